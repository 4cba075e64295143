"""Where a step's rows come from: a stream over the launched groups, when it generates, and what is saved of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hybridflow.algorithms.base import Algorithm
from hybridflow.batch import Batch
from hybridflow.config.schema import Config
from hybridflow.controller.failed_rewards import Collect, FailedRewards
from hybridflow.controller.launch import Launched
from hybridflow.controller.returned import bounded_keep, checked_collect
from hybridflow.controller.stream import Stream, StreamSettings, Taken
from hybridflow.controller.streaming import Generation, Scoring, streaming_handle
from hybridflow.errors import ConfigError, FieldError
from hybridflow.metrics import Metric, Metrics
from hybridflow.workers.respond import with_model_score
from hybridflow.workers.token_functions import PolicyAges, count_loss_tokens


class RowSource:
    """Gives each step its rows, from the present weights or, with `loop.max_staleness`, from a stream that runs ahead."""

    def __init__(self, config: Config, launched: Launched, algorithm: Algorithm, *, total_steps: int):
        self.config, self.launched, self.algorithm = config, launched, algorithm
        settings = StreamSettings(
            prompts_per_step=config.data.prompts_per_step,
            max_staleness=config.loop.max_staleness,
            total_steps=total_steps,
            timeout_s=config.run.timeout_s,
        )
        self.collect = checked_collect(algorithm)
        collect = self.collect if config.loop.max_staleness else self._collect_all
        self.stream = Stream(settings, launched.data.next_batch, self._watched(collect), bounded_keep(algorithm))
        self.generation: Generation | None = None
        self.scoring: Scoring | None = None
        if config.loop.max_staleness:
            self._begin_streaming()

    def _watched(self, collect: Collect) -> Collect:
        """`collect`, ending the run where the rewards of most rows of a step fail."""
        reward = self.launched.reward
        if reward is None:
            return collect
        prompts, share = self.config.data.prompts_per_step, self.config.reward.max_failed_share
        return FailedRewards(prompts_per_step=prompts, max_share=share, cause=reward.failure_cause).watching(collect)

    def _begin_streaming(self) -> None:
        """From here on collects run ahead, and their calls are carried out together."""
        rollout, reward = self.launched.rollout, self.launched.reward
        assert rollout is not None and reward is not None, "config/rules asks for both where max_staleness is above 0"
        if not rollout.answers_row_by_row:
            problem = f"{type(rollout).__name__} of placement.workers.rollout generates whole batches only. Set 0"
            raise ConfigError([FieldError("loop.max_staleness", problem)])
        self.generation = Generation(rollout, on_failure=self.stream.fail)
        self.scoring = Scoring(reward)
        handles = {
            "rollout": streaming_handle(rollout, generate=self.generation.generate),
            "reward": streaming_handle(reward, score=self.scoring.score),
        }
        for role, handle in handles.items():
            self.algorithm.use(role, handle)
        self.stream.forget = self.generation.forget
        self.stream.all_stacks = self.launched.all_stacks

    def _collect_all(self, prompts: Batch) -> Batch:
        """The rows of a whole step, with what the reward model says of them."""
        return self._with_model_score(self.collect(prompts))

    def _with_model_score(self, rows: Batch) -> Batch:
        return with_model_score(rows, self.launched.reward_model, weight=self.config.reward_model.weight)

    @property
    def shares_pool(self) -> bool:
        """Whether the processes that generate also train."""
        places = self.launched.places
        return any(role in places and places[role].pool == places["rollout"].pool for role in self.config.models)

    def take(self, step: int) -> tuple[Batch, Taken]:
        """The rows that step `step` learns from. The engines have the weights of the step before."""
        if self.generation is not None:
            self.generation.resume()
        taken = self.stream.take(step)
        if self.generation is not None and self.shares_pool:
            self.generation.pause()
        rows = taken.rows
        if self.generation is not None:  # a reward model scores the rows of a step at once, ahead of it only rules do
            rows = self._with_model_score(rows)
        if "loss_mask" in rows and "loss_tokens" not in rows:
            rows = rows.join(self.launched.data.compute(rows, count_loss_tokens))
        if self.generation is not None and "policy_versions" in rows:
            assert self.launched.rollout is not None
            self.launched.rollout.compute(rows, PolicyAges(version=step - 1))
        return rows, taken

    def metrics(self, step: Metrics, taken: Taken, *, seconds: float) -> Metrics:
        """The metrics of a step and, where a stream runs ahead or groups were refused, those of the stream."""
        if self.generation is None:
            return step + Metrics({"stream/groups_refused": Metric(taken.num_refused)}) if taken.num_refused else step
        found = {
            "stream/groups_refused": Metric(taken.num_refused),
            "stream/groups_outstanding": Metric(taken.num_outstanding),
            "stream/idle_training": Metric(taken.seconds_waiting, seconds),
        }
        if "stream/engine_seconds" in step:
            found["stream/idle_generation"] = Metric(max(0.0, 1 - step["stream/engine_seconds"] / seconds))
        if "importance/weight_sq" in step:
            found["importance/effective_sample_size"] = Metric(step["importance/weight"] ** 2 / step["importance/weight_sq"])
        return step.without(("stream/engine_seconds", "importance/weight_sq")) + Metrics(found)

    def save(self, folder: Path) -> dict[str, object]:
        """Write what rows under way have said; the numbers of the stream, which go with the rest of the controller's state."""
        if self.generation is None:
            return {}
        is_running = not self.generation.is_paused
        if is_running:
            self.generation.pause()
        said = self.generation.started()
        state = self.stream.state_dict()
        groups = list(self.stream.outstanding.values())
        if groups:
            prompts = Batch.concatenate([group.prompts for group in groups])
            self.launched.data.save_under_way(str(folder), _keys(prompts), said)
        if is_running:
            self.generation.resume()
        return state

    def restore(self, folder: Path, state: Mapping[str, object]) -> None:
        """Take back the groups that were under way. Their collects run again; calls of `generate` go on from what was said."""
        if not state or not state["groups"]:
            return
        prompts = self.launched.data.restore_under_way(str(folder))
        each = [prompts.select([row]) for row in range(len(prompts))]
        goes_on = state["max_staleness"] == self.config.loop.max_staleness
        if goes_on and self.generation is not None:
            said = self.launched.data.said_under_way(str(folder))
            self.generation.begun = _by_call(said)
        self.stream.load_state_dict(state, each)

    def close(self) -> None:
        """End the threads; collects that wait for results end when whoever gives them fails them."""
        for part in (self.generation, self.scoring):
            if part is not None:
                part.close()


def _keys(prompts: Batch) -> Batch:
    """What the data role finds prompts by, and what made them unlike others of their kind."""
    return Batch({name: prompts[name] for name in ("prompt_id", "seed", "group", "sample")})


def _by_call(said: Batch) -> dict[tuple[int, int], Batch]:
    keys = list(zip(said["group"].tolist(), said["call"].tolist(), strict=True)) if len(said) else []
    rows: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return {key: said.select(np.array(members)) for key, members in rows.items()}
