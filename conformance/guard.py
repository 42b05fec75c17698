"""One call of a backend, with everything checked that does not depend on numbers.

A backend is somebody else's program: it may raise, return anything, keep or change what it was given, or never come
back. `guarded_call` turns all of that but the last into `Misbehaviour`; `refspan.conformance.sessions` adds the clock.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import index
from threading import Barrier, Thread
from typing import Any

import numpy as np

from refspan.conformance.protocol import Array

Returned = tuple[str, Array, Array]
"""What returned an array, the array, and a copy."""
KEYWORDS = ("queries", "ramp", "position")
"""Arguments that the protocol passes by name. All others go by place: a backend may call them what it likes."""


def one_line(text: Any, most: int = 300) -> str:
    """Somebody else's words on one line of a terminal: no line breaks, no control characters, not too many."""
    try:
        words = str(text)
    except Exception:  # noqa: BLE001 - even that is theirs
        words = f"something of type {type(text).__name__}"
    return "".join(c if c.isprintable() else "?" for c in " ".join(words[: 10 * most].split()))[:most]


def shown(value: Any) -> str:
    """A value of somebody else's, as Python writes it, on one line."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a number of too many digits, say
        text = f"something of type {type(value).__name__}"
    return one_line(text)


def whole_number(value: Any) -> int | None:
    """`value` as a whole number from 0 to 2^63 - 1, if it is one."""
    try:
        number = None if isinstance(value, bool) else index(value)
    except Exception:  # noqa: BLE001 - whatever it is, it is no whole number
        return None
    return number if number is not None and 0 <= number < 1 << 63 else None


class Misbehaviour(Exception):
    """What a backend did wrong, in one line."""

    def __init__(self, text: object, *, row: int = 0, place: int | None = None) -> None:
        super().__init__(one_line(text, 2000))
        self.row = row
        """Of the batch, in which it is wrong, if that is known."""
        self.place = place
        """Of a program the operation, of several questions the one that shows it, if that is known."""


class Hung(Misbehaviour):
    """The backend did not answer in time, or died. It is started anew; asking the same again would cost as much."""


class NotOffered(Exception):
    """The backend lacks this operation, or does not take a case of it; a backend may raise it too."""


def not_foreseen(error: Exception) -> Misbehaviour:
    """What `error` says: it came up when an answer was looked at, so the answer is one that nobody thought of."""
    return Misbehaviour(f"the answer cannot be understood: {type(error).__name__}: {one_line(error)}")


class Shapes(dict[str, tuple[tuple[int, ...], str]]):
    """What a result must look like: name -> (shape, dtype). The name "" stands for a result that is one array."""


def guarded_call(
    backend: Any, operation: str, calls: Sequence[Mapping[str, Any]], shapes: Sequence[Shapes]
) -> list[Any]:
    """Call `operation` once for each of `calls`, and check what came back against `shapes`.

    Calls of one sequence get their arguments in the same memory as far as they fit, as a serving loop would: an answer
    that is cached by address or by shape is then the answer to another question.

    Raises:
        Misbehaviour: what the backend did wrong.
        NotOffered: the backend lacks the operation.
    """
    function = getattr(backend, operation, None)
    if function is None:
        raise NotOffered(operation)
    buffers: dict[tuple[str, tuple[int, ...], str], Array] = {}
    returned: list[Returned] = []
    results = []
    for arguments, expected in zip(calls, shapes, strict=True):
        handed = {name: _hand_over(name, value, buffers) for name, value in arguments.items()}
        try:
            positional = [value for name, value in handed.items() if name not in KEYWORDS]
            result = function(*positional, **{name: value for name, value in handed.items() if name in KEYWORDS})
        except (Misbehaviour, NotOffered):  # of a backend that is a session with another program
            raise
        except MemoryError:
            raise Misbehaviour(f"{operation} ran out of memory") from None
        except BaseException as error:
            if not_its_own(backend, error):
                raise
            text = one_line(error)
            hint = " (arguments are handed over read-only)" if "read-only" in text else ""
            raise Misbehaviour(f"{operation} raised {type(error).__name__}: {text}{hint}") from None
        results.append(_checked(operation, result, expected, handed, returned))
        for name, value in arguments.items():
            if isinstance(value, np.ndarray) and handed[name].tobytes() != value.tobytes():
                raise Misbehaviour(f"{operation} changed its argument {name!r}")
    check_kept(returned)
    return results


def not_its_own(backend: Any, error: BaseException) -> bool:
    """An end that was asked of this process (Ctrl-C), where the backend is only spoken to from here."""
    return not isinstance(error, Exception) and getattr(backend, "elsewhere", False) is True


def calls_at_once(
    backend: Any, operation: str, calls: Sequence[Mapping[str, Any]], shapes: Sequence[Shapes]
) -> list[Any]:
    """As `guarded_call`, each of `calls` on a thread of its own, all at once; raises what `at_once` does too."""
    pairs = zip(calls, shapes, strict=True)
    answers = at_once(backend, operation, [partial(guarded_call, backend, operation, [c], [s]) for c, s in pairs])
    return [answer for (answer,) in answers]


def at_once(backend: Any, operation: str, questions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Answers of the backend to questions, each asked on a thread of its own, all at once.

    Raises:
        NotOffered: the backend says that it is not made for this (`thread_safe = False`).
    """
    if not getattr(backend, "thread_safe", True):
        raise NotOffered(operation)
    start = Barrier(len(questions))
    answers: dict[int, Any] = {}
    errors: dict[int, BaseException] = {}

    def one(i: int) -> None:
        start.wait()
        try:
            answers[i] = questions[i]()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors[i] = error

    threads = [Thread(target=one, args=(i,), daemon=True) for i in range(len(questions))]  # who hangs is left behind
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return [answers[i] for i in range(len(questions))]


