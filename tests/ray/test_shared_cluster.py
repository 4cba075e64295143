"""The cluster that tests share: what one leaves there is not there for the next."""

from __future__ import annotations

import pytest
import ray

from tests.ray import conftest
from tests.ray.conftest import SharedCluster


@ray.remote(num_cpus=1)
class Left:
    """Keeps its CPU slot until somebody ends it."""

    def is_there(self) -> bool:
        """Once it has come up."""
        return True


def test_what_a_test_leaves_is_told_and_the_next_one_has_a_cluster_of_its_own(
    shared_cluster: SharedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_cluster.become("forked")
    shared_cluster.check_that_nothing_is_left()
    left = Left.options(name="left").remote()
    assert ray.get(left.is_there.remote())
    monkeypatch.setattr(conftest, "ENDS_WITHIN_S", 0.2)
    with pytest.raises(AssertionError, match=r"1\.0 CPU slots.*left"):
        shared_cluster.check_that_nothing_is_left()
    assert not ray.is_initialized()
