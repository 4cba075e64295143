"""Products in float8: rounded numbers, the same ones however rows are packed, and weights that nobody else sees changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hybridflow.batch import Ragged
from hybridflow.config.load import load_config
from hybridflow.errors import ConfigError, ModelError
from hybridflow.models import float8
from hybridflow.models.build import build_policy, build_value_model, named_tensors
from hybridflow.models.packing import pack
from tests.unit.test_models import CPU, rows, spec_of

pytest.importorskip("torchao", reason="NOT RUN: needs the optional package 'torchao'")


def test_log_probs_differ_by_the_rounding_only_and_do_not_depend_on_the_packing(tiny_model: str) -> None:
    prompts, responses = rows()
    plain, _ = build_policy(spec_of(tiny_model))(pack(prompts, responses, CPU))
    policy = build_policy(spec_of(tiny_model, float8=True))
    packed, _ = policy(pack(prompts, responses, CPU))
    difference = (packed - plain).abs().detach()
    assert 1e-4 < float(difference.mean()) < 0.5, "this model's distributions are uneven"
    alone = [
        policy(pack(Ragged.from_rows([prompt], np.int32), Ragged.from_rows([response], np.int32), CPU))[0]
        for prompt, response in zip(prompts, responses, strict=True)
        if len(response)
    ]
    assert float((torch.cat(alone) - packed).detach().abs().mean()) < float(difference.mean()) / 10


def test_gradients_point_where_those_of_full_products_point(tiny_model: str) -> None:
    gradients = []
    for is_float8 in (False, True):
        policy = build_policy(spec_of(tiny_model, float8=is_float8))
        policy(pack(*rows(), CPU))[0].sum().backward()
        gradients.append({name: whole(parameter.grad).flatten() for name, parameter in policy.named_parameters()})
    plain, rounded = gradients
    assert plain.keys() == rounded.keys()
    cosine = torch.cosine_similarity(torch.cat([*plain.values()]), torch.cat([*rounded.values()]), dim=0)
    assert 0.9 < float(cosine) < 1 - 1e-5


def whole(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_what_is_synced_and_saved_knows_nothing_of_it(tiny_model: str) -> None:
    plain, rounded = (dict(named_tensors(build_policy(spec_of(tiny_model, float8=choice)))) for choice in (False, True))
    assert plain.keys() == rounded.keys()
    for name, tensor in plain.items():
        assert type(rounded[name]) is type(tensor)
        assert torch.equal(whole(tensor), whole(rounded[name])), name


def test_a_value_model_takes_it(tiny_model: str) -> None:
    model = build_value_model(spec_of(tiny_model, float8=True))
    assert any(type(part).__name__.endswith("Float8Linear") for part in model.modules())


def test_layers_whose_sides_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="sides divisible by 16"):
        float8.convert([nn.Sequential(nn.Linear(24, 40))], CPU, torch.float32)


def test_only_what_fits_is_converted() -> None:
    layer = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 40))
    float8.convert([layer], CPU, torch.float32)
    assert [type(part).__name__ for part in layer] == ["Float8Linear", "Linear"]


def test_adapters_and_float8_are_refused_together(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m, float8: true, lora_rank: 8}\n")
    with pytest.raises(ConfigError, match="adapters are too narrow"):
        load_config(str(file), [])


def test_a_gpu_that_cannot_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, layers = torch.device("cuda"), [nn.Sequential(nn.Linear(32, 48))]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ModelError, match="found an old one"):
        float8.convert(layers, gpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ModelError, match="compute_dtype=bfloat16"):
        float8.convert(layers, gpu, torch.float32)
