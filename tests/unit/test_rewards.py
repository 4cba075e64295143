"""The rules, how a user's function is called, and what is said where it cannot be."""

import json
from pathlib import Path

import pytest

from hybridflow.config.schema import RewardConfig, RewardTerm
from hybridflow.errors import ConfigError, RewardError
from hybridflow.rewards.by_data_source import compute_score as score_by_data_source
from hybridflow.rewards.call import RewardFunction, RewardInput, load_reward_function
from hybridflow.rewards.math import last_boxed
from hybridflow.rewards.results import Failure, Score
from hybridflow.rewards.scorer import Scorer

EXAMPLES = Path(__file__).parents[2] / "examples" / "rewards"
REAL_DATA = Path(__file__).parents[3] / "shared" / "data"


def given(response: str = "#### 72", ground_truth: object = "72", data_source: str = "openai/gsm8k") -> RewardInput:
    return RewardInput(
        response=response,
        ground_truth=ground_truth,
        data_source=data_source,
        extra_info={"k": 1},
        prompt="q",
        messages=[],
        conversation=[],
        response_tokens=5,
        truncated=False,
    )


def built_in(name: str) -> RewardFunction:
    return load_reward_function(RewardConfig(name=name))


def user_function(folder: Path, source: str, **config: object) -> RewardFunction:
    (folder / "mine.py").write_text(source)
    return load_reward_function(RewardConfig(path=str(folder / "mine.py"), **config))


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("48 + 24 = 72\n#### 72", 1.0),
        ("#### 71", 0.0),
        ("#### 71\n#### 72", 1.0),  # the last one counts
        ("#### 72\n#### 71", 0.0),
        ("the answer is 72", 0.0),  # no ####
        ("####72", 0.0),  # the space belongs to the format
        ("#### 72.0", 0.0),  # strict compares text
        ("#### 72" + " " * 293, 1.0),  # 7 + 293 = 300 characters from the end
        ("#### 72" + " " * 294, 0.0),  # one too far: the first # is cut off
        ("", 0.0),
    ],
)
def test_the_strict_rule_of_gsm8k(response: str, reward: float) -> None:
    assert built_in("gsm8k").score(given(response)).reward == reward


def test_commas_and_dollars_do_not_count() -> None:
    assert built_in("gsm8k").score(given("#### 1,234", "1234")).reward == 1.0
    assert built_in("gsm8k").score(given("#### 1234", "$1,234")).reward == 1.0
    assert built_in("gsm8k").score(given("#### -5", "-5")).reward == 1.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("so she sold 72.", 1.0),
        ("it is 72 or 73", 0.0),
        ("72.0 clips", 1.0),
        ("$72", 1.0),
        ("no number", 0.0),
        ("-72", 0.0),
    ],
)
def test_the_flexible_rule_takes_the_last_number(response: str, reward: float) -> None:
    assert built_in("gsm8k_flexible").score(given(response)).reward == reward


def test_rules_say_whether_there_was_an_answer_at_all() -> None:
    assert built_in("gsm8k").score(given("#### 71")).metrics == {"overall": 0.0, "accuracy": 0.0, "format": 1.0}
    assert built_in("gsm8k").score(given("none")).metrics["format"] == 0.0


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} then \boxed{2", "1"),  # cut off by the length limit
        (r"\boxed{}", ""),
        ("none", None),
    ],
)
def test_the_last_complete_box_is_read(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("answer", "truth", "reward"),
    [
        ("0.5", r"\frac{1}{2}", 1.0),
        ("2x+1", "1+2x", 1.0),
        ("10080", r"10,\!080", 1.0),
        ("Evelyn", r"\text{Evelyn}", 1.0),
        ("(2,4)", "(4,2)", 0.0),
        (r"\frac{", "3", 0.0),
    ],
)
def test_the_rule_of_math_compares_meaning(answer: str, truth: str, reward: float) -> None:
    pytest.importorskip("math_verify")
    assert built_in("math").score(given(rf"so $\boxed{{{answer}}}$", truth)).reward == reward


def test_math_without_a_box_is_wrong() -> None:
    assert built_in("math").score(given("72", "72")).metrics == {"overall": 0.0, "accuracy": 0.0, "format": 0.0}


def test_the_rule_follows_the_data_source() -> None:
    assert score_by_data_source(given("#### 72"))["overall"] == 1.0
    assert score_by_data_source(given(r"\boxed{72}", data_source="lighteval/MATH"))["overall"] == 1.0
    assert score_by_data_source(given(r"\boxed{72}"))["overall"] == 0.0


