"""Two versions in turns: what the other one is asked, what is compared, and when the gate closes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gate, record
from benchmarks.against import ROOT, Checkout, checked_out, own_checkout, ratios
from benchmarks.gate import Ratio, verdict
from benchmarks.peers import trl_grpo
from benchmarks.ppo_step import WORKLOADS, Options, settings_of

HALF = Ratio(workload="W1", against="23c9331", device="H200", commit="abc", date="2026-11-27", step=0.5)


def test_keys_that_the_other_version_does_not_know_are_left_out_and_said() -> None:
    known = {"algorithm": "ppo", "algorithm.prompts_per_update": 8, "run.seed": 1, "placement.pools.main": "1x2"}
    kept, words = Checkout(ROOT, "here").adapted(known | {"run.sede": 1, "algorithm.responses": 2})
    assert kept == known
    assert words == [
        "run.sede=1 is left out: that version does not know it",
        "algorithm.responses=2 is left out: that version does not know it",
    ]


def test_a_key_that_was_renamed_since_has_its_old_name_there(tmp_path: Path) -> None:
    package = tmp_path / "hybridflow"
    (package / "config").mkdir(parents=True)
    for module in ("__init__", "config/__init__"):
        (package / f"{module}.py").touch()
    (package / "registry.py").write_text(
        "import dataclasses\nALGORITHMS = {}\n@dataclasses.dataclass\nclass Options: pass\n"
        "class PPO: config_class = Options\ndef load(name, table, *, key): return PPO\n"
    )
    (package / "config" / "build.py").write_text("def keys_of(kind): return ['rollout.memory_fraction']\n")
    (package / "config" / "schema.py").write_text("class Config: pass\n")
    kept, words = Checkout(tmp_path, "old").adapted({"rollout.gpu_memory_utilization": 0.4})
    assert kept == {"rollout.memory_fraction": 0.4}
    assert words == ["rollout.gpu_memory_utilization is called rollout.memory_fraction there"]


def test_every_key_of_a_workload_is_one_of_ours(tmp_path: Path) -> None:
    for name in ("W1", "W3", "W4", "W5s1x2", "tiny", "tiny3"):
        settings = settings_of(name, Options(folder=tmp_path, steps=3, extra={}))
        if ":" not in str(settings["algorithm"]):
            assert own_checkout().adapted(settings) == (settings, [])


def test_no_workload_for_a_gpu_sets_what_the_plan_decides() -> None:
    decided = ("tokens_per_microbatch", "gpu_memory_utilization", "logits_chunk_tokens", "offload", "sleep", "checkpointing")
    assert not [key for one in WORKLOADS.values() for key in one.overrides if key.endswith(decided)]


def test_a_commit_is_checked_out_and_its_folder_removed() -> None:
    with checked_out("HEAD") as other:
        assert (other.folder / "hybridflow" / "train.py").is_file() and other.folder != ROOT
        assert other.label == own_checkout().label.removesuffix("+")
    assert not other.folder.exists()


def test_what_is_neither_folder_nor_commit_is_refused() -> None:
    with pytest.raises(SystemExit, match="found neither a folder"), checked_out("no-such-commit"):
        pass


def test_ratios_are_of_medians_over_turns_and_of_seconds_that_both_have() -> None:
    ours = [{"seconds/step": 1.0, "memory/peak": 3.0, "seconds/new": 1.0}, {"seconds/step": 3.0, "seconds/new": 1.0}]
    theirs = [{"seconds/step": 4.0, "memory/peak": 3.0}, {"seconds/step": 6.0, "memory/peak": 3.0}]
    assert ratios(ours, theirs) == {"seconds/step": 2.0 / 5.0}


def test_the_gate_closes_where_more_than_five_percent_are_lost() -> None:
    assert verdict(replace(HALF, step=0.524), [HALF])[0] is True
    is_good, words = verdict(replace(HALF, step=0.526), [HALF])
    assert is_good is False and words.endswith("recorded was 0.500 (abc, 2026-11-27): +5.2%")


def test_the_last_measurement_of_the_same_kind_counts() -> None:
    others = [replace(HALF, workload="W3", step=0.1), replace(HALF, device="H100", step=0.1), replace(HALF, against="other")]
    assert verdict(replace(HALF, step=0.7), [HALF, replace(HALF, step=0.7), *others])[0] is True
    assert verdict(replace(HALF, step=9.0), others) == (
        True,
        "W1 takes 9.000 of the step of 23c9331 on H200; no such measurement was recorded yet",
    )


def test_the_gate_records_what_passes_and_ends_with_1_where_something_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, recorded = tmp_path / "result.json", tmp_path / "ratios.jsonl"
    ended = []
    for step in (0.5, 0.6):
        content = {name: value for name, value in vars(HALF).items() if name != "step"}
        result.write_text(json.dumps(content | {"ratios": {"seconds/step": step}}))
        monkeypatch.setattr(sys, "argv", ["gate", str(result), "--record", "--recorded", str(recorded)])
        with pytest.raises(SystemExit) as end:
            gate.main()
        ended.append(end.value.code)
    assert ended == [0, 1] and gate.read_recorded(recorded) == [HALF]


def test_every_result_names_host_cpu_and_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Fast CPU\ncpu MHz\t\t: 2000.4\ncpu MHz\t\t: 3000.0\ncpu MHz\t\t: 2100.0\n")
    monkeypatch.setattr(record, "CPU_INFO", info)
    found = record.circumstances("python", "cpu")
    assert found["device"] == "Fast CPU"
    assert found["host"] == {**record.host(), "cpu": "Fast CPU", "cpu_mhz_median": 2100, "cpu_mhz_max": 3000}


def test_without_trl_its_benchmark_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["trl_grpo", "tiny3", "--out", str(tmp_path)])
    monkeypatch.setattr(trl_grpo, "is_installed", lambda package: False)
    trl_grpo.main()
    assert "TRL is not installed" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_trl_measures_the_rows_of_our_workload(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: its benchmark is NOT tested on this machine")
    result = trl_grpo.run("tiny3", tmp_path, 3)
    steps = result["steps"]
    assert isinstance(steps, list) and len(steps) == 3 and all(step["seconds/step"] > 0 for step in steps)
