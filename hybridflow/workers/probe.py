"""Do engine and trainer agree on a few tokens? The check of the first syncs, and where weights cannot be read back.

The engine answers the same fixed prompt after every sync, long enough to fill blocks of its prefix cache: a cache left over
from older weights shows in the number of tokens that the engine took from it, however little the weights have moved. Of engines
that do not tell that number it shows in the log-probabilities, where the weights have moved by more than the tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import Config
from hybridflow.errors import DivergenceError, EngineError, WeightMismatchError
from hybridflow.rollout.base import Engine, Request, Response, Sampling
from hybridflow.workers.base import RankContext

PROMPT_TOKENS = 300
"""Two blocks of the largest default, 128 tokens (vLLM on CPU), and some more."""
RESPONSE_TOKENS = 8
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3, "float8": 0.6}
"""Mean |difference| in nats, by the coarser dtype of the two sides. Kernels alone differ by 1e-5 and 0.02, in bfloat16 by up to
0.1 and in float8 by up to 0.25 where the distribution is very uneven."""
SMALLEST_VOCABULARY = 8


@runtime_checkable
class ScoresRows(Protocol):
    """A worker that computes log-probabilities of responses."""

    def log_probs(self, batch: Batch) -> Batch:
        """Column `log_probs` for `prompt` and `response`."""
        ...


def probe(engine: Engine, actor: ScoresRows, config: Config, context: RankContext) -> float:
    """Mean |difference| of log-probabilities between engine and trainer over the probe's tokens, in nats.

    Every rank of the pool calls this: scoring is a forward pass of all.

    Raises:
        WeightMismatchError: it is above the tolerance.
        DivergenceError: the trainer's are not finite.
    """
    response_tokens = min(RESPONSE_TOKENS, engine.spec.max_model_tokens - 1)
    prompt_tokens = min(PROMPT_TOKENS, engine.spec.max_model_tokens - response_tokens)
    prompt = np.random.default_rng(0).integers(0, SMALLEST_VOCABULARY, prompt_tokens, dtype=np.int32)
    sampling = Sampling(temperature=config.rollout.temperature or 1.0, max_tokens=response_tokens, ignore_eos=True)
    request = Request(id=0, prompt=prompt, sampling=sampling, seed=config.run.seed)
    (response,) = engine.generate([request])
    if response.num_cached_tokens:
        raise WeightMismatchError(
            f"after the weight sync the engine of {context.role} rank {context.rank} took {response.num_cached_tokens} of "
            f"{len(prompt)} probe tokens from its prefix cache, which holds keys and values of older weights. Look at the "
            "engine's reset_prefix_cache"
        )
    if not len(response.tokens):
        raise EngineError(
            f"the engine of {context.role} rank {context.rank} answered a prompt of {len(prompt)} tokens by none. It was "
            f"to give {response_tokens} and ignore the end of sequence. Look at rollout.engine={config.rollout.engine}"
        )
    row = as_rows([request], [response])
    trained = actor.log_probs(without_log_probs(row)).tokens("log_probs").values
    if not np.isfinite(trained).all():
        raise DivergenceError(
            f"the trained model gives {np.sum(~np.isfinite(trained))} of {len(trained)} probe tokens log-probabilities that "
            "are not finite, though its weights are: it has diverged. Go on from an earlier checkpoint with a lower "
            "actor.learning_rate; before the first update, look at the files of model.path"
        )
    difference = float(np.abs(trained - row.tokens("rollout_log_probs").values).mean())
    tolerance = TOLERANCE[probe_dtype(engine, config, context)]
    if not difference <= tolerance:  # not a number counts as different
        raise WeightMismatchError(
            f"after the weight sync the engine of {context.role} rank {context.rank} gives {len(response.tokens)} probe tokens "
            f"log-probabilities that differ from the trainer's by {difference:.3g} nats on average; {tolerance} is allowed. "
            "Either weights did not arrive, or the engine still serves prefixes cached under older ones"
        )
    return difference


def as_rows(requests: Sequence[Request], responses: Sequence[Response]) -> Batch:
    """What was asked and answered, with the engine's `rollout_log_probs`."""
    given = [response.log_probs for response in responses if response.log_probs is not None]
    assert len(given) == len(responses), "the engine left out log-probabilities that were asked for"
    return Batch.from_columns(
        {
            "prompt": Ragged.from_rows([request.prompt for request in requests], np.int32),
            "response": Ragged.from_rows([response.tokens for response in responses], np.int32),
            "rollout_log_probs": Ragged.from_rows(given, np.float32),
            "prompt_tokens": np.array([len(request.prompt) for request in requests]),
            "response_tokens": np.array([len(response.tokens) for response in responses]),
        }
    )


def without_log_probs(rows: Batch) -> Batch:
    """As whoever scores them is to see them: a mismatch of a probe is none of the step's."""
    tokens = {name: rows.tokens(name) for name in ("prompt", "response")}
    counts = {name: rows[name] for name in ("prompt_tokens", "response_tokens")}
    return Batch.from_columns({**tokens, **counts})


def probe_dtype(engine: Engine, config: Config, context: RankContext) -> Literal["float8", "bfloat16", "float32"]:
    """The coarser one of those that engine and trainer compute in."""
    if config.model.float8:
        return "float8"
    is_coarse = "bfloat16" in (engine.spec.dtype, config.model.compute_dtype) or context.device.type == "cuda"
    return "bfloat16" if is_coarse else "float32"
