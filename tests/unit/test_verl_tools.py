"""Tools and interactions that were written for verl: their YAML, their classes, and what an episode makes of them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hybridflow.batch import Batch
from hybridflow.config.load import load_config
from hybridflow.config.rules_verl_files import BUILT_IN
from hybridflow.environments.base import Row
from hybridflow.environments.verl_names import NAMES
from hybridflow.environments.verl_tools import VerlEpisode
from tests.unit.config_cases import mistakes_of, right_run
from tests.unit.episodes import episode_config, episode_rows, worker_of

# A tool as files for verl write them: subclasses of what verl has, by the names that verl has them under.
TOOL = """
from typing import Any, Optional
from uuid import uuid4
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
from verl.utils.rollout_trace import rollout_trace_op

class Add(BaseTool):
    def __init__(self, config: dict, tool_schema: OpenAIFunctionToolSchema):
        super().__init__(config, tool_schema)
        self.units = {}

    async def create(self, instance_id: Optional[str] = None, **kwargs):
        instance_id = instance_id or str(uuid4())
        self.units[instance_id] = kwargs["create_kwargs"].get("unit", "")
        return instance_id, ToolResponse()

    @rollout_trace_op
    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs):
        return ToolResponse(text=f"{parameters['a'] + parameters['b']}{self.units[instance_id]}"), 0.5, {}

    async def release(self, instance_id: str, **kwargs):
        del self.units[instance_id]
"""
SCHEMA = "{type: function, function: {name: NAME, description: d, parameters: {type: object, properties: {}, required: []}}}"
DUCK = """
class Duck:
    def __init__(self, config, tool_schema):
        self.tool_schema = tool_schema

    async def create(self, **given):
        return "x"

    async def execute(self, instance, given):
        return "quack" * 9, 0, {}

    async def release(self, instance):
        pass
"""
"""Nothing of verl's in it, of an older form: `create` and `execute` give texts."""


def entry(class_name: str, name: str) -> str:
    return f"  - class_name: {class_name}\n    config: {{type: native}}\n    tool_schema: {SCHEMA.replace('NAME', name)}\n"


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tools, an interaction, and verl's names as a process of environments has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "my_tool.py").write_text(TOOL)
    (tmp_path / "duck.py").write_text(DUCK)
    tools = entry(f"{tmp_path}/my_tool.py:Add", "add") + entry("duck.py:Duck", "duck") + entry(BUILT_IN[0], "calc_gsm8k_reward")
    (tmp_path / "tools.yaml").write_text(f"tools:\n{tools}")
    (tmp_path / "talk.yaml").write_text(f"interaction:\n  - name: gsm8k\n    class_name: {BUILT_IN[1]}\n    config: {{}}\n")
    return tmp_path


def row(**extra_info: object) -> Row:
    question = [{"role": "user", "content": "3 + 4?"}]
    return Row(messages=list(question), ground_truth="7", data_source="", extra_info=extra_info, seed=0, sample=0)


def calls(*wanted: tuple[str, dict[str, object]]) -> dict[str, object]:
    listed = [{"type": "function", "id": str(i), "function": {"name": n, "arguments": a}} for i, (n, a) in enumerate(wanted)]
    return {"role": "assistant", "content": "", "tool_calls": listed}


def said(episode: VerlEpisode, given: Row, *messages: dict[str, object]) -> list[tuple[Any, ...]]:
    """What an episode answers to these messages."""

    async def run() -> list[tuple[Any, ...]]:
        await episode.reset(given)
        answers = [await episode.step(message) for message in messages]
        await episode.close()
        return answers

    return asyncio.run(run())


def contents(answer: tuple[Any, ...]) -> Sequence[str]:
    return [message["content"] for message in answer[0]]


