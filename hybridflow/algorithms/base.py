"""What an algorithm is: two methods over groups of workers. The loop calls them and knows no algorithm by name."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np

from hybridflow import ops
from hybridflow.algorithms.annotations import is_worker
from hybridflow.batch import Batch
from hybridflow.config.ranges import COUNT, NOT_NEGATIVE, POSITIVE
from hybridflow.errors import FieldError
from hybridflow.metrics import Metrics

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.ops.correction import ImportanceCorrection
    from hybridflow.rollout.base import Sampling
    from hybridflow.workers.base import Worker


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The `Config` of an algorithm without options."""


@dataclass(frozen=True, kw_only=True)
class ImportanceOptions:
    """To inherit from: weights between the engine's probabilities, which tokens were drawn with, and the trainer's."""

    importance_cap: Annotated[float, POSITIVE] | Literal["auto"] | None = "auto"
    """Weigh tokens by trainer's over engine's probability, at most this (truncated importance sampling, TIS); null for no
    weights, or with a mask for no bound. auto is 2 where loop.max_staleness lets older weights sample, else null."""
    importance_level: Literal["token", "sequence"] = "token"
    """Whether each token has its own weight or a response has one."""
    importance_mask: tuple[float, float] | None = None
    """Tokens (or responses) whose weight is outside count nothing (masked importance sampling); null for none."""

    def __post_init__(self) -> None:
        if self.importance_mask is not None and self.importance_mask[0] >= self.importance_mask[1]:
            low, high = self.importance_mask
            raise ValueError(
                f"importance_mask: found [{low:g}, {high:g}], outside of which is everything; the smaller one comes first"
            )

    def cap(self, run: RunConfig) -> float | None:
        """`importance_cap` with auto resolved."""
        resolved = DEFAULT_CAP if run.loop.max_staleness else None
        return resolved if self.importance_cap == "auto" else self.importance_cap

    def importance_correction(self, run: RunConfig) -> ImportanceCorrection | None:
        """For a loss; None where neither a bound nor a mask is set."""
        return ops.importance_correction(self.cap(run), self.importance_level, self.importance_mask)


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(ImportanceOptions):
    """To inherit from: how a step's rows become updates of a policy with a clipped ratio."""

    prompts_per_update: Annotated[int, COUNT] | None = None
    """Prompts whose responses make one update; divides data.prompts_per_step. Null means all: one update per epoch."""
    epochs: Annotated[int, COUNT] = 1
    """Passes over the step's rows."""
    clip: tuple[Annotated[float, NOT_NEGATIVE], Annotated[float, NOT_NEGATIVE]] = (0.2, 0.2)
    """The probability ratio is kept within [1 - low, 1 + high]."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""

    def makes_one_update(self, run: RunConfig) -> bool:
        """Whether a step makes a single update: then no log-probabilities need to be computed before it."""
        return self.epochs == 1 and self.prompts_per_update in (None, run.data.prompts_per_step)

    def ratio_over(self, run: RunConfig) -> OldLogProbs:
        """Denominator of the ratio. Of a single update the present ones, or, where older weights may have sampled, the engine's
        own: the ratio then is the importance weight. Of several updates, or without a cap, those computed before the first."""
        if self.makes_one_update(run) and not run.loop.max_staleness:
            return "current"
        return "rollout_log_probs" if self.makes_one_update(run) and self.cap(run) is not None else "log_probs"

    def ratio_bound(self, run: RunConfig) -> float | None:
        """Where the ratio is over the engine's log-probabilities, an importance weight, the bound of such weights holds for
        it."""
        return self.cap(run) if self.ratio_over(run) == "rollout_log_probs" else None


OldLogProbs = Literal["log_probs", "rollout_log_probs", "current"]
"""Denominator of the probability ratio: as computed before the updates, as the engine returned them, or the present ones."""
DEFAULT_CAP = 2.0
"""Of importance weights, where older weights sample."""


class Algorithm(ABC):
    """A dataflow over roles, as an ordinary class.

    Every attribute of a subclass that is annotated with a class of worker (`actor: ActorWorker`) is a role: the launcher
    creates a group for each and sets the attribute. Calls on it run on all ranks of the group. No algorithm inherits from
    another.
    """

    config_class: ClassVar[type] = NoOptions
    """The frozen dataclass of the algorithm's own options; an instance is in `self.config`."""
    rows: ClassVar[Literal["prompts", "responses", "preferences"]] = "prompts"
    """What `collect` is given: prompts to answer, prompts with the dataset's responses, or two rows for each prompt, the
    chosen response before the rejected one."""
    trained_roles: ClassVar[tuple[str, ...]] = ("actor", "critic")
    """Of the roles, those that have an optimizer."""

    def __init__(self, run: RunConfig, groups: Mapping[str, Worker]):
        self.run = run
        self.config = run.algorithm.options
        self.step = 0
        self.groups: dict[str, Worker] = {}
        for role in self.roles(run):
            self.use(role, groups[role])

    def use(self, role: str, handle: Worker) -> None:
        """Have calls of a role go through another handle."""
        self.groups[role] = handle
        setattr(self, role, handle)

    @abstractmethod
    def collect(self, prompts: Batch) -> Batch:
        """Turn prompts into scored rows, with rollout, reward and other roles that are not trained.

        Called once a step with all of its prompts; with `loop.max_staleness` above 0 once for each prompt, for many at a time,
        from several threads and ahead of `learn`. So it changes nothing on `self`, and what depends on trained models belongs
        to `learn`.
        """

    def keep(self, group: Batch) -> bool:
        """Whether to learn from the rows of one prompt. Where not, another prompt takes its place in the step."""
        return True

    @abstractmethod
    def learn(self, batch: Batch) -> Metrics:
        """Turn the rows of a step into updates, and say how they went."""

    def measure(self, rows: Batch) -> Metrics:
        """How well held-out rows do (`data.held_out_files`, of the kind that `collect` is given); nothing is learned."""
        raise NotImplementedError(f"{type(self).__name__} learns from {self.rows} and has no measure of held-out ones")

    @classmethod
    def roles(cls, run: RunConfig) -> tuple[str, ...]:
        """The roles to be created: the attributes that are annotated with a class of worker, or with whatever
        `placement.workers` names the class of, less `unused_roles`."""
        declared, named = dict[str, None](), run.placement.workers
        for base in reversed(cls.__mro__):
            if issubclass(base, Algorithm) and base is not Algorithm:
                kinds = inspect.get_annotations(base)
                declared |= {name: None for name in kinds if name in named or is_worker(kinds[name], base)}
        if run.reward_model.path is not None and "reward" in declared:  # its score is part of every reward
            declared["reward_model"] = None
        unused = cls.unused_roles(run)
        return tuple(role for role in declared if role not in unused)

    @classmethod
    def unused_roles(cls, run: RunConfig) -> set[str]:
        """Declared roles that this configuration does without."""
        return set()

    @classmethod
    def check(cls, run: RunConfig) -> list[FieldError]:
        """Mistakes in the algorithm's options, alone and against the rest of the configuration."""
        return []

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs beside the workers' own states."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back what `state_dict` gave."""
        assert not state, f"{type(self).__name__} does not know what to do with the saved {', '.join(state)}"

    def respond(self, rows: Batch, *, sampling: Sampling | None = None) -> Batch:
        """`rows` with a response to each and its score, by the roles `rollout` and `reward`: what `generate` and then `score`
        give, but scoring begins while others are still generated."""
        from hybridflow.workers.respond import respond

        return respond(rows, self.groups["rollout"], self.groups["reward"], sampling=sampling)  # type: ignore[arg-type]

    def old_log_probs(self) -> OldLogProbs:
        """For the loss of a step's only update: the present log-probabilities, or, where older weights may have sampled, the
        engine's own."""
        return "rollout_log_probs" if self.run.loop.max_staleness else "current"

    def updates(self, batch: Batch, prompts_per_update: int | None, *, epochs: int) -> list[Batch]:
        """The rows of each update of this step: every epoch visits all rows in an order drawn from (seed, step, epoch).

        An update has as many rows as `prompts_per_update` prompts have responses; None makes one update of all.
        """
        prompts_per_step = self.run.data.prompts_per_step
        rows_per_update = len(batch) * (prompts_per_update or prompts_per_step) // prompts_per_step
        parts = []
        for epoch in range(epochs):
            order = np.random.default_rng([self.run.run.seed, self.step, epoch]).permutation(len(batch))
            parts += batch.select(order).split(rows_per_update)
        return parts


def check_prompts_per_update(run: RunConfig, prompts_per_update: int | None) -> list[FieldError]:
    """Mistakes where a step's prompts cannot be cut into updates of `prompts_per_update` prompts; None is all of them."""
    prompts_per_step = run.data.prompts_per_step
    if prompts_per_update is None or prompts_per_step % prompts_per_update == 0:
        return []
    if prompts_per_update > prompts_per_step:
        problem = f"found {prompts_per_update}, more than the {prompts_per_step} prompts of data.prompts_per_step"
        advice = "Lower the one or raise the other"
    else:
        problem = f"found {prompts_per_update}, which does not divide data.prompts_per_step={prompts_per_step}"
        advice = f"Use one of {', '.join(str(n) for n in range(1, prompts_per_step + 1) if prompts_per_step % n == 0)}"
    return [FieldError("algorithm.prompts_per_update", f"{problem}. {advice}", related=("data.prompts_per_step",))]
