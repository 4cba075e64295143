"""Environments of verifiers (v1): its agent plays against the episode's address, and its judgement is the reward.

    pip install verifiers
    python -m hybridflow.train CONFIG environment.path=examples/environments/verifiers_agent.py \
        'environment.options={taskset: {id: my-taskset}}'

The options are the configuration of a `verifiers.v1` environment: a taskset, and what its agents run in. A row of the dataset
names its task by `extra_info.task`, the position of the task in the taskset. Run with verifiers 0.4.0 and its harness `null` in
a subprocess: `agent: {harness: {id: "null"}, runtime: {type: subprocess}}` among the options. verifiers asks for an older
openai package than others do: install it in a folder of its own (`pip install --target`), which PYTHONPATH names first.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, ClassVar

from verifiers.v1.clients import EvalClientConfig, ModelContext
from verifiers.v1.utils.loaders import load_environment, resolve_env_config

KEY_VARIABLE = "HYBRIDFLOW_SESSION_KEY"


class VerifiersAgent:
    """One episode of a verifiers environment; all episodes of a process share what the environment serves."""

    shared: ClassVar[dict[str, Any]] = {}
    starting: ClassVar[asyncio.Lock] = asyncio.Lock()

    def __init__(self, **environment: Any):
        self.settings = environment

    async def run(self, row: Mapping[str, Any], address: str) -> tuple[float, dict[str, float]]:
        """Play the row's task; the reward is the sum of what its traces were judged with."""
        environment, tasks = await self._served()
        os.environ.setdefault(KEY_VARIABLE, "unused")
        client = EvalClientConfig(base_url=address, api_key_var=KEY_VARIABLE)
        episode = await environment.run_episode(tasks[row["extra_info"]["task"]], ModelContext(model="policy", client=client))
        if not episode.ok:
            errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
            raise RuntimeError(f"the episode of verifiers failed: {[error.message for error in errors]}")
        return sum(trace.reward for trace in episode.traces), {"traces": float(len(episode.traces))}

    async def _served(self) -> tuple[Any, list[Any]]:
        async with self.starting:
            if not self.shared:
                environment = load_environment(resolve_env_config(self.settings))
                stack = AsyncExitStack()
                await stack.enter_async_context(environment.serving())
                self.shared.update(environment=environment, tasks=list(environment.taskset), stack=stack)
        return self.shared["environment"], self.shared["tasks"]
