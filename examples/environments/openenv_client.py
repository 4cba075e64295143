"""Environments of OpenEnv: a server that was started elsewhere, one session of it for each episode.

    pip install openenv
    python -m hybridflow.train CONFIG environment.path=examples/environments/openenv_client.py \
        'environment.options={base_url: "http://localhost:8000", action: "message"}'

An OpenEnv server takes actions and gives observations, both of them objects with fields of its own. `action` names the field
of an action that what the policy says becomes; where it is null, what the policy says is read as the JSON of a whole action. Of
an observation the field `observation` is what the policy hears; null gives it the whole as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from openenv.core.generic_client import GenericEnvClient

Message = dict[str, object]


class OpenEnv:
    """One session of a server. The dataset's prompt comes first, then the server's first observation."""

    def __init__(
        self,
        base_url: str,
        *,
        action: str | None = "message",
        observation: str | None = None,
        reset_options: Mapping[str, Any] | None = None,
    ):
        self.client = GenericEnvClient(base_url=base_url)
        self.action, self.observation, self.reset_options = action, observation, dict(reset_options or {})

    async def reset(self, row: Mapping[str, Any]) -> tuple[list[Message], dict[str, object]]:
        """A new session; the row's `extra_info` may hold `reset`, arguments of its own for the server."""
        await self.client.connect()
        own = row["extra_info"].get("reset") or {}
        result = await self.client.reset(seed=row["seed"] % 2**31, **self.reset_options, **own)
        return [*row["messages"], self._heard(result.observation)], {}

    async def step(self, message: Message) -> tuple[list[Message], float | None, bool, bool, dict[str, object]]:
        """One action. What cannot be read as one is told to the policy, and the server is not asked."""
        said = str(message["content"]).strip()
        try:
            action = json.loads(said) if self.action is None else {self.action: said}
        except ValueError as error:
            return [{"role": "user", "content": f"not an action: {error}"}], 0.0, False, False, {}
        result = await self.client.step(action)
        return [self._heard(result.observation)], result.reward, bool(result.done), False, {}

    def _heard(self, observation: Mapping[str, Any]) -> Message:
        content = json.dumps(observation) if self.observation is None else str(observation[self.observation])
        return {"role": "user", "content": content}

    async def close(self) -> None:
        """End the session."""
        await self.client.close()
