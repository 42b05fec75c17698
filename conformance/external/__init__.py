"""Backends in any language: a command that is spoken to over its stdin and stdout, see docs/protocol.md."""
