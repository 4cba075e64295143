"""Every algorithm of the table for a step of real models in this process: masks, several updates, stale rows, KL everywhere."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridflow import registry
from hybridflow.algorithms.base import Algorithm
from hybridflow.algorithms.options import UpdateOptions
from hybridflow.batch import Batch
from hybridflow.config.schema import AlgorithmConfig, Config, DataConfig, LoopConfig, ReferenceConfig
from hybridflow.data.prepare import PreparedRow, write_parquet
from hybridflow.metrics import Metrics
from hybridflow.parallel.layout import Layout
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import Worker
from hybridflow.workers.critic import CriticWorker
from hybridflow.workers.pretraining import PretrainingWorker
from hybridflow.workers.reference import ReferenceWorker
from hybridflow.workers.remote import remote
from hybridflow.workers.reward import RewardWorker
from hybridflow.workers.rollout import RolloutWorker
from hybridflow.workers.token_functions import count_loss_tokens
from tests.architecture import limits
from tests.metric_names import unexplained
from tests.training_rows import (
    context_of,
    disturbed,
    masked,
    model_without_zero_weights,
    random_batch,
    training_config,
    whole_weights,
)
from tests.unit.local_groups import LocalDispatcher


def algorithm_class(name: str) -> type[Algorithm]:
    loaded = registry.load(name, registry.ALGORITHMS, key="algorithm.name")
    assert isinstance(loaded, type) and issubclass(loaded, Algorithm)
    return loaded


WITH_TEXT = "ppo_ptx"
"""Learns from a second stream too: tests/unit/test_ppo_ptx.py."""
NAMES = sorted(name for name in registry.ALGORITHMS if algorithm_class(name).rows == "prompts" and name != WITH_TEXT)
"""Algorithms that generate what they learn from, and from nothing else."""
RESPONSES = random_batch([(3, 5), (3, 40), (3, 7), (20, 1), (20, 9), (20, 6)])
PROMPTS = RESPONSES.select([0, 3]).with_columns(group=np.array([0, 1]))
REWARDS = np.array([1.0, 0.0, 0.25, 0.5, 1.0, 0.0], np.float32)
WITH_MASK = masked(RESPONSES)
WITH_MASK = WITH_MASK.join(count_loss_tokens(WITH_MASK, context_of("data")))


class Answers(RolloutWorker):
    """Gives the rows of `said`, three to each prompt; of a call for one row each, every third."""

    __init__ = Worker.__init__
    answers_row_by_row = False
    said = RESPONSES

    @remote("split_by_data_rank")
    def generate(self, batch: Batch, *, sampling: object = None) -> Batch:
        names = ("response", "response_tokens", "rollout_log_probs", "loss_mask", "loss_tokens")
        found = only(self.said, *(name for name in names if name in self.said))
        return found if len(batch) == len(found) else found.select(np.arange(0, len(found), len(found) // len(batch)))


class Scores(RewardWorker):
    """Gives `REWARDS`."""

    scores_whole_batches = False
    __init__ = Worker.__init__

    @remote("split_by_data_rank")
    def score(self, batch: Batch) -> Batch:
        rewards = REWARDS[:: len(REWARDS) // len(batch)]
        return Batch({"reward": rewards, "reward/cost": rewards[::-1].copy()})


ROLES: Mapping[str, type[Worker]] = {
    "actor": ActorWorker,
    "critic": CriticWorker,
    "reference": ReferenceWorker,
    "teacher": ReferenceWorker,
    "rollout": Answers,
    "reward": Scores,
    "pretraining": PretrainingWorker,
}


def only(batch: Batch, *names: str) -> Batch:
    return Batch.from_columns({name: batch[name] if name in batch.per_row else batch.tokens(name) for name in names})


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_without_zero_weights(str(tmp_path_factory.mktemp("model")))


def teacher_of(path: str) -> str:
    """A model beside the one in `path`, with other weights."""
    folder = Path(path).with_name("teacher")
    if not folder.is_dir():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data *= 1.2
        model.save_pretrained(folder)
    return str(folder)


def text_of(path: str) -> str:
    """A file of text beside the model in `path`."""
    file = Path(path).with_name("text.parquet")
    if not file.is_file():
        write_parquet(
            [PreparedRow(prompt=f"{n}+", response=f"{n}=1", ground_truth="", data_source="x") for n in range(5)], file
        )
    return str(file)


def config_of(path: str, algorithm: type[Algorithm], *, max_staleness: int = 0, **options: object) -> Config:
    if algorithm is algorithm_class(WITH_TEXT):
        options["pretraining_files"] = (text_of(path),)
    return dataclasses.replace(
        training_config(path, tokens_per_microbatch=1000),
        algorithm=AlgorithmConfig(options=algorithm.config_class(responses_per_prompt=3, **options)),
        data=DataConfig(prompts_per_step=len(PROMPTS), max_response_tokens=40),
        loop=LoopConfig(max_staleness=max_staleness),
        teacher=ReferenceConfig(path=teacher_of(path)),
    )


def step_of(path: str, name: str, **options: object) -> tuple[Metrics, dict[str, torch.Tensor], list[str]]:
    """Metrics, the actor's weights, and the actor's calls of one step of two prompts."""
    algorithm = algorithm_class(name)
    config = config_of(path, algorithm, **options)
    assert not algorithm.check(config)
    workers = {role: ROLES[role](config, context_of(role)) for role in algorithm.roles(config)}
    dispatchers = {role: LocalDispatcher([one], Layout(), pool_name=role) for role, one in workers.items()}
    built = algorithm(config, {role: type(one).group(dispatchers[role]) for role, one in workers.items()})
    built.step = 1
    rows = built.collect(only(PROMPTS, "prompt", "prompt_tokens", "group"))
    metrics = built.learn(rows) + dispatchers["actor"].reported
    actor = workers["actor"]
    assert isinstance(actor, ActorWorker)
    return metrics, whole_weights(actor.named_tensors()), dispatchers["actor"].called


@pytest.fixture(scope="module")
def start(model_path: str) -> dict[str, torch.Tensor]:
    actor = ActorWorker(training_config(model_path), context_of("actor"))
    return whole_weights(actor.named_tensors())


VARIANTS = {
    "as it is": {},
    "several updates": {"prompts_per_update": 1, "epochs": 2},
    "stale rows": {"max_staleness": 1},
    "stale rows, several updates": {"max_staleness": 1, "epochs": 2},
    "KL in the reward": {"kl_in": "reward", "kl_estimator": "abs", "kl_coefficient": 0.1},
    "KL in the loss, straight through": {"kl_in": "loss", "kl_estimator": "k3+", "kl_coefficient": 0.1},
    "no KL, sequence mean of sums": {"kl_in": "none", "loss_aggregation": "sequence_mean_of_sums"},
    "fixed normaliser": {"loss_aggregation": "sequence_sum", "loss_length": 17, "entropy_coefficient": 0.01},
}


STEPS = [
    (name, variant)
    for name in (*NAMES, WITH_TEXT)
    for variant, options in VARIANTS.items()
    if name != "distillation" or options.get("kl_in", "none") == "none"  # the teacher takes the reference's place
    if name != WITH_TEXT or "loss_aggregation" not in options  # each kind has its own token mean
]


@pytest.mark.parametrize(("name", "variant"), STEPS)
def test_a_step_trains_and_says_finite_numbers(
    model_path: str, start: dict[str, torch.Tensor], name: str, variant: str
) -> None:
    metrics, weights, _ = step_of(model_path, name, **VARIANTS[variant])
    assert np.isfinite(list(metrics.values())).all(), dict(metrics)
    assert not unexplained(metrics)
    assert metrics["actor/skipped_updates"] == 0
    assert any(not torch.equal(weight, start[key]) for key, weight in weights.items())


@pytest.mark.parametrize("options", [{"epochs": 2}, {"max_staleness": 1}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_stands_at_a_masked_token_changes_no_bit(
    model_path: str, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, object]
) -> None:
    found = []
    for said in (WITH_MASK, disturbed(WITH_MASK)):
        monkeypatch.setattr(Answers, "said", said)
        found.append(step_of(model_path, name, **options))
    (told, weights, _), (other_told, other_weights, _) = found
    assert dict(told) == dict(other_told) and np.isfinite(list(told.values())).all()
    assert all(torch.equal(weight, other_weights[key]) for key, weight in weights.items())


@pytest.mark.parametrize("name", NAMES)
def test_present_log_probabilities_stand_for_old_ones_only_in_a_step_with_one_update(model_path: str, name: str) -> None:
    _, _, calls = step_of(model_path, name, epochs=2)
    assert calls[0] == "log_probs"
    _, _, calls = step_of(model_path, name, kl_in="none")
    assert "log_probs" not in calls


@pytest.mark.parametrize("name", [*NAMES, WITH_TEXT])
def test_a_page_is_one_file_of_at_most_a_hundred_lines_with_a_config_of_its_own(name: str) -> None:
    algorithm = algorithm_class(name)
    path = Path(inspect.getfile(algorithm))
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= (170 if name.startswith("ppo") else 100)
    assert algorithm.config_class.__module__ == algorithm.__module__
    assert dataclasses.fields(algorithm.config_class) and issubclass(algorithm.config_class, UpdateOptions)
    used = {module for _, module in limits.imported_modules(limits.Source(path.name, path.read_text(encoding="utf-8")))}
    assert not {module for module in used if module.startswith("hybridflow.algorithms.")} - {
        f"hybridflow.algorithms.{part}"
        for part in (*(f"base.{name}" for name in BASE), *(f"options.{name}" for name in OPTIONS), "mixing.mixed")
    }, "a page takes nothing from another page"


BASE = vars(importlib.import_module("hybridflow.algorithms.base"))
OPTIONS = vars(importlib.import_module("hybridflow.algorithms.options"))

WITHOUT_ONE = """
import sys
from hybridflow import registry
from hybridflow.config.schema import AlgorithmConfig, Config
missing = sys.argv[1]
sys.modules[registry.ALGORITHMS[missing].partition(":")[0]] = None
broken, NEEDED = [], ("teacher.path", "algorithm.pretraining_files")
for name in registry.ALGORITHMS:
    try:
        algorithm = registry.load(name, registry.ALGORITHMS, key="algorithm.name")
        run = Config(algorithm=AlgorithmConfig(name=name, options=algorithm.config_class()))
        assert algorithm.roles(run) and all(error.key in NEEDED for error in algorithm.check(run))
    except Exception as error:
        broken.append(name)
print(",".join(broken))
"""


@pytest.mark.parametrize("name", sorted(registry.ALGORITHMS))
def test_removing_a_page_breaks_only_itself(name: str) -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_ONE, name], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == name
