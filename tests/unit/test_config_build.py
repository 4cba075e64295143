"""Values become typed fields, or a mistake that says what was found and what is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from hybridflow.config.build import Builder, UnfitError, convert
from hybridflow.config.schema import FilePath


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    mode: Literal["fast", "slow"] = "fast"


@dataclass(frozen=True, kw_only=True)
class Outer:
    size: int
    inner: Inner = field(default_factory=lambda: Inner(rate=0.1))


@dataclass(frozen=True, kw_only=True)
class Even:
    size: int = 2

    def __post_init__(self) -> None:
        if self.size % 2:
            raise ValueError(f"size={self.size} is odd. Use an even one")


def built(kind: type, values: object, path: str = "") -> tuple[object, list[str]]:
    builder = Builder(lambda key: "here", known_keys=("size", "inner.rate", "inner.mode"))
    return builder.build(kind, values, path=path), [str(mistake) for mistake in builder.errors]


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, 3.0),
        ("1e-6", float, 1e-6),  # YAML 1.1 reads a number without a point as text
        ("a.parquet", tuple[str, ...], ("a.parquet",)),
        (["a", "b"], tuple[str, ...], ("a", "b")),
        ([0.9, 1], tuple[float, float], (0.9, 1.0)),
        (None, int | None, None),
        ("slow", Literal["fast", "slow"], "slow"),
        ("folder", Literal["auto"] | str, "folder"),
        ({"main": "1x1"}, Mapping[str, str], {"main": "1x1"}),
        ({"a": {"b": [1]}}, Mapping[str, object], {"a": {"b": [1]}}),
        (False, bool, False),
    ],
)
def test_a_fitting_value_is_read(value: object, hint: object, expected: object) -> None:
    converted = convert(value, hint)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (True, int, "found true (true/false); needed: an integer"),
        (True, float, "found true (true/false); needed: a number"),
        (1, bool, "found 1 (integer); needed: true or false"),
        (1.5, int, "found 1.5 (number); needed: an integer"),
        ("fast", float, "found 'fast' (text); needed: a number"),
        (float("inf"), float, "found inf (number); needed: a number"),
        (float("nan"), float | None, "found nan (number); needed: a number or null"),
        ("1e400", float, "found '1e400' (text); needed: a number"),
        ([0.2, float("inf")], tuple[float, float], "found [0.2, inf] (list); needed: a list of 2 (a number, a number)"),
        (None, int, "found null; needed: an integer"),
        (7, str, "found 7 (integer); needed: text. Quote it to have it read as text"),
        ([1, 2, 3], tuple[float, float], "found [1, 2, 3] (list); needed: a list of 2 (a number, a number)"),
        (0.2, tuple[float, float], "found 0.2 (number); needed: a list of 2 (a number, a number)"),
        (["a", 1], tuple[str, ...], "found ['a', 1] (list); needed: a list, each element text"),
        ({"a": 1}, tuple[str, ...], "found {'a': 1} (mapping); needed: a list, each element text"),
        ({"main": 1}, Mapping[str, str], "found {'main': 1} (mapping); needed: a mapping from names to text"),
        ("x", int | None, "found 'x' (text); needed: an integer or null"),
        ("fats", Literal["fast", "slow"], "found 'fats' (text); allowed: fast, slow; did you mean 'fast'?"),
    ],
)
def test_an_unfit_value_is_answered_with_what_was_found_and_what_is_needed(value: object, hint: object, message: str) -> None:
    with pytest.raises(UnfitError) as caught:
        convert(value, hint)
    assert str(caught.value) == message


def test_a_tilde_at_the_start_of_a_path_becomes_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert convert("~/data/train.parquet", FilePath) == str(Path("/home/someone/data/train.parquet"))
    assert convert("~/data/train.parquet", str) == "~/data/train.parquet"


def test_a_section_keeps_the_defaults_that_its_parent_gives_it() -> None:
    config, mistakes = built(Outer, {"size": 1, "inner": {"mode": "slow"}})
    assert config == Outer(size=1, inner=Inner(rate=0.1, mode="slow"))
    assert mistakes == []


def test_every_mistake_is_collected_and_the_rest_is_still_checked() -> None:
    _, mistakes = built(Outer, {"size": "big", "inner": {"rat": 1, "mode": "medium"}, "colour": {"hue": 1, "tint": 2}})
    assert mistakes == [
        "here: colour.hue: no such key. Sections: size, inner",
        "here: colour.tint: no such key. Sections: size, inner",
        "here: size: found 'big' (text); needed: an integer",
        "here: inner.rat: no such key; did you mean 'inner.rate'?",
        "here: inner.mode: found 'medium' (text); allowed: fast, slow",
    ]


def test_a_key_without_default_must_be_given() -> None:
    assert built(Outer, {}) == (None, ["here: size: is missing; needed: an integer"])


def test_a_section_that_is_one_value_is_a_mistake() -> None:
    _, mistakes = built(Outer, {"size": 1, "inner": 5})
    assert mistakes == ["here: inner: found 5 (integer); this is a section with keys of its own"]


def test_a_check_of_the_dataclass_itself_is_reported() -> None:
    _, mistakes = built(Even, {"size": 3}, "algorithm")
    assert mistakes == ["here: algorithm: size=3 is odd. Use an even one"]
