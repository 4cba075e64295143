"""What an algorithm is: two methods over groups of workers. The loop calls them and knows no algorithm by name."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from hybridflow import registry
from hybridflow.algorithms.importance import ImportanceOptions as ImportanceOptions
from hybridflow.algorithms.options import GroupOptions, old_column
from hybridflow.algorithms.options import NoOptions as NoOptions
from hybridflow.algorithms.options import PolicyOptions as PolicyOptions
from hybridflow.algorithms.options import UpdateOptions as UpdateOptions
from hybridflow.algorithms.options import check_prompts_per_update as check_prompts_per_update
from hybridflow.batch import Batch
from hybridflow.config.choices import OldLogProbs as OldLogProbs
from hybridflow.errors import FieldError
from hybridflow.metrics import Metrics
from hybridflow.workers.token_functions import CorrectTokens, RowKL, TokenAdvantages

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.rollout.base import Sampling
    from hybridflow.workers.actor import ActorWorker
    from hybridflow.workers.base import Worker
    from hybridflow.workers.reference import ReferenceWorker
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker


class Algorithm(ABC):
    """A dataflow over roles, as an ordinary class.

    Every attribute of a subclass that is annotated with a class of worker (`actor: ActorWorker`) is a role: the launcher
    creates a group for each and sets the attribute. Calls on it run on all ranks of the group. No algorithm inherits from
    another: what many have in common is in `PolicyAlgorithm`.
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
        self.refused = (0, 0)
        """A step, and how many prompts `keep` has refused in it."""
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
        """Whether to learn from the rows of one prompt. Where not, another prompt takes its place in the step. By default all
        but, where `GroupOptions` say `dynamic_sampling`, those of equal rewards."""
        options = self.config
        if not (isinstance(options, GroupOptions) and options.dynamic_sampling and np.ptp(group["reward"]) == 0):
            return True
        num_refused = self.refused[1] if self.refused[0] == self.step else 0
        is_refused = num_refused < (options.max_rounds - 1) * self.run.data.prompts_per_step
        self.refused = (self.step, num_refused + is_refused)
        return not is_refused

    @abstractmethod
    def learn(self, batch: Batch) -> Metrics:
        """Turn the rows of a step into updates, and say how they went."""

    def measure(self, rows: Batch) -> Metrics:
        """How well held-out rows do (`data.held_out_files`, of the kind that `collect` is given); nothing is learned."""
        raise NotImplementedError(f"{type(self).__name__} learns from {self.rows} and has no measure of held-out ones")

    @classmethod
    def roles(cls, run: RunConfig) -> tuple[str, ...]:
        """The roles to be created: the attributes that are annotated with a class of worker, or with whatever
        `placement.workers` names the class of, less `unused_roles`; and `validation` where it has engines of its own."""
        declared, named = dict[str, None](), run.placement.workers
        for base in reversed(cls.__mro__):
            if issubclass(base, Algorithm) and base is not Algorithm:
                kinds = inspect.get_annotations(base)
                declared |= {name: None for name in kinds if name in named or _is_worker(kinds[name], base)}
        if run.reward_model.path is not None and "reward" in declared:  # its score is part of every reward
            declared["reward_model"] = None
        unused = cls.unused_roles(run)
        declared |= {"validation": None} if run.validation.concurrent and "rollout" not in unused else {}
        return tuple(role for role in declared if role not in unused)

    @classmethod
    def unused_roles(cls, run: RunConfig) -> set[str]:
        """Declared roles that this configuration does without: by default the reference, where `UpdateOptions` have no KL."""
        options = run.algorithm.options
        return {"reference"} if isinstance(options, UpdateOptions) and not options.needs_reference else set()

    @classmethod
    def check(cls, run: RunConfig) -> list[FieldError]:
        """Mistakes in the algorithm's options, alone and against the rest of the configuration."""
        options = run.algorithm.options
        return options.errors(run) if isinstance(options, UpdateOptions) else []

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

    def with_log_probs(self, batch: Batch) -> Batch:
        """`batch` with the log-probabilities that `UpdateOptions` need before updates: old ones and the reference's."""
        options, pending = self.options(), []
        if options.ratio_over(self.run) == "log_probs":
            pending.append(self.roled("actor").log_probs.start(batch))
        if options.needs_reference:
            pending.append(self.roled("reference").log_probs.start(batch))  # roles on different pools overlap
        return self.corrected(batch.join(*(call.result() for call in pending)))

    def corrected(self, batch: Batch) -> Batch:
        """`batch`, which has the actor's log-probabilities, without the tokens that `rejections` take out, and with column
        `importance_weights`, where these are of the step as a whole."""
        correction = self.options().importance_correction(self.run)
        if correction is None or not self.options().corrects_before(self.run):
            return batch
        corrected = CorrectTokens(correction, is_normalized=self.options().importance_normalized)
        return batch.join(self.roled("actor").compute(batch, corrected))

    def prepare(self, batch: Batch) -> Batch:
        """The same, with rewards less the KL of their rows where `kl_in: reward` says so, and less what `GroupOptions` take
        from long responses."""
        batch, options = self.with_log_probs(self.with_length_penalty(batch)), self.options()
        if not options.penalises_reward:
            return batch
        kl = self.roled("actor").compute(batch, RowKL(options.kl_estimator, old_column(options.ratio_over(self.run))))
        return batch.with_columns(reward=batch["reward"] - options.kl_coefficient * kl["kl_sum"])

    def with_length_penalty(self, batch: Batch) -> Batch:
        """`batch` with rewards less the punishment of long responses of `GroupOptions`, which is in column `length_penalty`."""
        options = self.options()
        if not isinstance(options, GroupOptions) or not options.overlong_penalty:
            return batch
        penalty = options.length_penalty(self.run, batch["response_tokens"])
        return batch.with_columns(reward=batch["reward"] + penalty, length_penalty=penalty)

    def with_returns(
        self, batch: Batch, *, gamma: float = 1.0, lam: float = 1.0, whiten: bool = False, with_kl: bool = True
    ) -> Batch:
        """`batch` with column `advantages`: at each token the discounted sum of the rewards from it on, which carry the KL of
        their token where `with_kl` and `kl_in: reward` say so; where it has a critic's `values`, GAE of these."""
        options = self.options()
        function = TokenAdvantages(
            gamma=gamma,
            lam=lam,
            whiten=whiten,
            kl_coefficient=options.kl_coefficient if with_kl and options.kl_in == "reward" else 0.0,
            kl_estimator=options.kl_estimator,
            log_probs=old_column(options.ratio_over(self.run)),
        )
        return batch.join(self.roled("actor").compute(batch, function))

    def options(self) -> UpdateOptions:
        """The algorithm's own, which are `UpdateOptions` where `prepare` and `updates` are used."""
        assert isinstance(self.config, UpdateOptions), f"the Config of {type(self).__name__} is to inherit from UpdateOptions"
        return self.config

    def roled(self, role: str) -> Any:  # a worker of whatever class the role has
        """The handle of a role."""
        return self.groups[role]

    def old_log_probs(self) -> OldLogProbs:
        """For the loss of a step's only update: the present log-probabilities, or, where older weights may have sampled, the
        engine's own."""
        return "rollout_log_probs" if self.run.loop.max_staleness else "current"

    def updates(self, batch: Batch) -> list[Batch]:
        """The rows of each update of this step, as `UpdateOptions` say: every epoch visits all rows in an order drawn from
        (seed, step, epoch)."""
        options, prompts_per_step = self.options(), self.run.data.prompts_per_step
        rows_per_update = len(batch) * (options.prompts_per_update or prompts_per_step) // prompts_per_step
        parts = []
        for epoch in range(options.epochs):
            order = np.random.default_rng([self.run.run.seed, self.step, epoch]).permutation(len(batch))
            parts += batch.select(order).split(rows_per_update)
        return parts


class PolicyAlgorithm(Algorithm):
    """To inherit from: the roles of algorithms without a critic, and several scored responses to a prompt. `learn` is left."""

    config: Any  # a dataclass with `responses_per_prompt`
    actor: ActorWorker
    rollout: RolloutWorker
    reference: ReferenceWorker
    reward: RewardWorker

    def collect(self, prompts: Batch) -> Batch:
        return self.respond(prompts.repeat(self.config.responses_per_prompt))


def _is_worker(annotation: object, owner: type) -> bool:
    """Whether an annotation of an algorithm, as written or as a class, names a class of worker.

    Names that are imported for type checkers only do not resolve: what is written is looked up among the built-in roles, and
    else in the module of the algorithm.
    """
    if isinstance(annotation, str):
        if annotation in {name.partition(":")[2] for name in registry.ROLES.values()}:
            return True
        annotation = vars(sys.modules[owner.__module__]).get(annotation)
    return isinstance(annotation, type) and "layout_of" in {name for base in annotation.__mro__ for name in vars(base)}
