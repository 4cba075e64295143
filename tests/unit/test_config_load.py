"""Files and overrides become a Config; mistakes carry the line that made them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hybridflow.config.load import load_config
from hybridflow.config.schema import RENAMED
from hybridflow.config.settings import KNOWN_KEYS
from hybridflow.errors import ConfigError
from tests.unit.config_cases import mistakes_of, model_folder, right_run

OWN_ALGORITHM = '''
from dataclasses import dataclass
from typing import ClassVar
from hybridflow.errors import FieldError

@dataclass(frozen=True, kw_only=True)
class Config:
    lam: float = 0.5
    """Collides with the name of a key of verl's."""
    steps: int

class Mine:
    config_class: ClassVar[type] = Config

    @classmethod
    def roles(cls, run):
        return ("actor",)

    @classmethod
    def check(cls, run):
        return [FieldError("algorithm.steps", "is odd")] if run.algorithm.options.steps % 2 else []

class NoAlgorithm:
    pass
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's on the Python path."""
    (tmp_path / "own_algorithm.py").write_text(OWN_ALGORITHM)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_algorithm"


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "run.yaml", "data: {prompts_per_step: 32, max_prompt_tokens: 100}\n")
    config = load_config(file, [*right_run(tmp_path), "data.prompts_per_step=16"])
    assert (config.data.prompts_per_step, config.data.max_prompt_tokens) == (16, 100)


def test_values_on_the_command_line_are_yaml(tmp_path: Path) -> None:
    overrides = [
        "actor.learning_rate=1e-6",
        "run.total_steps=null",
        "rollout.stop=['a, b', \"\\n\"]",
        "rollout.ignore_eos=true",
    ]
    config = load_config(None, [*right_run(tmp_path), *overrides])
    assert (config.actor.learning_rate, config.run.total_steps) == (1e-6, None)
    assert (config.rollout.stop, config.rollout.ignore_eos) == (("a, b", "\n"), True)


def test_a_file_builds_on_another(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    written(tmp_path, "base.yaml", "actor: {learning_rate: 1e-4, warmup_steps: 3}\n")
    file = written(tmp_path / "deep", "run.yaml", "base: ../base.yaml\nactor:\n  warmup_steps: 5\n")
    config = load_config(file, right_run(tmp_path))
    assert (config.actor.learning_rate, config.actor.warmup_steps) == (1e-4, 5)


def test_a_mistake_names_the_line_of_the_file_it_is_in(tmp_path: Path) -> None:
    base = written(tmp_path, "base.yaml", "actor:\n  # a comment\n  learning_rate: fast\n")
    file = written(tmp_path, "run.yaml", "base: base.yaml\nrollout:\n  temprature: 1\n\nrun: {seed: -1}\n")
    assert mistakes_of([*right_run(tmp_path), "data.prompts_per_step=0.5"], file) == [
        f"{file}:5: run.seed: found -1 (integer); needed: an integer of at least 0",
        "command line: data.prompts_per_step: found 0.5 (number); needed: an integer of at least 1",
        f"{base}:3: actor.learning_rate: found 'fast' (text); needed: a number of at least 0",
        f"{file}:3: rollout.temprature: no such key; did you mean 'rollout.temperature'?",
    ]


def test_files_that_build_on_themselves_are_a_mistake(tmp_path: Path) -> None:
    one, two = (str(tmp_path / name) for name in ("one.yaml", "two.yaml"))
    written(tmp_path, "one.yaml", "base: two.yaml\n")
    written(tmp_path, "two.yaml", "# first line\nbase: one.yaml\n")
    assert mistakes_of(right_run(tmp_path), one) == [f"{two}:2: base: {one} builds on itself"]


def test_a_base_that_is_not_there_is_named_with_the_line_that_asks_for_it(tmp_path: Path) -> None:
    file = written(tmp_path, "run.yaml", "base: absent.yaml\n")
    expected = f"{file}:1: {tmp_path / 'absent.yaml'}: cannot be read: No such file or directory"
    assert mistakes_of(right_run(tmp_path), file) == [expected]


def test_a_missing_file_does_not_hide_the_other_mistakes(tmp_path: Path) -> None:
    found = mistakes_of([*right_run(tmp_path), "run.seed=x"], "absent.yaml")
    assert found == [
        "absent.yaml: cannot be read: No such file or directory",
        "command line: run.seed: found 'x' (text); needed: an integer of at least 0",
    ]


@pytest.mark.parametrize("text", [None, "run: {seed: 1\n"])
def test_of_a_file_that_cannot_be_read_nothing_is_missed(tmp_path: Path, text: str | None) -> None:
    file = str(tmp_path / "run.yaml") if text is None else written(tmp_path, "run.yaml", text)
    (found,) = mistakes_of([], file)
    assert file in found
    # Its algorithm, pools, and tokenizer may be such that nothing of this is a mistake.
    model = model_folder(tmp_path / "model", without="tokenizer.json")
    unclear = [f"model.path={model}", "critic.path=${actor.folder}", "rollout.tensor_parallel=3", "data.train_weights=3"]
    unclear += ["algorithm.steps=3", "reward.options.x=1"]
    assert len(mistakes_of(unclear, file)) == 1
    clear = ["run.seed=-1", "reward.path=/absent.py", "rollout.engine=torhc", "no.key=3", "algorithm=grpo", "algorithm.steps=3"]
    assert len(mistakes_of(clear, file)) == 1 + 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {seed: 1\nmodel: x\n", "YAML: "),
        ("run:\n  seed: 1\n  seed: 2\n", "YAML: found duplicate key seed"),
        ("run:\n  folder: a\x00\n", "YAML: unacceptable character"),
        ("- run\n", "holds no mapping of keys to values"),
        ("run:\n  folder: ${oc.env:NO_SUCH_VARIABLE}\n", "NO_SUCH_VARIABLE"),
        ("run:\n  folder: ${model.nothing}\n", "Interpolation key 'model.nothing' not found"),
        ("run:\n  folder: ${\n", "run.folder"),
    ],
)
def test_a_malformed_file_is_one_mistake(tmp_path: Path, text: str, message: str) -> None:
    (found,) = mistakes_of(right_run(tmp_path), written(tmp_path, "run.yaml", text))
    assert message in found
    assert str(tmp_path / "run.yaml") in found


