"""The three stages of InstructGPT on a CPU: fine-tuning, a reward model, PPO with it; and DPO from the same preferences.

    python examples/three_stages/run.py --folder outputs/three_stages --seed 0

Ouyang et al. 2022, arXiv:2203.02155. Everything that happens is a command that you could type yourself; each is shown before it
runs. At the end a table says what each stage did to the measure that it is for, on rows that it has not learned from.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(os.path.relpath(Path(__file__).parent))
MEASURES = (
    ("sft", "held_out/loss", "held-out loss, nats per token"),
    ("reward_model", "held_out/accuracy", "held-out pairs in the right order"),
    ("ppo", "validation/reward/model", "score of the reward model"),
    ("ppo", "validation/reward/true_score", "true score"),
    ("dpo", "held_out/margin", "held-out margin"),
    ("dpo", "validation/reward/true_score", "true score"),
)
"""Run, metric, and what it is."""

console = Console()


def command(*arguments: object) -> None:
    """Show a command of this interpreter and run it; ends this program where it fails."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n$ python {shlex.join(words)}", style="bold", markup=False, highlight=False, soft_wrap=True)
    code = subprocess.run([sys.executable, *words], check=False).returncode
    if code:
        sys.exit(f"The command above failed with exit code {code}.")


def train(stage: str, folder: Path, seed: int, **paths: str | Path) -> None:
    """Run a stage of this folder's YAML, with its files below `folder`."""
    given = [f"{key.replace('__', '.')}={value}" for key, value in paths.items()]
    command("-m", "hybridflow.train", HERE / f"{stage}.yaml", f"run.folder={folder / stage}", f"run.seed={seed}", *given)


def run(folder: Path, seed: int) -> None:
    """All stages, one after the other."""
    data, start, reward = folder / "data", folder / "start", folder / "reward"
    command(HERE / "counting.py", "--folder", data, "--seed", seed)
    command(HERE.parent / "quickstart" / "make_model.py", "--folder", folder / "model", "--kind", "bytes", "--seed", seed)
    chats = {"data__train_files": f"[{data}/chats.parquet]", "data__held_out_files": f"[{data}/chats_held_out.parquet]"}
    train("sft", folder, seed, model__path=folder / "model", **chats)
    command("-m", "hybridflow.export", folder / "sft", start)
    pairs = {
        "data__train_files": f"[{data}/preferences.parquet]",
        "data__held_out_files": f"[{data}/preferences_held_out.parquet]",
    }
    train("reward_model", folder, seed, model__path=start, **pairs)
    command("-m", "hybridflow.export", folder / "reward_model", reward, "--role", "reward_model")
    models = {"model__path": start, "critic__path": reward, "reward_model__path": reward}
    validation = {"data__validation_files": f"[{data}/validation.parquet]"}
    train("ppo", folder, seed, **models, data__train_files=f"[{data}/prompts.parquet]", **validation)
    train("dpo", folder, seed, model__path=start, **pairs, **validation)


def first_and_last(run_folder: Path, metric: str) -> tuple[float, float]:
    """Of what a run has measured of a metric."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    values = [float(line[metric]) for line in lines if line.get(metric) is not None]
    return values[0], values[-1]


def results(folder: Path) -> Table:
    """What each stage did."""
    table = Table(title="What the stages did, on rows that they have not learned from")
    for column in ("stage", "measure", "before", "after"):
        table.add_column(column, justify="left" if column in ("stage", "measure") else "right")
    for stage, metric, meaning in MEASURES:
        before, after = first_and_last(folder / stage, metric)
        table.add_row(stage, meaning, f"{before:.3f}", f"{after:.3f}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and do it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/three_stages"), help="where everything goes; emptied first"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and sampling")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    shutil.rmtree(options.folder, ignore_errors=True)
    run(options.folder, options.seed)
    console.print("\n", results(options.folder))
    console.print(f"took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
