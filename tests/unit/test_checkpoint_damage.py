"""Whatever happens to the files under checkpoints/: it is refused by name or changes nothing, and it never stops a save."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridflow.checkpoint.manifest import MANIFEST, write_manifest
from hybridflow.checkpoint.store import STATE, CheckpointStore
from tests.unit.counting_run import NUM_STEPS, command, whole_run

LAST = f"step_{NUM_STEPS:06d}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of eight steps with four checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert command(folder).values == whole_run()
    return folder


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def other_run(tmp_path: Path) -> Path:
    """A checkpoint of step 6 of another run."""
    command(tmp_path / "other", run__total_steps="6", model__path="other")
    return tmp_path / "other" / "checkpoints" / "step_000006"


def mutate(path: Path, chance: random.Random) -> str:
    """Change a file in one way of many; returns which."""
    content = bytearray(path.read_bytes())
    kinds: dict[str, Callable[[], object]] = {
        "cut": lambda: path.write_bytes(content[: chance.randrange(len(content))]),
        "longer": lambda: path.write_bytes(content + b"\0"),
        "gone": path.unlink,
        "empty": lambda: path.write_bytes(b""),
        "a folder": lambda: (path.unlink(), path.mkdir()),
        "a pipe": lambda: (path.unlink(), os.mkfifo(path)),
        "a link to itself": lambda: (path.unlink(), path.symlink_to(path)),
        "a part is zeros": lambda: path.write_bytes(content[: len(content) // 3] + bytes(len(content) - len(content) // 3)),
        "one byte more inside": lambda: path.write_bytes(content[:1] + chance.randbytes(1) + content[1:]),
        "a line more": lambda: path.write_bytes(content + b"\n"),
        "another's": lambda: path.write_bytes(bytes(chance.randbytes(len(content)))),
    }

    def flip() -> None:
        place = chance.randrange(len(content))
        content[place] ^= 1 << chance.randrange(8)
        path.write_bytes(content)

    kinds["flipped"] = flip
    kind = chance.choice(sorted(kinds))
    kinds[kind]()
    return kind


@pytest.mark.parametrize("seed", range(120))
def test_a_random_mutation_of_a_checkpoint_is_refused_by_name_or_changes_nothing(finished: Path, tmp_path: Path, seed: int):
    chance = random.Random(seed)
    folder = copied(finished, tmp_path)
    checkpoint = folder / "checkpoints" / LAST
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    path = files[seed % len(files)]
    kind = mutate(path, chance)
    ended = command(folder, run__total_steps="10")
    assert str(path) in ended.message or (ended.values[:NUM_STEPS] == whole_run() and len(ended.values) == 10), (
        kind,
        path,
        ended,
    )


@pytest.mark.parametrize("name", ["actor/notes.txt", "data/responses_under_way.npz", "extra"])
def test_a_file_that_was_added_to_a_checkpoint_is_refused_by_name(finished: Path, tmp_path: Path, name: str):
    folder = copied(finished, tmp_path)
    (folder / "checkpoints" / LAST / name).write_text("mine")
    assert f"{LAST}/{name} is not listed" in command(folder, run__total_steps="10").message


def edited(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda checkpoint: (checkpoint / MANIFEST).unlink(),
    "a manifest of other things": lambda checkpoint: (checkpoint / MANIFEST).write_text("[]"),
    "a manifest without sequence": lambda checkpoint: (checkpoint / MANIFEST).write_text('{"format": 1, "files": {}}'),
    "a manifest of text": lambda checkpoint: (checkpoint / MANIFEST).write_text(
        '{"format": 1, "files": {}, "sequence": "new"}'
    ),
    "a later sequence": lambda checkpoint: edited(checkpoint / MANIFEST, sequence=99),
    "another run": lambda checkpoint: edited(checkpoint / MANIFEST, run="x"),
    "no list of files": lambda checkpoint: edited(checkpoint / MANIFEST, files={}),
    "half an entry": lambda checkpoint: edited(checkpoint / MANIFEST, files={STATE: {"bytes": 1}}),
    "a step of text": lambda checkpoint: rewritten(checkpoint, step="eight"),
    "another step": lambda checkpoint: rewritten(checkpoint, step=7),
    "an unknown key": lambda checkpoint: rewritten(checkpoint, extra=1),
    "a list for a configuration": lambda checkpoint: rewritten(checkpoint, config=[1]),
    "text for a number": lambda checkpoint: rewritten(checkpoint, algorithm={"coefficient": "soon"}),
    "no finite number": lambda checkpoint: rewritten(checkpoint, algorithm={"coefficient": float("nan")}),
    "a role less": lambda checkpoint: (shutil.rmtree(checkpoint / "data"), rewritten(checkpoint)),
}


def rewritten(checkpoint: Path, **entries: object) -> None:
    """Edit the controller's state, and write a manifest that fits."""
    edited(checkpoint / STATE, **entries)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, sequence=4, run=CheckpointStore(checkpoint.parents[1]).run)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_every_damage_to_the_newest_checkpoint_is_refused_in_words(
    finished: Path, tmp_path: Path, damage: Callable[[Path], object]
):
    folder = copied(finished, tmp_path)
    damage(folder / "checkpoints" / LAST)
    ended = command(folder, run__total_steps="10")
    assert LAST in ended.message and ended.values == whole_run()


