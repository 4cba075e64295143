"""A language model gets better before your eyes: data, a toy model, fine-tuning, reinforcement learning, and what came of it.

    python examples/quickstart/run.py --algorithm ppo --seed 0

Everything that happens is a command that you could type yourself; each is shown before it runs. `make quickstart` sets up
the environment and then runs this file.
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
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from hybridflow import registry
from hybridflow.config.load import load_algorithm
from hybridflow.config.rules import PACKAGES, is_installed

HERE = Path(os.path.relpath(Path(__file__).parent))
CONFIGS = Path(os.path.relpath(Path(__file__).parents[2] / "configs"))
RL_CONFIGS = {"ppo": "quickstart.yaml", "grpo": "quickstart_grpo.yaml"}
NEED_MORE = {"distillation", "safe_rlhf", "ppo_ptx"}
"""Algorithms that learn from a teacher, a cost or further data: docs/algorithms.md says how to run them."""
ACCURACY = "validation/reward/mean"

console = Console()


@dataclass(frozen=True)
class Folders:
    """Where things go, below one folder."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def model(self) -> Path:
        """Random weights."""
        return self.root / "model"

    @property
    def sft(self) -> Path:
        """The run of fine-tuning."""
        return self.root / "sft"

    @property
    def start(self) -> Path:
        """The fine-tuned model, as a Hugging Face folder: where reinforcement learning starts."""
        return self.root / "start"

    @property
    def rl(self) -> Path:
        """The run of reinforcement learning."""
        return self.root / "rl"


def command(*arguments: object, keep_output: bool = False) -> str:
    """Show a command of this interpreter and run it on this terminal; with `keep_output`, return what it wrote instead.

    Ends this program where the command fails.
    """
    words = [str(argument) for argument in arguments]
    console.print(f"\n$ python {shlex.join(words)}", style="bold", markup=False, highlight=False, soft_wrap=True)
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE if keep_output else None, text=True) as process:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:  # Ctrl-C reaches the command too, which says what it leaves behind
            sys.exit(process.wait())
    if process.returncode:
        sys.exit(f"The command above failed with exit code {process.returncode}.")
    return output or ""


def prepare(folders: Folders, *, seed: int) -> None:
    """Write data and a random model, and fine-tune it."""
    command(HERE / "make_data.py", "--folder", folders.data, "--seed", seed)
    command(HERE / "make_model.py", "--folder", folders.model, "--seed", seed)
    command(
        *("-m", "hybridflow.train", CONFIGS / "quickstart_sft.yaml", f"run.folder={folders.sft}", f"run.seed={seed}"),
        *(f"model.path={folders.model}", f"data.train_files=[{folders.data}/train.parquet]"),
    )
    newest = max((folders.sft / "checkpoints").glob("step_*"))
    command("-m", "hybridflow.export", newest, folders.start)


def algorithms() -> list[str]:
    """The algorithms that generate what they learn from, and need no role beyond the quickstart's."""
    classes = {name: load_algorithm(name) for name in registry.ALGORITHMS}
    return sorted(name for name, found in classes.items() if getattr(found, "rows", "") == "prompts" and name not in NEED_MORE)


def train_command(folders: Folders, algorithm: str, run_folder: Path, *more: str, seed: int) -> None:
    """Train the fine-tuned model with rewards; those without a configuration have GRPO's data and their own defaults."""
    config = RL_CONFIGS.get(algorithm, RL_CONFIGS["grpo"])
    chosen = [] if algorithm in RL_CONFIGS else [f"algorithm={algorithm}"]
    command(
        *("-m", "hybridflow.train", CONFIGS / config, *chosen, f"run.folder={run_folder}", f"run.seed={seed}"),
        *(f"model.path={folders.start}", *more),
        *(f"data.train_files=[{folders.data}/train.parquet]", f"data.validation_files=[{folders.data}/validation.parquet]"),
    )


