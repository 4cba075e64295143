"""What an update computes, against counts by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from benchmarks.ppo_step import flops_of_roles, num_training_ranks, summary
from benchmarks.shapes import SHAPES
from hybridflow.models.lora import Adapters, add_adapters
from hybridflow.models.policy import PolicyModel
from hybridflow.workers.utilisation import FlopsPerToken, flops_per_token

# 0.5b, hidden 896, 14 heads and 2 of keys and values, of 64 each. A layer: queries and output 2 x 802,816, keys and values
# 2 x 114,688, feed-forward 3 x 4,358,144, together 14,909,440; 24 of them 357,826,560. Vocabulary 136,134,656.
# 7b, hidden 3,584, 28 heads and 4, of 128 each. A layer: 2 x 12,845,056, 2 x 1,835,008, 3 x 67,895,296, together 233,046,016;
# 28 of them 6,525,288,448. Vocabulary 544,997,376, once for the look-up and once more as output layer.
TIED_ACTOR = FlopsPerToken(backbone=2_146_959_360, output=816_807_936)
TIED_CRITIC = FlopsPerToken(backbone=2_146_959_360, output=6 * 896)
UNTIED_ACTOR = FlopsPerToken(backbone=39_151_730_688, output=3_269_984_256)


@pytest.mark.parametrize(
    ("shape", "role", "expected"),
    [("0.5b", "actor", TIED_ACTOR), ("0.5b", "critic", TIED_CRITIC), ("7b", "actor", UNTIED_ACTOR)],
)
def test_looked_up_embeddings_and_missing_output_layers_cost_nothing(shape: str, role: str, expected: FlopsPerToken) -> None:
    assert flops_of_roles(SHAPES[shape])[role] == expected


def test_only_response_tokens_go_through_the_output_layer() -> None:
    assert FlopsPerToken(backbone=100.0, output=10.0).of(7, 3) == 730


def test_frozen_weights_cost_two_thirds_and_adapters_come_on_top() -> None:
    pytest.importorskip("peft")
    with torch.device("meta"):
        causal_lm = Qwen2ForCausalLM(SHAPES["0.5b"].config())
        add_adapters(causal_lm, Adapters(rank=2, alpha=4.0, targets=("q_proj",), seed=0))
    found = flops_per_token(PolicyModel(causal_lm, chunk_tokens=1))
    # Two factors of 2 x 896 in each of 24 layers: 86,016 trained weights. The others are those of the tied actor.
    assert found == FlopsPerToken(backbone=4 * 357_826_560 + 6 * 86_016, output=4 * 136_134_656)


def test_a_benchmark_counts_what_each_trained_role_computes() -> None:
    step = {
        "prompt/tokens_mean": 100.0,
        "response/tokens_mean": 400.0,
        "actor/tokens": 4000.0,
        "critic/tokens": 4000.0,
        "seconds/step": 5.0,
        "tokens_per_second": 1000.0,
        "seconds/actor.update": 0.05,
        "seconds/critic.update": 0.03,
    }
    found = summary(SHAPES["0.5b"], [step] * 3)["training_utilisation"]
    # 10 rows of 100 + 400 tokens: the actor 2.1470e9 x 5,000 + 8.1681e8 x 4,000 = 1.40020e13, the critic 1.07348e13,
    # in 0.08 s of 790e12 each.
    assert found == pytest.approx(2.47368e13 / 0.08 / 790e12, rel=1e-4)
    alone = {name: value for name, value in step.items() if not name.startswith(("critic/", "seconds/critic"))}
    found = summary(SHAPES["0.5b"], [alone] * 3)["training_utilisation"]
    assert found == pytest.approx(1.40020e13 / 0.05 / 790e12, rel=1e-4)
    shared = summary(SHAPES["0.5b"], [alone] * 3, num_ranks=2)["training_utilisation"]
    assert shared == pytest.approx(found / 2)


@pytest.mark.parametrize(
    ("placement", "num_ranks"),
    [
        ("{pools: {main: 1x2, scoring: 1x1 cpu}, roles: {data: scoring}}", 2),
        ("{pools: {gen: 1x4, train: 2x8}, roles: {actor: train}}", 16),
    ],
)
def test_a_benchmark_counts_the_ranks_of_the_pool_that_trains(placement: str, num_ranks: int, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"placement: {placement}")
    assert num_training_ranks(tmp_path) == num_ranks
