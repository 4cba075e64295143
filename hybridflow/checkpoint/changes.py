"""What differs between the configuration that wrote a checkpoint and the one that goes on from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

WITHOUT_EFFECT = (
    "run.folder",
    "run.ray_address",
    "run.timeout_s",
    "data.validation_files",
    "rollout.gpu_memory_utilization",
    "rollout.cpu_cache_gib",
    "rollout.enforce_eager",
    "rollout.sleep",
    "rollout.verify_weights",
    "rollout.sync_bucket_mib",
    "reward.num_processes",
    "placement.cpu_slots",
    "validation.",
    "checkpoint.",
    "trackers.",
)
"""What keys begin with on which nothing depends that is trained. `offload_...` keys are of this kind too."""

OF_MODEL_OR_DATA = ("model.", "data.train_files", "data.train_weights", "data.max_prompt_tokens", "placement.workers")
"""What keys begin with that say which parameters and which rows there are. Keys `ROLE.path` are of this kind too."""
PART_OF_THE_WEIGHTS = ("model.lora_alpha", "model.lora_rank", "model.lora_targets")
"""Keys without whose value the saved numbers are another policy."""


def of_model_or_data(changed: Sequence[str]) -> list[str]:
    """Those of the lines of `changes` that can make a checkpoint unfit for the run."""
    return [line for line in changed if line.startswith(OF_MODEL_OR_DATA) or line.partition(":")[0].endswith(".path")]


def changes(written: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """One line for each key that differs and matters: `actor.learning_rate: 1e-06 then, 2e-06 now`.

    Both are configurations as nested dicts. A key that only one of them has belongs to another release and is left out.
    """
    before, after = dict(_keys(written)), dict(_keys(_as_read_back(now)))
    return [
        f"{key}: {_shown(before[key])} then, {_shown(value)} now"
        for key, value in after.items()
        if key in before and before[key] != value and not key.startswith(WITHOUT_EFFECT) and ".offload_" not in key
    ]


def changes_of_the_policy(lines: Sequence[str], *, has_adapters: bool) -> list[str]:
    """Those of the lines of `changes` by which the weights of the checkpoint would mean another policy than the one saved."""
    found = [line for line in lines if line.startswith(PART_OF_THE_WEIGHTS)]
    return found if has_adapters or any(line.startswith("model.lora_rank") for line in found) else []


def _keys(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for section, keys in config.items():
        assert isinstance(keys, Mapping), f"section {section!r} of a configuration"
        for key, value in keys.items():
            if (section, key) == ("algorithm", "options") and isinstance(value, Mapping):
                yield from ((f"algorithm.{name}", option) for name, option in value.items())
            else:
                yield f"{section}.{key}", value


def _as_read_back(config: Mapping[str, object]) -> Mapping[str, object]:
    """As it would come out of a checkpoint, where tuples are lists."""
    read: Mapping[str, object] = json.loads(json.dumps(config, default=str))
    return read


def _shown(value: object) -> str:
    return "null" if value is None else json.dumps(value) if isinstance(value, list | dict) else str(value)
