"""What is said about where roles run, before anything is started."""

from __future__ import annotations

from hybridflow.config.schema import Config, ModelConfig, PlacementConfig, RolloutConfig
from hybridflow.controller.placement import placement_lines


def test_a_role_is_shown_with_the_axes_that_cut_it_and_nothing_else() -> None:
    config = Config(
        model=ModelConfig(path="model"),
        rollout=RolloutConfig(tensor_parallel=2),
        placement=PlacementConfig(pools={"main": "1x4"}, roles={}),
    )
    rollout, reference = placement_lines(config, ("rollout", "reference"))
    assert rollout.endswith("1 node(s) x 4 rank(s), data parallel 2, tensor parallel 2 [RolloutWorker]")
    assert reference.endswith("1 node(s) x 4 rank(s), data parallel 4 [ReferenceWorker]")
