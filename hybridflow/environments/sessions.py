"""Agents that speak to an OpenAI-compatible address, as environments.

Each episode has an address of its own on loopback. A request for a chat completion is a turn of the policy: its messages are
what the environment has said, and the answer is what the policy says, token by token as it was sampled. A request whose
messages do not continue the conversation so far begins a new history; what was sampled before keeps the history that it was
sampled in.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from aiohttp import web

from hybridflow.environments.base import NEW_HISTORY, Message, Row
from hybridflow.environments.threads import on_thread

Run = Callable[[Row, str], object]
StepResult = tuple[list[Message], float, bool, bool, Mapping[str, object]]
MAX_REQUEST_BYTES = 64 * 2**20


@dataclass
class ChatRequest:
    """One request, and the answer that it waits for."""

    messages: list[Message]
    tools: list[Mapping[str, object]]
    answer: asyncio.Future[Message] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class SessionServer:
    """The HTTP server of this process, for all of its sessions."""

    def __init__(self) -> None:
        self.sessions: dict[str, AgentEnvironment] = {}
        self.address = ""
        self._starting = asyncio.Lock()

    async def open(self, session: AgentEnvironment) -> str:
        """The base address of a new session, to be given to a client as `base_url`."""
        async with self._starting:
            if not self.address:
                self.address = await self._start()
        key = secrets.token_hex(8)
        self.sessions[key] = session
        return f"{self.address}/sessions/{key}/v1"

    async def _start(self) -> str:
        app = web.Application(client_max_size=MAX_REQUEST_BYTES)
        app.router.add_post("/sessions/{key}/v1/chat/completions", self._complete)
        app.router.add_get("/sessions/{key}/v1/models", self._models)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        return f"http://{host}:{port}"

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "policy", "object": "model", "created": 0}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        session = self.sessions.get(request.match_info["key"])
        if session is None:
            return _error(404, "there is no such session, or its episode has ended")
        try:
            asked = await request.json()
            chat = ChatRequest([_as_message(message) for message in asked["messages"]], list(asked.get("tools") or ()))
        except (ValueError, KeyError, TypeError) as error:
            return _error(400, f"expected an object with a list of messages: {error!r}")
        if asked.get("n", 1) not in (1, None):
            return _error(400, "n must be 1: an episode has one continuation")
        session.requests.put_nowait(chat)
        try:
            answer = await chat.answer
        except asyncio.CancelledError:
            if not chat.answer.cancelled():  # it is the client that has gone
                raise
            return _error(410, "the episode has ended: it has no tokens or turns left, or it failed")
        return await _stream(request, answer) if asked.get("stream") else web.json_response(_completion(answer))


class AgentEnvironment:
    """An agent's run as an environment: `reset` waits for its first request, `step` answers one and waits for the next."""

    server: SessionServer | None = None
    """Of this process, once there is one."""

    def __init__(self, run: Run):
        self.run = run
        self.requests: asyncio.Queue[ChatRequest | None] = asyncio.Queue()
        """None where the agent has returned."""
        self.open: list[ChatRequest] = []
        """The one that waits for the policy, if any."""
        self.history: list[Message] = []
        self.tools: list[Mapping[str, object]] = []

    async def reset(self, row: Row) -> tuple[list[Message], dict[str, object]]:
        """Start the agent; its first request begins the conversation."""
        if AgentEnvironment.server is None:
            AgentEnvironment.server = SessionServer()
        self.key = await AgentEnvironment.server.open(self)
        self.task = asyncio.ensure_future(self._run(row))
        self.task.add_done_callback(lambda _: self.requests.put_nowait(None))
        request = await self.requests.get()
        if request is None:
            self.task.result()
            raise ValueError("the agent returned without a request to its address")
        self._note(request)
        return request.messages, {"tools": request.tools}

    async def _run(self, row: Row) -> object:
        run = cast(Callable[..., object], self.run)
        if inspect.iscoroutinefunction(run):
            return await run(row, self.key)
        result = await on_thread(run, row, self.key)
        return await result if inspect.isawaitable(result) else result

    def _note(self, request: ChatRequest) -> None:
        self.history, self.tools = list(request.messages), request.tools
        self.open.append(request)

    async def step(self, message: Message) -> StepResult:
        """Answer the request with what the policy has said."""
        request = self.open.pop()
        if not request.answer.done():
            request.answer.set_result(message)
        self.history.append(message)
        following = await self.requests.get()
        if following is None:
            return self._ended()
        known = len(self.history)
        goes_on = _comparable(following.messages[:known]) == _comparable(self.history) and following.tools == self.tools
        goes_on = goes_on and len(following.messages) > known
        self._note(following)
        if goes_on:
            return following.messages[known:], 0.0, False, False, {}
        return following.messages, 0.0, False, False, {NEW_HISTORY: True, "tools": following.tools}

    def _ended(self) -> StepResult:
        """What the agent returned: a reward, or (reward, info)."""
        result = self.task.result()
        reward, info = result if isinstance(result, tuple) else (result, {})
        return [], reward, True, False, info

    async def close(self) -> None:
        """End the agent, whatever it is busy with."""
        assert AgentEnvironment.server is not None
        AgentEnvironment.server.sessions.pop(self.key.split("/")[-2], None)
        self.task.cancel()
        while not self.requests.empty():
            if (request := self.requests.get_nowait()) is not None:
                self.open.append(request)
        for request in self.open:
            request.answer.cancel()


