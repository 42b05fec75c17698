"""One frozen program: what is asked of a whole model, call after call, and what is right."""

from collections.abc import Mapping
from dataclasses import dataclass
from json import dumps
from typing import Any

import numpy as np

from refspan.conformance.model_answers import Answers
from refspan.conformance.model_cases import ModelCase
from refspan.conformance.programs import Initialise, Learn, Open, Operation, Program, Projected, Size, Step
from refspan.conformance.protocol import Array
from refspan.conformance.tolerance import Expected
from refspan.conformance.training_cases import TrainingCase, expected_training
from refspan.conformance.vectors.program_json import to_json
from refspan.conformance.vectors.vector import Frozen

NEEDS = {"stream": "open_model", "training": "loss_and_gradients"}
"""Operation of a vector -> what a backend must offer."""
LEVELS = ("memory", "model", "training")
"""Of the checks that ask programs."""


@dataclass(frozen=True, repr=False, kw_only=True)
class ProgramVector(Frozen):
    """A program ("stream" or "training"): results go by the names of `program_json.shapes_of_answers`.

    Of `memory_size` the most that may be held is expected. Bounds are to be broadcast to the shapes of results.
    """

    program: tuple[Operation, ...]

    def question(self) -> tuple[str, Mapping[str, Array]]:
        """The calls as JSON; their tensors."""
        said, tensors = to_json(self.program)
        return dumps(said, sort_keys=True), tensors

    @property
    def dtype(self) -> str:
        """Of the parameters."""
        first = self.program[0]
        assert isinstance(first, Open | Learn)  # noqa: S101
        return str(first.params["embedding.weight"].dtype)

    def describe(self) -> list[str]:
        """The program in words and numbers, a line each."""
        return ModelCase(self.program, self.notes).describe()


def program_vector_of(
    program: Any,
    *,
    check: str,
    clauses: tuple[str, ...],
    purpose: str,
    notes: tuple[str, ...] = (),
    kills: tuple[str, ...] = (),
) -> ProgramVector | None:
    """A program, frozen with what is right; None if it is none, or asks what is the backend's own affair."""
    if not isinstance(program, tuple) or not program or not isinstance(program[0], Open | Learn):
        return None
    if any(isinstance(operation, Projected | Initialise) for operation in program):
        return None
    training = isinstance(program[0], Learn)
    right = dict(_taught(program) if training else _streamed(program))
    return ProgramVector(
        operation="training" if training else "stream",
        program=program,
        expected={name: np.array(one.value, np.float64) for name, one in right.items()},
        bound={name: np.array(one.bound, np.float64) for name, one in right.items()},
        check=check,
        clauses=clauses,
        purpose=purpose,
        notes=notes,
        kills=kills,
    )


def _streamed(program: Program) -> dict[str, Expected]:
    right: dict[str, Expected] = {}
    answers = Answers(program)
    for i, operation in enumerate(program):
        if isinstance(operation, Step):
            right[f"{i}.log_probs"] = answers.of_step(i)
        elif isinstance(operation, Size):
            least, most = np.array(answers.held(i), np.float64).T
            right[f"{i}.memory_size"] = Expected(most, most - least)
    return right


def _taught(program: tuple[Learn, ...]) -> dict[str, Expected]:
    right: dict[str, Expected] = {}
    for i, taught in enumerate(expected_training(TrainingCase(program))):
        right |= {f"{i}.task": taught.task, f"{i}.span": taught.span}
        right |= {f"{i}.grads.{name}": expected for name, expected in taught.gradients.items()}
    return right
