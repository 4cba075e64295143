"""docs/metrics.md explains every metric of a run. Which metrics there are is asked where runs and steps are tested."""

from __future__ import annotations

import ast
import re

import pytest

from tests.architecture.limits import sources
from tests.metric_names import unexplained

NAME = re.compile(
    r"(actor|critic|reward_model|reward|response|prompt|kl|agreement|importance|stream|staleness|seconds|memory|sync|controller)/[a-z_0-9]+"
)


@pytest.mark.parametrize(
    "name", ["actor/lose", "reward", "sync/second", "staleness/share_of_age_x", "dpo/accuracies", "other/loss"]
)
def test_a_name_that_the_page_does_not_have_is_found(name: str) -> None:
    assert unexplained(["step", "time", "actor/loss", name]) == [name]


@pytest.mark.parametrize(
    "name",
    [
        "sync/seconds_load",
        "sync/send_bytes_received",
        "staleness/share_of_age_3",
        "validation/response/tokens_mean",
        "validation/openai_gsm8k/pass@4/low",
        "held_out/margin",
        "reward/anything",
    ],
)
def test_a_name_of_many_is_covered_by_the_one_that_stands_for_them(name: str) -> None:
    assert not unexplained([name])


def test_every_name_that_is_written_out_in_the_package_is_explained() -> None:
    written = {
        node.value
        for source in sources("hybridflow")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and NAME.fullmatch(node.value)
        and not node.value.endswith("_")
    }
    assert len(written) > 40
    assert not unexplained(written)
