"""Each advice about checkpoints, the disk and resuming is done as it says, and the run gets further."""

from __future__ import annotations

import ast
import errno
import inspect
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hybridflow.checkpoint import advice
from hybridflow.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from hybridflow.checkpoint.store import CheckpointStore, find
from hybridflow.config.build import keys_of
from hybridflow.config.load import load_algorithm
from hybridflow.config.settings import KNOWN_KEYS, SECTIONS
from hybridflow.controller.boundary import ended_by, how_to_go_on
from hybridflow.errors import CallTimeoutError, CheckpointError, DataError
from hybridflow.registry import ALGORITHMS
from tests.architecture.limits import sources
from tests.unit.counting_run import NUM_STEPS, PLANS, Counting, command, config_of, whole_run

SETTING = re.compile(r"\b((?:checkpoint|run|model|algorithm)(?:\.[a-z_]+)?)=([^\s,;]+[^\s,;.])")
LAST = f"step_{NUM_STEPS:06d}"


def advised(message: str) -> dict[str, str]:
    """The settings that a message ends in, as `command` takes them."""
    lines = re.findall(r"^  ([a-z_.]+): (\S+) then, ", message, re.MULTILINE)
    return {key.replace(".", "__"): value for key, value in [*SETTING.findall(message.splitlines()[-1]), *lines]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of eight steps with four checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    command(folder)
    return folder


@dataclass
class Case:
    """A fault, and the command that meets it."""

    fault: Callable[[Path], object]
    used: tuple[Callable[..., str], ...]
    """The functions of advice.py whose sentence the user reads."""
    settings: Mapping[str, str] = field(default_factory=dict)
    repair: Callable[[Path], object] = lambda folder: None
    """What the advice says to do outside of the command."""


def damaged(*steps: int) -> Callable[[Path], object]:
    def fault(folder: Path) -> None:
        for step in steps:
            (folder / f"checkpoints/step_{step:06d}" / MANIFEST).write_text("{")

    return fault


def of_two_runs(folder: Path) -> None:
    command(folder.parent / "other", run__total_steps="6")
    shutil.move(folder / "checkpoints/step_000006", folder.parent / "step_000006")
    shutil.copytree(folder.parent / "other/checkpoints/step_000006", folder / "checkpoints/step_000006")
    (folder / "run.json").unlink()


def rewritten(checkpoint: Path, name: str, text: str) -> None:
    """Damage that checksums do not show."""
    (checkpoint / name).write_text(text)
    anew(checkpoint)


def without_role(checkpoint: Path, role: str) -> None:
    shutil.rmtree(checkpoint / role)
    anew(checkpoint)


def anew(checkpoint: Path) -> None:
    before = read_manifest(checkpoint)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, sequence=before.sequence, run=before.run)


