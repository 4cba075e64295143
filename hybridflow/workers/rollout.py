"""The rollout role: responses to prompts, by a generation engine that runs in this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from hybridflow import registry
from hybridflow.batch import Array, Batch, Ragged, ShardColumn
from hybridflow.columns import COLUMNS
from hybridflow.config.pools import parse_pool
from hybridflow.config.rules_placement import pool_of
from hybridflow.config.schema import Config
from hybridflow.data.chat import tokenizer_at
from hybridflow.environments.columns import episode_columns, episodes_of
from hybridflow.environments.episode import Episode
from hybridflow.environments.processes import EnvironmentProcesses
from hybridflow.environments.under_way import EpisodesUnderWay, Surroundings
from hybridflow.errors import ConfigError, EngineError, FieldError
from hybridflow.metrics import Metric, Metrics
from hybridflow.parallel.layout import Layout
from hybridflow.planner.needs import step_rows
from hybridflow.rollout.base import Engine, EngineSpec, Sampling
from hybridflow.rollout.seeds import mixed_seed
from hybridflow.rollout.step_thread import EngineThread
from hybridflow.rollout.stopping import detokenizer
from hybridflow.rollout.under_way import RowsElsewhere, RowsUnderWay, RowUnderWay
from hybridflow.user_file import split_name
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.proof import probe_rows
from hybridflow.workers.remote import remote

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("hybridflow")

ENDED: tuple[Literal["stop", "length"] | None, ...] = (None, "stop", "length")
"""How a row has ended, by the number in column `ended`."""
STARTED = ("response", "rollout_log_probs", "policy_versions")
"""Columns of what a row has said so far, in the order of `go_on_from`; of an episode there is `loss_mask` too."""


def training_sampling(config: Config) -> Sampling:
    """How responses are sampled in training: `rollout.*` and `data.max_response_tokens`."""
    rollout = config.rollout
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        max_tokens=config.data.max_response_tokens,
        stop=tuple(rollout.stop),
        stop_token_ids=tuple(rollout.stop_token_ids),
        ignore_eos=rollout.ignore_eos,
    )


def validation_sampling(config: Config) -> Sampling:
    """How responses are sampled in validation: `validation.*`, with the stop strings and tokens of training; the end of
    sequence always ends them."""
    return Sampling(
        temperature=config.validation.temperature,
        top_p=config.validation.top_p,
        top_k=config.validation.top_k,
        max_tokens=config.data.max_response_tokens,
        stop=tuple(config.rollout.stop),
        stop_token_ids=tuple(config.rollout.stop_token_ids),
        log_probs=False,
    )


class RolloutWorker(Worker):
    """One engine for each data rank; its tensor ranks step the same engine with the same requests."""

    answers_row_by_row: ClassVar[bool] = True
    """Whether rows may be had one by one as they finish (`submit`, `take_finished`). A class of your own whose `generate` does
    something else sets this to False, and is then asked for whole batches only. A class that replaces it has to say."""

    placed_as: ClassVar[str] = "rollout"
    """The role by which `placement.roles` names its pool."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "generate" in vars(cls) and "answers_row_by_row" not in vars(cls):
            problem = f"{cls.__name__} replaces `generate` and does not say whether rows may be had by `submit`"
            raise ConfigError([FieldError("placement.workers", f"{problem}. Set answers_row_by_row on it")])

    def __init__(self, config: Config, context: RankContext):
        from hybridflow.rollout.lockstep import lockstep
        from hybridflow.workers.sync import RolloutSync

        super().__init__(config, context)
        self.tokenizer = tokenizer_at(
            config.model.tokenizer or config.model.path, trust_remote_code=config.model.trust_remote_code
        )
        start, name = time.perf_counter(), config.rollout.engine
        logger.info("rollout rank %d: starting engine %s", context.rank, name)
        engine_class = registry.load(name, registry.ENGINES, key="rollout.engine")
        if not (isinstance(engine_class, type) and issubclass(engine_class, Engine)):
            problem = f"{name!r} is no subclass of hybridflow.rollout.base.Engine"
            raise ConfigError([FieldError("rollout.engine", problem)])
        # What an environment answers, and when, only one rank can know: it has the rows, and tells the others what to generate.
        agree = lockstep(context.layout, context.rank, sends_requests=config.environment.is_set)
        leads = context.layout.tensor_rank(context.rank) == 0
        is_shared = config.environment.is_set and agree is not None
        self.follows = is_shared and not leads
        engine = engine_class(engine_spec(self.config, context))
        self.engine = EngineThread(engine, agree=agree, leads=leads, is_followed=is_shared and leads, follows=self.follows)
        self.environment: Surroundings | None = None
        """Of episodes, where rows are such and this rank has them."""
        if config.environment.is_set and not self.follows:
            self.environment = Surroundings(config, self.tokenizer, EnvironmentProcesses(config.environment))
        self.rows = self._no_rows()
        """Those of `submit`."""
        self.num_calls = 0
        """Of `generate` and `submit` in this step."""
        self.busy_seconds = 0.0
        """Of the engine, as far as they are reported."""
        self.weight_sync = RolloutSync(config, context, self.engine)
        logger.info("rollout rank %d: engine %s started in %.0f s", context.rank, name, time.perf_counter() - start)

    @classmethod
    def imports(cls, config: Config) -> tuple[str, ...]:
        named = registry.ENGINES.get(config.rollout.engine, config.rollout.engine)
        return ("transformers", "hybridflow.workers.sync", *([] if split_name(named) else [named.partition(":")[0]]))

    @classmethod
    def layout_of(cls, config: Config, num_ranks: int) -> Layout:
        tensor = config.rollout.tensor_parallel
        assert num_ranks % tensor == 0, f"{num_ranks} ranks do not divide into engines of {tensor}; config/rules checks this"
        per_node = parse_pool(config.placement.pools[pool_of(cls.placed_as, config)]).ranks_per_node
        # The paper's groups (section 5.3): what a rank trains then lies inside what it generates with, on one node.
        stride = per_node // tensor if per_node % tensor == 0 and num_ranks % per_node == 0 else 1
        return Layout(data=num_ranks // tensor, tensor=tensor, tensor_stride=stride)

    @remote("one_to_all")
    def begin_step(self, step: int, total_steps: int) -> None:
        """Calls of `generate` are counted anew, and failures of episodes may be logged again."""
        self.num_calls = 0
        if self.environment is not None:
            self.environment.has_logged = False

    @remote("split_by_data_rank")
    def generate(self, batch: Batch, *, sampling: Sampling | None = None) -> Batch:
        """One response to each row's `prompt`, as new columns: `response`, `response_text`, `response_tokens`, `truncated`,
        `temperature`, `policy_versions`, and `rollout_log_probs` where `sampling.log_probs`. `sampling` is the configured one
        of training by default; a column `max_response_tokens` may allow a row less than `sampling.max_tokens`.

        A response is a function of weights, prompt, sampling, the row's `seed` and `sample`, and the number of this call
        within its step, so that a second call samples anew: the first is 0, and a column `call` says otherwise.

        Example:
            greedy = dataclasses.replace(training_sampling(config), temperature=0.0)
            sampled, best = rollout.generate(rows), rollout.generate(rows, sampling=greedy)
        """
        rows = self._no_rows()
        rows.version = self.rows.version
        has_log_probs = sampling is None or sampling.log_probs
        with self.engine.handing_out():
            rows.submit(self._rows(batch, sampling))
            taken = rows.take(len(batch))
        if refused := [row.refusal for row in taken if row.refusal is not None]:
            raise EngineError(f"{len(refused)} of {len(taken)} rows were refused by the engine. The first: {refused[0]}")
        return self._columns(taken, has_log_probs=has_log_probs)

    @remote("split_by_data_rank")
    def submit(self, batch: Batch, *, sampling: Sampling | None = None) -> None:
        """Start to generate what `generate` would, without waiting: `take_finished` hands it out.

        `batch` has a column `position`, by which the caller knows its rows again. Rows that have begun before (columns of
        `unfinished`) go on from where they were.
        """
        self.rows.submit(self._rows(batch, sampling))

    @remote("gather_rows")
    def take_finished(self, at_least: int, timeout_s: float | None = None) -> Batch:
        """Rows that have finished: the columns of `generate` and `position`; `rollout_log_probs` is empty for rows that were
        sampled without. Of rows with `refused`, which the engine does not generate, `response_text` says why. Each rank waits
        for `at_least`, or for all that it has left, or for `timeout_s`."""
        with self.engine.handing_out():
            taken = self.rows.take(at_least, timeout_s)
        seconds, self.busy_seconds = self.engine.busy_seconds - self.busy_seconds, self.engine.busy_seconds
        seconds_of_rank = Metric(seconds / self.context.layout.data, kind="sum")
        if self.config.loop.max_staleness:
            self.context.report(Metrics({"stream/engine_seconds": seconds_of_rank}))
        refused = np.array([row.refusal is not None for row in taken], np.bool_)
        return self._columns(taken, has_log_probs=True).with_columns(position=_numbers(taken), refused=refused)

    @remote("one_to_all")
    def interrupt(self) -> None:
        """Stop generating between two steps of the engine. What rows have said so far stays; `resume` lets them go on."""
        self.rows.interrupt()

    @remote("one_to_all")
    def resume(self) -> None:
        """Let interrupted rows go on, with the weights that the engine has now."""
        self.rows.resume()

    @remote("gather_rows")
    def unfinished(self) -> Batch:
        """The rows under way while they are interrupted, as `submit` takes them: `position`, what they have said (`response`,
        `rollout_log_probs`, `policy_versions`), and `ended`: 0 where they go on, 1 where they stopped, 2 at the limit."""
        return started_columns(self.rows.unfinished())

    def _no_rows(self) -> RowsUnderWay:
        if self.follows:
            return RowsElsewhere(self.engine, detokenizer(self.tokenizer))
        if self.environment is not None:
            return EpisodesUnderWay(self.engine, self.environment)
        return RowsUnderWay(self.engine, detokenizer(self.tokenizer))

    def _rows(self, batch: Batch, sampling: Sampling | None) -> list[RowUnderWay]:
        if "call" not in batch:
            batch = batch.with_columns(call=np.full(len(batch), self.num_calls, np.int64))
            self.num_calls += 1
        sampling = sampling or training_sampling(self.config)
        if self.environment is not None:
            return episodes_of(batch, fresh_rows(batch, sampling), self.config.environment)
        return rows_of(batch, sampling)

    def _columns(self, rows: Sequence[RowUnderWay], *, has_log_probs: bool) -> Batch:
        said = started_columns(rows)
        response = said.tokens("response")
        # Of no rows, transformers makes one empty text.
        texts = self.tokenizer.batch_decode([row.tolist() for row in response], skip_special_tokens=True) if rows else []
        columns: dict[str, Array | ShardColumn] = {name: said.tokens(name) for name in ("response", "policy_versions")}
        columns["response_text"] = [row.refusal or text for row, text in zip(rows, texts, strict=True)]
        if has_log_probs:
            columns["rollout_log_probs"] = log_probs = said.tokens("rollout_log_probs")
            is_asked = np.array([row.sampling.log_probs for row in rows], np.bool_)
            is_whole = log_probs.lengths == response.lengths
            assert is_whole[is_asked].all(), "the engine left out log-probabilities that were asked for"
        answered = Batch.from_columns(columns).with_columns(
            response_tokens=response.lengths,
            truncated=np.array([row.finish_reason == "length" for row in rows], np.bool_),
            temperature=np.array([row.sampling.temperature for row in rows], np.float64),
        )
        if self.environment is None:
            return answered
        return answered.join(episode_columns([row for row in rows if isinstance(row, Episode)], self.config.environment))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the engine's weights by full tensors under their Hugging Face names. Waits until the engine is idle."""
        with self.engine.paused() as engine:
            engine.load_weights(weights)

    @remote("one_to_all")
    def sync_weights(self, version: int = 0) -> Metrics:
        """Take the weights of the actor on the same pool, which are those of policy `version`. Metrics are named `sync/...`.

        Raises:
            WeightMismatchError: the engine holds something else afterwards.
        """
        return self._exchange(self.weight_sync.from_peer, version)

    @remote("one_to_all")
    def open_transfer(self, address: str) -> None:
        """Prepare to take weights from the actor of another pool, which gave this address."""
        self.weight_sync.open(address)

    @remote("one_to_all")
    def receive_weights(self, version: int = 0) -> Metrics:
        """Take the weights that `actor.send_weights` sends at the same time. Metrics and errors as of `sync_weights`."""
        return self._exchange(self.weight_sync.receive, version)

    @remote("one_to_all")
    def unreadable_weights(self) -> tuple[str, ...]:
        """Weights that the engine cannot show as they were sent; known after the first sync."""
        return self.weight_sync.unreadable

    @remote("gather_rows")
    def probe_rows(self) -> Batch:
        """A few responses to fixed prompts, for `actor.probe_differences`. Rows that run meanwhile are interrupted."""
        with self._held_rows(), self.engine.paused() as engine:
            return probe_rows(engine, self.config, self.context)

    @contextmanager
    def _held_rows(self) -> Iterator[bool]:
        """A block in which no row runs; whether any did."""
        is_generating = not self.rows.is_held and self.rows.num_left > 0
        if is_generating:
            self.rows.interrupt()
        yield is_generating
        if is_generating:
            self.rows.resume()

    def _exchange(self, take_weights: Callable[[], Metrics], version: int) -> Metrics:
        """Rows that run meanwhile are interrupted, and go on with the new weights; `sync/seconds_without_generation` is how
        long."""
        started = time.perf_counter()
        with self._held_rows() as is_generating:
            metrics = take_weights()
            self.rows.version = version
        if is_generating:
            seconds = Metric(time.perf_counter() - started, kind="max")
            metrics += Metrics({"sync/seconds_without_generation": seconds})
        return metrics

    @remote("one_to_all")
    def sleep(self) -> None:
        """Give the engine's memory to the other roles of this process."""
        with self.engine.paused() as engine:
            engine.sleep()

    @remote("one_to_all")
    def wake_up(self) -> None:
        """Take the memory back, before weights are loaded or responses generated."""
        with self.engine.paused() as engine:
            engine.wake_up()

    @remote("one_to_all")
    def close(self) -> None:
        """End the engine and its thread, and the processes of environments."""
        if self.environment is not None:
            self.environment.processes.close()
        self.engine.close()


class ValidationWorker(RolloutWorker):
    """Engines that generate for validation alone, on a pool of their own (`validation.concurrent`)."""

    placed_as = "validation"


def engine_spec(config: Config, context: RankContext) -> EngineSpec:
    """What the engine of this rank is built from."""
    rollout = config.rollout
    utilization = rollout.gpu_memory_utilization
    assert utilization != "auto", "what is left to the plan is decided before engines are built: planner.decisions.resolved"
    most_rows = -(-2 * step_rows(config) * (1 + config.loop.max_staleness) // context.layout.data)  # twice: rows are not even
    return EngineSpec(
        model=config.model.path,
        dtype=rollout.dtype_on(context.device.type),
        max_model_tokens=config.max_model_tokens,
        max_num_seqs=rollout.max_num_seqs,
        seed=config.run.seed,
        seed_requests=rollout.seed_requests,
        device=context.device,
        layout=context.layout,
        rank=context.rank,
        gpu_memory_utilization=utilization,
        cpu_cache_gib=rollout.cpu_cache_gib,
        enforce_eager=rollout.enforce_eager,
        options=dict(rollout.engine_options),
        tokenizer=config.model.tokenizer,
        trust_remote_code=config.model.trust_remote_code,
        most_rows=None if config.data.validation_files else most_rows,
        can_sleep=bool(rollout.sleep),
    )


def fresh_rows(batch: Batch, sampling: Sampling) -> list[RowUnderWay]:
    """What is to be generated for each row of a batch with `prompt`, `seed` and `call`, from the beginning."""
    numbers = batch["position"] if "position" in batch else np.arange(len(batch))
    limits = batch["max_response_tokens"] if "max_response_tokens" in batch else np.full(len(batch), sampling.max_tokens)
    samplings = {limit: replace(sampling, max_tokens=min(limit, sampling.max_tokens)) for limit in set(limits.tolist())}
    columns = zip(numbers.tolist(), batch.tokens("prompt"), limits.tolist(), _seeds(batch).tolist(), strict=True)
    return [
        RowUnderWay(number, prompt.astype(np.int32, copy=False), samplings[limit], seed)
        for number, prompt, limit, seed in columns
    ]


def rows_of(batch: Batch, sampling: Sampling) -> list[RowUnderWay]:
    """The same, from where the rows are where the batch has columns of `started_columns`."""
    rows = fresh_rows(batch, sampling)
    if "ended" in batch:
        for row, ended, *said in zip(rows, batch["ended"].tolist(), *map(batch.tokens, STARTED), strict=True):
            row.go_on_from(*said, finish_reason=ENDED[ended])
    return rows


def nothing_said(num_rows: int, names: Iterable[str] = STARTED) -> Batch:
    """What `started_columns` gives of rows that have not begun; `names` are those of its columns of tokens."""
    said: dict[str, Array | ShardColumn] = {
        name: Ragged(np.empty(0, COLUMNS[name].dtype), np.zeros(num_rows + 1, np.int64)) for name in names
    }
    return Batch.from_columns(said).with_columns(ended=np.zeros(num_rows, np.int64))


def started_columns(rows: Sequence[RowUnderWay]) -> Batch:
    """`position`, what the rows have said so far, and whether they have ended, as `rows_of` reads it back."""
    recorded = [row.recorded() for row in rows]
    said = {
        name: Ragged.from_rows([columns[place] for columns in recorded], COLUMNS[name].dtype)
        for place, name in enumerate(STARTED)
    }
    if any(isinstance(row, Episode) for row in rows):
        said["loss_mask"] = Ragged.from_rows([row.mask for row in rows if isinstance(row, Episode)], np.bool_)
    ended = np.array([ENDED.index(row.ended_by) for row in rows], np.int64)
    return Batch.from_columns(said).with_columns(position=_numbers(rows), ended=ended)


def _numbers(rows: Sequence[RowUnderWay]) -> Array:
    return np.array([row.number for row in rows], np.int64)


def _seeds(batch: Batch) -> npt.NDArray[np.int64]:
    """Of each row, from the seed of its prompt, the number of its response, and of its call where that is not the first."""
    sample = batch["sample"] if "sample" in batch else np.zeros(len(batch), np.int64)
    first = mixed_seed(batch["seed"], sample)
    return np.where(batch["call"] == 0, first, mixed_seed(batch["seed"], sample, batch["call"]))
