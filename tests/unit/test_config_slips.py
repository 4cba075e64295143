"""Slips in keys of ours are told, and never switch a run to verl's defaults."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridflow.config import verl_keys
from hybridflow.config.build import keys_of
from hybridflow.config.load import load_algorithm, load_config
from hybridflow.config.settings import KNOWN_KEYS, SECTIONS
from hybridflow.registry import ALGORITHMS
from tests.unit.config_cases import only_mistake, right_run
from tests.unit.test_config_verl import FITTING

OPTIONS = {key for name in ALGORITHMS for key in keys_of(load_algorithm(name).config_class, "algorithm")}
KEYS = sorted({*KNOWN_KEYS, *OPTIONS})
LETTERS = f"{string.ascii_lowercase}_"


def slips(word: str) -> Iterator[str]:
    """All that is one edit away from `word`: a letter left out, put in, another one, or two of them the other way round; and
    `word` without its unit."""
    for at in range(len(word) + 1):
        before, after = word[:at], word[at:]
        yield before + after[1:]
        yield before + after[1::-1] + after[2:]
        yield from (before + letter + after[skipped:] for letter in LETTERS for skipped in (0, 1))
    yield word.removesuffix("_s").removesuffix("_mib").removesuffix("_gib")


def test_no_slip_in_a_key_of_ours_is_a_key_of_verls() -> None:
    written = {f"{section}.{slip}" for section, _, key in (key.partition(".") for key in KEYS) for slip in slips(key)}
    assert [key for key in sorted(written.difference(KEYS)) if verl_keys.is_verls(verl_keys.full_name(key))] == []


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_a_misspelt_key_is_refused_with_the_nearest_one(tmp_path: Path, section: str) -> None:
    key = max((key for key in KNOWN_KEYS if key.startswith(f"{section}.")), key=len)
    assert only_mistake(tmp_path, f"{key[:-2]}{key[-1]}=5") == f"{key[:-2]}{key[-1]}: no such key; did you mean {key!r}?"


def test_a_template_under_verls_name_is_refused(tmp_path: Path) -> None:
    found = only_mistake(tmp_path, "data.chat_template=x", "placement.pools.main=1x1", "data.train_batch_size=256")
    assert found.startswith("data.chat_template: found 'x'; write it into the tokenizer's folder")


@pytest.mark.parametrize("key", ["rollout.server", "rollout.custom", "reward.timeout", "checkpoint.keep_last"])
def test_a_short_word_in_a_section_of_ours_is_no_key_of_verls(tmp_path: Path, key: str) -> None:
    assert only_mistake(tmp_path, f"{key}=1").startswith(f"{key}: no such key")


@pytest.mark.parametrize("others", [[], FITTING])
@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_an_empty_section_changes_nothing(tmp_path: Path, section: str, others: list[str]) -> None:
    overrides = [*right_run(tmp_path), *others]
    expected = load_config({}, overrides)
    for number, text in enumerate((f"{section}:\n", f"{section}: {{}}\n")):
        (tmp_path / f"{number}.yaml").write_text(text)
        assert load_config(str(tmp_path / f"{number}.yaml"), overrides) == expected
    assert load_config({section: {}}, overrides) == load_config({section: None}, overrides) == expected
