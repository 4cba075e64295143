"""A checkpoint is complete or absent, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from hybridflow.checkpoint.manifest import MANIFEST
from hybridflow.checkpoint.store import CheckpointStore, RunState, find
from hybridflow.errors import CheckpointError, WorkerDiedError


def write(store: CheckpointStore, step: int, content: bytes = b"weights") -> Path:
    with store.writing(step) as folder:
        (folder / "actor").mkdir()
        (folder / "actor" / "part").write_bytes(content)
        store.write_state(folder, RunState(step=step, config={"model": {"path": "m"}}, algorithm={"kl_coefficient": 0.1}))
    latest = store.latest()
    assert latest is not None
    return latest


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_what_was_written_comes_back(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    checkpoint = write(store, 7)
    assert checkpoint == tmp_path / "checkpoints" / "step_000007"
    store.verify(checkpoint)
    state = store.read_state(checkpoint)
    assert (state.step, state.config, state.algorithm) == (7, {"model": {"path": "m"}}, {"kl_coefficient": 0.1})
    assert (checkpoint / "actor" / "part").read_bytes() == b"weights"


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path):
    assert CheckpointStore(tmp_path / "new").latest() is None


def test_floats_and_large_integers_survive_exactly(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    own = {"numpy": {"state": 2**127 + 1, "inc": 3}, "python": [3, [1, 2**32 - 1], None], "scale": 0.1 + 0.2}
    with store.writing(1) as folder:
        store.write_state(folder, RunState(step=1, config={}, algorithm=own))
    assert store.read_state(tmp_path / "checkpoints" / "step_000001").algorithm == own


@pytest.mark.parametrize(
    ("own", "place"),
    [
        ({"a": {"b": [0, object()]}}, r"state.algorithm.a.b\[1\] is a object"),
        ({"a": {3: 1}}, "state.algorithm.a has the key 3"),
    ],
)
def test_state_that_json_would_lose_is_refused_by_its_place(tmp_path: Path, own: dict[str, object], place: str):
    with pytest.raises(CheckpointError, match=place):
        CheckpointStore(tmp_path).write_state(tmp_path, RunState(step=1, config={}, algorithm=own))


def test_what_a_killed_run_left_is_ignored_and_removed(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    previous = write(store, 5)
    abandoned = store.begin(7)
    (abandoned / "actor").mkdir()
    (abandoned / "actor" / "part").write_bytes(b"half of the wei")
    restarted = CheckpointStore(tmp_path)
    assert restarted.latest() == previous
    restarted.begin(6)
    assert names(store) == [".step_000006.tmp", "step_000005"]


KILLED_WHILE_WRITING = """
    import sys
    from pathlib import Path
    from hybridflow.checkpoint.store import CheckpointStore, RunState

    store = CheckpointStore(sys.argv[1], keep=2)
    for step in range(1, 100_000):
        with store.writing(step) as folder:
            for part in range(4):
                (folder / f"part_{part}").write_bytes(bytes([step % 256]) * 100_000)
            store.write_state(folder, RunState(step=step, config={}))
        if step == 3:
            sys.stdout.write("going\\n")
            sys.stdout.flush()
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.003, 0.011, 0.023, 0.041])
def test_sigkill_at_any_moment_leaves_a_complete_newest_checkpoint(tmp_path: Path, delay_s: float):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED_WHILE_WRITING), str(tmp_path)], stdout=subprocess.PIPE, cwd=Path.cwd()
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = CheckpointStore(tmp_path)
    latest = store.latest()
    assert latest is not None
    store.verify(latest)
    step = store.read_state(latest).step
    assert latest.name == f"step_{step:06d}"
    assert (latest / "part_3").read_bytes() == bytes([step % 256]) * 100_000


