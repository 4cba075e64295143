"""From a role's sharded weights to a Hugging Face folder, in one process and a few GiB of memory, whatever the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from hybridflow.checkpoint.advice import after_failed_export, export_from
from hybridflow.checkpoint.sharded import METADATA, load_sharded, read_metadata
from hybridflow.checkpoint.store import CheckpointStore, find
from hybridflow.data.chat import tokenizer_at
from hybridflow.disk import errno_of
from hybridflow.errors import CheckpointError, ModelError
from hybridflow.models import lora
from hybridflow.models.checkpoint_names import CheckpointNames
from hybridflow.models.heads import VALUE_HEAD_FILE
from hybridflow.models.load import load_config, skeleton

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
MODEL_KEY = "model."
"""What the keys of weights begin with in a role's sharded state; the rest is the name in a Hugging Face checkpoint."""
VALUE_HEAD = "value_head."
GENERATION = "generation_config.json"
CONFIGS = ("config.json", "tokenizer_config.json")
"""Files that may name code."""
FILE_BYTES = 4 << 30
"""Most bytes of weights in one file, and at once in memory (in the exported dtype)."""


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The model that training started from: what it is made of is copied from there."""

    path: str
    tokenizer: str
    trust_remote_code: bool
    lora_scale: float
    """What an adapter's product is multiplied by."""


