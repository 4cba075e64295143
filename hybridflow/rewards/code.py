r"""Code execution: the program in a response passes its tests, in a sandbox (rewards/sandbox.py).

The ground truth says what is tested, as a value or as JSON text of it:

    "assert add(1, 2) == 3"  or a list of such texts             statements that run behind the program, as in MBPP
    {"inputs": ["1 2\n"], "outputs": ["3\n"]}                    standard input and what the program must print for it
    {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}       arguments of a function, or method of Solution, and its results
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybridflow.rewards.call import RewardInput
from hybridflow.rewards.sandbox import Limits, ProgramRun, run_program

REWARD_NAME = "code"

FENCED = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
CALLS = """
import json as _json
_case = _json.loads(input())
_called = globals().get(_case["name"]) or getattr(Solution(), _case["name"])
_result = _called(*_case["arguments"])
_result = _json.loads(_json.dumps(_result))
assert _result == _case["expected"] or [_result] == _case["expected"], f"{_result!r} is not {_case['expected']!r}"
"""


@dataclass(frozen=True)
class Tests:
    """Programs with their inputs; a run passes where it ends by itself, and says what is expected if anything is."""

    program: str
    inputs: tuple[str, ...] = ("",)
    outputs: tuple[str, ...] | None = None
    passed_text: str = ""
    """What the last statement of the program prints: a program that leaves before its tests does not say it."""

    def passes(self, number: int, run: ProgramRun) -> bool:
        """Whether a run is a success."""
        if run.exit_code != 0 or run.reason is not None:
            return False
        if self.outputs is not None:
            return _lines(run.stdout) == _lines(self.outputs[number])
        return run.stdout.rstrip().endswith(self.passed_text)


def program_of(response: str) -> str | None:
    """The last fenced block of Python in the response; None where there is none.

    Example:
        >>> program_of("First\\n```python\\nx = 1\\n```\\nthen\\n```py\\ny = 2\\n```")
        'y = 2\\n'
    """
    blocks = FENCED.findall(response)
    return blocks[-1] if blocks else None


async def compute_score(
    reward_input: RewardInput,
    *,
    partial: bool = False,
    max_tests: int = 50,
    cpu_s: float = 4.0,
    wall_s: float = 6.0,
    memory_mib: int = 512,
    allow_unconfined: bool = False,
) -> Mapping[str, float]:
    """1 where the program passes all tests, else 0; with `partial` the share of tests that it passes.

    The program is the last fenced block of the response. Each test has `cpu_s` seconds of the processor, `wall_s` of the clock
    and `memory_mib`; at most the first `max_tests` run. `reward.timeout_s` bounds all of them together.

    Raises:
        RewardError: this machine cannot hold a program, and `allow_unconfined` is not set.
        ValueError: the ground truth is none of the forms above.
    """
    program = program_of(reward_input["response"])
    if program is None:
        return {"overall": 0.0, "accuracy": 0.0, "format": 0.0, "tests_passed": 0.0}
    limits = Limits(cpu_s=cpu_s, wall_s=wall_s, memory_mib=memory_mib)
    passed = num_tests = 0
    is_stopped = False
    for tests in tests_of(reward_input["ground_truth"], program, max_tests=max_tests, is_partial=partial):
        num_tests += len(tests.inputs)
        if is_stopped:
            continue
        runs = await run_program(
            tests.program, tests.inputs, limits=limits, stops_at_failure=not partial, allow_unconfined=allow_unconfined
        )
        passed += sum(tests.passes(number, run) for number, run in enumerate(runs))
        is_stopped = not partial and passed < num_tests
    share = passed / num_tests
    return {
        "overall": share if partial else float(passed == num_tests),
        "accuracy": float(passed == num_tests),
        "format": 1.0,
        "tests_passed": share,
    }


def tests_of(ground_truth: object, program: str, *, max_tests: int, is_partial: bool = False) -> list[Tests]:
    """What has to be run for a program; of statements one run for all or, for a share of them, one for each.

    Raises:
        ValueError: the ground truth is none of the forms that are known.
    """
    truth = _read(ground_truth)
    if isinstance(truth, str):
        truth = [truth]
    if isinstance(truth, list) and truth and all(isinstance(statement, str) for statement in truth):
        statements = truth[:max_tests]
        parts = [[statement] for statement in statements] if is_partial else [statements]
        return [_with_statements(program, part) for part in parts]
    if not isinstance(truth, Mapping) or not truth.get("inputs") or len(truth["inputs"]) != len(truth.get("outputs") or ()):
        raise ValueError(f"the ground truth of a program is statements, or inputs with as many outputs; found {truth!r:.200}")
    inputs, outputs = list(truth["inputs"])[:max_tests], list(truth["outputs"])[:max_tests]
    if name := truth.get("fn_name"):
        cases = [
            {"name": name, "arguments": _arguments(given), "expected": _value(expected)}
            for given, expected in zip(inputs, outputs, strict=True)
        ]
        secret = secrets.token_hex(8)
        texts = tuple(json.dumps(case) for case in cases)
        return [Tests(f"{program}\n{CALLS}\nprint({secret!r})\n", texts, passed_text=secret)]
    return [Tests(program, tuple(map(_text, inputs)), outputs=tuple(map(_text, outputs)))]


def why_unmatchable(ground_truth: object, data_source: str) -> str | None:
    """Why no program can pass; None where one can."""
    try:
        tests_of(ground_truth, "", max_tests=1)
    except ValueError as error:
        return f"{ground_truth!r:.80}: {error}"
    return None


def _with_statements(program: str, statements: Sequence[str]) -> Tests:
    secret = secrets.token_hex(8)
    # An empty line between: a program that ends with a backslash would make the first statement part of its last line.
    return Tests("\n".join([program, "", *statements, f"print({secret!r})", ""]), passed_text=secret)


def _read(value: object) -> object:
    """JSON text as what it says; other text as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[", '"')):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _value(text: object) -> object:
    """What a test expects: a value, or JSON text of it."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _arguments(given: object) -> list[object]:
    """A list of arguments, or text with one JSON value on each line."""
    if isinstance(given, str):
        return [json.loads(line) for line in given.splitlines() if line.strip()]
    return list(given) if isinstance(given, list) else [given]


def _text(value: object) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _lines(text: str) -> list[str]:
    """Trailing spaces and empty last lines do not count."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
