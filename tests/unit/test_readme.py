"""What the README shows is code that the tests run."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from hybridflow.config.settings import KNOWN_KEYS, MAPPINGS, SECTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
AGENTS = (ROOT / "AGENTS.md").read_text()
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


def test_keys_that_the_pages_name_are_keys() -> None:
    named = re.findall(r"(?<![\w./])([a-z_]+\.[a-z_.]+[a-z])(?==)|`([a-z_]+\.[a-z_]+)`", README + AGENTS)
    keys = {one or other for one, other in named if (one or other).partition(".")[0] in SECTIONS}
    assert len(keys) >= 9
    assert not [key for key in keys if key not in KNOWN_KEYS and key.rpartition(".")[0] not in MAPPINGS]


def test_files_that_the_pages_name_exist() -> None:
    named = re.findall(
        r"`(?:python )?((?:hybridflow|examples|configs|docs|tests|controller|workers|ops|config)/[\w/.-]*\w)`", README + AGENTS
    )
    named += re.findall(r"(?:examples|configs)/\w+(?:/\w+)*\.(?:py|yaml)", README)
    assert len(named) > 20
    assert not [
        path
        for path in named
        if "NAME" not in path and not any((folder / path).exists() for folder in (ROOT, ROOT / "hybridflow"))
    ]


def test_modules_that_the_pages_run_exist() -> None:
    modules = set(re.findall(r"python -m ((?:hybridflow|benchmarks)[\w.]*)", README + AGENTS))
    assert modules >= {"hybridflow.train", "hybridflow.evaluate", "hybridflow.export", "hybridflow.report"}
    assert all(find_spec(module) is not None for module in modules)


def test_agents_page_is_short() -> None:
    assert len(AGENTS.splitlines()) <= 80