CASES = {
    "the newest is damaged": Case(damaged(8), (advice.resume_from,)),
    "the two newest are damaged": Case(damaged(6, 8), (advice.resume_from,)),
    "all are damaged": Case(damaged(2, 4, 6, 8), (advice.resume_from,)),
    "a weight of the newest has another bit": Case(
        lambda folder: (folder / "checkpoints" / LAST / "actor/value").write_text("m 1"), (advice.resume_from,)
    ),
    "the newest of the run that is named is damaged": Case(
        damaged(8), (advice.resume_from,), {"checkpoint.resume": "{folder}"}
    ),
    "the one that is named is damaged": Case(
        damaged(6, 8), (advice.resume_from,), {"checkpoint.resume": "{folder}/checkpoints/step_000006"}
    ),
    "another model": Case(lambda folder: None, (advice.for_misfit,), {"model.path": "n"}),
    "another model, from a path": Case(
        lambda folder: None, (advice.for_misfit,), {"model.path": "n", "checkpoint.resume": "{folder}/checkpoints/step_000004"}
    ),
    "another model under the same name": Case(lambda folder: None, (advice.for_misfit,), {"of": "another"}),
    "another algorithm": Case(lambda folder: None, (advice.other_algorithm,), {"algorithm": "sft"}),
    "a role's file holds what no run would have written": Case(
        lambda folder: rewritten(folder / "checkpoints" / LAST, "data/value", "?"), (advice.resume_from,)
    ),
    "a role's folder has gone, and the manifest says so": Case(
        lambda folder: without_role(folder / "checkpoints" / LAST, "data"), (advice.resume_from,)
    ),
    "other settings of adapters": Case(lambda folder: None, (advice.other_policy,), {"model.lora_rank": "4"}),
    "checkpoints of several runs": Case(of_two_runs, (advice.among_several,)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_advised_at_a_start_that_is_refused_gets_the_run_further(
    finished: Path, tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    case.fault(folder)
    given = {key.replace(".", "__"): value.format(folder=folder) for key, value in case.settings.items() if key != "of"}
    if "of" in case.settings:
        monkeypatch.setattr(Counting, "restore", refuses)
    plans = len(PLANS)
    refused = command(folder, **given, run__total_steps="10")
    assert refused.message, "the case is meant to be refused"
    assert refused.values == whole_run() and len(PLANS) == plans, "a start that is refused changes nothing"
    further = advised(refused.message)
    assert further, f"no setting is advised: {refused.message}"
    again = command(folder, **{**given, "run__total_steps": "10", **further})
    assert not again.message and again.steps[-1] == 10, (further, again)
    assert_repeats(folder, {**given, **further})


@pytest.mark.parametrize("since", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("resume", ["auto", "never", "path"])
def test_what_is_advised_where_training_was_spoilt_since_a_step_leads_behind_it(
    finished: Path, tmp_path: Path, since: int, resume: str
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    given = {"checkpoint__resume": str(folder / "checkpoints" / LAST) if resume == "path" else resume}
    if resume == "path":
        command(folder, **given)
    said = how_to_go_on(config_of(folder, {"checkpoint.resume": given["checkpoint__resume"]}), since_step=since)
    seen: list[int] = []
    again = command(folder, seen.append, **{**given, **advised(said), "run__total_steps": "10"})
    assert not again.message and again.steps == list(range(1, 11))
    newest_sound = (since - 1) // 2 * 2
    assert seen[0] == newest_sound + 1, (said, seen)


def test_a_checkpoint_without_adapters_is_not_said_to_have_some(finished: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    said = command(folder, model__lora_rank="4").message
    assert "was trained without adapters" in said and "merges" not in said and "model.lora_rank: 0 then, 4 now" in said
    command(folder.parent / "other", model__lora_rank="4", run__total_steps="2")
    said = command(folder.parent / "other", model__lora_rank="8").message
    assert "has adapters, which are another policy" in said and "merges its adapters" in said


def test_a_failure_that_would_come_again_is_to_be_put_right_first(finished: Path, capsys: pytest.CaptureFixture[str]):
    for error, is_told in ((DataError("no"), True), (CallTimeoutError("late"), False), (OSError("no"), False)):
        assert ended_by(error, config_of(finished, {})) == 1
        text = capsys.readouterr().err
        assert ("When that is put right: the same command continues after " in text) == is_told
        assert advice.once_put_right(advice.to_continue("auto", finished)).lower().endswith(f"after {finished}.".lower())


def refuses(self: Counting, folder: str) -> None:
    raise CheckpointError(f"{folder} is of another model")


def assert_repeats(folder: Path, settings: Mapping[str, str]) -> None:
    """The command as advised, given once more with more to train, goes on from where it has come."""
    before = command(folder, **{**settings, "run__total_steps": "10"})
    if settings.get("checkpoint__resume") == "never":
        return
    after = command(folder, **{**settings, "run__total_steps": "12"})
    assert after.values[: len(before.values)] == before.values and after.steps[-1] == 12, (before, after)


@contextmanager
def failing_write(number: int, *, times: int) -> Iterator[None]:
    """Within the block a role's state cannot be written, the first `times` times."""
    left = [times]
    right = Counting.save

    def save(self: Counting, folder: str) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(number, errno.errorcode[number], f"{folder}/value")
        right(self, folder)

    Counting.save = save  # type: ignore[method-assign]
    try:
        yield
    finally:
        Counting.save = right  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "Make room"),
        (errno.EDQUOT, "Make room"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "permissions"),
        (errno.EIO, "failed twice"),
        (errno.ESTALE, "failed twice"),
        (errno.ENAMETOOLONG, "Room was not short"),
    ],
)
@pytest.mark.parametrize("resume", ["auto", "never", "path"])
@pytest.mark.parametrize("first_save", [True, False])
def test_what_is_advised_when_a_checkpoint_cannot_be_written_gets_the_run_further(
    finished: Path, tmp_path: Path, number: int, words: str, resume: str, first_save: bool
):
    folder = tmp_path / "run"
    settings = {"checkpoint__resume": str(finished / "checkpoints/step_000004") if resume == "path" else resume}
    start = 4 if resume == "path" else 0
    failing_step = start + (2 if first_save else 4)

    def hook(step: int) -> None:
        if step == failing_step:
            context.__enter__()

    context = failing_write(number, times=2)
    ended = command(folder, hook, **settings, run__total_steps="10")
    context.__exit__(None, None, None)
    assert words in ended.message and f"{folder}/checkpoints" in ended.message
    assert ("Make room" in ended.message) == (words == "Make room")
    again = command(folder, **{**settings, **advised(ended.message), "run__total_steps": "10"})
    assert not again.message and again.steps == list(range(start + 1, 11)), again
    if not first_save and resume != "never":
        assert f"continues after {folder}/checkpoints/step_{failing_step - 2:06d}" in ended.message


def test_a_failure_that_passes_is_answered_by_one_more_attempt_that_names_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hybridflow.controller.checkpoints.RETRY_S", 0.0)
    with failing_write(errno.ESTALE, times=1):
        ended = command(tmp_path / "run")
    assert not ended.message and ended.values == whole_run()
    (warning,) = [record.getMessage() for record in caplog.records if "once more" in record.getMessage()]
    assert "actor/value" in warning


@pytest.mark.parametrize("resume", ["auto", "never", "path"])
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_what_is_said_when_a_run_is_stopped_is_what_the_same_command_does(
    finished: Path, tmp_path: Path, resume: str, stop: int
):
    folder = tmp_path / "run"
    settings = {"checkpoint__resume": str(finished / "checkpoints/step_000002") if resume == "path" else resume}
    start = 2 if resume == "path" else 0

    def hook(step: int) -> None:
        if step == start + stop:
            raise CheckpointError("stopped")

    said = command(folder, hook, **settings).advice_when_stopped
    newest = start + (stop - 1) // 2 * 2
    assert (f"after {folder}/checkpoints/step_{newest:06d}" in said) == (newest > start), said
    seen: list[int] = []
    again = command(folder, seen.append, **{**settings, **advised(said)})
    assert again.steps == list(range(start + 1, NUM_STEPS + 1))
    assert seen[0] == newest + 1, "it goes on where it said"


def test_what_is_advised_to_an_export_of_a_damaged_checkpoint_is_whole(finished: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    damaged(8)(folder)
    with pytest.raises(CheckpointError, match=r"export that$") as caught:
        find(folder, instead=advice.export_from)
    assert "checkpoint.resume" not in str(caught.value)
    whole = re.search(r"beside it is (\S+): export", str(caught.value))
    assert whole and find(whole[1]).name == "step_000006"
    CheckpointStore.verify(whole[1])
    damaged(2, 4, 6)(folder)
    with pytest.raises(CheckpointError, match="nothing to export"):
        find(folder, instead=advice.export_from)


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def replaced(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    shutil.copytree(folder.with_name("moved"), folder)


@pytest.mark.parametrize("fault", [removed, replaced])
@pytest.mark.parametrize("step", [1, 2, 3, NUM_STEPS])
def test_what_is_advised_when_the_folder_has_gone_gets_the_run_further(
    tmp_path: Path, fault: Callable[[Path], object], step: int
):
    folder = tmp_path / "run"
    ended = command(folder, lambda now: fault(folder) if now == step else None)  # type: ignore[arg-type, return-value]
    assert "run.folder" in ended.message or "is not there any more" in ended.message
    assert "move it back" in ended.message
    assert ("continues after" in ended.advice_when_stopped) == (fault is replaced and step > 2)
    again = command(folder)
    assert not again.message and again.values[-1] == whole_run()[-1]


def test_every_advice_of_the_package_is_in_one_place_and_is_tried_here():
    tried = Path(__file__).read_text(encoding="utf-8")
    functions = [
        name for name, value in vars(advice).items() if inspect.isfunction(value) and value.__module__ == advice.__name__
    ]
    through_the_store = {"after_failed_write": "failing_write", "to_continue": "advice_when_stopped", "folder_gone": "removed"}
    through_the_store |= {"before_it_was_spoilt": "since_step=since"}
    elsewhere = {"folder_taken": "test_run_folder.py", "after_failed_export": "test_export.py"}
    missing = [name for name in functions if f"advice.{name}" not in tried and name not in through_the_store | elsewhere]
    assert not missing
    strays = [
        f"{source.path}: {node.value!r}"
        for source in sources("hybridflow")
        if source.path != "hybridflow/checkpoint/advice.py"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"checkpoint\.resume=(?!never\))", node.value)
    ]
    assert not strays


def test_every_setting_that_a_message_names_is_one() -> None:
    options = {f"algorithm.{key}" for name in ALGORITHMS for key in keys_of(load_algorithm(name).config_class)}
    named = {
        (source.path, key)
        for source in sources("hybridflow")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for key in re.findall(rf"(?<![\w.])((?:{'|'.join(sorted(SECTIONS))})\.[a-z_]+)=", node.value)
    }
    assert len({key for _, key in named}) > 30
    assert not [(path, key) for path, key in named if key not in {*KNOWN_KEYS, *options, "actor.lerning_rate"}], (
        "the last is an example"
    )
