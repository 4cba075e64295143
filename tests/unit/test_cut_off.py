"""A step all of whose responses were cut off is a warning."""

import logging

import numpy as np
import pytest

from hybridflow.batch import Batch
from hybridflow.controller.cut_off import CutOffWarning


def test_it_is_told_once_where_it_begins(caplog: pytest.LogCaptureFixture) -> None:
    warning = CutOffWarning(7, max_turns=2)
    steps = [[True, True], [True, True], [True, False], [True, True], []]
    with caplog.at_level(logging.WARNING, "hybridflow"):
        for number, truncated in enumerate(steps, start=1):
            warning.look(number, Batch({"truncated": np.array(truncated, np.bool_)}))
        warning.look(6, Batch({"reward": np.ones(2)}))
    assert [record.getMessage()[:26] for record in caplog.records] == [
        "step 1: all 2 responses we",
        "step 4: all 2 responses we",
    ]
    assert "data.max_response_tokens (7)" in caplog.text


def test_episodes_are_told_of_the_limit_of_turns(caplog: pytest.LogCaptureFixture) -> None:
    rows = Batch({"truncated": np.ones(3, np.bool_), "environment/turns": np.full(3, 2.0, np.float32)})
    with caplog.at_level(logging.WARNING, "hybridflow"):
        CutOffWarning(7, max_turns=2).look(1, rows)
    assert "all 3 episodes were ended by a limit" in caplog.text and "environment.max_turns (2)" in caplog.text


def test_answers_of_a_dataset_are_told_of_the_limit_that_cut_them_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hybridflow"):
        CutOffWarning(7, max_turns=2, is_sampled=False).look(1, Batch({"truncated": np.ones(3, np.bool_)}))
    assert "all 3 answers of the dataset were cut at data.max_response_tokens (7)" in caplog.text
    assert "rollout.stop" not in caplog.text
