"""Whatever ends a run is told in the same lines: what happened, what was saved, where the trace is."""

from __future__ import annotations

import errno
import importlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import ray

from hybridflow import ending, errors, interrupts
from hybridflow.config.schema import Config, RunConfig
from hybridflow.controller import run
from hybridflow.controller.boundary import ended_by
from hybridflow.ending import phase, without_trace

train = importlib.import_module("hybridflow.train")
"""The module: `hybridflow.train` may be the function of that name, too."""


@pytest.fixture(autouse=True)
def nothing_has_arrived() -> None:
    """What tests before in this process have noted is not of this run."""
    with interrupts.noticed():
        pass


class UnspeakableError(Exception):
    """Whose text cannot be had."""

    def __str__(self) -> str:
        raise TypeError("no")


def raised_in_phase(error: BaseException) -> BaseException:
    try:
        with phase("step 3 was taken"):
            raise error
    except BaseException as caught:
        return caught


ANY: list[Callable[[], BaseException]] = [
    lambda: ZeroDivisionError("one response to no prompts"),
    lambda: OSError(errno.ENOSPC, "No space left on device", "/tmp/metrics.jsonl"),
    lambda: MemoryError(),
    lambda: RecursionError("too deep"),
    lambda: AssertionError(),
    lambda: Exception("The current node timed out during startup"),
    lambda: ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory"),
    lambda: ray.exceptions.RaySystemError("the head is gone"),
    lambda: UnspeakableError(),
    lambda: ValueError("\udcff\udcfe"),
    lambda: SystemExit(0),
    lambda: GeneratorExit(),
    lambda: errors.CheckpointError("the checkpoint of step 3 could not be written"),
    lambda: errors.WorkerError(
        role="actor", rank=1, node="n2", method="update", cause='  File "a.py", line 3, in update\n    x()\nValueError: no'
    ),
    lambda: BaseExceptionGroup("several", [ValueError("a"), KeyError("b")]),
]