def export_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    role: str = "actor",
    dtype: DtypeName = "auto",
    source: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the weights of `role` to `folder` as a model that `AutoModelForCausalLM` loads, with configuration and tokenizer.

    `checkpoint` may be a run's folder, which means its newest checkpoint. `dtype` auto is that of the model that training
    started from; `source` says where that is, if it was moved. Adapters are merged. A model with a value head gives its
    backbone, which `AutoModel` loads, and `value_head.safetensors` with `weight` and `bias`. `folder` is complete or
    absent. Code that comes with the model is run only with `trust_remote_code`, whatever the run was allowed.

    Raises:
        CheckpointError: there is no such checkpoint or role, a file is damaged, an adapter cannot be merged, or `folder` cannot
            be written.
        ModelError: the model that training started from does not load.
    """
    found, target = find(checkpoint, instead=export_from), Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty. Export to a new folder")
    roles = sorted(path.parent.name for path in found.glob(f"*/{METADATA}"))
    if role not in roles:
        raise CheckpointError(f"{found} has no weights of role {role!r}. It has those of: {', '.join(roles) or 'none'}")
    CheckpointStore.verify(found, instead=export_from)
    origin = _source(CheckpointStore.read_state(found, instead=export_from).config, role, source)
    if not trust_remote_code:
        origin = _without_code(origin)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_model(found / role, temporary, origin, dtype)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        advice = after_failed_export(errno_of(error), folder=target.parent)
        raise CheckpointError(f"{target} could not be written: {error}. {advice}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_model(weights_folder: Path, target: Path, origin: WeightFiles, dtype: DtypeName) -> None:
    try:
        config = load_config(origin.path, trust_remote_code=origin.trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{error}. Training started from it; --source MODEL says where it is if it was moved") from error
    exported = _dtype(config, dtype)
    weights = SavedWeights(weights_folder, lora_scale=origin.lora_scale)
    try:
        model = skeleton(config, trust_remote_code=origin.trust_remote_code)
    except ValueError as error:
        raise ModelError(f"{origin.path} holds no causal language model: {str(error).partition('. Model type')[0]}") from error
    _check_adapters(weights, model)
    head = [name for name in weights.shapes if name.startswith(VALUE_HEAD)]
    names = _checked_names(weights, model, has_value_head=bool(head))
    if head:
        values = {name.removeprefix(VALUE_HEAD): value.to(torch.float32) for name, value in weights.read(head).items()}
        save_file(values, target / VALUE_HEAD_FILE, metadata={"format": "pt"})
        config.architectures = [type(model.base_model).__name__]
    folder_names = CheckpointNames(model)
    fixed = _fixed_tensors(model, folder_names, origin.path)
    _write_weights(weights, target, exported, folder_names.groups(names), folder_names, fixed)
    config.dtype = exported
    config.save_pretrained(target)
    tokenizer_at(origin.tokenizer, trust_remote_code=origin.trust_remote_code).save_pretrained(target)
    _copy_extras(origin, target, has_value_head=bool(head))


class SavedWeights:
    """The weights in a role's sharded state, under the names of a Hugging Face checkpoint, read on demand."""

    def __init__(self, folder: Path, *, lora_scale: float):
        self.folder, self.lora_scale = folder, lora_scale
        self._saved: dict[str, TensorStorageMetadata] = {
            key.removeprefix(MODEL_KEY): entry
            for key, entry in read_metadata(str(folder)).state_dict_metadata.items()
            if key.startswith(MODEL_KEY) and isinstance(entry, TensorStorageMetadata)
        }

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name -> shape of each weight, adapters counted as part of the weight that they change."""
        return {lora.plain_name(name): entry.size for name, entry in self._saved.items() if lora.FACTOR not in name}

    @property
    def adapted(self) -> dict[str, bool]:
        """Layer with an adapter -> whether that is saved as the two factors of a saved weight, and nothing else."""
        factors: dict[str, set[str]] = {}
        for name in self._saved:
            if lora.FACTOR in name:
                factors.setdefault(name.partition(lora.FACTOR)[0], set()).add(name)
        weights = {layer: f"{layer}{lora.BASE}weight" for layer in factors}
        return {
            layer: found == set(lora.factor_names(weights[layer])) and weights[layer] in self._saved
            for layer, found in factors.items()
        }

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """The weights of these names, adapters merged, in the dtype that they were trained in."""
        needed = [saved for name in names for saved in self._parts(name)]
        state = {saved: torch.empty(self._saved[saved].size, dtype=self._saved[saved].properties.dtype) for saved in needed}
        load_sharded(str(self.folder), {MODEL_KEY.rstrip("."): state}, None)
        return lora.merge(state, self.lora_scale)

    def _parts(self, name: str) -> list[str]:
        """What `name` is made of: itself, or the weight before adaptation with both factors of its adapter."""
        if name in self._saved:
            return [name]
        layer, _, leaf = name.rpartition(".")
        adapted = f"{layer}{lora.BASE}{leaf}"
        return [part for part in (adapted, *lora.factor_names(adapted)) if part in self._saved]


def _check_adapters(weights: SavedWeights, model: PreTrainedModel) -> None:
    """Refuse adapters that would be left out or merged wrongly: a Conv1D's weight, for one, is the transpose of a Linear's."""
    kinds = {name: type(layer) for name, layer in model.named_modules()}
    adapted, tied = weights.adapted, model.all_tied_weights_keys
    wrong = sorted(
        layer
        for layer, is_whole in adapted.items()
        # Layers of another model are reported with all other weights that differ.
        if not is_whole or kinds.get(layer, nn.Linear) is not nn.Linear or f"{layer}.weight" in tied
    )
    if wrong:
        kind = kinds[wrong[0]].__name__ if wrong[0] in kinds else "not in the model"
        raise CheckpointError(
            f"{weights.folder} has adapters on {len(adapted)} layers, and those of {len(wrong)} cannot be merged, the first of "
            f"{wrong[0]} ({kind}): a torch.nn.Linear with a weight of its own can, saved with that and both factors. Train "
            "again with such layers in model.lora_targets; if the weights are of another model, give that by --source"
        )


def _checked_names(weights: SavedWeights, model: PreTrainedModel, *, has_value_head: bool) -> list[str]:
    """The weights to be written: exactly what the model is made of, tied weights once."""
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if has_value_head:
        inside = f"{model.base_model_prefix}."
        expected = {name: shape for name, shape in expected.items() if name.startswith(inside)}
    once = set(model.all_tied_weights_keys) - expected.keys()
    found = {name: shape for name, shape in weights.shapes.items() if not name.startswith(VALUE_HEAD) and name not in once}
    if different := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        first = different[0]
        raise CheckpointError(
            f"{weights.folder} does not fit {type(model).__name__}: {len(different)} weights differ, the first is {first}: "
            f"the checkpoint has {_shape(found.get(first))}, the model {_shape(expected.get(first))}. "
            "Give the model that training started from by --source"
        )
    return list(found)


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else f"shape {tuple(shape)}"


def _fixed_tensors(model: PreTrainedModel, folder_names: CheckpointNames, source: str) -> dict[str, torch.Tensor]:
    """What belongs to a model and is not trained, under its name in a folder: the correction of a router's scores, for one."""
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted = {folder_names.group_of(name) for name in model.state_dict() if name not in trained}
    if not wanted:
        return {}
    folder = Path(source) if Path(source).is_dir() else Path(str(cached_file(source, "config.json"))).parent
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in wanted.intersection(opened.keys())}
    if missing := sorted(wanted - found.keys()):
        raise CheckpointError(
            f"{type(model).__name__} has {missing[0]}, which is not trained and so in no checkpoint, and {source!r} does not "
            "have it in safetensors files either. Give the model that training started from by --source"
        )
    return found


