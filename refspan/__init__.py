"""refspan: Expire-Span (Sukhbaatar et al., ICML 2021, arXiv 2105.06548) as an executable specification.

    soft_mask                 how much of each memory each query still sees   (clauses PAST, MASK, WIDTH)
    span_attention            attention under that mask                       (LOGIT, WEIGHT, EMPTY, OUTPUT)
    span_attention_backward   its hand-written vector-Jacobian product        (GRAD)
    ModelConfig               the shape of a whole model                      (SPAN, LAYER, MODEL)
    loss_and_gradients        one training step's losses and gradients        (LOSS, SHORTEN, AGE, DROP, START)
    Adam                      the optimiser of the paper: warm-up, clipped gradients
    open_model                streams of tokens through a trained model       (CACHE, AGE, DROP, BOUND)

All of it runs on NumPy, CuPy and any other array library that follows the array API standard.
`refspan.export` holds the same computation as ONNX graphs, `refspan.conformance` checks any backend against it.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from refspan.adam import Adam
from refspan.attention import AttentionGradients, SavedAttention, span_attention, span_attention_backward
from refspan.checkpoint import load_model, load_state, save_model, save_state
from refspan.clauses import CLAUSES
from refspan.config import ModelConfig, initial_parameters, parameter_shapes
from refspan.dropout import Dropout
from refspan.mask import soft_mask, soft_mask_backward
from refspan.memory import Memory
from refspan.model import Losses, loss_and_gradients
from refspan.shorten import draw_span_limit
from refspan.stream import MemoryLimitError, Stream, open_model
from refspan.tiles import KEEP_BYTES, SCRATCH_BYTES

__all__ = [
    "CLAUSES",
    "KEEP_BYTES",
    "SCRATCH_BYTES",
    "Adam",
    "AttentionGradients",
    "Dropout",
    "Losses",
    "Memory",
    "MemoryLimitError",
    "ModelConfig",
    "SavedAttention",
    "Stream",
    "__version__",
    "draw_span_limit",
    "initial_parameters",
    "load_model",
    "load_state",
    "loss_and_gradients",
    "open_model",
    "parameter_shapes",
    "save_model",
    "save_state",
    "soft_mask",
    "soft_mask_backward",
    "span_attention",
    "span_attention_backward",
]

try:
    __version__ = version("refspan")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"

# An installed package holds export/ and conformance/ inside this folder; a checkout holds them beside it. Python
# started in the root of a checkout finds this folder before the installed one, so let it find the other two as well.
_here = Path(__file__).resolve().parent
if not (_here / "export").is_dir() and (_here.parent / "export" / "__init__.py").is_file():
    __path__.append(str(_here.parent))
