"""What a right model answers a program."""

from dataclasses import dataclass, replace

import numpy as np

from refspan.conformance.model_bounds import History, ModelBounds, model_bounds
from refspan.conformance.programs import Open, Program, Reset, Restore, Save, Step
from refspan.conformance.tolerance import Expected


@dataclass(frozen=True)
class _Row:
    """Where one row of a stream stands: what it has read since it was empty."""

    tokens: tuple[int, ...]
    given: bool
    """Whether the stream's initial memory is part of its history."""


class Answers:
    """What a right model answers a program."""

    def __init__(self, program: Program) -> None:
        self._opened: dict[int, Open] = {}
        """By its place in the program, which tells streams of one name apart."""
        self._of: list[int] = []
        """For each operation the place at which its stream was opened."""
        self._rows: list[dict[int, _Row]] = []
        """For each operation the rows of its stream after it."""
        self._bounds: dict[tuple[int, int, bool], list[tuple[tuple[int, ...], ModelBounds]]] = {}
        now: dict[str, tuple[int, dict[int, _Row]]] = {}
        kept: dict[str, dict[int, _Row]] = {}
        for i, operation in enumerate(program):
            name = operation.stream
            place, rows = now.get(name, (i, {}))
            if isinstance(operation, Open):
                self._opened[i] = operation
                place, rows = i, {b: _Row((), operation.memory is not None) for b in range(operation.batch)}
            elif isinstance(operation, Step):
                read = operation.tokens.tolist()
                rows = {b: replace(r, tokens=(*r.tokens, *read[b])) for b, r in rows.items()}
            elif isinstance(operation, Reset):
                rows = {**rows, operation.row: _Row((), given=False)}
            elif isinstance(operation, Save):
                kept[operation.name] = rows
            elif isinstance(operation, Restore):
                rows = kept[operation.name]
            now[name] = place, rows
            self._of.append(place)
            self._rows.append(rows)
        self._program = program
        self._longest = max((o.tokens.shape[1] for o in program if isinstance(o, Step)), default=1)

    def of_step(self, i: int) -> Expected:
        """Log-probabilities [B, M, V] of operation i, a step."""
        operation = self._program[i]
        assert isinstance(operation, Step)  # noqa: S101
        length = operation.tokens.shape[1]
        values, bounds = [], []
        for b in range(len(operation.tokens)):
            row = self._rows[i][b]
            expected = self._of_row(self._of[i], b, row).expected
            end = len(row.tokens)
            values.append(expected.value[end - length : end])
            bounds.append(expected.bound[end - length : end])
        return Expected(np.stack(values), np.stack(bounds))

    def held(self, i: int) -> list[tuple[int, int]]:
        """Fewest and most memories that each layer may hold at operation i for its fullest row, granularity 1 (BOUND).

        Rounding decides about those at the very end of their ramps. Fewer would forget what is alive.
        """
        place = self._of[i]
        rows = [(self._of_row(place, b, row), len(row.tokens)) for b, row in self._rows[i].items()]
        layers = range(self._opened[place].config.layers)
        live = [[bounds.live(layer, read) for bounds, read in rows] for layer in layers]
        return [(max(least for least, _ in of_layer), max(most for _, most in of_layer)) for of_layer in live]

    def _of_row(self, place: int, b: int, row: _Row) -> ModelBounds:
        """Bounds of a history of which this row's is the beginning: the longest that the program has."""
        key = (place, b, row.given)
        if key not in self._bounds:
            all_rows = [rows[b] for rows, of in zip(self._rows, self._of, strict=True) if of == place]
            histories = {one.tokens for one in all_rows if one.given == row.given}
            longest = [h for h in histories if not any(o != h and o[: len(h)] == h for o in histories)]
            self._bounds[key] = [(h, self._run(place, b, _Row(h, row.given))) for h in longest]
        return next(bounds for h, bounds in self._bounds[key] if h[: len(row.tokens)] == row.tokens)

    def _run(self, place: int, b: int, row: _Row) -> ModelBounds:
        opened = self._opened[place]
        tokens = np.array(row.tokens, np.int64)
        if not row.given or opened.memory is None:
            return model_bounds(opened.config, opened.params, History(tokens, block=self._longest))
        hidden, age = [h[b] for h, _ in opened.memory], [a[b] for _, a in opened.memory]
        return model_bounds(opened.config, opened.params, History(tokens, hidden, age, self._longest))
