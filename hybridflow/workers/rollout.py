"""The rollout role: responses to prompts, by a generation engine that runs in this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from hybridflow import registry
from hybridflow.batch import Array, Batch, Ragged
from hybridflow.config.pools import parse_pool
from hybridflow.config.rules_placement import pool_of
from hybridflow.config.schema import Config
from hybridflow.errors import ConfigError, Mistake
from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import Engine, EngineSpec, Request, Response, Sampling
from hybridflow.rollout.lockstep import lockstep
from hybridflow.rollout.sampling import mixed_seed
from hybridflow.rollout.step_thread import EngineThread
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.remote import remote
from hybridflow.workers.sync import RolloutSync

if TYPE_CHECKING:
    import torch

    from hybridflow.metrics import Metrics

logger = logging.getLogger("hybridflow")


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

    def __init__(self, config: Config, context: RankContext):
        super().__init__(config, context)
        self.tokenizer = AutoTokenizer.from_pretrained(
            config.model.tokenizer or config.model.path, trust_remote_code=config.model.trust_remote_code
        )
        start, name = time.perf_counter(), config.rollout.engine
        logger.info("rollout rank %d: starting engine %s", context.rank, name)
        engine_class = registry.load(name, registry.ENGINES, key="rollout.engine")
        if not (isinstance(engine_class, type) and issubclass(engine_class, Engine)):
            problem = f"{name!r} is no subclass of hybridflow.rollout.base.Engine"
            raise ConfigError([Mistake("rollout.engine", problem)])
        self.engine = EngineThread(engine_class(engine_spec(config, context)), agree=lockstep(context.layout, context.rank))
        self.finishing = Finishing([], np.empty(0, np.int32), has_log_probs=False)
        self.weight_sync = RolloutSync(config, context, self.engine)
        logger.info("rollout rank %d: engine %s started in %.0f s", context.rank, name, time.perf_counter() - start)

    @classmethod
    def layout_of(cls, config: Config, num_ranks: int) -> Layout:
        tensor = config.rollout.tensor_parallel
        if num_ranks % tensor:
            divisors = ", ".join(str(n) for n in range(1, num_ranks + 1) if num_ranks % n == 0)
            problem = f"found {tensor}, which does not divide the {num_ranks} ranks of the pool. Use one of {divisors}"
            raise ConfigError([Mistake("rollout.tensor_parallel", problem)])
        per_node = parse_pool(config.placement.pools[pool_of("rollout", config)]).ranks_per_node
        # The paper's groups (section 5.3): what a rank trains then lies inside what it generates with, on one node.
        stride = per_node // tensor if per_node % tensor == 0 and num_ranks % per_node == 0 else 1
        return Layout(data=num_ranks // tensor, tensor=tensor, tensor_stride=stride)

    @remote("split_by_data_rank")
    def generate(self, batch: Batch, *, sampling: Sampling | None = None) -> Batch:
        """One response to each row's `prompt`, as new columns: `response`, `response_text`, `response_tokens`, `truncated`,
        and `rollout_log_probs` where `sampling.log_probs`. `sampling` is the configured one of training by default.

        A response is a function of weights, prompt, sampling and the row's `seed` and `sample`.
        """
        sampling = sampling or training_sampling(self.config)
        return self._columns(self.engine.generate(_requests(batch, sampling)), has_log_probs=sampling.log_probs)

    @remote("split_by_data_rank")
    def submit(self, batch: Batch, *, sampling: Sampling | None = None) -> None:
        """Start to generate what `generate` would, without waiting: `generate_part` hands it out.

        `batch` has a light column `position`, by which the caller knows its rows again.
        """
        is_answering = self.context.layout.tensor_rank(self.context.rank) == 0
        num_forgotten = self.finishing.num_left if is_answering else 0
        assert not num_forgotten, f"{num_forgotten} rows of an earlier submit were not asked for"
        sampling = sampling or training_sampling(self.config)
        futures = self.engine.submit(_requests(batch, sampling))
        self.finishing = Finishing(futures, batch["position"], has_log_probs=sampling.log_probs)

    @remote("gather_rows")
    def generate_part(self, num_parts_left: int) -> Batch:
        """Wait until the next of `num_parts_left` equal parts of the rows still out has finished, and hand it out with all else
        that has: the columns of `generate` and `position`, rows in the order of positions. A rank that has none left waits for
        none; of one part, it hands out all that is left.
        """
        positions, responses = self.finishing.take(-(-self.finishing.num_left // num_parts_left))
        columns = self._columns(responses, has_log_probs=self.finishing.has_log_probs)
        return columns.with_columns(position=positions)

    def _columns(self, responses: list[Response], *, has_log_probs: bool) -> Batch:
        rows = [response.tokens for response in responses]
        # Of no rows, transformers makes one empty text.
        texts = self.tokenizer.batch_decode([row.tolist() for row in rows], skip_special_tokens=True) if rows else []
        columns = Batch.from_columns(
            {
                "response": Ragged.from_rows(rows, np.int32),
                "response_text": list(texts),
            }
        )
        if has_log_probs:
            log_probs = [response.log_probs for response in responses if response.log_probs is not None]
            assert len(log_probs) == len(responses), "the engine left out log-probabilities that were asked for"
            columns = columns.join(Batch.from_columns({"rollout_log_probs": Ragged.from_rows(log_probs, np.float32)}))
        return columns.with_columns(
            response_tokens=np.array([len(row) for row in rows], np.int64),
            truncated=np.array([response.finish_reason == "length" for response in responses], np.bool_),
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the engine's weights by full tensors under their Hugging Face names. Waits until the engine is idle."""
        with self.engine.paused() as engine:
            engine.load_weights(weights)

    @remote("one_to_all")
    def sync_weights(self) -> Metrics:
        """Take the weights of the actor on the same pool. Metrics are named `sync/...`.

        Raises:
            WeightMismatchError: the engine holds something else afterwards.
        """
        return self.weight_sync.from_peer()

    @remote("one_to_all")
    def open_transfer(self, address: str) -> None:
        """Prepare to take weights from the actor of another pool, which gave this address."""
        self.weight_sync.open(address)

    @remote("one_to_all")
    def receive_weights(self) -> Metrics:
        """Take the weights that `actor.send_weights` sends at the same time. Metrics and errors as of `sync_weights`."""
        return self.weight_sync.receive()

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
        """End the engine and its thread."""
        self.engine.close()


