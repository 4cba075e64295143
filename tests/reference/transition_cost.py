"""What a change of layout costs each rank, in closed form. HybridFlow (arXiv:2409.19256), table 2."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class TransitionCost:
    """Shares of the size of the model, for one rank."""

    received: Fraction
    """Communication volume."""
    peak: Fraction
    """Most weights that are held at once."""
    redundant: Fraction
    """Weights held twice after the transition: the training shard that is no part of the generation slice."""


def hybridflow_cost(*, pipeline: int, tensor: int, generation_pipeline: int, generation_tensor: int) -> TransitionCost:
    """The paper's grouping: one all-gather in each micro-data group, into a slice that contains the trained one."""
    num_training, num_generation = pipeline * tensor, generation_pipeline * generation_tensor
    received = Fraction(num_training - num_generation, num_generation * num_training)
    return TransitionCost(received, Fraction(1, num_generation), Fraction(0))


def vanilla_cost(*, pipeline: int, tensor: int) -> TransitionCost:
    """Consecutive ranks form generation groups (HybridFlow-V): all-gather within the replica, then cut anew."""
    num_training = pipeline * tensor
    return TransitionCost(Fraction(num_training - 1, num_training), Fraction(1), Fraction(1, num_training))


def deepspeed_chat_cost(*, pipeline: int, tensor: int, data: int) -> TransitionCost:
    """ZeRO-3 over all ranks: all-gather over all of them."""
    num_ranks = pipeline * tensor * data
    return TransitionCost(Fraction(num_ranks - 1, num_ranks), Fraction(1), Fraction(1, num_ranks))
