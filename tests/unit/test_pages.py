"""The environments that docs/environments.md prints run as they stand."""

from __future__ import annotations

import asyncio
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hybridflow.config.schema import EnvironmentConfig
from hybridflow.environments.base import load_environment

PAGE = (Path(__file__).parents[2] / "docs/environments.md").read_text()
GUESSING, TOOLS, AGENT = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ROW = {"messages": [{"role": "user", "content": "?"}], "ground_truth": "5"}


def loaded(folder: Path, block: str) -> Any:
    file = folder / "my_env.py"
    file.write_text(block)
    return load_environment(EnvironmentConfig(path=str(file)))()


def test_the_game_of_the_page_ends_with_the_right_number(tmp_path: Path) -> None:
    game = loaded(tmp_path, GUESSING)
    assert game.reset(ROW) == (ROW["messages"], {})
    assert game.step({"content": "3"})[0] == [{"role": "user", "content": "higher"}]
    assert game.step({"content": " 5"})[1:3] == (1.0, True)


def test_the_tool_of_the_page_answers(tmp_path: Path) -> None:
    research = loaded(tmp_path, TOOLS)
    _, info = research.reset({**ROW, "ground_truth": "Switzerland"})
    assert info["tools"][0]["function"]["parameters"]["properties"]["query"]["description"] == "Words to look for."
    call = {"id": "1", "function": {"name": "search", "arguments": {"query": "Bern"}}}
    answers, *_ = asyncio.run(research.step({"content": "", "tool_calls": [call]}))
    assert answers[0]["content"] == "Bern is the capital of Switzerland."
    assert asyncio.run(research.step({"content": "Switzerland"}))[1] == 1.0


@pytest.mark.skipif(find_spec("openai") is None, reason="the agent of the page needs the package openai")
def test_the_agent_of_the_page_loads(tmp_path: Path) -> None:
    assert loaded(tmp_path, AGENT) is not None
