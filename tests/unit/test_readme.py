"""What the README shows is code that the tests run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", [block for block in PYTHON_BLOCKS if block.startswith("class ")])
def test_classes_in_the_readme_are_those_of_the_examples(block: str) -> None:
    examples = [path.read_text() for path in (ROOT / "examples/extend").glob("*.py")]
    assert any(block in text for text in examples)


def test_the_reward_function_of_the_readme_runs() -> None:
    (block,) = [block for block in PYTHON_BLOCKS if block.startswith("def compute_score")]
    names: dict[str, object] = {}
    exec(block, names)
    compute_score = names["compute_score"]
    assert callable(compute_score)
    score = compute_score({"response": "it is 42", "ground_truth": "42"})
    assert score == {"overall": 1.0, "words": 3}


@pytest.mark.parametrize("target", re.findall(r"\]\(((?:docs|CONTRIBUTING)[^)]*)\)", README))
def test_links_of_the_readme_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_folders_of_the_readme_are_those_of_the_package() -> None:
    named = set(re.findall(r"`hybridflow/(\w+)`", README))
    found = {path.name for path in (ROOT / "hybridflow").iterdir() if path.is_dir() and any(path.glob("[a-z]*.py"))}
    assert named == found