def _as_message(message: Mapping[str, object]) -> Message:
    """A message of a request as chat templates take it."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        content = "".join(str(part["text"]) for part in content)
    kept = {name: message[name] for name in ("role", "name", "tool_call_id") if message.get(name) is not None}
    kept["content"] = content or ""
    if calls:
        kept["tool_calls"] = [_as_call(call) for call in cast(Sequence[Mapping[str, object]], calls)]
    return kept


def _as_call(call: Mapping[str, object]) -> dict[str, object]:
    function = dict(cast(Mapping[str, object], call["function"]))
    if isinstance(function.get("arguments"), str):
        function["arguments"] = json.loads(str(function["arguments"]))
    return {"id": call.get("id"), "type": "function", "function": function}


def _comparable(messages: Sequence[Message]) -> list[tuple[object, ...]]:
    return [
        (
            message["role"],
            message["content"] or "",
            [call["function"] for call in cast(Sequence[Mapping[str, object]], message.get("tool_calls") or ())],
        )
        for message in messages
    ]


def _completion(answer: Message) -> dict[str, object]:
    """The policy's message as the answer of the API."""
    message: dict[str, object] = {"role": "assistant", "content": answer["content"]}
    calls = cast(Sequence[Mapping[str, Mapping[str, object]]], answer.get("tool_calls") or ())
    if calls:
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}} for call in calls
        ]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop", "logprobs": None}
    name = f"chatcmpl-{secrets.token_hex(8)}"
    return {"id": name, "object": "chat.completion", "created": int(time.time()), "model": "policy", "choices": [choice]}


async def _stream(request: web.Request, answer: Message) -> web.StreamResponse:
    """The same in one chunk, for clients that ask for a stream."""
    whole = _completion(answer)
    (choice,) = cast(list[dict[str, object]], whole["choices"])
    delta = dict(cast(dict[str, object], choice["message"]))
    if "tool_calls" in delta:
        calls = cast(list[dict[str, object]], delta["tool_calls"])
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    chunk = {"index": 0, "delta": delta, "finish_reason": choice["finish_reason"]}
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    told = json.dumps({**whole, "object": "chat.completion.chunk", "choices": [chunk]})
    await response.write(f"data: {told}\n\ndata: [DONE]\n\n".encode())
    await response.write_eof()
    return response


def _error(status: int, problem: str) -> web.Response:
    return web.json_response({"error": {"message": problem, "type": "invalid_request_error"}}, status=status)
