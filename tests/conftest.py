"""What tests share."""

from __future__ import annotations

import pytest

from tests.toy import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random Qwen2 with a tokenizer of one token per character. Read only."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"))
