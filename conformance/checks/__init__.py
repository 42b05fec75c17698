"""The checks, a module per level, and two of what concerns three. Importing this package registers them all."""

from refspan.conformance.checks import (
    attention,
    crowds,
    golden,
    gradient,
    limits,
    mask,
    memory,
    model,
    repetition,
    training,
)

__all__ = ["attention", "crowds", "golden", "gradient", "limits", "mask", "memory", "model", "repetition", "training"]
