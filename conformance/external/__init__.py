"""Backends in processes of their own: Python ones, and commands in any language, see docs/protocol.md."""
