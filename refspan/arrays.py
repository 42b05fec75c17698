"""What the specification asks of its arguments, and the one place that knows about array libraries.

Every public function accepts arrays of NumPy, CuPy or any library that follows the array API standard, all of one
library and on one device, and returns arrays of that kind.
"""

from operator import index
from typing import Any, TypeAlias

from array_api_compat import array_namespace, device, is_cupy_namespace, is_numpy_namespace

Array: TypeAlias = Any
"""An array of any library that follows the array API standard."""

SHORTEST_RAMP = 1e-30
"""Below it, span / ramp would overflow in float32. A ramp of 1e-30 steps is no ramp already."""
LONGEST = 1e30
"""Steps of a ramp or span: float32 holds them, and what they are added to and multiplied by."""


def namespace_of(**arrays: Array) -> Any:
    """The array namespace that all the named `arrays` share.

    Raises:
        TypeError: one of them is no array, or they come from different libraries.
    """
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        try:
            found[name] = array_namespace(array)
        except TypeError:
            raise TypeError(f"{name}: got {type(array).__name__}, expected an array (NumPy, CuPy, ..)") from None
    (first, xp), *others = found.items()
    for name, other in others:
        if other is not xp:
            raise TypeError(f"{name}: got an array of {other.__name__}, expected one of {xp.__name__} like {first}")
    return xp


def device_of(array: Array) -> Any:
    """The device that `array` lives on, for creating others beside it."""
    return device(array)


def exp_in_place(xp: Any, x: Array) -> Array:
    """exp(x), written over x where the library can (the standard has no `out`): x may be most of the scratch."""
    return xp.exp(x, out=x) if is_numpy_namespace(xp) or is_cupy_namespace(xp) else xp.exp(x)


def check_shape(name: str, array: Array, expected: tuple[int | str, ...]) -> None:
    """Raise ValueError unless `array` has the `expected` shape; a string names a size that may be anything."""
    shape = tuple(array.shape)
    if len(shape) != len(expected) or any(
        isinstance(want, int) and have != want for have, want in zip(shape, expected, strict=True)
    ):
        wanted = ", ".join(str(size) for size in expected) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{name}: got shape {shape}, expected ({wanted})")


def check_dtype(xp: Any, name: str, array: Array, expected: tuple[str, ...]) -> None:
    """Raise TypeError unless the dtype of `array` is one of the `expected` names."""
    if not any(hasattr(xp, dtype) and array.dtype == getattr(xp, dtype) for dtype in expected):
        *most, last = expected
        wanted = f"{', '.join(most)} or {last}" if most else last
        raise TypeError(f"{name}: got {array.dtype}, expected {wanted}")


def check_whole(name: str, number: int, expected: str = "a whole number") -> int:
    """`number` as an int; raises TypeError, which says what was `expected`, unless it is a whole number."""
    try:
        return index(number)
    except TypeError:
        raise TypeError(f"{name}: got {number!r}, expected {expected}") from None


def check_count(name: str, count: int) -> int:
    """`count` as an int; raises TypeError or ValueError unless it is a whole number >= 1."""
    value = check_whole(name, count, "a whole number >= 1")
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
    return value


def check_number(name: str, number: float, expected: str = "a number") -> float:
    """`number` as a float; raises TypeError, which says what was `expected`, unless it is a number."""
    try:
        if not isinstance(number, str | bytes | bool):
            return float(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise TypeError(f"{name}: got {number!r}, expected {expected}") from None


def check_ramp(ramp: float) -> float:
    """The ramp length R as a float; raises TypeError or ValueError unless it is one, > 0, that float32 holds."""
    value = check_number("ramp", ramp, "a number of steps > 0")
    if not SHORTEST_RAMP <= value <= LONGEST:
        raise ValueError(f"ramp: got {value:g}, expected a number of steps > 0 ({SHORTEST_RAMP:g} to {LONGEST:g})")
    return value


def check_spans(xp: Any, span: Array, age: Array) -> None:
    """Check `span` [B, N] and `age` [B, N]: clause WIDTH, equal shapes, finite spans."""
    check_shape("span", span, ("B", "N"))
    check_dtype(xp, "span", span, ("float32", "float64"))
    check_shape("age", age, tuple(span.shape))
    check_dtype(xp, "age", age, ("int64",))
    if not bool(xp.all(xp.isfinite(span))):
        bad = int(xp.sum(xp.astype(~xp.isfinite(span), xp.int64)))
        raise ValueError(f"span: got {bad} NaN or infinite values, expected finite numbers of steps")


FLOATS = ("float16", "float32", "float64")


def check_attention(
    xp: Any, query: Array, key: Array, value: Array, span: Array, age: Array, position: Array | None
) -> None:
    """Check shapes and dtypes of the arguments of one attention step; the first that is wrong is named."""
    check_shape("query", query, ("B", "H", "M", "D"))
    batch, heads, queries, head_size = query.shape
    if queries < 1 or head_size < 1:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected M >= 1 queries of head size D >= 1")
    check_dtype(xp, "query", query, FLOATS)
    dtype = (str(query.dtype).rsplit(".", maxsplit=1)[-1],)
    check_shape("key", key, (batch, heads, "N", head_size))
    check_dtype(xp, "key", key, dtype)
    check_shape("value", value, tuple(key.shape))
    check_dtype(xp, "value", value, dtype)
    check_shape("span", span, (batch, key.shape[2]))
    check_spans(xp, span, age)
    if position is not None:
        check_shape("position", position, ("P", head_size))
        check_dtype(xp, "position", position, dtype)
