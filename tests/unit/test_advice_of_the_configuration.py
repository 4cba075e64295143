"""What a mistake in the configuration says to set is set, and the mistake is gone and no other has come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from hybridflow.config import rules
from hybridflow.config.load import load_config
from hybridflow.config.settings import SECTIONS
from tests.unit.config_cases import mistakes_of, right_run

VALUE = r"('[^']*'|\[[^\]]*\]|[^\s,;)]+?)(?=[\s,;)]|\.?$|\.\s)"
ASSIGNED = re.compile(rf"(?<![\w.])((?:{'|'.join(sorted(SECTIONS))})(?:\.[a-z_]+)*)=" + VALUE)
CASES: dict[str, tuple[str, ...]] = {
    "ahead without rewards": ("loop.max_staleness=1", "algorithm=sft"),
    "torch cuts no weights": ("placement.pools={main: 1x2, scoring: 1x1}", "rollout.tensor_parallel=2"),
    "ranks that do not divide": (
        "rollout.engine=vllm",
        "placement.pools={main: 1x2, scoring: 1x1}",
        "placement.cpu_slots=4",
        "rollout.tensor_parallel=3",
    ),
    "options of an engine without": ("rollout.engine_options.block_size=16",),
    "top_p with vLLM": ("rollout.engine=vllm", "rollout.top_p=0.9"),
    "raw at a temperature": (
        "rollout.engine=vllm",
        "rollout.temperature=0.7",
        "rollout.engine_options.logprobs_mode=raw_logprobs",
    ),
    "concurrent on a shared pool": ("validation.concurrent=true", "data.validation_files=${data.train_files}"),
    "no GPU": ("run.device=cuda",),
    "more ranks than slots": ("placement.pools={main: 1x64, scoring: 1x1}",),
    "a punishment beside the sum": ("algorithm={name: gdpo, rewards: [a, b], overlong_penalty: 1.0}",),
    "rewards of turns": ("algorithm=reinforce_plus_plus_baseline", "environment={name: 'os:path', rewards: turn}"),
    "updates that do not divide": ("algorithm={name: ppo, prompts_per_update: 5}",),
    "k1 in a loss": ("algorithm={name: grpo, kl_estimator: k1, kl_coefficient: 0.1}",),
    "adaptive in a loss": ("algorithm={name: ppo, kl_in: loss, kl_estimator: k2, kl_controller: adaptive}",),
    "no package for vLLM": ("rollout.engine=vllm", "without vllm"),
    "no package for SGLang": ("rollout.engine=sglang", "without sglang"),
    "no package for attention": ("model.attention=flash_attn", "without flash_attn"),
    "no package for adapters": ("model.lora_rank=4", "without peft"),
    "verl's sides": ("data.truncation=top",),
    "verl's engine": ("actor_rollout_ref.rollout.name=trt",),
    "verl's dropped prompts": ("data.truncation=right",),
    "verl's division": ("algorithm.adv_estimator=rloo", "algorithm.norm_adv_by_std_in_grpo=False"),
    "verl's repetition": ("data.max_prompt_length=128", "actor_rollout_ref.rollout.prompt_length=64"),
}


def alternatives(message: str, given: Sequence[str]) -> list[list[str]]:
    """The commands that a message advises: `given` with other settings."""
    key, _, text = message.removeprefix("command line: ").partition(": ")
    advice = re.split(r"(?<=[a-z0-9)\]'])\. |; (?=or|set)|: (?=pip install|A function)", text)[1:] or [text]
    found: list[list[str]] = []
    for sentence in advice:
        found += [[f"{name}={value}"] for name, value in ASSIGNED.findall(sentence) if "at temperature" not in sentence]
        found += [[f"{name}={value}"] for name, value in re.findall(r"[Ss]et ([a-z_]+): (\w+)", sentence)]
        for start in ("Set it to ", "Use one of ", "Use ", "Set "):
            if sentence.startswith(start) and "=" not in sentence.split(",")[0]:
                values = re.split(r", or |, | or ", re.split(r",? or \w+=", sentence)[0].removeprefix(start).rstrip("."))
                found += [[f"{key}={value}"] for value in values if re.fullmatch(r"[\w+'.-]+", value) and value != "it"]
                break
        if "eave it out" in sentence:
            found.append([])
    found = [
        [one if "." in one.partition("=")[0] or one.startswith("algorithm=") else f"algorithm.{one}" for one in each]
        for each in found
    ]
    return [[*(one for one in given if each or not one.startswith(f"{key}=")), *each] for each in found if each != [f"{key}="]]


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_what_is_advised_is_no_mistake(given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {one.partition(" ")[2] for one in given if one.startswith("without ")}
    monkeypatch.setattr(rules, "is_installed", lambda package: package not in missing)
    overrides = [*right_run(tmp_path), *(one for one in given if not one.startswith("without "))]
    before = mistakes_of(overrides)
    assert before, "the case is meant to be refused"
    tried = 0
    for message in before:
        for again in alternatives(message, overrides):
            tried += 1
            assert set(mistakes_of(again)) < set(before), f"{message}\n  {again[len(overrides) :]}: {mistakes_of(again)}"
    assert tried, before


def test_a_decay_that_leaves_nothing_of_the_weights_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = right_run(tmp_path)
    load_config(None, [*run, "actor.weight_decay=10", "actor.learning_rate=0.001"])
    assert "weight_decay" not in caplog.text
    load_config(None, [*run, "actor.weight_decay=1000", "actor.learning_rate=0.001"])
    assert "actor.weight_decay: found 1000 with actor.learning_rate=0.001: 1 of every weight is taken off" in caplog.text
    load_config(None, [*run, "actor.learning_rate=1e30"])
    assert "actor.learning_rate: found 1e+30: each update moves a weight by about so much" in caplog.text
    assert "actor.weight_decay: found 0.01" not in caplog.text