def test_calls_are_answered_by_the_files_tools_and_the_end_is_a_message_without_a_call(files: Path) -> None:
    options = {"add": {"create_kwargs": {"unit": " kg"}}, "calc_gsm8k_reward": {"create_kwargs": {"ground_truth": "7"}}}
    asked = calls(("add", {"a": 3, "b": 4}), ("calc_gsm8k_reward", {"answer": "7"}), ("none", {}), ("add", {"a": 1, "b": 1}))
    episode = VerlEpisode(tool_config_path=str(files / "tools.yaml"), max_parallel_calls=3)
    first, last = said(episode, row(tools_kwargs=options), asked, {"role": "assistant", "content": "7"})
    assert contents(first) == ["7 kg", "Current parsed answer='7' reward=1.0", "Error when executing tool: 'none'"]
    assert first[1:4] == (0.0, False, False) and first[4]["tool_reward"] == 0.5
    assert last[:4] == ([], 0.0, True, False)


def test_a_tool_that_is_named_by_its_file_alone_imports_verls_names(files: Path) -> None:
    (files / "one.yaml").write_text(f"tools:\n{entry('my_tool.py:Add', 'add')}")
    (answer,) = said(VerlEpisode(tool_config_path=str(files / "one.yaml")), row(), calls(("add", {"a": 3, "b": 4})))
    assert contents(answer) == ["7"]


def test_episodes_that_begin_at_once_on_threads_all_find_their_tools(files: Path) -> None:
    (files / "slow.py").write_text(f"import time\ntime.sleep(0.2)\n{TOOL}")
    (files / "one.yaml").write_text(f"tools:\n{entry('slow.py:Add', 'add')}")
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: VerlEpisode(tool_config_path=str(files / "one.yaml")), range(4)))
    assert all(episode.tools is made[0].tools for episode in made)


MADE_SCHEMA = """
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionParametersSchema, OpenAIFunctionPropertySchema, OpenAIFunctionSchema, \\
    OpenAIFunctionToolSchema, ToolResponse

class Run(BaseTool):
    def get_openai_tool_schema(self):
        code = OpenAIFunctionPropertySchema(type="string", description="Python", enum=["1", "2"])
        taken = OpenAIFunctionParametersSchema(type="object", properties={"code": code}, required=["code"])
        function = OpenAIFunctionSchema(name="run", description="Run it.", parameters=taken)
        return OpenAIFunctionToolSchema(type="function", function=function)

    async def execute(self, instance_id, parameters, agent_data):
        agent_data.extra_fields["calls"] = agent_data.extra_fields.get("calls", 0) + 1
        first, options = agent_data.messages[0]["content"], agent_data.tools_kwargs["run"]["execute_kwargs"]
        return ToolResponse(text=f"{first} {options['unit']} {agent_data.extra_fields['calls']} {agent_data.request_id}"), 0, {}
"""
"""A schema of verl's classes within a mapping, and a tool that asks for the episode."""


def test_a_schema_that_a_tool_makes_of_verls_classes_is_plain_and_its_call_is_told_of_the_episode(files: Path) -> None:
    (files / "run.py").write_text(MADE_SCHEMA)
    (files / "one.yaml").write_text("tools:\n  - {class_name: 'run.py:Run', config: {type: native}}\n")
    episode, given = (
        VerlEpisode(tool_config_path=str(files / "one.yaml")),
        row(tools_kwargs={"run": {"execute_kwargs": {"unit": "kg"}}}),
    )
    (schema,) = asyncio.run(episode.reset(given))[1]["tools"]
    code = {"type": "string", "description": "Python", "enum": ["1", "2"]}
    assert json.loads(json.dumps(schema))["function"]["parameters"]["properties"] == {"code": code}
    answers = said(episode, given, calls(("run", {})), calls(("run", {})))
    assert [contents(answer) for answer in answers] == [[f"3 + 4? kg {number} {episode.number}"] for number in (1, 2)]


NULLS = """
from pydantic import BaseModel

class Function(BaseModel):
    name: str
    default: str | None = "x"
    enum: list[str] | None = None

class Schema(BaseModel):
    function: Function

class Find:
    def __init__(self, config, tool_schema):
        self.tool_schema = Schema(function=Function(name="find", default=None))
"""


