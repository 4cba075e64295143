"""Every exception of the package. Each survives pickling, so that one raised on a rank arrives whole at the user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self


def listed(names: Iterable[str], most: int = 5, *, separator: str = ", ") -> str:
    """The first of several names, for messages.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    every = list(names)
    return separator.join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


class HybridflowError(Exception):
    """Base of all errors of the package; its message says what was asked, what was found, and what to do."""

    advice: str = ""
    """How to go on with the run: the end of the message, where the error knows it. For others the outer boundary says that."""

    since_step: int | None = None
    """Since this step what was trained and saved is of no use, where the error knows it."""

    @classmethod
    def advising(cls, problem: str, advice: str) -> Self:
        """An error whose message ends in advice."""
        error = cls(f"{problem} {advice}")
        error.advice = advice
        return error


@dataclass(frozen=True)
class FieldReport:
    """What there is to say of a key of the configuration."""

    key: str
    """The dotted key, for example `rollout.temperature`."""
    problem: str
    """What was found and what is allowed, as a sentence."""
    where: str = ""
    """`file:line`, `command line`, or empty where the key was not given."""
    related: tuple[str, ...] = ()
    """Other keys whose values the problem depends on. Where one of them has an error of its own, this is not told."""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.key}: {self.problem}"


@dataclass(frozen=True)
class FieldError(FieldReport):
    """One error in a configuration."""

    is_local: bool = False
    """This machine lacks something that the one that is to run may have: a file, a package, a GPU. A warning in a dry run."""


@dataclass(frozen=True)
class FieldWarning(FieldReport):
    """What a user should know, and what stops nothing."""


class ConfigError(HybridflowError):
    """The configuration has errors; `errors` holds all of them, not only the first."""

    def __init__(self, errors: Sequence[FieldError]):
        self.errors = tuple(errors)
        super().__init__(self.errors)

    def __str__(self) -> str:
        count = len(self.errors)
        heading = "1 error in the configuration" if count == 1 else f"{count} errors in the configuration"
        return "\n".join([f"{heading}:", *(f"  {error}" for error in self.errors)])


class FolderInUseError(HybridflowError):
    """Another run has the folder of this one."""


class RunFolderError(HybridflowError):
    """The folder of a run has gone, is another one now, or cannot be written."""


class DataError(HybridflowError):
    """A data file is missing, malformed, or empty after filtering."""


class ModelError(HybridflowError):
    """A model folder cannot be loaded, or a model lacks something that a role needs."""


class UserFileError(HybridflowError):
    """A Python file of the user's cannot be imported."""


class ReturnError(HybridflowError):
    """A method of a role or an algorithm has returned what its callers cannot use."""


class DivergenceError(HybridflowError):
    """Training has left the finite numbers: weights are not finite, or update after update is skipped."""


class RewardError(HybridflowError):
    """A reward function cannot be loaded or called."""


class EpisodeError(HybridflowError):
    """An environment cannot be loaded, or none of its episodes comes to an end."""


class BatchError(HybridflowError):
    """A column is missing or does not fit the rows of a batch."""


class CheckpointError(HybridflowError):
    """A checkpoint cannot be written, found or read."""

    errno: int | None = None
    """What the operating system refused, by its number; None where it was not that, or it is not known."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint holds what no run would have written."""


class PlacementError(HybridflowError):
    """The cluster cannot hold the pools that the configuration asks for."""


class EngineError(HybridflowError):
    """A generation engine cannot start, lost a request, or refused weights."""


class RequestRefusedError(EngineError):
    """A generation engine refused one request, for example since it does not fit the context; others go on."""


class WeightMismatchError(HybridflowError):
    """After a weight sync the engine's tensors differ from the trainer's."""


class WorkerError(HybridflowError):
    """A method failed on a rank. `role`, `rank` and `node` say where; the message holds that rank's traceback."""

    def __init__(self, *, role: str, rank: int, node: str, method: str, cause: str):
        self.role, self.rank, self.node, self.method, self.cause = role, rank, node, method, cause
        super().__init__(f"{self.place}:\n{cause}")

    @property
    def place(self) -> str:
        """Which call failed where."""
        return f"{self.role}.{self.method} failed on rank {self.rank} (node {self.node})"

    def __reduce__(self) -> tuple[object, ...]:
        return _worker_error, (type(self), (self.role, self.rank, self.node, self.method), self.cause, self.since_step)


class WorkerDiedError(WorkerError):
    """The process of a rank ended without an answer: killed, out of memory, or its node was lost."""


class CallTimeoutError(HybridflowError):
    """A call on a group did not end within `run.timeout_s`; the message names the ranks that have not answered."""


def _worker_error(kind: type[WorkerError], where: tuple[str, int, str, str], cause: str, since_step: int | None) -> WorkerError:
    role, rank, node, method = where
    error = kind(role=role, rank=rank, node=node, method=method, cause=cause)
    error.since_step = since_step
    return error
