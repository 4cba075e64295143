"""The engine of examples/extend does what it says, and refuses the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.extend.transformers_engine import TransformersEngine
from hybridflow.errors import EngineError
from hybridflow.rollout.base import Request, Sampling
from tests.toy import make_tiny_model
from tests.unit.test_engine_contract import spec_of


def test_the_example_engine_generates_and_refuses_what_it_does_not_do(tmp_path: Path) -> None:
    engine = TransformersEngine(spec_of(make_tiny_model(tmp_path)))
    request = Request(id=1, prompt=np.array([5, 6], np.int32), sampling=Sampling(max_tokens=6, ignore_eos=True), seed=3)
    first, again = (engine.generate([request])[0] for _ in range(2))
    assert first.tokens.tolist() == again.tokens.tolist()
    assert len(first.tokens) == 6
    assert first.log_probs is not None and first.log_probs.shape == (6,)
    with pytest.raises(EngineError, match="no top_p, top_k"):
        engine.add(replace(request, sampling=Sampling(max_tokens=6, top_k=3)))
