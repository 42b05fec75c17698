"""The checks, a module per level, and three of what concerns several. Importing this package registers them all."""

from refspan.conformance.checks import (
    attention,
    golden,
    gradient,
    limits,
    mask,
    memory,
    model,
    repetition,
    tiled,
    training,
)

__all__ = ["attention", "golden", "gradient", "limits", "mask", "memory", "model", "repetition", "tiled", "training"]
