"""What an algorithm is: two methods over groups of workers. The loop calls them and knows no algorithm by name."""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np

from hybridflow import ops
from hybridflow.algorithms.respond import respond
from hybridflow.batch import Batch
from hybridflow.config.ranges import COUNT, NOT_NEGATIVE, POSITIVE
from hybridflow.errors import FieldError
from hybridflow.metrics import Metric, Metrics
from hybridflow.workers.remote import CombinedFuture, Future

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.ops.correction import ImportanceCorrection
    from hybridflow.workers.base import Worker
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The `Config` of an algorithm without options."""


@dataclass(frozen=True, kw_only=True)
class ImportanceOptions:
    """To inherit from: weights between the engine's probabilities, which tokens were drawn with, and the trainer's."""

    importance_cap: Annotated[float, POSITIVE] | None = None
    """Weigh tokens by trainer's over engine's probability, at most this (truncated importance sampling, usually 2); null for no
    weights, or with a mask for no bound."""
    importance_level: Literal["token", "sequence"] = "token"
    """Whether each token has its own weight or a response has one."""
    importance_mask: tuple[float, float] | None = None
    """Tokens (or responses) whose weight is outside count nothing; null for none."""

    def __post_init__(self) -> None:
        if self.importance_mask is not None and self.importance_mask[0] >= self.importance_mask[1]:
            low, high = self.importance_mask
            raise ValueError(
                f"importance_mask: found [{low:g}, {high:g}], outside of which is everything; the smaller one comes first"
            )

    @property
    def importance_correction(self) -> ImportanceCorrection | None:
        """For a loss; None where neither a bound nor a mask is set."""
        return ops.importance_correction(self.importance_cap, self.importance_level, self.importance_mask)


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(ImportanceOptions):
    """To inherit from: how a step's rows become updates of a policy with a clipped ratio."""

    prompts_per_update: Annotated[int, COUNT] | None = None
    """Prompts whose responses make one update, the mini-batch; divides data.prompts_per_step, the train batch. Null means all:
    one update per epoch."""
    epochs: Annotated[int, COUNT] = 1
    """Passes over the step's rows."""
    clip: tuple[Annotated[float, NOT_NEGATIVE], Annotated[float, NOT_NEGATIVE]] = (0.2, 0.2)
    """The probability ratio is kept within [1 - low, 1 + high]."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""

    def is_on_policy(self, run: RunConfig) -> bool:
        """Whether a step makes a single update, for which the policy's own log-probabilities are the old ones."""
        return self.epochs == 1 and self.prompts_per_update in (None, run.data.prompts_per_step)


class Algorithm(ABC):
    """A dataflow over roles, as an ordinary class.

    Every annotated attribute of a subclass, but `config`, is a role (`actor: ActorWorker`): the launcher creates a group
    for each and sets the attribute. Calls on it run on all ranks of the group. No algorithm inherits from another.
    """

    config_class: ClassVar[type] = NoOptions
    """The frozen dataclass of the algorithm's own options; an instance is in `self.config`."""
    rows: ClassVar[Literal["prompts", "responses"]] = "prompts"
    """What `collect` is given: prompts to answer, or prompts with the dataset's responses."""

    def __init__(self, run: RunConfig, groups: Mapping[str, Worker]):
        self.run = run
        self.config = run.algorithm.options
        self.step = 0
        self.measured = Metrics()
        """What `respond` has measured in this step; the loop logs it with what `learn` returns."""
        for role in self.roles(run):
            setattr(self, role, groups[role])

    @abstractmethod
    def collect(self, prompts: Batch) -> Batch:
        """Turn prompts into a scored batch."""

    @abstractmethod
    def learn(self, batch: Batch) -> Metrics:
        """Turn the batch into updates, and say how they went."""

    @classmethod
    def roles(cls, run: RunConfig) -> tuple[str, ...]:
        """The roles to be created: the annotated attributes without a value, less `unused_roles`."""
        declared: dict[str, None] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, Algorithm) and base is not Algorithm:
                # An annotation with a value, such as `config_class`, is an attribute of the class and no role.
                declared |= {name: None for name in inspect.get_annotations(base) if name not in vars(base)}
        unused = cls.unused_roles(run) | {"config"}
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

    def respond(self, rows: Batch, rollout: RolloutWorker, reward: RewardWorker) -> tuple[Batch, Future[Batch]]:
        """`rows` with a response to each, and a future of their scores, on which work began when the first had finished.

        Wait for the scores before other calls: `seconds/scoring_after_generation` is measured until they are asked for.
        """
        rows, scores = respond(rows, rollout, reward)
        generated = time.perf_counter()

        def measured(results: Sequence[Batch]) -> Batch:
            seconds = Metric(time.perf_counter() - generated, kind="sum")
            self.measured += Metrics({"seconds/scoring_after_generation": seconds})
            return results[0]

        return rows, CombinedFuture([scores], measured)

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
