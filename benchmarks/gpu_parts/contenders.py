"""Whoever computes the attention step, by name."""

from .device import runtime
from .ours import onnxruntime_contender, reference_contender
from .peers import torch_contender

FORWARD = [
    "torch_eager", "reference", "onnxruntime_fused", "onnxruntime_fused_gathered", "onnxruntime_portable",
    "torch_sdpa", "torch_sdpa_gathered", "torch_compile", "torch_flex", "torch_flex_blocks_reused",
]  # fmt: skip
BACKWARD = ["torch_eager", "reference", "onnxruntime_gradient", "torch_compile"]
COMPILED = ["torch_compile", "torch_flex", "torch_flex_blocks_reused"]
BYTES_PER_SCORE = {"torch_eager": 8, "torch_compile": 6, "onnxruntime_portable": 16, "onnxruntime_gradient": 28}
"""Rough need for each query, memory and head of a contender that keeps all scores; 0 for those that need not."""


def contender(name, case, data, settings):
    """As `torch_contender`, for any name; raises if it is not there, does not fit or there is no time for it."""
    settings.check_time()
    if name in settings.avoid:
        raise RuntimeError(f"not tried again after {settings.avoid[name]}")
    need = BYTES_PER_SCORE.get(name, 0) * (2 if case.backward else 1)
    need = case.batch * case.queries * case.memories * (need * case.heads + 20) + 3 * data["key"].nbytes
    free = runtime(settings.device)[1]()
    if need > free:
        raise MemoryError(f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
    if name in COMPILED and settings.left() < (5 if settings.small else 40):
        raise TimeoutError("no time left to compile")
    make = {"torch": torch_contender, "onnxruntime": onnxruntime_contender}.get(name.split("_")[0], reference_contender)
    return make(name, case, data, settings.device)