def reinforce(folders: Folders, options: argparse.Namespace) -> None:
    """Train the fine-tuned model with rewards; validates before, during and after."""
    steps = [f"run.total_steps={options.steps}"] if options.steps else []
    train_command(folders, options.algorithm, folders.rl, f"rollout.engine={options.engine}", *steps, seed=options.seed)


def read_jsonl(path: Path) -> list[dict[str, object]]:
    """The objects of a file with one per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def accuracies(run_folder: Path) -> dict[int, float]:
    """Step -> share of right answers to the validation problems, one sampled answer to each."""
    lines = read_jsonl(run_folder / "metrics.jsonl")
    return {int(str(line["step"])): float(str(line[ACCURACY])) for line in lines if ACCURACY in line}


def accuracy_table(measured: dict[int, float], *, num_problems: int) -> Table:
    """The accuracies as a table, ending with what was gained."""
    table = Table(title=f"Right answers to {num_problems:,} new problems")
    table.add_column("after step", justify="right")
    table.add_column("accuracy", justify="right")
    table.add_column("")
    for step, accuracy in sorted(measured.items()):
        table.add_row(str(step), f"{accuracy:.3f}", "█" * round(40 * accuracy))
    first, last = measured[min(measured)], measured[max(measured)]
    table.add_section()
    table.add_row("gained", f"{last - first:+.3f}", "")
    return table


def sample_table(samples: Sequence[dict[str, object]]) -> Table:
    """Some answers of the trained model as a table."""
    table = Table(title="Sample answers after training")
    for column in ("prompt", "response", "right answer", "reward"):
        table.add_column(column)
    for sample in samples:
        table.add_row(*(str(sample[key]) for key in ("prompt", "response", "ground_truth", "reward")))
    return table


def show_results(folders: Folders) -> None:
    """Tables, three answers, and where to look next."""
    measured = accuracies(folders.rl)
    num_problems = pq.ParquetFile(folders.data / "validation.parquet").metadata.num_rows
    samples = [sample for sample in read_jsonl(folders.rl / "samples.jsonl") if sample["step"] == max(measured)]
    plots = command("-m", "hybridflow.report", folders.rl, keep_output=True).splitlines()
    console.print("\n", accuracy_table(measured, num_problems=num_problems), "\n", sample_table(samples[:3]))
    for plot in plots:
        console.print(f"plot         {plot}", highlight=False, soft_wrap=True)
    console.print(f"metrics      {folders.rl / 'metrics.jsonl'}", highlight=False, soft_wrap=True)
    tensorboard = f"{Path(sys.executable).parent / 'tensorboard'} --logdir {folders.rl}"
    console.print(f"TensorBoard  {tensorboard}", highlight=False, soft_wrap=True)


def engine_problem(name: str) -> str | None:
    """Why `name` cannot generate here; None where it can."""
    package, advice = PACKAGES.get(("rollout.engine", name), ("hybridflow", ""))
    missing = None if is_installed(package) else f"{name} is not installed: {advice}"
    return registry.unknown_name(name, registry.ENGINES) or missing


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and do it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=algorithms(), default="ppo")
    parser.add_argument("--seed", type=int, default=0, help="of problems, weights and sampling")
    parser.add_argument("--engine", default="torch", help="what generates: torch, vllm, or another of the table")
    parser.add_argument("--steps", type=int, help="of reinforcement learning; by default what the configuration says")
    parser.add_argument("--folder", type=Path, default=Path("outputs/quickstart"), help="where everything goes; emptied first")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"argument --steps: found {options.steps}; needed: at least 1")
    if problem := engine_problem(options.engine):
        parser.error(f"argument --engine: {problem}")
    folders = Folders(options.folder)
    started = time.perf_counter()
    for stale in (folders.data, folders.model, folders.sft, folders.start, folders.rl):
        shutil.rmtree(stale, ignore_errors=True)
    prepare(folders, seed=options.seed)
    prepared = time.perf_counter()
    reinforce(folders, options)
    trained = time.perf_counter()
    show_results(folders)
    console.print(f"took         {prepared - started:.0f} s to prepare, {trained - prepared:.0f} s to train with rewards")


if __name__ == "__main__":
    main()
