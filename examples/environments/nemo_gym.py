"""Resource servers of NeMo-Gym: tools and a verifier behind HTTP.

    python -m hybridflow.train CONFIG environment.path=examples/environments/nemo_gym.py \
        'environment.options={base_url: "http://localhost:8001"}'

A row of the dataset has in `extra_info` the row of NeMo-Gym: `responses_create_params` with `input` and `tools` in the format
of OpenAI's Responses, and whatever else its verifier reads. An episode begins a session (`POST /seed_session`), calls tools at
addresses of their names (`POST /NAME`), and ends with the first message that calls none: `POST /verify` gives the reward. The
session is a cookie, so each episode has a client of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aiohttp import ClientSession, CookieJar

Message = dict[str, Any]


class NemoGym:
    """One session of a resource server."""

    def __init__(self, base_url: str):
        self.base_url = base_url.rstrip("/")
        self.client: ClientSession | None = None
        self.output: list[Message] = []
        """What has happened, as items of a response."""

    async def reset(self, row: Mapping[str, Any]) -> tuple[list[Message], dict[str, object]]:
        """Seed the session with the row."""
        self.row = row["extra_info"]
        self.client = ClientSession(cookie_jar=CookieJar(unsafe=True))  # of an address without a name
        await self._post("seed_session", self.row)
        asked = self.row.get("responses_create_params") or {}
        given = asked.get("input") or row["messages"]
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
        tools = [
            {
                "type": "function",
                "function": {name: tool[name] for name in ("name", "description", "parameters") if name in tool},
            }
            for tool in asked.get("tools") or []
        ]
        return messages, {"tools": tools}

    async def step(self, message: Message) -> tuple[list[Message], float, bool, bool, dict[str, object]]:
        """Call tools; or verify where none is called."""
        answers = [await self._call(call) for call in message.get("tool_calls", [])]
        if answers:
            return answers, 0.0, False, False, {}
        text = {"type": "output_text", "text": message["content"], "annotations": []}
        self.output.append({"type": "message", "id": "msg", "role": "assistant", "status": "completed", "content": [text]})
        response = {
            "id": "response",
            "object": "response",
            "created_at": 0,
            "model": "policy",
            "output": self.output,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": (self.row.get("responses_create_params") or {}).get("tools") or [],
        }
        verified = await self._post("verify", {**self.row, "response": response})
        numbers = {name: value for name, value in verified.items() if isinstance(value, int | float) and name != "reward"}
        return [], float(verified["reward"]), True, False, numbers

    async def _call(self, call: Mapping[str, Any]) -> Message:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        named = {"call_id": call["id"], "name": name, "arguments": json.dumps(arguments)}
        self.output.append({"type": "function_call", **named})
        found = await self._post(name, arguments, is_tool=True)
        result = json.dumps(found)
        self.output.append({"type": "function_call_output", "call_id": call["id"], "output": result})
        return {"role": "tool", "name": name, "tool_call_id": call["id"], "content": result}

    async def _post(self, path: str, body: Mapping[str, Any], *, is_tool: bool = False) -> dict[str, Any]:
        assert self.client is not None, "reset comes first"
        async with self.client.post(f"{self.base_url}/{path}", json=body) as response:
            if is_tool and response.status >= 400:  # the policy's mistake, which it may mend
                return {"error": f"{response.status}: {await response.text()}"}
            response.raise_for_status()
            return await response.json()

    async def close(self) -> None:
        """End the session."""
        if self.client is not None:
            await self.client.close()
