"""Rows that were sampled and rows of text in one update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hybridflow.batch import Batch
from hybridflow.workers.token_functions import Filled

if TYPE_CHECKING:
    from hybridflow.workers.actor import ActorWorker


def mixed(part: Batch, text: Batch, actor: ActorWorker, read: Sequence[str], *, temperature: float) -> Batch:
    """The rows of an update for a loss that reads the per-token columns `read` of the sampled rows `part`, and of `text` none.

    Each row has the weights that `ops.PretrainingLoss` asks for, and the temperature at which it counts: text at 1, sampled
    rows at their own.
    """
    is_masked = "loss_mask" in part or "loss_mask" in text
    tokens = [int(rows["loss_tokens" if "loss_tokens" in rows else "response_tokens"].sum()) for rows in (part, text)]
    if missing := Filled(dict.fromkeys(read, 0.0), has_mask=is_masked and "loss_mask" not in text):
        text = text.join(actor.compute(text, missing))
    if is_masked and "loss_mask" not in part:
        part = part.join(actor.compute(part, Filled({}, has_mask=True)))
    # By these rows are divided evenly over ranks.
    counts = [name for name in ("prompt_tokens", "response_tokens") if name in part and name in text]
    named = {"prompt", "response", *counts, *read, *(["loss_mask"] if is_masked else [])}
    sampled_at = part["temperature"] if "temperature" in part else np.full(len(part), temperature)
    of_policy, of_text = (sum(tokens) / max(of_kind, 1) for of_kind in tokens)
    kinds = []
    for rows, at, weights in ((part, sampled_at, (of_policy, 0.0)), (text, np.ones(len(text)), (0.0, of_text))):
        columns = {
            name: np.full(len(rows), weight, np.float32)
            for name, weight in zip(("policy_weight", "text_weight"), weights, strict=True)
        }
        kept = rows.without([name for name in rows.names if name not in named])
        kinds.append(kept.with_columns(temperature=at.astype(np.float64), **columns))
    return Batch.concatenate(kinds)