def test_a_null_in_a_tools_schema_is_kept_and_what_it_leaves_out_is_not_added(files: Path) -> None:
    (files / "find.py").write_text(NULLS)
    (files / "one.yaml").write_text(f"tools:\n{entry('find.py:Find', 'find')}")
    episode = VerlEpisode(tool_config_path=str(files / "one.yaml"))
    (schema,) = asyncio.run(episode.reset(row()))[1]["tools"]
    assert schema == {"function": {"name": "find", "default": None}}


@pytest.mark.parametrize(
    ("side", "text"),
    [("left", "quackqua...(truncated)"), ("right", "(truncated)...ackquack"), ("middle", "quac...(truncated)...uack")],
)
def test_a_class_with_the_methods_is_a_tool_and_long_answers_are_cut_as_in_verl(files: Path, side: str, text: str) -> None:
    path = str(files / "tools.yaml")
    episode = VerlEpisode(tool_config_path=path, max_tool_response_length=8, tool_response_truncate_side=side)
    (answer,) = said(episode, row(), calls(("duck", {})))
    assert contents(answer) == [text]


def test_an_interaction_goes_on_until_it_is_content_or_the_turns_are_over(files: Path) -> None:
    given = row(interaction_kwargs={"name": "gsm8k", "ground_truth": "7"})
    wrong, right = ({"role": "assistant", "content": content} for content in ("it is 8", "so 7"))
    first, second = said(VerlEpisode(interaction_config_path=str(files / "talk.yaml")), given, wrong, right)
    assert "incorrect" in contents(first)[0] and first[2] is False
    assert "is correct" in contents(second)[0] and second[2] is True and second[4]["turn_scores"] == 1.0
    (only,) = said(VerlEpisode(interaction_config_path=str(files / "talk.yaml"), max_turns=1), given, wrong)
    assert only[2] is True and not only[0]


def test_what_is_checked_beforehand_is_what_is_there() -> None:
    assert all(class_name in {f"{module}.{name}" for module in NAMES for name in NAMES[module]} for class_name in BUILT_IN)


TALK = """
class Again:
    def __init__(self, config):
        self.config, self.left = config, {}

    async def start_interaction(self, instance_id, **given):
        self.left[instance_id] = given["turns"]

    async def generate_response(self, instance_id, messages, **given):
        self.left[instance_id] -= 1
        return self.left[instance_id] == 0, self.config["said"], 0.25, {}

    async def finalize_interaction(self, instance_id, **given):
        del self.left[instance_id]
"""


def test_episodes_of_an_engine_run_the_files_in_processes_of_their_own(files: Path, tiny_model: str) -> None:
    (files / "again.py").write_text(TALK)
    talk = f"  - {{name: again, class_name: '{files}/again.py:Again', config: {{said: go on}}}}\n"
    (files / "again.yaml").write_text(f"interaction:\n{talk}")
    (files / "one.yaml").write_text(f"tools:\n{entry('my_tool.Add', 'add')}")
    options = {"interaction_config_path": str(files / "again.yaml"), "tool_config_path": str(files / "one.yaml")}
    name = "hybridflow.environments.verl_tools:VerlEpisode"
    config = episode_config(tiny_model, files / "none.py", path=None, name=name, options=options)
    extra = [{"interaction_kwargs": {"name": "again", "turns": turns}} for turns in (1, 2, 3)]
    rows = episode_rows(["a", "b", "c"]).without(("extra_info",)).join(Batch.from_columns({"extra_info": extra}))
    worker = worker_of(dataclasses.replace(config, data=dataclasses.replace(config.data, max_prompt_tokens=300)))
    answered = worker.generate(rows)
    worker.close()
    assert not answered["episode_failed"].any()
    assert answered["environment/turns"].tolist() == [1, 2, 3]
    assert answered["environment/turn_scores"].tolist() == [0.25, 0.5, 0.75]
    said = answered.objects("conversation")[2]
    assert [message["content"] for message in said if message["role"] == "user"][1:] == ["go on"] * 3  # type: ignore[attr-defined]


