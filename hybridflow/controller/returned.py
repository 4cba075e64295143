"""What the methods of an algorithm return, judged where it comes from: otherwise whoever uses it first would be blamed."""

from __future__ import annotations

from collections.abc import Callable

from hybridflow.algorithms.base import Algorithm
from hybridflow.algorithms.options import GroupOptions
from hybridflow.batch import Batch
from hybridflow.errors import ReturnError
from hybridflow.workers.remote import returned

ROUNDS_WITHOUT_A_PROMPT = 50
"""Steps' worth of prompts, all of which `keep` has refused one after the other."""


def checked_collect(algorithm: Algorithm) -> Callable[[Batch], Batch]:
    """`collect`, raising ReturnError where it gives no rows."""
    name = f"{type(algorithm).__name__}.collect"

    def collect(prompts: Batch) -> Batch:
        rows = returned(algorithm.collect(prompts), Batch, name)
        if not len(rows):
            raise ReturnError(
                f"{name} has returned no rows for {len(prompts)} prompts: refuse them in `keep`, which sees one by one"
            )
        return rows

    return collect


def bounded_keep(algorithm: Algorithm) -> Callable[[Batch], bool]:
    """`keep`, raising ReturnError where it refuses prompt after prompt: the step would never be complete. `max_rounds`, where
    the algorithm has it, may allow more."""
    options = algorithm.config
    num_rounds = max(ROUNDS_WITHOUT_A_PROMPT, options.max_rounds if isinstance(options, GroupOptions) else 0)
    most = num_rounds * algorithm.run.data.prompts_per_step
    num_refused = 0

    def keep(group: Batch) -> bool:
        nonlocal num_refused
        is_kept = algorithm.keep(group)
        num_refused = 0 if is_kept else num_refused + 1
        if num_refused >= most:
            name = f"{type(algorithm).__name__}.keep"
            raise ReturnError(
                f"{name} has refused {num_refused} prompts in a row, {num_rounds} steps' worth: no step can begin"
            )
        return is_kept

    return keep
