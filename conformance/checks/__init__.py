"""The checks, a module per level. Importing this package registers them all."""

from refspan.conformance.checks import attention, golden, gradient, mask, memory, model, training

__all__ = ["attention", "golden", "gradient", "mask", "memory", "model", "training"]