def test_a_section_whose_keys_are_commented_out_is_empty(tmp_path: Path) -> None:
    file = written(tmp_path, "run.yaml", "actor:\n  # learning_rate: 1\ncritic: {}\n")
    assert load_config(file, right_run(tmp_path)).actor.learning_rate == 1e-6


def test_an_override_without_equals_is_a_mistake(tmp_path: Path) -> None:
    found = mistakes_of([*right_run(tmp_path), "actor.learning_rate", "=3", "data.train_files=[a,"])
    assert found[:2] == [
        "command line: actor.learning_rate: is not of the form key=value",
        "command line: =3: is not of the form key=value",
    ]
    assert found[2].startswith("command line: data.train_files: the value '[a,' cannot be read as YAML")


def test_interpolations_see_the_environment_and_later_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", "/somewhere")
    file = written(tmp_path, "run.yaml", "run: {folder: '${oc.env:OUT}/x'}\ncritic: {path: '${model.path}'}\n")
    config = load_config(file, [*right_run(tmp_path), "model.path=other/name"])
    assert (config.run.folder, config.critic.path) == ("/somewhere/x", "other/name")


def test_a_mapping_is_replaced_as_a_whole_and_a_dotted_key_changes_one_entry(tmp_path: Path) -> None:
    file = written(tmp_path, "run.yaml", "placement:\n  pools: {all: 1x2}\n  roles: {}\n")
    config = load_config(file, right_run(tmp_path))
    assert config.placement.pools == {"all": "1x2"}
    config = load_config(None, [*right_run(tmp_path), "placement.pools.main=1x2"])
    assert config.placement.pools == {"main": "1x2", "scoring": "1x1 cpu"}  # the default of scoring stays
    config = load_config(file, [*right_run(tmp_path), "placement.pools.more=1x1"])
    assert config.placement.pools == {"all": "1x2", "more": "1x1"}


def test_the_name_of_an_algorithm_replaces_the_section_below(tmp_path: Path) -> None:
    file = written(tmp_path, "run.yaml", "algorithm:\n  name: ppo\n  gae_lambda: 0.5\n  epochs: 4\n")
    config = load_config(
        file, [*right_run(tmp_path), "algorithm.responses_per_prompt=4", "algorithm=grpo", "algorithm.epochs=2"]
    )
    options = vars(config.algorithm.options)
    assert config.algorithm.name == "grpo"
    assert (options["epochs"], options["responses_per_prompt"]) == (2, 4)


def test_the_short_form_works_in_a_file(tmp_path: Path) -> None:
    file = written(tmp_path, "run.yaml", "algorithm: grpo\nalgorithm.clip: [0.1, 0.3]\n")
    config = load_config(file, right_run(tmp_path))
    assert (config.algorithm.name, vars(config.algorithm.options)["clip"]) == ("grpo", (0.1, 0.3))


def test_an_unknown_algorithm_is_answered_with_the_nearest_and_its_options_are_checked(tmp_path: Path) -> None:
    options = ["algorithm.epoch=1", "algorithm.clip=high", "data.prompts_per_step=8", "algorithm.prompts_per_update=9"]
    found = mistakes_of([*right_run(tmp_path), "algorithm=gprp", *options])
    starts = (
        "algorithm.name: 'gprp' is not known; did you mean 'grpo'?",
        "algorithm.epoch: no such key; did you mean 'algorithm.epochs'?",
        "algorithm.clip: found 'high' (text)",
        "algorithm.prompts_per_update: found 9, more than the 8 prompts",
    )
    assert all(text.startswith(f"command line: {start}") for start, text in zip(starts, found, strict=True))


