"""What is compiled for one model serves the next."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from hybridflow.config.schema import ReferenceConfig
from hybridflow.models.build import build_policy
from hybridflow.workers.model_core import ModelCore, frozen
from tests.training_rows import context_of, random_batch
from tests.unit.test_models import LENGTHS, spec_of


def test_the_reference_takes_the_layers_compiled_for_the_actor(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, compile_ = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compile_(module, **how | {"backend": counter}))
    spec = replace(spec_of(tiny_model), compile=True)
    section = ReferenceConfig(tokens_per_microbatch=256)
    torch._dynamo.reset()

    def score(core: ModelCore) -> int:
        core.evaluate(random_batch(LENGTHS), lambda microbatch: {"log_probs": core.model(microbatch.packed)[0]})
        return counter.frame_count

    actor = score(ModelCore(build_policy(spec), section, context_of("reference")))
    assert actor > 0
    assert score(frozen(ModelCore(build_policy(spec), section, context_of("reference")))) == actor