def engine_spec(config: Config, context: RankContext) -> EngineSpec:
    """What the engine of this rank is built from."""
    rollout = config.rollout
    return EngineSpec(
        model=config.model.path,
        dtype=rollout.dtype_on(context.device.type),
        max_model_tokens=config.max_model_tokens,
        max_requests=rollout.max_requests,
        seed=config.run.seed,
        seed_requests=rollout.seed_requests,
        device=context.device,
        layout=context.layout,
        rank=context.rank,
        memory_fraction=rollout.memory_fraction,
        cpu_cache_gib=rollout.cpu_cache_gib,
        enforce_eager=rollout.enforce_eager,
        options=dict(rollout.engine_options),
        tokenizer=config.model.tokenizer,
        trust_remote_code=config.model.trust_remote_code,
        can_sleep=rollout.sleep is True,
    )


class Finishing:
    """The rows of a `submit`, handed out in the order in which their responses finish.

    Ranks that share an engine may differ in that order, since what has finished before it is asked for comes by row: only the
    answers of one of them, the first of their data rank, are read.
    """

    def __init__(self, futures: Sequence[Future[Response]], positions: Array, *, has_log_probs: bool):
        self.num_left, self.positions, self.has_log_probs = len(futures), positions, has_log_probs
        self._finished: SimpleQueue[tuple[int, Future[Response]]] = SimpleQueue()
        for row, future in enumerate(futures):
            future.add_done_callback(partial(self._note, row))

    def _note(self, row: int, future: Future[Response]) -> None:
        self._finished.put((row, future))

    def take(self, num_rows: int) -> tuple[Array, list[Response]]:
        """Positions and responses of the next `num_rows` to finish and of all that have by then, by ascending position. Waits
        for those `num_rows`.

        Raises:
            EngineError: one of them has no response.
        """
        taken = [self._finished.get() for _ in range(num_rows)]
        with suppress(Empty):
            while True:
                taken.append(self._finished.get_nowait())
        self.num_left -= len(taken)
        taken.sort(key=lambda finished: finished[0])
        return self.positions[[row for row, _ in taken]], [future.result() for _, future in taken]


def _requests(batch: Batch, sampling: Sampling) -> list[Request]:
    return [
        Request(id=row, prompt=prompt.astype(np.int32, copy=False), sampling=sampling, seed=int(seed))
        for row, (prompt, seed) in enumerate(zip(batch.tokens("prompt"), _seeds(batch), strict=True))
    ]


def _seeds(batch: Batch) -> npt.NDArray[np.int64]:
    sample = batch["sample"] if "sample" in batch else np.zeros(len(batch), np.int64)
    return mixed_seed(batch["seed"], sample)
