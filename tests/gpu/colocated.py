"""An actor and its engine on one GPU, in this process."""

from __future__ import annotations

import torch

from hybridflow.config.schema import Config
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.rollout import RolloutWorker

DEVICE = torch.device("cuda", 0)


def actor_and_rollout(config: Config) -> tuple[ActorWorker, RolloutWorker]:
    """As on a rank of a pool that both share."""
    roles: dict[str, Worker] = {}
    for role, kind in (("actor", ActorWorker), ("rollout", RolloutWorker)):
        layout = kind.layout_of(config, 1)
        roles[role] = kind(config, RankContext(role=role, rank=0, layout=layout, device=DEVICE, peers=roles))
    actor, rollout = roles["actor"], roles["rollout"]
    assert isinstance(actor, ActorWorker) and isinstance(rollout, RolloutWorker)
    return actor, rollout