TURNS = "actor_rollout_ref.rollout.multi_turn"


def test_verls_keys_make_an_environment_of_the_files(files: Path) -> None:
    keys = [f"{TURNS}.tool_config_path={files}/tools.yaml", f"{TURNS}.max_user_turns=2", f"{TURNS}.format=hermes"]
    small = ["data.train_batch_size=256", "placement.pools.main=1x1"]
    environment = load_config(None, [*right_run(files), *small, *keys]).environment
    assert environment.name == "hybridflow.environments.verl_tools:VerlEpisode"
    # Two turns of the environment's have three of the policy's around them.
    assert (environment.max_turns, environment.options["max_turns"], environment.add_reward) == (3, 3, "all")
    both = load_config(None, [*right_run(files), *small, *keys, f"{TURNS}.max_assistant_turns=2"])
    assert both.environment.max_turns == 2


@pytest.mark.parametrize("kind", ["tool_config_path=tools.yaml", "interaction_config_path=talk.yaml"])
def test_verls_tools_and_interactions_go_with_engines_of_several_ranks(
    files: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (files / "vllm.py").touch()  # stands for the package
    monkeypatch.syspath_prepend(files)
    ranks = ["trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.tensor_model_parallel_size=2", "placement.cpu_slots=4"]
    config = load_config(
        None, [*right_run(files), *ranks, "rollout.engine=vllm", "data.train_batch_size=256", f"{TURNS}.{kind}"]
    )
    assert (config.rollout.tensor_parallel, config.environment.is_set) == (2, True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tools: []", "has no list `tools`"),
        ("tools:\n  - config: {}", "an entry without class_name"),
        ("tools:\n  - class_name: .B", "an entry of class_name '.B'. Name one as my_package.module.Class"),
        ("tools:\n  - class_name: a..B", "an entry of class_name 'a..B'"),
        ("tools: [", "cannot be read as YAML"),
        (f"tools:\n{entry('verl.tools.search_tool.SearchTool', 's')}", "verl is not installed, and this class of its is not"),
        (f"tools:\n{entry('nowhere.Tool', 's')}", "Write a class with create, execute, release"),
        (f"tools:\n{entry('duck.py:Drake', 's')}", "has no 'Drake'"),
        ("tools:\n  - {class_name: a.B, config: {type: mcp}}", "Write a tool of type native"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(files: Path, text: str, problem: str) -> None:
    (files / "bad.yaml").write_text(text)
    keys = ["data.train_batch_size=256", "placement.pools.main=1x1", f"{TURNS}.tool_config_path={files}/bad.yaml"]
    (found,) = mistakes_of([*right_run(files), *keys])
    assert problem in found


def test_a_file_that_is_elsewhere_is_named_with_verls_key(files: Path) -> None:
    keys = ["data.train_batch_size=256", "placement.pools.main=1x1", f"{TURNS}.interaction_config_path=gone.yaml"]
    (found,) = mistakes_of([*right_run(files), *keys])
    assert f"({TURNS}.interaction_config_path)" in found and "Copy it from the folder" in found
    assert load_config(None, [*right_run(files), *keys], is_dry_run=True).environment.is_set, "another machine may have it"


def test_a_file_that_cannot_be_read_is_named_with_verls_key(files: Path) -> None:
    (files / "bad.yaml").symlink_to("/proc/self/mem")  # a file whose first byte nobody may read, root neither
    keys = ["data.train_batch_size=256", "placement.pools.main=1x1", f"{TURNS}.tool_config_path={files}/bad.yaml"]
    (found,) = mistakes_of([*right_run(files), *keys])
    assert f"({TURNS}.tool_config_path)" in found and f"{files}/bad.yaml cannot be read as YAML" in found


def test_verls_names_are_put_in_place_only_where_asked_for() -> None:
    code = "import hybridflow.environments.verl_tools, sys; sys.exit('verl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
