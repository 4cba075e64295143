"""Seconds per training step of whole runs, by phase, on models of real shape with random weights.

    python -m benchmarks.ppo_step W1 W2 W3 --steps 10 --folder /tmp/bench --out benchmarks/results

Each workload is an ordinary `hybridflow.train` run; the numbers come from its metrics.jsonl, medians after two warm-up steps.

- W1: PPO, Qwen2.5-0.5B shape for actor, critic and reference; 64 prompts of GSM8K length, 512 response tokens each,
  mini-batch of 32 prompts, one GPU.
- W2: the same with 512 prompts, mini-batch 256.
- W3: GRPO, 64 prompts x 8 responses of 512 tokens, no critic, one GPU.
- W4: GRPO, Qwen2.5-7B shape, 128 prompts x 8 responses of 1,024 tokens on 4 GPUs, rollout tensor parallel 2.
- W5: GRPO, Qwen2.5-0.5B shape, 64 prompts x 8 responses, the lengths of which are log-normal with mean 400 and at most 4,096
  tokens: long ones hold up a step that waits for all. W5s1 lets generation run one step ahead on the same GPU, W5x2 is W5 on
  two GPUs that do both, W5s1x2 has one GPU for each side.
- W4s1: GRPO, Qwen2.5-7B shape, 32 prompts x 8 responses of 256 tokens, two GPUs that train and two that generate (tensor
  parallel 2), one step ahead: what pushing weights into running engines costs.
- tiny: W1's shape in small, for a CPU; tiny3 likewise W3, tiny5 and tiny5s1 W5.

With `--against COMMIT_OR_FOLDER` two versions run in turns (ours, theirs, ours, theirs) on this host; what counts are ratios:

    python -m benchmarks.ppo_step W1 --against 23c9331 --their-set actor.tokens_per_microbatch=24576 model.compile=true

benchmarks/gate.py compares such a result with the one that was recorded last.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import Qwen2ForCausalLM

from benchmarks.against import Checkout, checked_out, own_checkout, ratios
from benchmarks.record import circumstances
from benchmarks.shapes import SHAPES, Shape, make_model, make_prompts
from hybridflow.config.pools import parse_pool
from hybridflow.models.heads import ValueModel
from hybridflow.models.policy import PolicyModel
from hybridflow.workers.utilisation import FlopsPerToken, flops_per_token

HERE = Path(os.path.relpath(Path(__file__).parent))
WARM_UP_STEPS = 2
SUMMARISED = ("seconds/", "sync/", "memory/", "controller/", "stream/", "staleness/", "importance/", "mismatch/")
PEAK_FLOPS = 790e12
"""What a bf16 matrix product reaches on one H200, measured; utilisation is relative to this."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A run to be measured."""

    shape: str
    prompts: int
    response_tokens: int
    responses_per_prompt: int = 1
    overrides: Mapping[str, object] = field(default_factory=dict)


COMMON = {
    "rollout.ignore_eos": "true",
    "validation.before_training": "false",
    "validation.every_steps": 0,
    "checkpoint.every_steps": 0,
    "checkpoint.save_last": "false",
    "trackers.names": "[console]",
    "reward.path": HERE / "parity_reward.py",
    "data.max_prompt_tokens": 256,
    "model.compile": "true",  # ten steps stand for a run of thousands, in which auto would be that
}
PPO = {"algorithm": "ppo", "algorithm.kl_coefficient": 0.001}
GRPO = {"algorithm": "grpo", "algorithm.responses_per_prompt": 8, "algorithm.kl_coefficient": 0.001}
ON_FOUR = {"placement.pools.main": "1x4", "rollout.tensor_parallel": 2}
TINY = {"rollout.engine": "torch", "run.device": "cpu", "model.compile": "false"}

LENGTHS = {"algorithm": "benchmarks.log_normal:LogNormalGRPO"}
AHEAD = {"loop.max_staleness": 1}
APART = {"placement.pools": "{main: 1x1, generation: 1x1, scoring: 1x1 cpu}", "placement.roles.rollout": "generation"}
SPLIT_IN_HALF = {
    "placement.pools": "{main: 1x2, generation: 1x2, scoring: 1x1 cpu}",
    "placement.roles.rollout": "generation",
    "rollout.tensor_parallel": 2,
}
W5 = Workload(shape="0.5b", prompts=64, response_tokens=4096, responses_per_prompt=8, overrides=GRPO | LENGTHS)
TINY5 = Workload(shape="tiny", prompts=8, response_tokens=256, responses_per_prompt=4, overrides=GRPO | TINY | LENGTHS)