def _write_weights(
    weights: SavedWeights,
    target: Path,
    dtype: torch.dtype,
    groups: Sequence[Sequence[str]],
    folder_names: CheckpointNames,
    fixed: Mapping[str, torch.Tensor],
) -> None:
    """One file for each `FILE_BYTES` of weights, named and indexed as Hugging Face does; the first with what is `fixed`."""
    shapes = weights.shapes
    sizes = {tuple(group): sum(shapes[name].numel() for name in group) * dtype.itemsize for group in groups}
    files = list(_portions(sizes))
    index: dict[str, str] = {}
    for number, portion in enumerate(files, start=1):
        file_name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        trained = {name: weight.to(dtype) for name, weight in weights.read(portion).items()}
        tensors = {name: weight.contiguous() for name, weight in folder_names.convert(trained).items()}
        tensors |= fixed if number == 1 else {}
        save_file(tensors, target / file_name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file_name)
    if len(files) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        (target / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))


def _portions(sizes: Mapping[tuple[str, ...], int]) -> Iterator[list[str]]:
    """The names in order, split where the next group would exceed `FILE_BYTES`."""
    names: list[str] = []
    total = 0
    for group, size in sizes.items():
        if names and total + size > FILE_BYTES:
            yield names
            names, total = [], 0
        names += group
        total += size
    yield names


def _without_code(origin: WeightFiles) -> WeightFiles:
    """`origin` with none of its own code run. A checkpoint says whether the run was allowed to; whoever exports is asked again.

    Raises:
        CheckpointError: the run was, and the model names code.
    """
    for path in (Path(place, name) for place in (origin.path, origin.tokenizer) for name in CONFIGS):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # on the hub, where transformers refuses likewise; or damaged, which is told where it is read
        if origin.trust_remote_code and isinstance(content, dict) and content.get("auto_map"):
            raise CheckpointError(
                f"{path} names Python code that comes with the model: {content['auto_map']}. Read it, and to have it run add "
                "--trust-remote-code"
            )
    return replace(origin, trust_remote_code=False)


def _copy_extras(origin: WeightFiles, target: Path, *, has_value_head: bool) -> None:
    """Generation settings, and the code of a model that brings its own."""
    if not has_value_head:
        # Copied as it is: what people published, transformers may refuse to write. A model without any is complete.
        with suppress(OSError):
            shutil.copy(str(cached_file(origin.path, GENERATION)), target / GENERATION)
    if origin.trust_remote_code and Path(origin.path).is_dir():
        for code in Path(origin.path).glob("*.py"):
            shutil.copy(code, target)


def _dtype(config: PretrainedConfig, name: DtypeName) -> torch.dtype:
    if name == "auto":
        return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    assert name in get_args(DtypeName), f"dtype {name!r}"
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def _source(config: Mapping[str, object], role: str, moved_to: str | None) -> WeightFiles:
    """Where the model of `role` came from, by the run's configuration."""
    model, own = _section(config, "model"), _section(config, role)
    path = str(moved_to or own.get("path") or model.get("path") or "")
    if not path:
        raise CheckpointError(f"the checkpoint does not say which model {role!r} started from. Give it by --source")
    rank, alpha = model.get("lora_rank", 0), model.get("lora_alpha", 0.0)
    return WeightFiles(
        path=path,
        tokenizer=str(moved_to or model.get("tokenizer") or path),
        trust_remote_code=bool(model.get("trust_remote_code", False)),
        lora_scale=float(str(alpha)) / max(int(str(rank)), 1),
    )


def _section(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}