def _hand_over(name: str, value: Any, buffers: dict[tuple[str, tuple[int, ...], str], Array]) -> Any:
    """A read-only array in C order with the numbers of `value`, in the memory of an earlier argument if one fits."""
    if not isinstance(value, np.ndarray):
        return value
    buffer = buffers.setdefault((name, value.shape, str(value.dtype)), np.empty(value.shape, value.dtype))
    buffer.flags.writeable = True
    buffer[...] = value
    buffer.flags.writeable = False
    return buffer


def _checked(operation: str, result: Any, expected: Shapes, handed: Mapping[str, Any], returned: list[Returned]) -> Any:
    """The result in memory of its own, if it is of the right type, shape and dtype."""
    if "" in expected:
        return check_array(f"{operation} returned", result, *expected[""], handed, returned)
    if not isinstance(result, Mapping):
        raise Misbehaviour(f"{operation} returned {type(result).__name__}, expected a dict of {', '.join(expected)}")
    missing = [name for name in expected if result.get(name) is None]
    extra = [one_line(name) for name in result if name not in expected and result[name] is not None]
    if missing or extra:
        wrong = "misses " + ", ".join(missing) if missing else "has an unexpected " + ", ".join(extra)
        raise Misbehaviour(f"{operation} returned a dict that {wrong}")
    return {
        name: check_array(f"{operation} returned for {name!r}", result[name], *like, handed, returned)
        for name, like in expected.items()
    }


def check_array(
    where: str,
    array: Any,
    shape: tuple[int, ...],
    dtype: str,
    handed: Mapping[str, Any],
    returned: list[Returned],
) -> Array:
    """A copy of `array`, if it is a NumPy array of this shape and dtype that shares no memory with what was handed.

    Both go into `returned`, for `check_kept`.
    """
    if isinstance(array, np.generic):  # what NumPy makes of an array without axes
        array = np.asarray(array)
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise Misbehaviour(f"{where} {type(array).__name__}, expected a NumPy array")
    plain = np.ndarray.view(array, np.ndarray)  # a subclass may say anything of itself
    if plain.shape != shape:
        raise Misbehaviour(f"{where} shape {plain.shape}, expected {shape}")
    if plain.dtype != np.dtype(dtype):
        raise Misbehaviour(f"{where} dtype {plain.dtype}, expected {dtype}")
    for name, argument in handed.items():
        if isinstance(argument, np.ndarray) and np.may_share_memory(plain, argument):
            raise Misbehaviour(f"{where} memory of its argument {name!r}")
    copy = np.array(plain)
    returned.append((where, plain, copy))
    return copy


def check_kept(returned: Sequence[Returned]) -> None:
    """Raise Misbehaviour if an array that was returned is not as it was: a later answer was written there."""
    for where, array, copy in returned:
        if not np.array_equal(array, copy, equal_nan=True):
            raise Misbehaviour(f"what {where} was changed by a later call")