@pytest.mark.parametrize("name", ["gprp", "remax", "no_such_module:Mine"])
def test_an_option_is_no_mistake_where_the_algorithm_is_not_known_and_may_have_it(tmp_path: Path, name: str) -> None:
    option = "gae_lambda" if name == "gprp" else "anything"  # the former is PPO's, and the nearest is GRPO
    assert len(mistakes_of([*right_run(tmp_path), f"algorithm={name}", f"algorithm.{option}=0.5"])) == 1


@pytest.mark.parametrize(
    ("word", "keys"),
    [
        ("learning_rate", "'actor.learning_rate' or 'critic.learning_rate' or 'reward_model.learning_rate'"),
        ("lr", "'actor.learning_rate' or 'critic.learning_rate'"),
        ("total_steps", "'run.total_steps'"),
        ("epochs", "'algorithm.epochs'"),
        ("ppo_mini_batch_size", "'algorithm.prompts_per_update'"),
    ],
)
def test_a_last_word_alone_is_answered_with_the_keys_that_end_in_it(tmp_path: Path, word: str, keys: str) -> None:
    assert mistakes_of([*right_run(tmp_path), f"{word}=3"]) == [f"command line: {word}: no such key; did you mean {keys}?"]


def test_a_key_of_the_release_before_is_taken_under_its_new_name_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(None, [*right_run(tmp_path), "rollout.memory_fraction=0.4", "rollout.max_requests=8"])
    assert (config.rollout.gpu_memory_utilization, config.rollout.max_num_seqs) == (0.4, 8)
    said = [message for message in caplog.messages if "is called" in message]
    assert said == [
        "command line: rollout.memory_fraction: is called rollout.gpu_memory_utilization now, and is taken as that",
        "command line: rollout.max_requests: is called rollout.max_num_seqs now, and is taken as that",
    ]
    assert set(RENAMED.values()) <= set(KNOWN_KEYS) and not RENAMED.keys() & set(KNOWN_KEYS)


def test_an_option_of_another_algorithm_is_a_mistake(tmp_path: Path) -> None:
    (found,) = mistakes_of([*right_run(tmp_path), "algorithm=grpo", "algorithm.gae_lamda=0.9"])
    assert found.startswith("command line: algorithm.gae_lamda: no such key. Keys of this section: name, ")
    assert " responses_per_prompt, " in found


def test_an_algorithm_of_the_users_own_brings_its_options(tmp_path: Path, own_module: str) -> None:
    config = load_config(None, [*right_run(tmp_path), f"algorithm={own_module}:Mine", "algorithm.steps=4", "algorithm.lam=1"])
    assert vars(config.algorithm.options) == {"lam": 1.0, "steps": 4}


def test_the_algorithm_checks_its_options_itself(tmp_path: Path, own_module: str) -> None:
    overrides = [*right_run(tmp_path), f"algorithm={own_module}:Mine"]
    assert mistakes_of([*overrides, "algorithm.steps=3"]) == ["command line: algorithm.steps: is odd"]
    assert mistakes_of(overrides) == ["algorithm.steps: is missing; needed: an integer"]


def test_a_class_that_is_no_algorithm_is_refused(tmp_path: Path, own_module: str) -> None:
    (found,) = mistakes_of([*right_run(tmp_path), f"algorithm={own_module}:NoAlgorithm"])
    assert found.endswith("'own_algorithm:NoAlgorithm' is no subclass of hybridflow.algorithms.base.Algorithm")


def test_many_mistakes_are_listed_together_with_their_number(tmp_path: Path) -> None:
    overrides = ["rolout.top_p=1", "rollout.top_p=2", "actor.schedule=cosin", "data.train_files=absent.parquet"]
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*right_run(tmp_path), *overrides, "run.device=tpu"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "5 errors in the configuration:"
    keys = ("rolout.top_p: ", "run.device: ", "actor.schedule: ", "rollout.top_p: ", "data.train_files: ")
    assert all(f"  command line: {key}" in line for key, line in zip(keys, lines[1:], strict=True))


def test_a_mistake_is_reported_in_two_seconds_without_torch_and_ray(tmp_path: Path) -> None:
    overrides = [*right_run(tmp_path), "algorithm=grpo", "run.seed=x"]
    program = f"""
import sys, time
from hybridflow.config.load import load_config
from hybridflow.errors import ConfigError
try:
    load_config(None, {overrides!r})
except ConfigError as error:
    assert not {{"torch", "ray", "vllm", "transformers"}} & sys.modules.keys(), "a slow package was imported"
    assert time.process_time() < 2, "seconds of this process, whatever else the machine does"
    sys.exit(3)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 3, finished.stderr