@pytest.mark.parametrize("make", ANY, ids=lambda make: type(make()).__name__)
def test_an_error_of_any_type_is_told_in_the_same_lines_and_its_trace_is_in_the_folder(
    make: Callable[[], BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = make()

    def fails(config: Config) -> None:
        with phase("step 3 was taken"):
            raise error

    monkeypatch.setattr(run, "prepared", fails)
    monkeypatch.setattr(train, "load_config", lambda *_, **__: Config(run=RunConfig(folder=str(tmp_path))))
    assert train.main(["some.yaml"]) == 1
    text = capsys.readouterr().err
    head, what, saved, where = text.strip().splitlines()
    assert head == "The run failed."
    name = "actor.update failed on rank 1 (node n2): ValueError: no" if isinstance(error, errors.WorkerError) else ""
    assert name in what and (isinstance(error, errors.HybridflowError) or type(error).__name__ in what)
    assert isinstance(error, errors.HybridflowError) or what.endswith("(while step 3 was taken)")
    is_to_be_put_right = isinstance(error, errors.HybridflowError)
    assert saved.startswith("When that is put right: ") == is_to_be_put_right
    assert saved.lower().endswith("there is no checkpoint yet: the same command starts anew.")
    assert where == f"The whole trace is in {tmp_path}/failure.txt"
    trace = (tmp_path / "failure.txt").read_text()
    assert "Traceback" in trace and "in fails" in trace and "while step 3 was taken" in trace


def test_where_the_folder_cannot_be_written_the_trace_is_somewhere_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Path.write_text

    def full(path: Path, text: str, **options: str) -> int:
        if path.parent == tmp_path:
            path.touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(path, text, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(ending.tempfile, "gettempdir", lambda: str(tmp_path.parent))
    assert ended_by(ValueError("x"), Config(run=RunConfig(folder=str(tmp_path)))) == 1
    named = Path(capsys.readouterr().err.splitlines()[-1].removeprefix("The whole trace is in "))
    assert named.parent == tmp_path.parent and "ValueError: x" in named.read_text()
    assert not (tmp_path / "failure.txt").exists(), "half a file"


def test_a_run_that_another_one_keeps_out_writes_nothing_into_its_folder(tmp_path: Path) -> None:
    assert ended_by(errors.FolderInUseError("in use"), Config(run=RunConfig(folder=str(tmp_path)))) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", interrupts.HEEDED)
def test_a_signal_whose_number_ray_has_lost_still_gives_the_exit_code(number: signal.Signals, tmp_path: Path) -> None:
    before = {each: signal.signal(each, signal.SIG_DFL) for each in interrupts.HEEDED}
    try:
        with interrupts.noticed():
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
            interrupts.seen()
            signal.raise_signal(number)  # a second one raises nothing: what ends the run runs to its end
            assert interrupts.is_urgent()
        for error in (KeyboardInterrupt(), errors.WorkerError(role="a", rank=0, node="n", method="m", cause="it died too")):
            assert ended_by(error, Config(run=RunConfig(folder=str(tmp_path)))) == 128 + number
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemError("returned a result with an exception set")])
def test_what_another_thread_has_found_out_is_told_whatever_ray_makes_of_it(
    raised: BaseException, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with interrupts.noticed(), pytest.raises(errors.HybridflowError):
        interrupts.fail(errors.HybridflowError("Ray's head has ended"))
        interrupts.raise_if_lost()
    assert ended_by(raised, Config(run=RunConfig(folder=str(tmp_path)))) == 1
    assert "Ray's head has ended" in capsys.readouterr().err
    with interrupts.noticed():
        assert interrupts.failure() is None, "the next run begins anew"


def test_a_signal_that_comes_after_the_failure_leaves_it_a_failure(tmp_path: Path) -> None:
    with interrupts.noticed():
        interrupts.seen()
        signal.raise_signal(signal.SIGTERM)
        assert ended_by(ValueError("x"), Config(run=RunConfig(folder=str(tmp_path)))) == 1


def test_of_a_trace_its_last_lines_are_told_and_other_texts_stay() -> None:
    trace = '  File "a.py", line 3, in f\n    g()\n    ^^^\n  File "b.py", line 5, in g\nValueError: first\n second\n'
    assert without_trace(trace) == "ValueError: first\n second"
    assert without_trace("ModelError: no such model\nDo this") == "ModelError: no such model\nDo this"


@pytest.mark.parametrize("error", [ray.exceptions.RaySystemError("the head died"), KeyboardInterrupt()])
def test_what_fails_after_the_last_step_was_saved_leaves_the_run_finished(
    error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def ends_badly(config: Config) -> Iterator[None]:
        yield
        raise error

    caplog.set_level("INFO", logger="hybridflow")
    for name in ("reserved", "launched", "watched", "Loop", "algorithm_class"):
        monkeypatch.setattr(run, name, MagicMock())
    for name in ("all_roles", "placement_lines"):
        monkeypatch.setattr(run, name, lambda *_: ())
    monkeypatch.setattr(run, "cluster", ends_badly)
    groups = run.launched.return_value.__enter__.return_value
    groups.dataset.num_prompts = groups.dataset.num_validation_prompts = run.Loop.return_value.total_steps = 1
    with run.prepared(Config(run=RunConfig(folder=str(tmp_path), device="cpu"))) as loop:
        loop.run()
    loop.run.assert_called_once()
    *_, warning, done = caplog.messages
    assert warning.startswith("the run is finished; in ending its processes: ") and done.startswith("done: ")


def test_an_error_before_anything_was_started_is_told_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> Config:
        raise PermissionError(13, "Permission denied", "/root/x.yaml")

    monkeypatch.setattr(train, "load_config", fails)
    assert train.main(["some.yaml"]) == 1
    head, what, where = capsys.readouterr().err.strip().splitlines()
    assert head == "The command failed before anything was started."
    assert "PermissionError" in what and where.startswith("The whole trace is in ")