def test_a_kill_between_the_two_renames_of_a_replacement_keeps_the_old_checkpoint(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    old = write(store, 7)
    store.begin(7)
    old.rename(old.with_name(".step_000007.replaced"))
    assert CheckpointStore(tmp_path).latest() == old
    store.verify(old)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    write(store, 7, b"old")
    checkpoint = write(store, 7, b"new")
    assert (checkpoint / "actor" / "part").read_bytes() == b"new"
    assert names(store) == ["step_000007"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        write(store, step)
    assert names(store) == ["step_000003", "step_000004"]


def test_keep_zero_keeps_all(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=0)
    for step in (1, 2, 3):
        write(store, step)
    assert names(store) == ["step_000001", "step_000002", "step_000003"]


def test_the_newest_checkpoint_is_the_one_written_last_not_the_one_with_the_highest_step(tmp_path: Path):
    write(CheckpointStore(tmp_path), 100)
    second_run = CheckpointStore(tmp_path, keep=1)
    assert write(second_run, 10).name == "step_000010"
    assert names(second_run) == ["step_000010"]


def test_the_old_checkpoint_stays_until_the_new_one_is_complete(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 1)
    with store.writing(2):
        assert "step_000001" in names(store)
    assert names(store) == ["step_000002"]


def test_a_changed_byte_is_found_by_name(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    previous = write(store, 1)
    checkpoint = write(store, 2, b"a" * 1000)
    (checkpoint / "actor" / "part").write_bytes(b"a" * 999 + b"b")
    with pytest.raises(CheckpointError, match=r"step_000002/actor/part has the checksum .*checkpoint\.resume=") as caught:
        store.verify(checkpoint)
    assert f"checkpoint.resume={previous}" in str(caught.value)


def test_a_truncated_file_is_found_by_name_with_both_sizes(tmp_path: Path):
    checkpoint = write(CheckpointStore(tmp_path), 1, b"a" * 1000)
    (checkpoint / "actor" / "part").write_bytes(b"a" * 10)
    with pytest.raises(CheckpointError, match=r"actor/part should have 1,000 bytes and has 10.*checkpoint\.resume=never"):
        CheckpointStore.verify(checkpoint)


def test_a_missing_file_is_found_by_name(tmp_path: Path):
    checkpoint = write(CheckpointStore(tmp_path), 1)
    (checkpoint / "actor" / "part").unlink()
    with pytest.raises(CheckpointError, match="actor/part is missing"):
        CheckpointStore.verify(checkpoint)


def test_a_checkpoint_without_its_manifest_is_an_error_not_an_older_checkpoint(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    first = write(store, 1)
    (write(store, 2) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=rf"step_000002/manifest\.json is missing.*checkpoint\.resume={first}"):
        store.latest()


def test_two_damaged_checkpoints_are_told_one_by_one(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    for checkpoint in [write(store, step) for step in (1, 2)]:
        (checkpoint / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match=r"step_000002/manifest\.json cannot be read.*No other .*resume=never"):
        store.latest()


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path):
    checkpoint = write(CheckpointStore(tmp_path), 1)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99, and this version reads format 1"):
        CheckpointStore.verify(checkpoint)


def test_a_failed_write_leaves_the_previous_checkpoint_and_says_how_much_was_free(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    previous = write(store, 1)
    with (
        pytest.raises(CheckpointError, match=r"(?s)checkpoint of step 2 .*No space left.* bytes were free") as caught,
        store.writing(2),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(previous) in str(caught.value)
    assert store.latest() == previous
    assert names(store) == ["step_000001"]


def test_a_full_disk_leaves_the_previous_checkpoint(small_disk: Path):
    store = CheckpointStore(small_disk, keep=1)
    previous = write(store, 1, b"a" * 400_000)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write(store, 2, os.urandom(2_000_000))
    assert store.latest() == previous
    store.verify(previous)


def test_a_dead_worker_is_still_a_dead_worker(tmp_path: Path):
    died = WorkerDiedError(role="actor", rank=1, node="n", method="save", cause="killed")
    with pytest.raises(WorkerDiedError), CheckpointStore(tmp_path).writing(1):
        raise died


def test_a_folder_that_cannot_be_made_is_reported_with_its_key(tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match=r"choose another run\.folder"):
        CheckpointStore(tmp_path / "run").begin(1)


@pytest.mark.parametrize("given", ["run", "run/checkpoints", "run/checkpoints/step_000003"])
def test_a_run_and_a_checkpoint_both_name_the_checkpoint(tmp_path: Path, given: str):
    checkpoint = write(CheckpointStore(tmp_path / "run"), 3)
    assert find(tmp_path / given) == checkpoint


def test_a_folder_without_checkpoints_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="has no checkpoint in it"):
        find(tmp_path)
