"""Two sides that must agree: tokenizers, templates, stops, ends, vocabularies, adapters. Each is told with its fix."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hybridflow.config.rules_agreement import adapters_are_merged, sides_agree
from hybridflow.config.schema import Config, DataConfig, ModelConfig, ReferenceConfig, RolloutConfig, TrainingConfig
from hybridflow.errors import FieldError, FieldReport, FieldWarning
from tests.toy import CHAT_TEMPLATE, make_tiny_model, make_tiny_tokenizer

ROLES = ("data", "actor", "critic", "reference", "reward", "rollout")
TURNS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<unk>\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)
"""Turns end with a special token that is not the end of sequence; its id is 3, that of <eos> is 2."""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return make_tiny_model(tmp_path / "model")


def found(config: Config, roles: tuple[str, ...] = ROLES) -> list[FieldReport]:
    return [*adapters_are_merged(config, roles), *sides_agree(config, roles)]


def config_of(folder: str, **rollout: object) -> Config:
    return Config(model=ModelConfig(path=folder), rollout=RolloutConfig(**rollout))


def with_template(folder: str, template: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def test_a_model_with_its_own_tokenizer_is_nothing_to_tell(folder: str) -> None:
    assert found(config_of(folder, stop=["####", "\n\n"], stop_token_ids=[5])) == []


def test_a_token_without_an_embedding_is_named(folder: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(folder)
    rows = len(make_tiny_tokenizer())
    (report,) = found(config_of(folder))
    assert report.key == "model.path"
    assert (
        f"2 tokens of the tokenizer {folder!r} have none: '<think>' (id {rows}), '</think>' (id {rows + 1})" in report.problem
    )
    assert f"resize_token_embeddings({rows + 2})" in report.problem


def test_a_stop_string_that_is_a_special_token_is_answered_with_its_id(folder: str) -> None:
    (report,) = found(config_of(folder, stop=["<unk>"], stop_token_ids=[7]))
    assert report.key == "rollout.stop"
    assert "rollout.stop_token_ids=[7, 3]" in report.problem
    assert found(config_of(folder, stop_token_ids=[7, 3])) == []


def test_a_stop_string_that_no_tokens_spell_is_told(folder: str) -> None:
    (report,) = found(config_of(folder, stop=["HUMAN:"]))
    assert "cannot be written in the tokens" in report.problem


def test_a_stop_token_that_no_model_samples_is_told(folder: str) -> None:
    (report,) = found(config_of(folder, stop_token_ids=[70]))
    assert report.key == "rollout.stop_token_ids"
    assert "it would never stop" in report.problem


def test_a_template_that_ends_turns_with_another_token_than_generation_is_told_and_the_fix_works(folder: str) -> None:
    with_template(folder, TURNS)
    (report,) = found(config_of(folder))
    assert isinstance(report, FieldError)
    assert "ends turns with '<unk>' (id 3), but generation ends with '<eos>' (id 2)" in report.problem
    assert "Set rollout.stop_token_ids=[3]" in report.problem
    assert found(config_of(folder, stop_token_ids=[3])) == []
    assert found(config_of(folder, stop_token_ids=[2])) == []  # said to be meant
    assert found(replace(config_of(folder), data=DataConfig(apply_chat_template="never"))) == []
    (warning,) = found(config_of(folder), ("data", "actor"))
    assert isinstance(warning, FieldWarning)
    (Path(folder) / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    assert found(config_of(folder)) == []


def test_a_template_without_special_tokens_ends_nothing(folder: str) -> None:
    with_template(folder, CHAT_TEMPLATE)
    assert found(config_of(folder)) == []


def other_tokenizer(folder: str) -> None:
    file = Path(folder) / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


def test_a_reference_or_critic_with_another_tokenizer_is_told(folder: str, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    config = replace(config_of(folder), reference=ReferenceConfig(path=other))
    assert found(config) == []
    other_tokenizer(other)
    (report,) = found(config)
    assert report.key == "reference.path"
    assert "2 of 64 tokens differ, 'a' is" in report.problem
    (report,) = found(replace(config_of(folder), critic=TrainingConfig(path=other)))
    assert report.key == "critic.path"
    assert found(config, ("data", "actor", "rollout")) == []


def test_a_tokenizer_that_is_not_the_models_own_is_told(folder: str, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other")
    other_tokenizer(other)
    (report,) = found(Config(model=ModelConfig(path=folder, tokenizer=other)))
    assert report.key == "model.tokenizer"


def test_models_with_fewer_embeddings_are_told(folder: str, tmp_path: Path) -> None:
    padded = make_tiny_model(tmp_path / "padded", vocab_size=80)
    (report,) = found(replace(config_of(padded), reference=ReferenceConfig(path=folder)))
    assert isinstance(report, FieldWarning)
    assert (report.key, "has 64 embeddings and the policy 80" in report.problem) == ("reference.path", True)
    small = make_tiny_model(tmp_path / "small", vocab_size=60)
    reports = found(replace(config_of(folder), reference=ReferenceConfig(path=small)))
    assert any(isinstance(report, FieldError) and "have none" in report.problem for report in reports)


def test_adapters_beside_whole_weights_are_refused(folder: str) -> None:
    (Path(folder) / "adapter_config.json").write_text("{}")
    assert any("merge_and_unload" in report.problem for report in found(config_of(folder)))


def test_a_stop_that_every_response_ends_with_is_refused(folder: str) -> None:
    (report,) = found(config_of(folder, stop=[""]))
    assert report.key == "rollout.stop" and "empty text" in report.problem


def test_a_template_that_leaves_out_what_is_asked_is_refused(folder: str) -> None:
    with_template(folder, "hello")
    (report,) = found(config_of(folder))
    assert isinstance(report, FieldError) and "every prompt would be 'hello'" in report.problem
    assert found(replace(config_of(folder), data=DataConfig(apply_chat_template="never"))) == []


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "does not say where an answer begins"),
        ("{% for m in messages %}{{ m['role'", "refuses a message of the user"),
        ("{{ raise_exception('needs a system message') }}", "refuses a message of the user: needs a system message"),
    ],
)
def test_a_template_that_may_be_meant_so_is_a_warning(folder: str, template: str, told: str) -> None:
    with_template(folder, template)
    (report,) = found(config_of(folder))
    assert isinstance(report, FieldWarning) and told in report.problem


def test_a_template_whose_answers_follow_the_question_has_nothing_to_open(folder: str) -> None:
    """Like Mistral's."""
    with_template(
        folder,
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
    )
    assert not [report for report in found(config_of(folder)) if "where an answer begins" in report.problem]
