"""What a stream remembers, as arrays by name: the form in which streams are saved, whatever runs them.

    layers.{i}.age     [B, N] int64, as seen from the next query; `NEVER` where a slot is empty
    layers.{i}.key     [B, N, H D]
    layers.{i}.value   [B, N, H D]
    layers.{i}.span    [B, N]
    model              uint8 [32], the fingerprint of the parameters

Numbers are those of the parameters, or float32 where these are narrower.
"""

from collections.abc import Mapping
from typing import Any

from refspan.arrays import Array, check_shape, namespace_of
from refspan.config import ModelConfig
from refspan.fingerprint import FINGERPRINT_BYTES
from refspan.memory import Memory, check_ages


def check_state(
    xp: Any, state: Mapping[str, Array], config: ModelConfig, batch: int, empty: Memory, model: Array
) -> list[Memory]:
    """The memory of each layer, copied from a state that fits this model.

    Args:
        xp: array namespace.
        state: arrays by name.
        config: the model.
        batch: B.
        empty: a memory of no slots, for the names, dtypes and sizes of its contents.
        model: the fingerprint that is expected, uint8 [32].

    Raises:
        TypeError, ValueError: the first thing that does not fit; the message names it.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: got {type(state).__name__}, expected arrays by name, as `state` returns")
    wanted = {"age": empty.age, **empty.contents}
    known = {"model", *(f"layers.{i}.{name}" for i in range(config.layers) for name in wanted)}
    unknown = [name for name in state if name not in known]
    if unknown:
        raise ValueError(f"state {unknown[0]}: not known to this model")
    memory = []
    for i in range(config.layers):
        slots: int | str = "N"
        for name, like in wanted.items():
            _check_array(state, f"layers.{i}.{name}", like, (batch, slots, *like.shape[2:]))
            slots = int(state[f"layers.{i}.{name}"].shape[1])
        contents = {name: state[f"layers.{i}.{name}"] for name in empty.contents}
        for name, array in contents.items():
            if not bool(xp.all(xp.isfinite(array))):
                raise ValueError(f"state layers.{i}.{name}: holds NaN or infinite numbers")
        check_ages(xp, f"state layers.{i}.age", state[f"layers.{i}.age"], (batch, slots))
        ordered = xp.sort(state[f"layers.{i}.age"], axis=1)
        repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)
        if bool(xp.any(repeated)):
            twice = int(xp.max(xp.where(repeated, ordered[:, 1:], 0)))
            raise ValueError(f"state layers.{i}.age: got {twice} twice in a row of the batch, expected each age once")
        span, longest = contents["span"], config.max_span
        wrong = (span < 0) | (span > longest)
        if bool(xp.any(wrong)):
            got = float(xp.max(xp.where(wrong, span, -xp.inf)))
            raise ValueError(f"state layers.{i}.span: got {got:g}, expected 0 to {longest:g}")
        age, *copies = [xp.asarray(x, copy=True) for x in (state[f"layers.{i}.age"], *contents.values())]
        memory.append(Memory(age, dict(zip(contents, copies, strict=True))))
    _check_array(state, "model", model, (FINGERPRINT_BYTES,))
    if not bool(xp.all(state["model"] == model)):
        raise ValueError("state model: the fingerprint of other parameters, expected that of this model's")
    return memory


def _check_array(state: Mapping[str, Array], name: str, like: Array, shape: tuple[int | str, ...]) -> None:
    """Raise unless `state` has an array of this name, of this shape and of the dtype and library of `like`."""
    if name not in state:
        raise ValueError(f"state {name}: missing")
    namespace_of(parameters=like, **{f"state {name}": state[name]})
    check_shape(f"state {name}", state[name], shape)
    if state[name].dtype != like.dtype:
        raise TypeError(f"state {name}: got {state[name].dtype}, expected {like.dtype}")
