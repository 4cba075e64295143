"""Plots of a run from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridflow.errors import DataError
from hybridflow.report import main
from hybridflow.trackers.plots import HEALTH, SPEED, ReadRun, drawn, figures, merged, plot_run, read_run, running_mean

pytest.importorskip("matplotlib")


def write_run(folder: Path, *, num_steps: int, **metrics: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, "time": 0.0, **{name.replace("__", "/"): value for name, value in metrics.items()}}
        for step in range(1, num_steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_a_run_gives_a_png_for_learning_health_and_speed(tmp_path: Path):
    write_run(
        tmp_path,
        num_steps=3,
        reward__mean=0.5,
        validation__reward__accuracy=0.5,
        actor__loss=-0.1,
        seconds__step=2.0,
        seconds__sync=0.1,
    )
    paths = plot_run(tmp_path)
    assert [path.name for path in paths] == ["learning.png", "health.png", "speed.png"]
    assert all(is_png(path) for path in paths)


def test_a_run_of_many_steps_is_drawn_too(tmp_path: Path):
    assert all(is_png(path) for path in plot_run(write_run(tmp_path, num_steps=60, reward__mean=0.5, seconds__step=1.0)))


def test_a_figure_of_which_nothing_was_measured_is_left_out(tmp_path: Path):
    assert [path.name for path in plot_run(write_run(tmp_path, num_steps=2, actor__loss=1.0))] == ["health.png"]


def test_numbers_that_are_missing_or_null_leave_gaps(tmp_path: Path):
    lines = [{"step": 1, "reward/mean": 0.1}, {"step": 2, "reward/mean": None}, {"step": 3}, {"step": 4, "reward/mean": 0.4}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(tmp_path).series("reward/mean") == ([1, 4], [0.1, 0.4])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [None, 0.0, -1.0, 1e308, -1e308, 1e39])
def test_a_run_whose_numbers_say_nothing_is_drawn_too(tmp_path: Path, value: float | None):
    """No gradients, no difference between engine and trainer, or numbers that have run away: axes are logarithmic there."""
    names = ("actor/grad_norm", "critic/grad_norm", "mismatch/mean", "actor/loss", "actor/entropy", "reward/mean")
    lines = [{"step": step, "time": 1.0, "seconds/step": 1.0, **dict.fromkeys(names, value)} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tmp_path / "plots" / "speed.png" in plot_run(tmp_path)


def test_metrics_of_the_users_own_reward_get_a_line(tmp_path: Path):
    run = read_run(write_run(tmp_path, num_steps=2, reward__mean=0.5, reward__std=0.1, reward__format=0.9))
    (training, _) = figures(run)["learning"]
    assert [(line.metric, line.label) for line in training.lines] == [("reward/mean", "reward"), ("reward/format", "format")]


def test_curves_that_lie_on_each_other_are_one_with_all_names(tmp_path: Path):
    scores = {"reward__mean": 0.5, "reward__overall": 0.5, "reward__format": 0.9, "reward__accuracy": 0.5}
    run = read_run(write_run(tmp_path, num_steps=2, **scores))
    (training, _) = figures(run)["learning"]
    assert [line.label for line in merged(training.lines, run)] == ["reward = overall = accuracy", "format"]


def test_a_score_has_the_same_color_in_training_and_validation(tmp_path: Path):
    scores = {"reward__mean": 0.5, "reward__format": 0.9, "validation__reward__format": 0.9}
    training, validation = figures(read_run(write_run(tmp_path, num_steps=2, **scores)))["learning"]
    assert validation.lines[0].color == training.lines[1].color


def test_no_quarter_of_a_figure_is_empty(tmp_path: Path):
    run = read_run(write_run(tmp_path, num_steps=2, **{line.metric: 1.0 for panel in SPEED for line in panel.lines}))
    figures = {count: drawn(run, SPEED[:count], "") for count in (1, 2, 3, 4)}
    widths = {count: [len(axes.get_subplotspec().colspan) for axes in figure.axes] for count, figure in figures.items()}
    assert widths == {1: [2], 2: [1, 1], 3: [2, 1, 1], 4: [1, 1, 1, 1]}


def test_a_critic_that_was_far_off_once_does_not_flatten_its_curve(tmp_path: Path):
    values = [-12795.0, -0.5, 0.25]
    lines = [{"step": step, "critic/explained_variance": value} for step, value in enumerate(values, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (panel,) = [panel for panel in HEALTH if panel.title == "What the critic knows"]
    assert drawn(read_run(tmp_path), [panel], "").axes[0].get_ylim()[0] == -1


def test_a_first_step_that_compiles_does_not_flatten_the_times_of_the_others(tmp_path: Path):
    lines = [{"step": step, "seconds/step": 30.0 if step == 1 else 2.0, "seconds/actor.update": 1.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (axes,) = drawn(read_run(tmp_path), SPEED[:1], "").axes
    assert axes.get_ylim() == (0, 3)
    assert [text.get_text().strip() for text in axes.texts] == ["30 s"]


def test_a_running_mean_looks_back_only():
    # Windows of two: 1; (1+3)/2; (3+5)/2.
    assert running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


def test_a_folder_without_metrics_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"metrics\.jsonl does not exist"):
        plot_run(tmp_path)


def test_a_run_without_a_finished_step_says_so(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rew')
    with pytest.raises(DataError, match="no finished step"):
        plot_run(tmp_path)


def test_the_command_prints_where_the_plots_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(write_run(tmp_path, num_steps=2, reward__mean=0.5))]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/plots/learning.png\n"


def test_the_command_fails_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "nothing")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_every_metric_that_is_drawn_is_documented():
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    missing = [line.metric for panel in (*HEALTH, *SPEED) for line in panel.lines if f"`{line.metric}`" not in documented]
    assert not missing


def test_metrics_of_the_runs_own_have_a_figure():
    lines = [
        {"step": step, "actor/loss": 1.0, "judge/words": step, "environment/solved": 0.5, "held_out/loss": 1.0}
        for step in (1, 2)
    ]
    run = ReadRun("run", lines)
    assert [(panel.title, [line.metric for line in panel.lines]) for panel in figures(run)["own_metrics"]] == [
        ("judge", ["judge/words"]),
        ("environment", ["environment/solved"]),
    ]
    assert "Held-out rows" in [panel.title for panel in figures(run)["learning"]]


def test_accuracy_of_one_response_to_each_prompt_is_drawn_once(tmp_path: Path):
    scores = {"validation__reward__mean": 0.5, "validation__reward__accuracy": 0.5, "validation__accuracy": 0.5}
    (_, validation) = figures(read_run(write_run(tmp_path / "one", num_steps=2, **scores)))["learning"]
    assert [line.metric for line in validation.lines] == ["validation/reward/mean", "validation/reward/accuracy"]
    several = write_run(tmp_path / "several", num_steps=2, **scores, **{"validation__pass@2": 0.7})
    (*_, worth) = figures(read_run(several))["learning"]
    assert [line.metric for line in worth.lines] == ["validation/accuracy", "validation/pass@2"]


def test_legends_of_several_data_sources_stay_in_the_figure_and_apart(tmp_path: Path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    sources = {
        f"validation__{source}__accuracy": 0.2 for source in ("hybridflow_arithmetic", "openai_gsm8k", "DigitalLearning_MATH")
    }
    lines = [
        {
            "step": step,
            **{
                name.replace("__", "/"): value + step / 100 * index
                for index, (name, value) in enumerate(
                    {
                        "reward__mean": 0.1,
                        "validation__reward__mean": 0.3,
                        "validation__reward__words": 2.0,
                        "validation__accuracy": 0.25,
                        **sources,
                    }.items()
                )
            },
        }
        for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    figure = drawn(run, figures(run)["learning"], "learning")
    FigureCanvasAgg(figure).draw()
    legends = [axes.get_legend().get_window_extent() for axes in figure.axes]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in legends)
    assert not any(one.overlaps(other) for place, one in enumerate(legends) for other in legends[:place])
