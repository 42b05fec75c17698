"""The built-in backends: our own implementations, seen through the protocol that strangers use."""
