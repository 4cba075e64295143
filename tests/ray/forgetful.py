"""An algorithm in whose second step Python forgets a Ctrl-C, as it does where one comes in a finalizer."""

from __future__ import annotations

import os
import signal

from hybridflow.algorithms.ppo import PPO
from hybridflow.batch import Batch


class InterruptedAtItsEnd:
    """Ctrl-C comes while this is being finalized."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two of these
            pass


class Forgetful(PPO):
    """PPO that is interrupted once."""

    def collect(self, prompts: Batch) -> Batch:
        if self.step == 2:
            InterruptedAtItsEnd()
        return super().collect(prompts)