def test_an_unknown_data_source_says_what_to_set() -> None:
    with pytest.raises(RewardError, match=r"data_source 'openai/gsm8'; did you mean 'openai/gsm8k'\?.*reward.path"):
        score_by_data_source(given(data_source="openai/gsm8"))


def test_a_function_of_one_dict_gets_everything_and_its_options(tmp_path: Path) -> None:
    source = "def compute_score(reward_input, **kwargs):\n    return {'overall': kwargs['x'], 'n': len(reward_input)}"
    score = user_function(tmp_path, source, options={"x": 3}).score(given())
    assert score.reward == 3.0
    assert score.metrics == {"overall": 3.0, "n": 9.0}


@pytest.mark.parametrize(
    "signature",
    [
        "data_source, solution_str, ground_truth, extra_info=None",
        "data_source, solution_str, ground_truth, extra_info=None, **kwargs",
        "solution_str, ground_truth, data_source, extra_info",
        "solution_str, ground_truth, **kwargs",
        "*, data_source, solution_str, ground_truth, extra_info",
    ],
)
def test_a_function_of_four_arguments_gets_them_by_name(tmp_path: Path, signature: str) -> None:
    source = f"def compute_score({signature}):\n    return {{'score': float(ground_truth), 'right': solution_str == '#### 72'}}"
    assert user_function(tmp_path, source).score(given()).metrics == {"score": 72.0, "right": 1.0}


def test_four_arguments_with_other_names_go_by_position(tmp_path: Path) -> None:
    source = "def compute_score(data_source, text, truth, info, weight):\n    return weight * info['k'] * (text[-2:] == truth)"
    assert user_function(tmp_path, source, options={"weight": 0.5}).score(given()).reward == 0.5


def test_a_batch_function_gets_all_at_once(tmp_path: Path) -> None:
    source = "REWARD_TYPE = 'batch'\nREWARD_NAME = 'mine'\ndef compute_score(inputs):\n    return [len(inputs)] * len(inputs)"
    function = user_function(tmp_path, source)
    assert (function.kind, function.name) == ("batch", "mine")
    assert [score.reward for score in function.score_all([given(), given()])] == [2.0, 2.0]


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_the_reward.py").write_text("VALUE = 7")
    source = "import beside_the_reward\ndef compute_score(reward_input):\n    return beside_the_reward.VALUE"
    assert user_function(tmp_path, source).score(given()).reward == 7.0


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ("None", "returned None; expected a number, or a dict with 'overall'"),
        ("'1'", "returned a str"),
        ("{'accuracy': 1}", r"a dict with \['accuracy'\]; it needs 'overall' or 'score'"),
        ("{'overall': None}", "returned None as 'overall'"),
        ("{'score': (1.0, 2.0)}", "returned a tuple .* as 'score'"),
        ("(number for number in [1.0])", r"returned a generator \(<generator object compute_score.<locals>.<genexpr>>\)"),
        ("float('nan')", "must be finite"),
        ("[1.0]", "returned a list"),
        ("(1.0, {'right': 1})", "returned a tuple"),
    ],
)
def test_a_wrong_result_is_named(tmp_path: Path, result: str, problem: str) -> None:
    function = user_function(tmp_path, f"def compute_score(reward_input):\n    return {result}")
    with pytest.raises((TypeError, ValueError), match=problem):
        function.score(given())


def test_of_what_a_function_raises_so_much_is_told_and_nothing_of_who_called_it(tmp_path: Path) -> None:
    source = "def compute_score(reward_input):\n    raise ValueError('a' + 'x' * 10_000_000 + 'z')"
    (tmp_path / "reward.py").write_text(source)
    scorer = Scorer(RewardConfig(path=str(tmp_path / "reward.py")))
    failure = scorer.begin(given())()
    assert isinstance(failure, Failure) and len(failure.detail) < 5000
    assert "ValueError: axxx" in failure.detail and failure.detail.rstrip().endswith("xz")
    assert "reward.py" in failure.detail and "scorer.py" not in failure.detail


def test_a_result_that_is_none_is_told_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def compute_score(reward_input):\n    return 'good'")
    failure = Scorer(RewardConfig(path=str(tmp_path / "reward.py"))).begin(given())()
    assert isinstance(failure, Failure) and failure.detail.startswith("TypeError: the function returned a str ('good')")