WORKLOADS = {
    "W1": Workload(shape="0.5b", prompts=64, response_tokens=512, overrides=PPO | {"algorithm.prompts_per_update": 32}),
    "W2": Workload(shape="0.5b", prompts=512, response_tokens=512, overrides=PPO | {"algorithm.prompts_per_update": 256}),
    "W3": Workload(
        shape="0.5b",
        prompts=64,
        response_tokens=512,
        responses_per_prompt=8,
        overrides=GRPO,
    ),
    "W4": Workload(
        shape="7b",
        prompts=128,
        response_tokens=1024,
        responses_per_prompt=8,
        overrides=GRPO | ON_FOUR,
    ),
    "W4s1": Workload(
        shape="7b",
        prompts=32,
        response_tokens=256,
        responses_per_prompt=8,
        overrides=GRPO | AHEAD | SPLIT_IN_HALF,
    ),
    "W5": W5,
    "W5s1": replace(W5, overrides=W5.overrides | AHEAD),
    "W5x2": replace(W5, overrides=W5.overrides | {"placement.pools.main": "1x2"}),
    "W5s1x2": replace(W5, overrides=W5.overrides | AHEAD | APART),
    "tiny3": Workload(shape="tiny", prompts=4, response_tokens=32, responses_per_prompt=8, overrides=GRPO | TINY),
    "tiny5": TINY5,
    "tiny5s1": replace(TINY5, overrides=TINY5.overrides | AHEAD | APART),
    "tiny": Workload(shape="tiny", prompts=16, response_tokens=32, overrides=PPO | TINY | {"algorithm.prompts_per_update": 8}),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How workloads are run."""

    folder: Path
    steps: int
    extra: Mapping[str, object]
    """More settings, for every workload."""


def settings_of(name: str, options: Options) -> dict[str, object]:
    """The keys of a workload."""
    workload, folder = WORKLOADS[name], options.folder
    return {
        **COMMON,
        **workload.overrides,
        "run.folder": folder / "runs" / name,
        "run.total_steps": options.steps,
        "model.path": folder / workload.shape / "model",
        "model.tokenizer": folder / workload.shape / "tokenizer",
        "data.train_files": f"[{folder / 'prompts.parquet'}]",
        "data.prompts_per_step": workload.prompts,
        "data.max_response_tokens": workload.response_tokens,
        "checkpoint.resume": "never",
        **options.extra,
    }


def command(settings: Mapping[str, object]) -> list[str]:
    """The training command with these keys."""
    pairs = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "hybridflow.train", str(HERE / "ppo_step.yaml"), *pairs]


def read_steps(folder: Path) -> list[dict[str, float]]:
    """The metrics of each step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flops_of_roles(shape: Shape) -> dict[str, FlopsPerToken]:
    """What a token costs each role that may be trained."""
    with torch.device("meta"):
        causal_lm = Qwen2ForCausalLM(shape.config())
        causal_lm.tie_weights()
        models = {"actor": PolicyModel(causal_lm, chunk_tokens=1), "critic": ValueModel(causal_lm)}
    return {role: flops_per_token(model) for role, model in models.items()}


def training_flops(roles: Mapping[str, FlopsPerToken], step: Mapping[str, float]) -> float:
    """Floating-point operations of the updates of one step, of all trained models."""
    prompt_share = step["prompt/tokens_mean"] / step["response/tokens_mean"]
    total = 0.0
    for role, flops in roles.items():
        response_tokens = step.get(f"{role}/tokens", 0.0)
        total += flops.of(response_tokens * (1 + prompt_share), response_tokens)
    return total


def num_training_ranks(folder: Path) -> int:
    """Ranks of the pool that trains, from the configuration that a run has left in its folder."""
    placement = yaml.safe_load((folder / "config.yaml").read_text())["placement"]
    pools = placement["pools"]
    return parse_pool(pools[placement["roles"].get("actor", next(iter(pools)))]).num_ranks


def summary(shape: Shape, steps: list[dict[str, float]], *, num_ranks: int = 1) -> dict[str, float]:
    """Medians over the steps after warm-up, and the utilisation of the training phase by the ranks that train."""
    measured = steps[min(WARM_UP_STEPS, len(steps) - 1) :]
    names = sorted({name for step in measured for name in step if name.startswith(SUMMARISED)})
    medians = {name: statistics.median(step.get(name, 0.0) for step in measured) for name in [*names, "tokens_per_second"]}
    medians["response/tokens_mean"] = statistics.median(step["response/tokens_mean"] for step in measured)
    updating = sum(medians.get(f"seconds/{role}.update", 0.0) for role in ("actor", "critic"))
    if updating:
        roles = flops_of_roles(shape)
        flops = statistics.median(training_flops(roles, step) for step in measured)
        medians["training_utilisation"] = flops / updating / num_ranks / PEAK_FLOPS
    medians["seconds/step_min"] = min(step["seconds/step"] for step in measured)
    medians["seconds/step_max"] = max(step["seconds/step"] for step in measured)
    return medians


def show(name: str, medians: Mapping[str, float]) -> None:
    """Print the medians as a table."""
    table = Table(title=f"{name}: medians of the steps after warm-up")
    table.add_column("what")
    table.add_column("value", justify="right")
    for key, value in medians.items():
        table.add_row(key, f"{value:,.4g}")
    Console(width=100).print(table)


def prepare(name: str, folder: Path) -> None:
    """Write the model and the prompts of a workload, where they are not there."""
    shape = SHAPES[WORKLOADS[name].shape]
    make_model(folder / WORKLOADS[name].shape, shape)
    make_prompts(folder / "prompts.parquet", num_prompts=2048, vocabulary=shape.vocabulary)


def run(name: str, options: Options, checkout: Checkout) -> dict[str, object]:
    """Run one workload in a version of the project, and return its raw numbers with what is needed to repeat them."""
    settings, words = checkout.adapted(settings_of(name, options))
    for word in words:
        Console(soft_wrap=True).print(f"{checkout.label}: {word}", markup=False, highlight=False)
    line = command(settings)
    started = time.time()
    subprocess.run(line, check=True, cwd=checkout.folder, env=checkout.environment())
    run_folder = options.folder / "runs" / name
    measured = read_steps(run_folder)
    medians = summary(SHAPES[WORKLOADS[name].shape], measured, num_ranks=num_training_ranks(run_folder))
    medians["seconds/command_to_first_step"] = measured[0]["time"] - measured[0]["seconds/step"] - started
    medians["seconds/command_to_end_of_first_step"] = measured[0]["time"] - started
    show(f"{name} ({checkout.label})", medians)
    device = "cuda" if torch.cuda.is_available() and settings.get("run.device") != "cpu" else "cpu"
    found = circumstances(shlex.join(["python", *line[1:]]), device)
    return {**found, "workload": name, "commit": checkout.label, "adapted": words, "medians": medians, "steps": measured}


def compare(name: str, ours: Options, theirs: Options, *, against: str, turns: int) -> dict[str, object]:
    """Run a workload in this version and another in turns; the ratios are of medians over all turns, ours over theirs."""
    taken: dict[str, list[dict[str, object]]] = {"ours": [], "theirs": []}
    with checked_out(against) as other:
        for _ in range(turns):
            taken["ours"].append(run(name, ours, own_checkout()))
            taken["theirs"].append(run(name, theirs, other))
        label = other.label
    medians = {side: [cast("dict[str, float]", one["medians"]) for one in turn] for side, turn in taken.items()}
    found = ratios(medians["ours"], medians["theirs"])
    show(f"{name}: this version over {label}", found)
    first = {key: taken["ours"][0][key] for key in ("date", "device", "host", "versions", "workload", "commit")}
    return {**first, "against": label, "ratios": found, "turns": taken}


def main() -> None:
    """Run the workloads that are named, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="more settings for every workload")
    parser.add_argument("--suffix", default="", help="added to the names of the result files")
    parser.add_argument("--against", metavar="COMMIT_OR_FOLDER", help="another version, to run in turns with this one")
    parser.add_argument("--turns", type=int, default=2, help="runs of each version")
    parser.add_argument("--their-set", nargs="*", default=[], metavar="key=value", help="more settings for the other version")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    extra = dict(pair.split("=", 1) for pair in given.set)
    ours = Options(folder=given.folder.absolute(), steps=given.steps, extra=extra)
    theirs = replace(ours, extra=extra | dict(pair.split("=", 1) for pair in given.their_set))
    for name in given.workloads:
        prepare(name, ours.folder)
        if given.against:
            result = compare(name, ours, theirs, against=given.against, turns=given.turns)
            file = f"ppo_step_{name}_against_{str(result['against']).replace('/', '_')}{given.suffix}.json"
        else:
            result, file = run(name, ours, own_checkout()), f"ppo_step_{name}{given.suffix}.json"
        (given.out / file).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