STRANGERS: dict[str, Callable[[Path, Path], object]] = {
    "an empty folder": lambda folder, other: (folder / "step_000099").mkdir(),
    "an empty folder in the way": lambda folder, other: (folder / "step_000010").mkdir(),
    "a file in the way": lambda folder, other: (folder / "step_000010").touch(),
    "a link in the way": lambda folder, other: (folder / "step_000010").symlink_to("/etc"),
    "another run's": lambda folder, other: shutil.copytree(other, folder / "step_000099"),
    "another run's in the way": lambda folder, other: shutil.copytree(other, folder / "step_000010"),
    "a copy under another step": lambda folder, other: shutil.copytree(folder / LAST, folder / "step_000020"),
    "a copy under another name": lambda folder, other: shutil.copytree(folder / LAST, folder / f"{LAST}.bak"),
    "an older one damaged": lambda folder, other: (folder / "step_000004" / MANIFEST).write_text("{"),
    "an older one without its files": lambda folder, other: shutil.rmtree(folder / "step_000004" / "actor"),
    "half a checkpoint of a killed run": lambda folder, other: (folder / ".step_000010.tmp" / "actor").mkdir(parents=True),
    "a file with the name of one that is written": lambda folder, other: (folder / ".step_000010.tmp").touch(),
    "a link with the name of one that is written": lambda folder, other: (folder / ".step_000010.tmp").symlink_to("/etc"),
}


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
def test_whatever_lies_under_checkpoints_never_stops_a_save_and_is_not_lost(
    finished: Path, tmp_path: Path, stranger: Callable[[Path, Path], object]
):
    folder = copied(finished, tmp_path)
    stranger(folder / "checkpoints", other_run(tmp_path))
    num_etc = len(os.listdir("/etc"))
    ended = command(folder, run__total_steps="12")
    assert not ended.message and ended.values[:NUM_STEPS] == whole_run() and len(ended.values) == 12
    store = CheckpointStore(folder)
    newest = store.latest()
    assert newest is not None and newest.name == "step_000012"
    store.verify(newest)
    assert len(os.listdir("/etc")) == num_etc
    assert all(found.manifest is None or found.manifest.run == store.run for found in store.scan())


def test_a_stranger_that_comes_during_the_run_stops_no_save(finished: Path, tmp_path: Path):
    folder, other = copied(finished, tmp_path), other_run(tmp_path)

    def hook(step: int) -> None:
        if step == 9:
            for stranger in ("an empty folder", "another run's in the way", "an older one damaged"):
                STRANGERS[stranger](folder / "checkpoints", other)

    ended = command(folder, hook, run__total_steps="12", checkpoint__keep="2")
    assert not ended.message and len(ended.values) == 12
    assert [found.path.name for found in CheckpointStore(folder).own()] == ["step_000010", "step_000012"]
    assert (folder / "checkpoints" / "step_000004").is_dir() and (folder / "checkpoints" / "step_000010.aside").is_dir()
