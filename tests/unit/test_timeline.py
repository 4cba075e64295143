"""timeline.json and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridflow.trackers.timeline import Span, TimelineFile, drawn_timeline, read_spans

ACTOR = Span("main", "actor.update", began=100.0, seconds=2.0, step=1)
ROLLOUT = Span("generation", "rollout.take_finished", began=100.5, seconds=1.25, step=1)


def written(folder: Path, *spans: Span, resume_step: int = 0) -> Path:
    file = TimelineFile(folder, resume_step=resume_step)
    for span in spans:
        file.write(span.step, [span])
    file.close()
    return folder / "timeline.json"


def test_what_was_written_is_read_but_for_calls_too_short_to_show(tmp_path: Path) -> None:
    assert read_spans(written(tmp_path, ACTOR, Span("main", "actor.num_updates", 99.0, 1e-5, 1), ROLLOUT)) == [ACTOR, ROLLOUT]


def test_the_file_is_a_trace_in_chromes_format_once_its_array_is_closed(tmp_path: Path) -> None:
    events = json.loads(written(tmp_path, ACTOR, ROLLOUT).read_text().rstrip(",\n") + "]")
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"main", "actor", "generation", "rollout"}
    update = next(event for event in events if event["name"] == "actor.update")
    assert (update["ts"], update["dur"]) == (100_000_000, 2_000_000)


def test_a_resumed_run_goes_on_in_the_file_and_a_new_one_puts_it_aside(tmp_path: Path) -> None:
    path = written(tmp_path, ACTOR)
    assert read_spans(written(tmp_path, ROLLOUT, resume_step=1)) == [ACTOR, ROLLOUT]
    assert read_spans(written(tmp_path, ROLLOUT)) == [ROLLOUT]
    assert [read_spans(aside) for aside in tmp_path.glob("timeline.until-*")] == [[ACTOR, ROLLOUT]]
    assert path.exists()


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path, ACTOR, ROLLOUT)
    path.write_text(path.read_text()[:-10])
    assert read_spans(path) == [ACTOR]


@pytest.mark.parametrize("spoilt", [b'{"name": "actor.upd', b"\0\0\0\0", b"\xff\xfe", b'{"name": 3', b"3", b'{"step": 1}'])
def test_what_a_kill_or_a_power_cut_has_left_costs_no_line_of_the_resumed_run(tmp_path: Path, spoilt: bytes) -> None:
    path = written(tmp_path, ACTOR)
    path.write_bytes(path.read_bytes() + spoilt)
    assert read_spans(written(tmp_path, ROLLOUT, resume_step=1)) == [ACTOR, ROLLOUT]
    path.write_bytes(path.read_bytes() + spoilt + b"\n")
    assert read_spans(written(tmp_path, ACTOR, resume_step=1)) == [ACTOR, ROLLOUT, ACTOR]


def test_the_picture_has_a_row_for_each_role_of_a_pool() -> None:
    axes = drawn_timeline([ACTOR, ROLLOUT], "run").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["main: actor", "generation: rollout"]
