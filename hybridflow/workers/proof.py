"""Has a sync reached what the engine cannot show? A perturbed probe, once, at the first sync.

The engine started from the weights that the first sync brings, so an engine that took the names and not the values would agree
with the trainer until it has learned something. Hence half of the elements of every weight that cannot be read back change
their sign on both sides, and both compute the same responses; a part that the engine left as it was shows in the tokens that
pass it. Then the signs change back, which is exact, and the weights are given once more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from hybridflow.batch import Batch
from hybridflow.config.schema import Config
from hybridflow.errors import WeightMismatchError
from hybridflow.rollout.base import Engine, Request, Sampling
from hybridflow.workers.base import RankContext
from hybridflow.workers.probe import ScoresRows, as_rows, probe_dtype, without_log_probs

PROBED_SYNCS = 2
"""Syncs at the start of a run after which log-probabilities are compared too: the first shows whether engine and trainer
compute the same at all, the second whether cached prefixes were forgotten."""
NUM_PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS = 6, 48, 6
"""Enough different tokens that some reach each of many experts."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0, "float8": 2.0}
"""Largest |difference| of a token in nats, by the coarser dtype of the two sides."""


@runtime_checkable
class FlipsSigns(Protocol):
    """A worker whose weights can be perturbed."""

    def flip_signs(self, names: Collection[str]) -> None:
        """Change the sign of half of the elements, always the same, of the weights of these names: twice is not at all."""
        ...


def prove(
    names: Sequence[str], actor: FlipsSigns, engine: Engine, config: Config, context: RankContext, *, sync: Callable[[], object]
) -> None:
    """Perturb the weights of `names`, `sync` them, and compare. Every rank of the pool calls this.

    Raises:
        WeightMismatchError: it names the kinds of weights whose values the engine did not take.
    """

    def differs_with(perturbed: Sequence[str]) -> float | None:
        """The largest difference where it is above the tolerance."""
        assert isinstance(actor, ScoresRows)
        actor.flip_signs(perturbed)
        try:
            sync()
            difference = _largest_difference(engine, actor, config, context)
        finally:
            actor.flip_signs(perturbed)
        return None if difference <= TOLERANCE[probe_dtype(engine, config, context)] else difference

    difference = differs_with(names)
    if difference is not None:
        kinds = kinds_of(names)
        wrong = [kind for kind, members in kinds.items() if differs_with(members) is not None] or list(kinds)
    sync()
    if difference is not None:
        raise WeightMismatchError(not_taken(wrong, difference))


def not_taken(kinds: Iterable[str], difference: float) -> str:
    """What is told where an engine accepts weights of these kinds and goes on with the old ones."""
    return (
        f"an engine accepts weights and does not take their values: with other values of {', '.join(kinds)} its "
        f"log-probabilities differ from the trainer's by up to {difference:.3g} nats. Responses would come from other weights "
        "than those that learn. Look at the engine's load_weights for these names; rollout.verify_weights=false turns this "
        "check off"
    )


def kinds_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Weights that differ in numbers only are of one kind: `model.layers.*.mlp.down_proj.weight`."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return kinds


def probe_rows(engine: Engine, config: Config, context: RankContext) -> Batch:
    """Responses of an idle engine to fixed prompts, with its `rollout_log_probs`, and the `tolerance` of each row."""
    from hybridflow.models.load import load_config
    from hybridflow.models.self_test import text_rows

    most = engine.spec.max_model_tokens
    num_response = min(RESPONSE_TOKENS, most - 1)
    lengths = (min(PROMPT_TOKENS, most - num_response),) * NUM_PROMPTS
    prompts = text_rows(load_config(engine.spec.model, trust_remote_code=config.model.trust_remote_code), lengths)
    sampling = Sampling(temperature=config.rollout.temperature or 1.0, max_tokens=num_response, ignore_eos=True)
    requests = [Request(id=i, prompt=row.astype(np.int32), sampling=sampling, seed=i) for i, row in enumerate(prompts)]
    rows = as_rows(requests, engine.generate(requests))
    tolerance = TOLERANCE[probe_dtype(engine, config, context)]
    return rows.with_columns(tolerance=np.full(len(rows), tolerance))


def differences(rows: Batch, actor: ScoresRows, context: RankContext) -> npt.NDArray[np.float64]:
    """The largest |difference| of each row between `rollout_log_probs` and the trainer's, in nats; infinite where one is no
    number. Every rank of the trainer calls this, and nothing of it is reported."""
    reported = list(context.reported)
    trained = actor.log_probs(without_log_probs(rows)).tokens("log_probs")
    context.reported[:] = reported
    given = rows.tokens("rollout_log_probs")
    by_row = [np.abs(a - b).max(initial=0.0) for a, b in zip(given, trained, strict=True)]
    return np.nan_to_num(np.array(by_row, np.float64), nan=np.inf)


def _largest_difference(engine: Engine, actor: ScoresRows, config: Config, context: RankContext) -> float:
    import torch
    import torch.distributed as dist

    found = differences(probe_rows(engine, config, context), actor, context).max()
    worst = torch.tensor(found, dtype=torch.float32, device=context.device)
    if context.group is not None:  # all ranks go on alike
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=context.group)
    return float(worst)
