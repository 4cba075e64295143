"""Evaluate a model: `python -m hybridflow.evaluate MODEL_OR_CHECKPOINT --data FILE ... [key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import sys
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hybridflow.config.load import load_config, to_yaml
from hybridflow.config.schema import Config
from hybridflow.ending import as_process, ended_command, show

if TYPE_CHECKING:
    from hybridflow.controller.evaluation import Results

ALGORITHM = "hybridflow.algorithms.evaluation:Evaluation"
KEPT = {
    "run": ("device",),
    "model": ("tokenizer", "trust_remote_code"),
    "data": ("max_prompt_tokens", "max_response_tokens", "apply_chat_template", "chat_template_options"),
    "rollout": ("engine", "stop", "stop_token_ids", "dtype"),
    "validation": ("temperature", "top_p", "top_k", "responses_per_prompt", "correct_reward"),
    "reward": None,
    "environment": None,
}
"""What holds of a run when its checkpoint is evaluated, unless something else is asked for; None is a whole section."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `key=value` may stand behind `--data` too.

    Example:
        >>> parse(["model", "--data", "a.parquet", "reward.name=gsm8k"]).overrides
        ['reward.name=gsm8k']
    """
    parser = argparse.ArgumentParser(prog="python -m hybridflow.evaluate", description=__doc__)
    parser.add_argument("model", metavar="MODEL_OR_CHECKPOINT", help="Hugging Face folder or name, checkpoint, or run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of a run, such as reward.path=my.py")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="Parquet files of prompts")
    parser.add_argument("--engine", help="rollout.engine: torch, vllm, sglang or your own")
    parser.add_argument("--responses", type=int, help="to each prompt; more than one need a temperature")
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--k", type=int, nargs="+", help="of pass@k and majority@k; by default the powers of two")
    parser.add_argument("--role", default="actor", help="of a checkpoint: whose weights")
    parser.add_argument(
        "--source", metavar="MODEL", help="of a checkpoint: the model that training started from, if it was moved"
    )
    parser.add_argument("--output", default="outputs/evaluation", metavar="DIR", help="where rows and results go")
    options = parser.parse_intermixed_args(arguments)
    swallowed = [each for each in options.data if "=" in each and not Path(each).expanduser().is_file()]
    options.overrides += swallowed
    options.data = [each for each in options.data if each not in swallowed]
    if not options.data:
        parser.error("argument --data: expected at least one file")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print a table; returns 0 done, 1 it failed, 2 the request has errors, 128 + n stopped by signal n."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    options = parse(arguments)
    return ended_command("The evaluation", partial(_evaluated, options))


def _evaluated(options: argparse.Namespace) -> int:
    config = evaluation_config(options)
    num_responses = config.validation.responses_per_prompt
    ks = options.k or [k for k in (1 << power for power in range(16)) if k <= num_responses]
    if bad := [k for k in ks if not 1 <= k <= num_responses]:
        sys.stderr.write(f"--k: found {bad[0]}; there are {num_responses} responses to each prompt. Raise --responses\n")
        return 2
    from hybridflow.controller.evaluation import evaluate

    show(table(evaluate(config, ks)))
    show(f"every row: {config.run.folder}/rows.parquet; results: {config.run.folder}/results.json\n")
    return 0


def evaluation_config(options: argparse.Namespace) -> Config:
    """The configuration of the run that only validates.

    Raises:
        ConfigError: with every error found.
        CheckpointError: the model is neither a Hugging Face folder or name nor a checkpoint.
    """
    output = Path(options.output)
    model, settings = options.model, dict[str, object]()
    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        model, settings = exported(folder, output, role=options.role, source=options.source)
    asked = {
        "run.folder": str(output),
        "model.path": model,
        "rollout.engine": options.engine,
        "validation.responses_per_prompt": options.responses,
        "validation.temperature": options.temperature,
    }
    files = "[" + ", ".join(f"'{file}'" for file in options.data) + "]"
    overrides = [f"{key}={value}" for key, value in asked.items() if value is not None]
    overrides += [f"algorithm={ALGORITHM}", f"data.train_files={files}", f"data.validation_files={files}"]
    output.mkdir(parents=True, exist_ok=True)
    base = output / "of_checkpoint.yaml"
    base.write_text(to_yaml(settings) if settings else "")
    return load_config(str(base), [*overrides, *options.overrides])


def exported(checkpoint: Path, output: Path, *, role: str, source: str | None = None) -> tuple[str, dict[str, object]]:
    """A checkpoint's weights as a Hugging Face folder below `output`, and the settings of its run that hold here.

    What an earlier evaluation of the same checkpoint has left there is taken.
    """
    from hybridflow.checkpoint.export import export_checkpoint
    from hybridflow.checkpoint.manifest import MANIFEST
    from hybridflow.checkpoint.store import CheckpointStore, find

    found = find(checkpoint)
    # Runs in folders of the same name, and a run that began anew, have checkpoints of the same name.
    content = zlib.crc32((found / MANIFEST).read_bytes()) if (found / MANIFEST).is_file() else 0
    target = output / "models" / f"{found.parent.parent.name}-{found.name}-{role}-{content:08x}"
    if not (target / "config.json").is_file():
        export_checkpoint(found, target, role=role, source=source)
    saved = CheckpointStore.read_state(found).config
    settings: dict[str, object] = {}
    for section, names in KEPT.items():
        values = saved.get(section)
        if isinstance(values, Mapping):
            settings[section] = {name: value for name, value in values.items() if names is None or name in names}
    return str(target), settings


def table(results: Results) -> str:
    """The results as text, one line for each source and measure."""
    lines = [f"{'source':<24} {'measure':<14} {'value':>8}   95 % interval       prompts"]
    for source, found in results.items():
        for name, estimate in found.items():
            interval = f"[{estimate.low:.4f}, {estimate.high:.4f}]"
            lines.append(f"{source:<24} {name:<14} {estimate.value:>8.4f}   {interval:<18}  {estimate.num_prompts:>7}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    as_process(main)
