"""Where metrics go."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from hybridflow.config.schema import Config, RunConfig, TrackerConfig
from hybridflow.errors import ConfigError
from hybridflow.metrics import Metrics
from hybridflow.trackers import behind
from hybridflow.trackers.base import Sample, Tracker, Trackers
from hybridflow.trackers.console import REWARD, SHOWN, SPEED, ConsoleTracker, shortened, step_line, validation_line
from hybridflow.trackers.jsonl import JsonlTracker, drop_later_lines, read_lines
from hybridflow.trackers.own import own_metrics


def config(folder: Path, *names: str) -> Config:
    return Config(run=RunConfig(folder=str(folder)), trackers=TrackerConfig(names=names))


def log_steps(folder: Path, steps: Sequence[int], *, resume_step: int) -> None:
    tracker = JsonlTracker(config(folder), 10, resume_step)
    for step in steps:
        tracker.log(step, Metrics({"reward/mean": step / 10}))
        tracker.log_samples(step, [Sample(prompt="1+1=", response="2", ground_truth="2", reward=float(step))])
    tracker.close()


def lines_without_time(path: Path) -> list[dict[str, object]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in read_lines(path)]


def test_what_two_earlier_runs_measured_is_kept_though_both_ended_in_the_same_second(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for content in ("run A\n", "run B\n"):
        path.write_text(content)
        os.utime(path, (1e9, 1e9))
        drop_later_lines(path, 0)
    assert sorted(kept.read_text() for kept in tmp_path.iterdir()) == ["run A\n", "run B\n"]


class FailingTracker(Tracker):
    """A dashboard that is down."""

    def log(self, step: int, metrics: Metrics) -> None:
        raise ConnectionError("no route to the dashboard")


def test_a_line_holds_step_time_and_every_metric(tmp_path: Path):
    tracker = JsonlTracker(config(tmp_path), 10, 0)
    tracker.log(3, Metrics({"reward/mean": 0.5, "critic/loss": math.nan}))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    content = json.loads(line)
    assert content.pop("time") > 1e9
    assert content == {"step": 3, "reward/mean": 0.5, "critic/loss": None}
    tracker.close()


def test_after_a_resume_the_file_is_that_of_an_uninterrupted_run(tmp_path: Path):
    log_steps(tmp_path / "whole", range(11), resume_step=0)
    log_steps(tmp_path / "cut", range(8), resume_step=0)
    log_steps(tmp_path / "cut", range(6, 11), resume_step=5)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines_without_time(tmp_path / "cut" / name) == lines_without_time(tmp_path / "whole" / name)


def test_a_line_that_a_kill_cut_short_is_dropped_on_resume(tmp_path: Path):
    log_steps(tmp_path, range(1, 6), resume_step=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rewa')
    log_steps(tmp_path, [6], resume_step=5)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b\u0085c", "\x0b\x0c\x1c\r\n", "\ud83d", "é\x00"])
def test_no_sample_is_lost_on_resume_whatever_ends_of_lines_its_text_has(tmp_path: Path, text: str):
    samples = [Sample(prompt=text.encode("utf-8", "replace").decode(), response="2", ground_truth="", reward=1.0)]
    for resume_step in (0, 2):
        tracker = JsonlTracker(config(tmp_path), 4, resume_step)
        tracker.log_samples(resume_step + 1, samples)
        tracker.close()
    assert [(line["step"], line["prompt"]) for line in read_lines(tmp_path / "samples.jsonl")] == [
        (step, samples[0].prompt) for step in (1, 3)
    ]


@pytest.mark.parametrize("garbage", [b"\xff\xfe\x00\n", b"\x00" * 50 + b"\n", b"[1]\n5\n", b'{"step": "x"}\n'])
def test_what_a_power_cut_left_in_the_metrics_is_no_step_and_stops_nothing(tmp_path: Path, garbage: bytes):
    log_steps(tmp_path, range(1, 4), resume_step=0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(garbage)
    log_steps(tmp_path, [4], resume_step=3)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_new_run_in_an_old_folder_starts_empty_and_says_where_the_old_lines_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO):
        log_steps(tmp_path, range(4), resume_step=0)
        assert not caplog.records
        log_steps(tmp_path, [0], resume_step=0)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0]
    (aside,) = tmp_path.glob("metrics.until-*.jsonl")
    assert len(aside.read_text().splitlines()) == 4
    (record,) = caplog.records
    assert aside.name in record.getMessage() and "samples.until-" in record.getMessage()


def test_samples_are_kept_as_they_are(tmp_path: Path):
    tracker = JsonlTracker(config(tmp_path), 10, 0)
    tracker.log_samples(0, [Sample(prompt="é\n", response="[/]", ground_truth="", reward=math.inf)])
    tracker.close()
    assert read_lines(tmp_path / "samples.jsonl") == [
        {"step": 0, "prompt": "é\n", "response": "[/]", "ground_truth": "", "reward": None}
    ]


def test_jsonl_is_always_on(tmp_path: Path):
    trackers = Trackers(config(tmp_path), 10, 0)
    trackers.log(1, Metrics({"reward/mean": 0.5}))
    trackers.close()
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


def test_a_failing_tracker_is_reported_once_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trackers = Trackers(config(tmp_path, f"{__name__}:FailingTracker"), 10, 0)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            trackers.log(step, Metrics({"reward/mean": 0.5}))
        trackers.close()
    (record,) = caplog.records
    assert "ConnectionError: no route to the dashboard [test_trackers.py:" in record.getMessage()
    assert record.exc_info is None and "\n" not in record.getMessage(), "one line"
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3


class HangingTracker(Tracker):
    """A server that accepts everything and answers nothing, until `release`."""

    release = threading.Event()

    def log(self, step: int, metrics: Metrics) -> None:
        if step == 2:
            self.release.wait(60)


class Odd(BaseException):
    """What no `except Exception` catches, from a constructor that no pickle can call again."""

    def __init__(self, one: int, two: int):
        super().__init__(one)

    def __str__(self) -> str:
        raise RuntimeError("no text")


class BreaksAt(Tracker):
    """Does `ill` at the moment that its name says."""

    place: ClassVar[str] = ""
    ill: ClassVar[Callable[[], object]] = staticmethod(lambda: None)
    never = threading.Event()

    def __init__(self, config: Config, total_steps: int, resume_step: int):
        super().__init__(config, total_steps, resume_step)
        self._at("constructor")

    def _at(self, place: str) -> None:
        if place == self.place:
            self.ill()

    def log(self, step: int, metrics: Metrics) -> None:
        self._at("log")

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._at("log_samples")

    def flush(self) -> None:
        self._at("flush")

    def close(self) -> None:
        self._at("close")


def raises(error: Callable[[], BaseException]) -> Callable[[], object]:
    def ill() -> None:
        raise error()

    return ill


ILLS: dict[str, Callable[[], object]] = {
    "an error": raises(lambda: OSError(28, "No space left on device")),
    "many lines": raises(lambda: ValueError("one\ntwo\n" * 1000)),
    "sys.exit": raises(lambda: SystemExit("no key")),
    "Ctrl-C of its own": raises(KeyboardInterrupt),
    "no text": raises(lambda: Odd(1, 2)),
    "hangs": lambda: BreaksAt.never.wait(60),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("place", ["constructor", "log", "log_samples", "flush", "close"])
@pytest.mark.parametrize("ill", ILLS)
def test_whatever_a_tracker_does_wherever_is_one_line_and_never_the_run(
    ill: str, place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    for name in ("LATE_S", "CLOSE_S", "CLOSE_LATE_S"):
        monkeypatch.setattr(behind, name, 0.2)
    monkeypatch.setattr(BreaksAt, "place", place)
    monkeypatch.setattr(BreaksAt, "ill", staticmethod(ILLS[ill]))
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        trackers = Trackers(config(tmp_path, f"{__name__}:BreaksAt"), 10, 0)
        for step in (1, 2, 3):
            trackers.log(step, Metrics({"reward/mean": 0.5}))
            trackers.log_samples(step, [])
            trackers.flush()
        trackers.close()
    assert time.monotonic() - started < 5
    (message,) = caplog.messages
    assert "BreaksAt" in message and "\n" not in message and len(message) < 1000
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3


class RecordingTracker(Tracker):
    """Notes what it is given, slowly."""

    taken: ClassVar[list[object]] = []

    def log(self, step: int, metrics: Metrics) -> None:
        time.sleep(0.02)
        self.taken.append(step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self.taken.append(len(samples))

    def close(self) -> None:
        self.taken.append("closed")


def test_a_tracker_that_hangs_holds_nobody_up_and_is_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(behind, "LATE_S", 0.3)
    monkeypatch.setattr(behind, "CLOSE_LATE_S", 0.2)
    names = [f"{__name__}:HangingTracker", f"{__name__}:RecordingTracker"]
    RecordingTracker.taken.clear()
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        trackers = Trackers(config(tmp_path, *names), 10, 0)
        for step in range(1, 11):
            trackers.log(step, Metrics({"reward/mean": 0.5}))
            time.sleep(0.06)
        trackers.close()
    assert time.monotonic() - started < 10
    (message,) = caplog.messages
    assert names[0] in message and "busy with one call for more than" in message and "\n" not in message
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 10
    assert RecordingTracker.taken == [*range(1, 11), "closed"]
    HangingTracker.release.set()


def test_what_trackers_are_given_is_off_the_path_of_a_step_and_complete_in_the_end(tmp_path: Path):
    RecordingTracker.taken.clear()
    trackers = Trackers(config(tmp_path, f"{__name__}:RecordingTracker"), 10, 0)
    started = time.monotonic()
    for step in range(1, 51):
        trackers.log(step, Metrics({"reward/mean": 0.5}))
    trackers.log_samples(50, [Sample(prompt="a", response="b", ground_truth="c", reward=1.0)])
    assert time.monotonic() - started < 0.5, "50 steps of 20 ms each were waited for"
    trackers.close()
    assert RecordingTracker.taken == [*range(1, 51), 1, "closed"]


def test_a_failing_metrics_file_ends_the_run(tmp_path: Path):
    trackers = Trackers(config(tmp_path), 10, 0)
    trackers.close()
    with pytest.raises(ValueError, match="closed file"):
        trackers.log(1, Metrics({"reward/mean": 0.5}))


def test_an_unknown_tracker_is_a_mistake_in_the_configuration(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"trackers\.names: 'tensorbord' is not known; did you mean 'tensorboard'"):
        Trackers(config(tmp_path, "tensorbord"), 10, 0)


def test_a_class_that_is_no_tracker_is_a_mistake_in_the_configuration(tmp_path: Path):
    with pytest.raises(ConfigError, match="not a subclass of"):
        Trackers(config(tmp_path, "pathlib:Path"), 10, 0)


def test_tensorboard_has_every_scalar_at_its_step(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(config(tmp_path, "tensorboard"), 10, 0)
    for step in (1, 2):
        trackers.log(step, Metrics({"reward/mean": step / 4}))
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]


METRICS = Metrics(
    {
        "reward/mean": 0.4127,
        "reward/std": 0.2,
        "reward/accuracy": 0.4,
        "reward/failed": 0.0,
        "kl/mean": 0.0021,
        "actor/entropy": 1.234,
        "seconds/rollout.generate": 1.2,
        "seconds/actor.update": 0.8,
        "seconds/sync": 0.01,
        "seconds/step": 2.1,
        "tokens_per_second": 12345.0,
    }
)


def test_the_line_of_a_step_has_numbers_phases_and_speed():
    training, phases, speed = step_line(METRICS, max_characters=160).split(" | ")
    assert training == "reward 0.413  accuracy 0.400  kl 0.0021  entropy 1.23"
    assert phases == "rollout.generate 1.2s  actor.update 0.80s", "the longest first; what takes little of the step not at all"
    assert speed == "step 2.1s  tokens/s 12,345"


CROWDED = METRICS + Metrics({"critic/loss": 0.5, "actor/grad_norm": 1.0, "mismatch/mean": 0.01, "actor/mfu": 0.5})


def test_what_does_not_fit_into_the_line_of_a_step_is_what_matters_least():
    assert len(step_line(CROWDED, max_characters=500)) > 140
    short = step_line(CROWDED, max_characters=80)
    assert len(short) <= 80
    assert "reward 0.413" in short and "step 2.1s" in short and "critic loss" not in short


def test_scores_that_are_equal_show_once():
    equal = Metrics({"reward/mean": 0.25, "reward/overall": 0.25, "reward/accuracy": 0.25, "reward/format": 1.0})
    assert step_line(equal, max_characters=160) == "reward 0.250  format 1.000"


def test_a_critic_that_explains_nothing_shows_as_such_however_far_off_it_is():
    assert step_line(Metrics({"critic/explained_variance": -12795.61}), max_characters=160) == "explained <-10"
    assert step_line(Metrics({"critic/explained_variance": -0.5}), max_characters=160) == "explained -0.50"


def test_the_metrics_of_an_algorithm_of_ones_own_show_in_the_line_of_a_step():
    own = Metrics({"dpo/loss": 0.6931, "actor/margin": -1.25, "judge/words": 12.0, "actor/loss": 0.5})
    line = step_line(METRICS + own, max_characters=160)
    assert "loss 0.693  margin -1.25  words 12" in line and "reward 0.413" in line and "step 2.1s" in line


def test_every_metric_of_the_framework_is_known_as_such():
    text = (Path(__file__).parents[2] / "docs/metrics.md").read_text(encoding="utf-8")
    of_some = {"Preferences", "Of some algorithms"}
    in_tables = re.compile(r"^\| `([a-z_]+/[a-z_0-9]+)`", re.MULTILINE)
    names = {section.partition("\n")[0]: in_tables.findall(section) for section in text.split("\n## ")}
    of_all = [name for section, found in names.items() for name in found if section not in of_some]
    assert len(of_all) > 50 and own_metrics(of_all) == []
    for section in of_some:
        assert own_metrics(names[section]) == names[section] != []


def test_failed_rewards_show_in_the_line_of_a_step():
    assert "rewards failed 3" in step_line(Metrics({"reward/mean": 0.1, "reward/failed": 3.0}), max_characters=160)


def test_the_line_of_a_validation_has_its_own_numbers_only():
    names = {
        "validation/reward/mean": 0.5,
        "validation/reward/accuracy": 0.25,
        "validation/response/tokens_mean": 7.2,
        "reward/mean": 0.1,
        "seconds/validation": 1.5,
    }
    assert validation_line(Metrics(names)) == "reward 0.500  accuracy 0.250  tokens 7  took 1.5s"


def test_the_line_of_a_validation_shows_what_the_environment_measured():
    names = {
        "validation/reward/mean": 0.5,
        "validation/environment/histories": 1.0,
        "validation/environment/turns": 3.25,
        "validation/environment/solved": 0.375,
        "environment/solved": 0.25,
    }
    assert validation_line(Metrics(names)) == "reward 0.500  solved 0.375  turns 3.2"


def test_a_step_without_validation_has_no_line_for_it():
    assert validation_line(METRICS) == ""


def test_without_a_terminal_every_step_is_one_plain_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tracker = ConsoleTracker(config(tmp_path), 100, 0)
    tracker.log(0, Metrics({"validation/reward/mean": 0.1}))
    tracker.log(1, METRICS)
    tracker.log(2, CROWDED)  # with its head and end, more than a line holds
    tracker.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["validation at step 0", "step 1/100", "step 2/100"]
    assert all(line.endswith(" left") for line in lines[1:])
    assert "\x1b" not in "".join(lines)
    assert max(map(len, lines)) <= 160


def test_what_was_measured_of_held_out_rows_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tracker = ConsoleTracker(config(tmp_path), 100, 0)
    tracker.log(0, Metrics({"held_out/loss": 0.6931, "held_out/chosen_reward": -0.5}))
    tracker.close()
    assert capsys.readouterr().out == "held-out rows at step 0  loss 0.693  chosen reward -0.5\n"
    assert (
        step_line(Metrics({"actor/loss": 1.5, "actor/margin": 0.1, "held_out/loss": 0.6}), max_characters=160).count("loss")
        == 1
    )


def test_on_a_terminal_the_bar_stands_at_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr("hybridflow.trackers.console.Console", lambda **_: Console(file=screen, force_terminal=True, width=200))
    tracker = ConsoleTracker(config(tmp_path), 100, 40)
    tracker.log(41, METRICS)
    tracker.close()
    assert "41/100" in screen.getvalue()
    assert "reward 0.413" in screen.getvalue()


def test_the_text_of_a_sample_is_not_read_as_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tracker = ConsoleTracker(config(tmp_path), 100, 0)
    tracker.log_samples(10, [Sample(prompt="[bold]2+2[/x]", response="4\n#### 4", ground_truth="4", reward=1.0)])
    tracker.close()
    printed = capsys.readouterr().out
    assert "[bold]2+2[/x]" in printed
    assert "4\\n#### 4" in printed
    assert "reward 1, expected '4'" in printed


def test_long_texts_keep_the_end_of_a_prompt_and_the_beginning_of_a_response():
    assert shortened("abcdef", keep_end=True, max_characters=3) == "...def"
    assert shortened("abcdef", keep_end=False, max_characters=3) == "abc..."


def test_every_metric_that_the_console_shows_is_documented():
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    missing = [name for number in (REWARD, *SHOWN, *SPEED) for name in number.names if f"`{name}`" not in documented]
    assert not missing
