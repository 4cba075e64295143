"""From a folder to a model that is sharded over the ranks of its role and ready to compute."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hybridflow.models import float8, self_test
from hybridflow.models.heads import ValueModel
from hybridflow.models.load import ModelSource, load_causal_lm
from hybridflow.models.lora import FACTOR, Adapters, add_adapters, merged_weights, plain_name
from hybridflow.models.policy import PolicyModel
from hybridflow.ops.log_probs import EAGER, compiled_kernels
from hybridflow.parallel import fsdp
from hybridflow.parallel.layout import Layout
from hybridflow.parallel.mesh import ensure_process_group, sequence_group, shard_mesh


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a model is built from."""

    source: ModelSource
    layout: Layout
    device: torch.device
    compute_dtype: torch.dtype
    chunk_tokens: int
    """Tokens whose logits exist at once."""
    float8: bool = False
    """Decoder layers multiply in float8."""
    gradient_checkpointing: bool = False
    compile: bool = False
    adapters: Adapters | None = None


def build_policy(spec: ModelSpec) -> PolicyModel:
    """A policy, sharded over all ranks, each of which calls this.

    Raises:
        ModelError: the model does not load, or does not compute on packed rows what it computes in transformers.
    """
    causal_lm = _load(spec)
    ranks = sequence_group(spec.layout, spec.device.type)
    kernels = compiled_kernels() if spec.compile else EAGER
    model = PolicyModel(causal_lm, chunk_tokens=spec.chunk_tokens, kernels=kernels, sequence_group=ranks)
    fsdp.shard(model, decoder_layers(model), sharding=_sharding(spec))
    self_test.check(model, path=spec.source.path, device=spec.device, dtype=_coarsest(spec))
    return model


def build_value_model(spec: ModelSpec) -> ValueModel:
    """A value model on the backbone of a causal language model, likewise; its head too where that is an exported critic."""
    causal_lm = _load(spec, is_policy=False)
    model = ValueModel(causal_lm, sequence_group=sequence_group(spec.layout, spec.device.type))
    if dist.get_rank() == 0:  # the others take their shares from it
        model.value_head.take_from(spec.source.path)
    fsdp.shard(model, decoder_layers(model), in_float32=[model.value_head], sharding=_sharding(spec))
    self_test.check(model, path=spec.source.path, device=spec.device, dtype=_coarsest(spec))
    return model


def _coarsest(spec: ModelSpec) -> torch.dtype:
    """What the self-test has to expect: packed with others a token may fall on the other side of a rounding to float8."""
    return torch.bfloat16 if spec.float8 else spec.compute_dtype


def _load(spec: ModelSpec, *, is_policy: bool = True) -> PreTrainedModel:
    """Rank 0 reads the weights; the others only need the shapes. What is no policy has no use for an output layer."""
    ensure_process_group(spec.device)
    causal_lm = load_causal_lm(spec.source, is_skeleton=dist.get_rank() != 0, is_policy=is_policy)
    if spec.adapters is not None:
        add_adapters(causal_lm, spec.adapters)
    if spec.float8:
        float8.convert(decoder_layers(causal_lm), spec.device, spec.compute_dtype)
    if spec.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if spec.compile:
        for layer in decoder_layers(causal_lm):
            layer.compile(dynamic=True)
    return causal_lm


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: what is gathered, checkpointed and compiled as one."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _sharding(spec: ModelSpec) -> fsdp.Sharding:
    mesh = shard_mesh(spec.layout, spec.device.type)
    return fsdp.Sharding(mesh=mesh, compute_dtype=spec.compute_dtype, device=spec.device)


def parameters_by_name(model: PolicyModel | ValueModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, under the name it has in a Hugging Face checkpoint; adapters under peft's names."""
    fsdp.drop_gathered(model)
    for name, parameter in model.named_parameters():
        yield _hugging_face_name(model, name), parameter


@torch.no_grad()
def flip_signs(model: PolicyModel | ValueModel, names: Collection[str]) -> None:
    """Change the sign of half of the elements of the weights of these names in place; a second call restores every bit.

    `names` are those of `named_tensors`. Which elements is a function of the name and of how the model is sharded.
    """
    for name, parameter in parameters_by_name(model):
        if plain_name(name) in names:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            signs = torch.randint(0, 2, local.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            local.mul_(signs.to(local.device))


def named_tensors(model: PolicyModel | ValueModel) -> list[tuple[str, torch.Tensor]]:
    """The trained weights under their Hugging Face names, tied ones once, adapters merged; every rank calls this."""
    fsdp.drop_gathered(model)
    # Parameters as they are: detaching 300 sharded ones takes several milliseconds of every weight sync.
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    if any(FACTOR in name for name in weights):
        weights = merged_weights(model)
    return [(_hugging_face_name(model, name), weight) for name, weight in weights.items()]


def _hugging_face_name(model: PolicyModel | ValueModel, name: str) -> str:
    if isinstance(model, PolicyModel):
        return name.removeprefix("causal_lm.")
    prefix = model.backbone.base_model_prefix
    return f"{prefix}.{name.removeprefix('backbone.')}" if name.startswith("backbone.") else name
