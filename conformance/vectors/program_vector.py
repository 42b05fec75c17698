"""One frozen program: what is asked of a whole model, call after call, and what is right."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from json import dumps
from typing import Any

import numpy as np

from refspan.conformance.model_cases import Answers, ModelCase
from refspan.conformance.programs import Initialise, Learn, Open, Operation, Program, Projected, Size, Step
from refspan.conformance.protocol import Array
from refspan.conformance.tolerance import Expected
from refspan.conformance.training_cases import TrainingCase, expected_training
from refspan.conformance.vectors.program_json import to_json

NEEDS = {"stream": "open_model", "training": "loss_and_gradients"}
"""Operation of a vector -> what a backend must offer."""
LEVELS = ("memory", "model", "training")
"""Of the checks that ask programs."""


@dataclass(frozen=True, repr=False)
class ProgramVector:
    """What is asked, and what is right."""

    operation: str
    """"stream" or "training"."""
    program: tuple[Operation, ...]
    expected: Mapping[str, Array]
    """float64, by the names of `program_json.shapes_of_answers`; of `memory_size` the most that may be held."""
    bound: Mapping[str, Array]
    """float64, how far a result may be from it, to be broadcast to its shape; inf decides nothing."""
    check: str
    """Where it comes from."""
    clauses: tuple[str, ...]
    purpose: str
    """What it is for."""
    notes: tuple[str, ...] = ()
    """How it was made, in words."""
    kills: tuple[str, ...] = ()
    """Mutants (`python -m refspan.conformance.mutants`) that it rejects."""

    def __repr__(self) -> str:
        return f"ProgramVector({self.id})"

    @property
    def id(self) -> str:
        """From what is asked, and nothing else: it stays while the program stays."""
        said, tensors = to_json(self.program)
        digest = blake2b(dumps(said, sort_keys=True).encode(), digest_size=8)
        for name, array in sorted(tensors.items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return f"{self.operation}-{digest.hexdigest()}"

    @property
    def dtype(self) -> str:
        """Of the parameters."""
        first = self.program[0]
        assert isinstance(first, Open | Learn)  # noqa: S101
        return str(first.params["embedding.weight"].dtype)

    def describe(self) -> list[str]:
        """The program in words and numbers, a line each."""
        return ModelCase(self.program, self.notes).describe()

    def expectations(self) -> dict[str, Expected]:
        """By name of the result."""
        return {name: Expected(value, self.bound[name]) for name, value in self.expected.items()}


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
        "training" if training else "stream",
        program,
        {name: np.array(one.value, np.float64) for name, one in right.items()},
        {name: np.array(one.bound, np.float64) for name, one in right.items()},
        check,
        clauses,
        purpose,
        notes,
        kills,
    )


def _streamed(program: Program) -> dict[str, Expected]:
    right: dict[str, Expected] = {}
    answers = Answers(program)
    for i, operation in enumerate(program):
        if isinstance(operation, Step):
            right[f"{i}.log_probs"] = answers.of_step(i)
        elif isinstance(operation, Size):
            most = np.array(answers.most_held(i), np.float64)
            right[f"{i}.memory_size"] = Expected(most, np.zeros_like(most))
    return right


def _taught(program: tuple[Learn, ...]) -> dict[str, Expected]:
    right: dict[str, Expected] = {}
    for i, taught in enumerate(expected_training(TrainingCase(program))):
        right |= {f"{i}.task": taught.task, f"{i}.span": taught.span}
        right |= {f"{i}.grads.{name}": expected for name, expected in taught.gradients.items()}
    return right
