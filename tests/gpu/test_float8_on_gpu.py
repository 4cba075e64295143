"""Products in float8 on the GPU: what bfloat16 gives but for the rounding, compiled or not."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from hybridflow.models.attention import NAME
from hybridflow.models.build import ModelSpec, build_policy
from hybridflow.models.load import ModelSource
from hybridflow.models.packing import pack
from hybridflow.models.policy import PolicyModel
from hybridflow.parallel.layout import Layout
from tests.toy import make_tiny_model
from tests.unit.test_models import rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA device"),
]
pytest.importorskip("torchao", reason="NOT RUN: needs the optional package 'torchao'")
GPU = torch.device("cuda", 0)


def policy(path: str, **options: bool) -> PolicyModel:
    source = ModelSource(path=path, attention=NAME, dtype=torch.float32)
    return build_policy(
        ModelSpec(source=source, layout=Layout(), device=GPU, compute_dtype=torch.bfloat16, chunk_tokens=50, **options)
    )


@pytest.mark.parametrize("is_compiled", [False, True])
def test_log_probs_and_gradients_differ_from_bfloat16_by_the_rounding(
    tmp_path_factory: pytest.TempPathFactory, is_compiled: bool
) -> None:
    path = make_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=128, num_attention_heads=2)
    found = []
    for model in (policy(path), policy(path, float8=True, compile=is_compiled)):
        log_probs, _ = model(pack(*rows(), GPU))
        log_probs.sum().backward()
        gradients = [weight.grad for weight in model.parameters()]
        whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in gradients if tensor is not None]
        found.append((log_probs.detach(), torch.cat([tensor.flatten() for tensor in whole])))
    (plain, gradient), (rounded, rounded_gradient) = found
    assert 1e-4 < float((rounded - plain).abs().mean()) < 0.5
    assert float(torch.cosine_similarity(rounded_gradient, gradient, dim=0)) > 0.9
