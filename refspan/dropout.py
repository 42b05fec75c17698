"""Dropout whose every decision can be looked up again: no state, no stored masks.

A number is kept or not by a hash of the seed and of where it stands. So backward asks the same question instead of
remembering the answer, work can be cut into tiles of any size, and two runs with one seed are alike on any library.
Kept numbers are divided by 1 - rate.
"""

from dataclasses import dataclass
from typing import Any

from refspan.arrays import Array, check_number, check_whole, device_of


@dataclass(frozen=True)
class Dropout:
    """Drop each number with probability `rate`, as `seed` decides."""

    rate: float
    seed: int

    def __post_init__(self) -> None:
        rate = check_number("dropout rate", self.rate, "a number, at least 0 and below 1")
        if not 0 <= rate < 1:
            raise ValueError(f"dropout rate: got {self.rate}, expected at least 0 and below 1")
        seed = check_whole("dropout seed", self.seed, "a whole number >= 0")
        if seed < 0:
            raise ValueError(f"dropout seed: got {seed}, expected at least 0")
        object.__setattr__(self, "rate", rate)
        object.__setattr__(self, "seed", seed)

    def of(self, place: int) -> "Dropout":
        """Decisions for another place in the model, independent of those made here."""
        low, high = (_hash(self.seed, (place, half)) for half in (0, 1))
        return Dropout(self.rate, high << 32 | low)

    def scale(self, xp: Any, dtype: Any, *coordinates: Array) -> Array:
        """0 or 1 / (1 - rate) for each combination of the int64 `coordinates`, which broadcast."""
        bits = _hash(self.seed, coordinates)
        keep = bits >= int(self.rate * 2**32)
        return xp.astype(keep, dtype) / (1 - self.rate)

    def scale_like(self, xp: Any, x: Array) -> Array:
        """As `scale`, each number of `x` numbered by its place.   [..] -> [..]."""
        count = 1
        for size in x.shape:
            count *= size
        places = xp.arange(count, dtype=xp.int64, device=device_of(x))
        return xp.reshape(self.scale(xp, x.dtype, places), x.shape)


_WORD = 2**32 - 1


def _hash(seed: int, coordinates: tuple[Array, ...]) -> Any:
    """32 well-mixed bits of the seed, of 64 bits, and of the low words of the coordinates: numbers or int64 arrays.

    Each coordinate is mixed before it meets the state: else seeds that differ in one bit would make the same decisions
    in another order.
    """
    state: Any = _mix(_mix(seed & _WORD ^ 0x9E3779B9) ^ (seed >> 32 & _WORD))
    for coordinate in coordinates:
        state = _mix(_mix(coordinate & _WORD) ^ state)
    return state


def _mix(word: Array) -> Array:
    """A bijection of 32-bit words in which each bit of the result depends on all bits of the argument.

    Products of two 32-bit words would overflow int64, so the odd factor has 27 bits.
    """
    word = ((word >> 16) ^ word) * 0x45D9F3B & _WORD
    word = ((word >> 16) ^ word) * 0x45D9F3B & _WORD
    return (word >> 16) ^ word
