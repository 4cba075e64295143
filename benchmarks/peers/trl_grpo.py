"""Seconds per step of GRPO in TRL, as a user would set it up, on the shape, prompts and lengths of one of our workloads.

    python -m benchmarks.peers.trl_grpo W3 --steps 10 --folder /tmp/bench --out benchmarks/results

GRPOTrainer generates with vLLM in its own process (on CUDA; with transformers on a CPU) and takes Liger's kernels where they
are installed. Responses run to the length limit, as in ours. Needs `pip install trl` and, on CUDA, vLLM.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from benchmarks.ppo_step import WARM_UP_STEPS, WORKLOADS, Workload
from benchmarks.record import circumstances, command
from benchmarks.shapes import SHAPES, make_model, make_prompts
from hybridflow.config.rules import is_installed

if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer

MICROBATCH_ROWS = 32
"""The largest power of two with which W3 fitted an H200 beside vLLM."""
PROMPT_TOKENS = 256


def reward(completions: Sequence[str], **columns: object) -> list[float]:
    """Something that differs between the responses to a prompt, as our parity reward."""
    return [float(len(text) % 2) for text in completions]


def settings(workload: Workload, folder: Path, steps: int) -> GRPOConfig:
    """TRL's configuration of a workload: all rows of a step in one update, in microbatches."""
    from trl import GRPOConfig

    rows, has_gpu = workload.prompts * workload.responses_per_prompt, torch.cuda.is_available()
    tokens = workload.response_tokens
    to_the_limit: dict[str, Any] = {"ignore_eos": True} if has_gpu else {"min_new_tokens": tokens}
    of_device: dict[str, Any] = {"use_cpu": True}
    if has_gpu:
        of_device = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": 0.3,
            "vllm_max_model_length": PROMPT_TOKENS + tokens,
            "use_liger_kernel": is_installed("liger_kernel"),
        }
    return GRPOConfig(
        output_dir=str(folder / "runs" / "trl"),
        max_steps=steps,
        per_device_train_batch_size=min(MICROBATCH_ROWS, rows),
        gradient_accumulation_steps=max(1, rows // MICROBATCH_ROWS),
        num_generations=workload.responses_per_prompt,
        max_completion_length=tokens,
        generation_kwargs=to_the_limit,
        beta=0.001,
        learning_rate=1e-6,
        bf16=has_gpu,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **of_device,
    )


def trainer(workload: Workload, folder: Path, steps: int) -> GRPOTrainer:
    """TRL's trainer, with model and prompts of ours."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import GRPOTrainer

    prompts = load_dataset("parquet", data_files=str(folder / "prompts.parquet"), split="train").select_columns(["prompt"])
    return GRPOTrainer(
        model=str(folder / workload.shape / "model"),
        reward_funcs=reward,
        args=settings(workload, folder, steps),
        train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(folder / workload.shape / "tokenizer", padding_side="left"),
    )


def seconds_of_steps(runner: GRPOTrainer) -> list[float]:
    """Train, and say when each step was done after the one before it."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends = [time.perf_counter()]

        def on_step_end(self, *arguments: object, **named: object) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    clock = Clock()
    runner.add_callback(clock)
    runner.train()
    return [end - begin for begin, end in zip(clock.ends, clock.ends[1:], strict=False)]


def run(name: str, folder: Path, steps: int) -> dict[str, object]:
    """Measure one workload; the numbers have the form and the names of benchmarks/ppo_step.py."""
    workload, shape = WORKLOADS[name], SHAPES[WORKLOADS[name].shape]
    make_model(folder / workload.shape, shape)
    make_prompts(folder / "prompts.parquet", num_prompts=2048, vocabulary=shape.vocabulary)
    seconds = seconds_of_steps(trainer(workload, folder, steps))
    measured = seconds[min(WARM_UP_STEPS, len(seconds) - 1) :]
    tokens = workload.prompts * workload.responses_per_prompt * workload.response_tokens
    medians = {"seconds/step": statistics.median(measured), "seconds/first_step": seconds[0]}
    medians |= {"seconds/step_min": min(measured), "seconds/step_max": max(measured)}
    medians["response_tokens_per_second"] = tokens / medians["seconds/step"]
    if torch.cuda.is_available():
        medians["memory/peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps_taken = [{"step": number + 1, "seconds/step": taken} for number, taken in enumerate(seconds)]
    found = circumstances(command("benchmarks.peers.trl_grpo"), device)
    return {**found, "workload": name, "framework": "trl", "medians": medians, "steps": steps_taken}


def main() -> None:
    """Run a workload in TRL; says so and does nothing where TRL is not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=[name for name, one in WORKLOADS.items() if one.responses_per_prompt > 1])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    if not is_installed("trl"):
        console.print("not run: TRL is not installed (pip install trl)")
        return
    result = run(options.workload, options.folder.absolute(), options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"trl_grpo_{options.workload}.json").write_text(json.dumps(result, indent=1))
    console.print(json.dumps(result["medians"], indent=1))


if __name__ == "__main__":
    main()
