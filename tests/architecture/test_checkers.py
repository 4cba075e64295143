"""Each checker finds what it is there for, and leaves alone what is allowed: a limit that cannot fail holds nothing."""

from __future__ import annotations

import pytest

from tests.architecture import limits
from tests.architecture.limits import Source, Violation


def source(text: str, path: str = "hybridflow/ops/losses.py") -> Source:
    return Source(path, text)


def function_of(num_lines: int) -> str:
    return "\n".join(["def f():", *["    x = 1"] * (num_lines - 1)])


def test_a_long_file_is_found():
    assert not limits.long_files(source("x = 1\n" * 500))
    assert str(limits.long_files(source("x = 1\n" * 501))[0]).endswith("losses.py:501: the file has 501 lines, allowed 500")


def test_a_long_function_is_found_with_its_line():
    assert not limits.long_functions(source(function_of(60)))
    assert limits.long_functions(source("\n" + function_of(61))) == [
        Violation("hybridflow/ops/losses.py", 2, "function 'f' has 61 lines, allowed 60")
    ]


def test_a_long_method_and_a_long_inner_function_are_found():
    inner = "\n".join(f"    {line}" for line in function_of(61).splitlines())
    assert len(limits.long_functions(source(f"class A:\n{inner}"))) == 1
    assert len(limits.long_functions(source(f"def g():\n{inner}"))) == 2


def test_self_is_no_parameter_but_keyword_only_ones_are():
    assert not limits.many_parameters(source("class A:\n    def f(self, a, b, c, *, d, e, f): ..."))
    assert len(limits.many_parameters(source("def f(a, b, c, *, d, e, f, g): ..."))) == 1


def test_explanations_do_not_count_as_code():
    text = '"""Many\nlines\nof words."""\n\n# a comment\nx = [\n    1,\n]\n'
    assert limits.code_lines(source(text)) == 3


def test_an_algorithm_of_many_pages_is_found():
    assert not limits.long_algorithms(source("x = 1\n" * 120))
    assert len(limits.long_algorithms(source("x = 1\n" * 121))) == 1


LEVELS = (("errors",), ("ops",), ("workers",), ("controller",))


@pytest.mark.parametrize(
    "statement",
    [
        "import hybridflow.controller.loop",
        "from hybridflow import controller",
        "from hybridflow.workers.actor import ActorWorker",
        "from ..workers.actor import ActorWorker",
        "def f():\n    from hybridflow.workers import actor",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hybridflow.workers.actor import ActorWorker",
    ],
)
def test_an_import_from_above_is_found_wherever_it_stands(statement: str):
    assert len(limits.upward_imports(source(statement), LEVELS)) == 1


@pytest.mark.parametrize(
    "statement", ["from hybridflow.errors import DataError", "from hybridflow.ops import gae", "import torch"]
)
def test_an_import_from_below_or_beside_is_allowed(statement: str):
    assert not limits.upward_imports(source(statement), LEVELS)


def test_a_part_without_a_level_is_found():
    assert len(limits.upward_imports(source("x = 1", "hybridflow/helpers/x.py"), LEVELS)) == 1


def test_a_circle_of_parts_is_found():
    there = source("from hybridflow import data", "hybridflow/ops/a.py")
    back = source("import hybridflow.ops.a", "hybridflow/data/b.py")
    assert limits.part_cycle([there, back]) == ["data", "ops", "data"]
    assert limits.part_cycle([there]) == []


HOMES = {"ray": ("controller/",), "torch.utils.tensorboard": ("trackers/tensorboard.py",)}


@pytest.mark.parametrize("statement", ["import ray", "from ray.util import placement_group", "import ray.actor as actor"])
def test_a_dependency_outside_its_home_is_found(statement: str):
    assert len(limits.strayed_imports(source(statement), HOMES)) == 1
    assert not limits.strayed_imports(source(statement, "hybridflow/controller/group.py"), HOMES)


def test_a_submodule_can_have_a_home_of_its_own():
    assert limits.strayed_imports(source("from torch.utils.tensorboard import SummaryWriter"), HOMES)
    assert not limits.strayed_imports(source("import torch, rays"), HOMES)


def test_a_print_is_found():
    assert len(limits.printed(source("def f():\n    print('x')"))) == 1
    assert not limits.printed(source("logger.print('x')  # print('x')"))


def test_a_todo_needs_an_issue():
    assert len(limits.bare_todos(source("x = 1  # TODO: later"))) == 1
    assert not limits.bare_todos(source("x = 1  # TODO(#12): when torch 2.14 is out\ny = 'TODO'"))


def test_a_forbidden_word_is_found_outside_its_folders():
    words = {r"sh" + "ared/": ("tests/",)}
    assert len(limits.forbidden_words("docs/a.md", "x\nsee sh" + "ared/data", words)) == 1
    assert not limits.forbidden_words("tests/a.py", "see sh" + "ared/data", words)


def test_what_is_public_needs_a_docstring():
    text = "class A:\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...\ndef _i(): ..."
    problems = [str(found) for found in limits.missing_docstrings(source(text), explained=set())]
    assert [problem.split(": ", 1)[1].split(" ")[0] for problem in problems] == ["the", "A", "A.f", "h"]


def test_a_method_that_its_interface_explains_needs_no_docstring():
    base = source('"""M."""\nclass Base:\n    """B."""\n    def f(self):\n        """F."""')
    derived = source('"""M."""\nclass Derived:\n    """D."""\n    def f(self): ...')
    assert not limits.missing_docstrings(derived, limits.explained_methods([base, derived]))


@pytest.mark.parametrize(
    "text",
    [
        "if config.algorithm.name == 'ppo': ...",
        "x = self.run.rollout.engine != 'vllm'",
        "if role in ('actor', 'critic'): ...",
        "if 'reward' == context.role: ...",
        "match config.rollout.engine:\n    case 'vllm': ...",
    ],
)
def test_a_branch_on_a_name_is_found(text: str):
    assert len(limits.branches_on_names(source(text))) == 1


@pytest.mark.parametrize(
    "text", ["if role in table: ...", "if name == 'ppo': ...", "if engine is None: ...", "x = role == other"]
)
def test_other_comparisons_are_allowed(text: str):
    assert not limits.branches_on_names(source(text))


def test_a_branch_on_a_name_is_allowed_at_home():
    assert not limits.branches_on_names(source("if engine == 'vllm': ...", "hybridflow/rollout/base.py"))
    assert not limits.branches_on_names(source("if role == 'reward': ...", "hybridflow/controller/placement.py"))


def test_an_unexplained_field_is_found():
    text = 'class C:\n    """A class."""\n    a: int = 1\n    """Explained."""\n    b: int = 2\n'
    assert [found.line for found in limits.unexplained_fields(source(text), "C")] == [5]
