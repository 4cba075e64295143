"""PPO-ptx: sampled rows and text in one update."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from hybridflow import ops
from hybridflow.algorithms.mixing import mixed
from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import Config
from hybridflow.controller.protocols import Arguments, SplitByDataRank
from hybridflow.ops.reduce import Counts, token_weights
from hybridflow.parallel.layout import Layout
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import Worker
from tests.training_rows import context_of
from tests.unit.local_groups import LocalDispatcher

SAMPLED, TEXT = [2, 3], [4]
POLICY = ops.PolicyLoss(surrogate=partial(ops.clipped, clip=(0.2, 0.2)), advantage="advantages")


class Actor(ActorWorker):
    __init__ = Worker.__init__


def rows(lengths: list[int], **columns: list[float]) -> Batch:
    tokens = Ragged.from_lengths(np.arange(sum(lengths), dtype=np.int32), np.array(lengths))
    numbers = {name: Ragged.from_lengths(np.array(values, np.float32), np.array(lengths)) for name, values in columns.items()}
    prompt = Ragged.from_rows([[1]] * len(lengths), np.int32)
    return Batch.from_columns({"prompt": prompt, "response": tokens, "response_tokens": np.array(lengths), **numbers})


def update_rows() -> Batch:
    worker = Actor(Config(), context_of("actor"))
    actor = Actor.group(LocalDispatcher([worker], Layout(), pool_name="actor"))
    part = rows(SAMPLED, advantages=[1.0, -1.0, 0.5, 2.0, -3.0], log_probs=[-1.0, -2.0, -0.5, -1.5, -3.0])
    return mixed(part, rows(TEXT), actor, POLICY.columns, temperature=0.7)


def test_each_kind_has_its_own_mean() -> None:
    batch = update_rows()
    lengths_B = torch.tensor([*SAMPLED, *TEXT])
    new = [-1.1, -1.0, -0.5, -1.7, -100.0, -1.0, -2.0, -3.0, -100.0]
    new_T = torch.tensor(new, requires_grad=True)
    columns = {name: torch.tensor(batch.tokens(name).values) for name in POLICY.columns}
    per_row = {name: torch.tensor(batch[name]).repeat_interleave(lengths_B) for name in ("policy_weight", "text_weight")}
    weights_T = token_weights(lengths_B, aggregation="token_mean", counts=Counts(tokens=9, rows=3))
    loss = ops.PretrainingLoss(policy=POLICY, coefficient=0.5)
    tokens = ops.TokenBatch(log_probs_T=new_T, columns=columns | per_row, lengths_B=lengths_B, weights_T=weights_T)
    value, metrics = loss(tokens)
    value.backward()
    # The surrogate of five sampled tokens: -min(r A, clip(r) A), r = exp(new - old), clipped to 0.8 .. 1.2 where that is less.
    ratios = np.exp(np.array(new[:5]) - np.array([-1.0, -2.0, -0.5, -1.5, -3.0]))
    advantages = np.array([1.0, -1.0, 0.5, 2.0, -3.0])
    of_policy = np.mean(-np.minimum(ratios * advantages, np.clip(ratios, 0.8, 1.2) * advantages))
    of_text = (1.0 + 2.0 + 3.0 + 100.0) / 4
    assert value.item() == pytest.approx(of_policy + 0.5 * of_text, rel=1e-5)
    assert new_T.grad is not None and new_T.grad[5:].tolist() == pytest.approx([-0.5 / 4] * 4)
    assert torch.isfinite(new_T.grad).all()
    text = metrics["pretraining_loss"]
    assert float(text.total / text.count) == pytest.approx(of_text)


def test_ranks_get_equal_work_by_the_tokens_of_both_kinds() -> None:
    worker = Actor(Config(), context_of("actor"))
    actor = Actor.group(LocalDispatcher([worker], Layout(), pool_name="actor"))
    part = rows([9, 1, 1]).with_columns(prompt_tokens=np.array([1, 1, 1]))
    text = rows([1, 1, 1]).with_columns(prompt_tokens=np.array([1, 1, 1]))
    both = mixed(part, text, actor, [], temperature=1.0)
    parts = SplitByDataRank(Layout(data=2)).distribute(Arguments((both,), {}))
    lengths = [sorted(cut.args[0]["response_tokens"].tolist()) for cut in parts if cut is not None]
    assert sorted(lengths) == [[1, 1, 1, 1, 1], [9]]


def test_text_counts_at_temperature_one() -> None:
    assert update_rows()["temperature"].tolist() == [0.7, 0.7, 1.0]


def test_a_mask_of_one_kind_is_all_ones_for_the_other() -> None:
    part = rows(SAMPLED).join(Batch.from_columns({"loss_mask": Ragged.from_rows([[1, 0], [0, 1, 1]], np.bool_)}))
    worker = Actor(Config(), context_of("actor"))
    actor = Actor.group(LocalDispatcher([worker], Layout(), pool_name="actor"))
    both = mixed(part.with_columns(loss_tokens=np.array([1, 2])), rows(TEXT), actor, [], temperature=1.0)
    assert both.tokens("loss_mask").values.tolist() == [1, 0, 0, 1, 1, 1, 1, 1, 1]
    # 3 of 7 tokens that count are sampled, 4 are text
    assert both["policy_weight"].tolist() == pytest.approx([7 / 3, 7 / 3, 0]) and both["text_weight"][2] == pytest.approx(7 / 4)