@pytest.mark.parametrize("name", ["mean", "std", "failed"])
def test_a_metric_may_not_take_the_name_of_one_of_the_rewards_own(tmp_path: Path, name: str) -> None:
    function = user_function(tmp_path, f"def compute_score(given):\n    return {{'overall': 1.0, '{name}': 0.5}}")
    with pytest.raises(RewardError, match=f"a number called '{name}', but reward/{name} is of the reward itself"):
        function.score(given())


def test_entries_that_are_no_numbers_are_not_metrics(tmp_path: Path) -> None:
    source = "def compute_score(reward_input):\n    return {'score': True, 'pred': '72', 'none': None}"
    assert user_function(tmp_path, source).score(given()).metrics == {"score": 1.0}


@pytest.mark.parametrize(("result", "problem"), [("[1.0]", "got 2 responses and returned 1"), ("1.0", "returns a list")])
def test_a_batch_result_of_another_length_is_named(tmp_path: Path, result: str, problem: str) -> None:
    function = user_function(tmp_path, f"REWARD_TYPE = 'batch'\ndef compute_score(inputs):\n    return {result}")
    with pytest.raises((TypeError, ValueError), match=problem):
        function.score_all([given(), given()])


@pytest.mark.parametrize(
    ("source", "config", "problem"),
    [
        ("def compute_scores(x): ...", {}, "no function 'compute_score'; did you mean 'compute_scores'"),
        ("compute_score = 3", {}, "is a int .3., not a function"),
        ("import no_such_package", {}, "does not import: ModuleNotFoundError"),
        ("def compute_score(x:", {}, "does not import: SyntaxError"),
        ("def compute_score(a, b): ...", {}, r"takes \(a, b\); expected \(reward_input"),
        ("def compute_score(x, weight=1): ...", {"options": {"weigth": 2}}, "not take reward.options.weigth.*mean 'weight'"),
        ("def compute_score(x, *, weight): ...", {}, "needs 'weight'; set reward.options.weight"),
        ("def compute_score(solution_str, ground_truth, method): ...", {}, "needs 'method'; set reward.options.method"),
        ("REWARD_TYPE = 'all'\ndef compute_score(x): ...", {}, "REWARD_TYPE is 'all'"),
        ("REWARD_TYPE = 'batch'\ndef compute_score(a, solution_str, ground_truth): ...", {}, "takes one list of dicts"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused(
    tmp_path: Path, source: str, config: dict[str, object], problem: str
) -> None:
    with pytest.raises(RewardError, match=problem):
        user_function(tmp_path, source, **config)


def test_a_missing_file_and_an_unknown_rule_are_named(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("")
    with pytest.raises(RewardError, match=r"there is no such file; did you mean 'reward.py'"):
        load_reward_function(RewardConfig(path=str(tmp_path / "rewards.py")))
    with pytest.raises(ConfigError, match="did you mean 'gsm8k'"):
        load_reward_function(RewardConfig(name="gsm8"))


@pytest.mark.parametrize(
    ("response", "reward", "format_metric"),
    [
        (r"so \boxed{72}", 1.0, 1.0),
        ("<answer>72.0</answer> 5", 1.0, 1.0),
        ("first 5\nthen 72", 1.0, 0.0),
        ("1,000", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_sequential_example_reads_three_forms(response: str, reward: float, format_metric: float) -> None:
    score = load_reward_function(RewardConfig(path=str(EXAMPLES / "gsm8k_reward.py"))).score(given(response))
    assert (score.reward, score.metrics["format"]) == (reward, format_metric)


def test_the_batch_example_prefers_the_shorter_right_answer() -> None:
    function = load_reward_function(RewardConfig(path=str(EXAMPLES / "batch_reward.py")))
    scores = function.score_all([given("72"), given("it is 72"), given("71")])
    # Right answers of 2 and 8 characters: the shortest loses nothing, the longest length_weight = 0.2.
    assert [score.reward for score in scores] == pytest.approx([1.0, 0.8, 0.0])


def test_the_four_argument_example_rewards_the_end() -> None:
    function = load_reward_function(RewardConfig(path=str(EXAMPLES / "four_argument_reward.py")))
    assert [function.score(given(text)).reward for text in ("so 72.", "72 or 73", "5")] == [1.0, 0.1, 0.0]


@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real datasets are not in ../shared/data")
def test_gold_answers_of_math_500_are_right() -> None:
    pytest.importorskip("math_verify")
    rule = built_in("math")
    answers = [json.loads(line)["answer"] for line in (REAL_DATA / "math500" / "test.jsonl").open()]
    # Written with \dfrac and spaces inside, so that equality as text does not decide.
    rewritten = [answer.replace(r"\frac", r"\dfrac") for answer in answers]
    rewards = [
        rule.score(given(rf"$\boxed{{ {text} }}$", answer)).reward for text, answer in zip(rewritten, answers, strict=True)
    ]
    assert sum(rewards) == 500


NUMBERS = [
    "1",
    "1.0",
    "True",
    "np.float32(1)",
    "np.array(1.0)",
    "np.array([1.0])",
    "Decimal(1)",
    "Fraction(1)",
    "torch.tensor([1.0])",
]
PREAMBLE = "import numpy as np, torch\nfrom decimal import Decimal\nfrom fractions import Fraction\n"


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("form", ["{}", "{{'overall': {}}}", "{{'score': {}, 'text': 'x'}}"])
def test_a_number_of_any_library_is_a_reward(tmp_path: Path, number: str, form: str) -> None:
    source = f"{PREAMBLE}def compute_score(reward_input):\n    return {form.format(number)}"
    assert user_function(tmp_path, source).score(given()).reward == 1.0


LISTS = ["[1.0, 0.5]", "(1.0, 0.5)", "np.array([1.0, 0.5])", "torch.tensor([1.0, 0.5])", "(x for x in (1.0, 0.5))"]
LISTS += [
    "{1.0: 0, 0.5: 0}.keys()",
    "map(float, ('1', '0.5'))",
    "[np.float32(1), torch.tensor(0.5)]",
    "np.array([[1.0], [0.5]])",
]


@pytest.mark.parametrize("results", LISTS)
def test_many_results_may_come_in_any_list_array_or_tensor(tmp_path: Path, results: str) -> None:
    source = f"REWARD_TYPE = 'batch'\n{PREAMBLE}def compute_score(inputs):\n    return {results}"
    assert [score.reward for score in user_function(tmp_path, source).score_all([given(), given()])] == [1.0, 0.5]


EXTRAS = [
    "np.arange(3)",
    "torch.ones(2)",
    "[1, 2]",
    "None",
    "'x'",
    "object()",
    "{'a': 1}",
    "Refuses()",
    "np.array('x')",
    "1j",
    "b''",
]


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_entry_that_is_no_number_never_fails_the_score(tmp_path: Path, extra: str) -> None:
    source = f"{PREAMBLE}class Refuses:\n    def __float__(self): raise RuntimeError('no')\n    tolist = __float__\n"
    source += f"def compute_score(reward_input):\n    return {{'score': 0.5, 'mean': {extra}, 'more': {extra}, 'ok': 1}}"
    assert user_function(tmp_path, source).score(given()).metrics == {"score": 0.5, "ok": 1.0}


@pytest.mark.parametrize(
    "value", ["1e39", "-1e39", "3.5e38", "10**400", "np.float64(1e300)", "float('inf')", "torch.tensor(float('nan'))"]
)
def test_rewards_are_finite_as_the_float32_that_they_become(tmp_path: Path, value: str) -> None:
    function = user_function(tmp_path, f"{PREAMBLE}def compute_score(reward_input):\n    return {value}")
    with pytest.raises(ValueError, match=r"must be finite, and at most 3\.4e38"):
        function.score(given())


TRL = "def reward(completions, {parameters}):\n    return {result}"


@pytest.mark.parametrize("prefix", ["", "async "])
def test_the_signature_of_trl_gets_columns_and_returns_a_list(tmp_path: Path, prefix: str) -> None:
    source = prefix + TRL.format(
        parameters="ground_truth, k, **kwargs", result="[float(t in c) + i for c, t, i in zip(completions, ground_truth, k)]"
    )
    function = user_function(tmp_path, source, function="reward")
    assert function.kind == "batch"
    assert [score.reward for score in function.score_all([given("#### 72"), given("none")])] == [2.0, 1.0]


def test_the_signature_of_trl_gets_messages_where_the_dataset_has_messages(tmp_path: Path) -> None:
    source = TRL.format(
        parameters="prompts, **kwargs", result="[len(p) + len(c[0]['content']) for p, c in zip(prompts, completions)]"
    )
    conversation = given("abc")
    conversation["messages"] = [{"role": "user", "content": "q"}]
    conversation["prompt"] = "user: q"  # as a template has made it
    function = user_function(tmp_path, source, function="reward")
    assert function.score_all([conversation])[0].reward == 4.0  # one message, three characters


def test_a_column_that_the_dataset_does_not_have_is_named(tmp_path: Path) -> None:
    function = user_function(tmp_path, TRL.format(parameters="solution", result="[]"), function="reward")
    with pytest.raises(RewardError, match=r"needs a column 'solution'.*given: k, prompts, completions"):
        function.score_all([given()])


COROUTINES = ["async def compute_score(reward_input):\n    await asyncio.sleep(0)\n    return 1.0"]
COROUTINES += ["async def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return {'score': 1.0}"]
COROUTINES += ["async def inner():\n    return 1.0\ndef compute_score(reward_input):\n    return inner()"]
COROUTINES += ["class Call:\n    async def __call__(self, reward_input):\n        return 1.0\ncompute_score = Call()"]
COROUTINES += ["async def inner():\n    return 1.0\ndef compute_score(reward_input):\n    return asyncio.run(inner())"]


@pytest.mark.parametrize("source", COROUTINES)
def test_coroutines_are_awaited(tmp_path: Path, source: str) -> None:
    assert user_function(tmp_path, f"import asyncio\n{source}").score(given()).reward == 1.0
    found = scorer(path=str(tmp_path / "mine.py")).begin(given())()
    assert isinstance(found, Score) and found.reward == 1.0


def scorer(**config: object) -> Scorer:
    return Scorer(RewardConfig(**config))


def test_several_rewards_are_summed_by_weight_and_each_has_its_mean(tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text(
        "REWARD_NAME = 'short'\nasync def compute_score(x):\n    return {'score': 1.0, 'words': 2}"
    )
    (tmp_path / "batch.py").write_text("REWARD_TYPE = 'batch'\ndef compute_score(xs):\n    return [10 * len(xs)] * len(xs)")
    terms = (
        RewardTerm(name="gsm8k", weight=1.0),
        RewardTerm(path=str(tmp_path / "short.py"), weight=0.25),
        RewardTerm(path=str(tmp_path / "batch.py"), weight=0.0, label="many"),
    )
    (score,) = scorer(functions=terms).score_all([given()])
    assert isinstance(score, Score)
    assert score.reward == 1.25
    assert score.metrics == {"gsm8k": 1, "gsm8k/accuracy": 1, "gsm8k/format": 1, "short": 1, "short/words": 2, "many": 10}
    assert scorer(functions=terms[:2]).begin(given("none"))() == Score(
        0.25, {"gsm8k": 0, "gsm8k/accuracy": 0, "gsm8k/format": 0, "short": 1, "short/words": 2}
    )


def test_a_reward_may_be_for_some_data_sources_alone() -> None:
    terms = (RewardTerm(name="gsm8k", data_sources=("openai/*", "mine")), RewardTerm(name="math", data_sources=("other",)))
    scores = scorer(functions=terms)
    found = scores.begin(given())()
    assert isinstance(found, Score) and (found.reward, "math" in found.metrics) == (1.0, False)
    with pytest.raises(RewardError, match=r"no function of reward\.functions scores data_source 'nobodys'"):
        scores.begin(given(data_source="nobodys"))()


def test_a_function_that_returns_none_does_not_take_part_in_a_sum(tmp_path: Path) -> None:
    (tmp_path / "none.py").write_text("def compute_score(x):\n    return None")
    none = RewardTerm(path=str(tmp_path / "none.py"), label="none")
    assert scorer(functions=(none, RewardTerm(name="gsm8k", label="g"))).begin(given())().reward == 1.0
    failure = scorer(functions=(none,)).begin(given())()
    assert isinstance(failure, Failure) and "every function returned None" in failure.detail


def test_one_of_several_that_fails_fails_the_response_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def compute_score(x):\n    raise ValueError('broken')")
    terms = (RewardTerm(name="gsm8k"), RewardTerm(path=str(tmp_path / "bad.py"), label="bad"))
    failure = scorer(functions=terms).begin(given())()
    assert isinstance(failure, Failure) and failure.detail.startswith("bad: ") and failure.cause == "ValueError: broken"


def test_a_sum_is_judged_as_float32_too() -> None:
    failure = scorer(functions=(RewardTerm(name="gsm8k", weight=1e39),)).begin(given())()
    assert isinstance(failure, Failure) and "must be finite" in failure.detail


def test_two_rewards_may_not_share_a_name() -> None:
    with pytest.raises(RewardError, match=r"'gsm8k' is the name of another function\. Set `label`"):
        scorer(functions=(RewardTerm(name="gsm8k"), RewardTerm(name="gsm8k")))
