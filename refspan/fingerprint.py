"""Telling models apart by their numbers, so that a stream's state is not given to another model of the same shape."""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from array_api_compat import is_cupy_array, is_numpy_array

from refspan.arrays import Array
from refspan.config import ModelConfig

if TYPE_CHECKING:
    import numpy as np

FINGERPRINT_BYTES = 32


def fingerprint(config: ModelConfig, params: Mapping[str, Array]) -> bytes:
    """SHA-256 of a config and of its parameters: their names, dtypes, shapes and numbers."""
    settings = {name: float(v) if isinstance(v, int) else v for name, v in config.to_dict().items()}  # 8 is 8.0
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name in sorted(params):
        array = to_numpy(params[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.digest()


def to_numpy(array: Array) -> "np.ndarray[Any, Any]":
    """A NumPy array of the same numbers, in rows one after the other, whatever library and device they come from."""
    import numpy as np

    if is_cupy_array(array):
        array = array.get()
    elif not is_numpy_array(array):
        array = np.from_dlpack(array, device="cpu")
    return np.asarray(array, order="C")
