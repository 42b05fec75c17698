"""Programs to ask of models, drawn by Hypothesis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refspan.config import ModelConfig
from refspan.conformance.programs import Open, Operation, Program, Projected, Reset, Restore, Save, Size, Step
from refspan.conformance.protocol import Array
from refspan.conformance.small_models import models, moved

CHANGES = Open | Step | Reset | Restore
"""What changes how much is held."""

MOST_TOKENS = 40
"""Of one stream, unless more is asked for."""


@dataclass(frozen=True, repr=False)
class ModelCase:
    """A program, and how it was made."""

    program: Program
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"ModelCase({'; '.join(self.notes)})"

    def describe(self, last: int | None = None) -> list[str]:
        """The case in words and numbers, a line each; of the program nothing behind operation `last`."""
        lines = list(self.notes)
        for i, operation in enumerate(self.program):
            if last is not None and i > last:
                lines.append(f"and {len(self.program) - i} more")
                break
            if isinstance(operation, Open):
                lines.append(f"{operation.stream}: {operation.config}")
            lines.append(f"{i}: {operation}")
            if isinstance(operation, Open) and operation.memory is not None:
                ages = [(layer, b, row) for layer, (_, age) in enumerate(operation.memory) for b, row in enumerate(age)]
                lines += [f"   layer {layer}, row {b}: ages {row.tolist()}" for layer, b, row in ages if row.size]
        return lines

    def log_probs_of(self, i: int) -> str:
        """What step i gives, in words."""
        return f"log-probabilities of operation {i}, {self.program[i]}"

    def steps(self) -> list[int]:
        """Places of the steps in the program."""
        return [i for i, operation in enumerate(self.program) if isinstance(operation, Step)]


@st.composite
def cases(
    draw: st.DrawFn,
    /,
    dtype: np.dtype,
    *,
    streams: int = 1,
    rows: Sequence[int] = (2, 1, 3),
    memory: bool | None = None,
    far: bool = False,
    resets: bool = False,
    restores: bool = False,
    reopens: bool = False,
    sizes: bool = False,
    projected: bool = False,
    alike: bool = False,
    least_tokens: int = 1,
    most_tokens: int = MOST_TOKENS,
    long_block: int | None = None,
    **about_model: Any,
) -> ModelCase:
    """Streams that are opened and stepped in turn, in blocks of random length and single tokens.

    Args:
        draw: Hypothesis's.
        dtype: of the parameters.
        streams: how many are open at once, each of its own model.
        rows: what batch sizes are drawn from.
        memory: whether streams start with memories given; None means sometimes.
        far: whether these are as old as `_far_ages` says.
        resets: whether rows are emptied in between; in the end see `_reset_in_turn`.
        restores: whether states are kept, one before anything is read and two later, and returned to; in the end see
            `_back_to_older_states`.
        reopens: whether a stream may give way to a new one, of another model, under its name.
        sizes: whether what is held is asked after all that changes it, twice.
        projected: whether the number of projections is asked, after some steps and in the end.
        alike: whether models differ in their parameters alone; in the end `_opened_again`.
        least_tokens: that each stream reads.
        most_tokens: that it reads beyond these.
        long_block: tokens of one more kind of block; with `resets` one of these comes last, after a reset.
        about_model: see `models`.
    """
    program: list[Operation] = []
    drawn: list[tuple[ModelConfig, dict[str, Array]]] = []
    notes = []
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))

    def open_one(name: str) -> Open:
        if alike and drawn:
            some = draw(st.booleans())
            config, params = drawn[0][0], moved(rng, drawn[0][1], some=some)
            words = f"as the first, with {'some ' * some}other parameters"
        else:
            config, params, words = draw(models(dtype, **about_model))
            drawn.append((config, params))
        batch = draw(st.sampled_from(rows))
        with_memory = draw(st.booleans()) if memory is None else memory
        given = _given_memory(rng, config, batch, dtype, far=far) if with_memory else None
        notes.append(f"stream {name}: {words}{', starting with memories' if given else ''}")
        one = Open(name, config, params, batch, given)
        program.append(one)
        return one

    opened = {name: open_one(name) for name in "abc"[:streams]}
    if projected:  # by then initial memories are, in all rows, and in all states
        program += [_some_tokens(rng, name, one) for name, one in opened.items()]
    begun = {name: f"state_{name}0" for name in opened} if restores else {}
    """States of streams that have not read anything yet."""
    program += [Save(*one) for one in begun.items()]
    read = dict.fromkeys(opened, 0)
    kept: dict[str, set[str]] = {name: set() for name in opened}
    kinds = ["step", "step", "token", *["reset"] * resets, *["save", "restore"] * restores, *["open"] * reopens]
    turns = draw(st.integers(2, 9 * streams + 3 * (resets + restores + reopens)))
    while turns > 0 or min(read.values()) < least_tokens:
        turns -= 1
        name = draw(st.sampled_from(sorted(opened))) if turns > 0 else min(opened, key=read.__getitem__)
        one, kind = opened[name], draw(st.sampled_from(kinds))
        room = most_tokens + least_tokens - read[name]
        if kind == "open" and turns > 0:
            opened[name] = open_one(name)
            read[name] = 0
            kept[name].clear()  # states of another model
            if restores:
                program.append(Save(name, begun[name]))
        elif kind == "reset":
            program.append(Reset(name, draw(st.integers(0, one.batch - 1))))
        elif kind == "save":
            kept[name].add(state := draw(st.sampled_from(_states_of(name))))
            program.append(Save(name, state))
        elif kind == "restore" and kept[name]:
            program.append(Restore(name, draw(st.sampled_from(sorted(kept[name])))))
        elif room > 0:
            block = one.config.block_size
            lengths = (block, block - 1, 2 * block + 1, 7, *((long_block,) if long_block else ()))
            length = 1 if kind == "token" else min(room, draw(st.sampled_from(lengths)))
            tokens = rng.integers(0, one.config.vocab_size, (one.batch, max(1, length)))
            program.append(Step(name, tokens))
            read[name] += tokens.shape[1]
    if resets:
        program += _reset_in_turn(rng, opened)
    if restores:
        program += _back_to_older_states(rng, opened, resets=resets)
        for name, state in begun.items():
            program += [Restore(name, state), _some_tokens(rng, name, opened[name])]
    if alike:
        program += _opened_again(rng, next(iter(opened.values())), dtype)
    if long_block and resets:  # where the places of one row are empty
        for name, one in opened.items():
            tokens = rng.integers(0, one.config.vocab_size, (one.batch, long_block))
            program += [Reset(name, int(rng.integers(one.batch))), Step(name, tokens)]
    if sizes:
        program = _asking_twice_for_sizes(program)
    if projected:
        program = _asking_for_projections(rng, program, opened)
    return ModelCase(tuple(program), tuple(notes))


def _asking_twice_for_sizes(program: Sequence[Operation]) -> list[Operation]:
    """After all that changes them."""
    return [one for o in program for one in ((o, *[Size(o.stream)] * 2) if isinstance(o, CHANGES) else (o,))]


def _asking_for_projections(
    rng: np.random.Generator, program: Sequence[Operation], opened: Mapping[str, Open]
) -> list[Operation]:
    """After about half of the steps, and twice in the end; not before the first, which may project what was given."""
    ask = [isinstance(o, Step) and bool(rng.integers(2)) for o in program]
    asking = [one for o, now in zip(program, ask, strict=True) for one in (o, *[Projected(o.stream)] * now)]
    return asking + [Projected(name) for name in opened] * 2


def _states_of(name: str) -> tuple[str, str]:
    """Names of the states that are kept of a stream."""
    return f"state_{name}1", f"state_{name}2"


def _some_tokens(rng: np.random.Generator, name: str, one: Open) -> Step:
    """A block of a stream, no longer than those that its model is made for."""
    length = int(rng.integers(1, one.config.block_size + 1))
    return Step(name, rng.integers(0, one.config.vocab_size, (one.batch, length)))


def _reset_in_turn(rng: np.random.Generator, opened: Mapping[str, Open]) -> list[Operation]:
    """The last row of one stream is emptied, then that of another; each time all go on."""
    program: list[Operation] = []
    for name, one in opened.items():
        program += [Reset(name, one.batch - 1)]
        program += [_some_tokens(rng, *of_one) for of_one in opened.items()]
    return program


def _back_to_older_states(
    rng: np.random.Generator, opened: Mapping[str, Open], *, resets: bool = False
) -> list[Operation]:
    """Two states of each stream, a block read after each; and going on from the older, the newer, the older again.

    With `resets` a row is emptied before some states are kept, or returned to.
    """
    program: list[Operation] = []
    for keep, i in ((Save, 0), (Save, 1), (Restore, 0), (Restore, 1), (Restore, 0)):
        for name, one in opened.items():
            if resets and rng.integers(2):
                program.append(Reset(name, int(rng.integers(one.batch))))
            program += [keep(name, _states_of(name)[i]), _some_tokens(rng, name, one)]
    return program


def _opened_again(rng: np.random.Generator, one: Open, dtype: np.dtype) -> list[Operation]:
    """A model's streams that read the same tokens, from other memories each: none, some, and others."""
    starts = [None, *(_given_memory(rng, one.config, one.batch, dtype) for _ in range(2))]
    step = _some_tokens(rng, one.stream, one)
    return [o for start in starts for o in (replace(one, memory=start), step)]


def _given_memory(
    rng: np.random.Generator, config: ModelConfig, batch: int, dtype: np.dtype, *, far: bool = False
) -> list[tuple[Array, Array]]:
    """Hidden states at distinct ages, shuffled, with gaps: in each layer none, a few, or 20 and more."""
    given = []
    for i in range(config.layers):
        slots = 8 + i if far else (0, 4 + i, 4 + i, 20 + i)[int(rng.integers(4))]
        ages = _far_ages(config) if far else np.arange(1, 3 * slots + 1)
        hidden = rng.standard_normal((batch, slots, config.hidden_size)).astype(dtype)
        age = np.stack([rng.permutation(ages)[:slots] for _ in range(batch)])
        given.append((hidden, age))
    return given


def _far_ages(config: ModelConfig) -> Array:
    """Ages that narrow numbers confuse with others: where a span of L / 2 ends, and just after powers of two."""
    end = int(config.max_span) // 2
    # float32 cannot tell the steps of a ramp from each other that far away
    on_ramp = range(end - 2, end + min(int(config.ramp), 16) + 2) if end < 2**17 else ()
    wraps = (2**bits + j for bits in (7, 8, 10, 11, 15, 16, 31, 32, 34) for j in (1, 2, 4))
    return np.unique([*on_ramp, *wraps])
