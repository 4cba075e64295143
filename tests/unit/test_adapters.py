"""The adapters of examples/environments, each against a server of its kind on loopback."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from examples.environments.nemo_gym import NemoGym

ROW = {
    "messages": [{"role": "user", "content": "Count."}],
    "ground_truth": "3",
    "data_source": "test",
    "seed": 7,
    "sample": 0,
    "extra_info": {
        "target": 3,
        "responses_create_params": {
            "input": [{"role": "user", "content": "Count to three."}],
            "tools": [{"type": "function", "name": "increase", "description": "Adds one.", "parameters": {"type": "object"}}],
        },
    },
}


@asynccontextmanager
async def counting_server() -> AsyncIterator[str]:
    """A resource server whose sessions count, and whose verifier asks for the target."""
    counts: dict[str, int] = {}

    async def seed(request: web.Request) -> web.Response:
        assert (await request.json())["target"] == 3
        key = f"session{len(counts)}"
        counts[key] = 0
        response = web.json_response({})
        response.set_cookie("session", key)
        return response

    async def increase(request: web.Request) -> web.Response:
        body = await request.json()
        if body["by"] < 0:
            return web.Response(status=422, text="by must not be negative")
        counts[request.cookies["session"]] += body["by"]
        return web.json_response({"count": counts[request.cookies["session"]]})

    async def verify(request: web.Request) -> web.Response:
        body = await request.json()
        output = body["response"]["output"]
        assert [item["type"] for item in output][-1] == "message" and body["response"]["object"] == "response"
        is_right = counts[request.cookies["session"]] == body["target"] and output[-1]["content"][0]["text"] == "done"
        return web.json_response({**body, "reward": float(is_right), "calls": len(output) - 1})

    app = web.Application()
    app.add_routes([web.post("/seed_session", seed), web.post("/increase", increase), web.post("/verify", verify)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def call(**arguments: object) -> dict[str, object]:
    function = {"name": "increase", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": function}]}


def test_a_resource_server_of_nemo_gym_gives_tools_and_a_reward() -> None:
    async def play() -> None:
        async with counting_server() as address:
            games = [NemoGym(address), NemoGym(address)]
            for game in games:
                messages, info = await game.reset(ROW)
                assert messages == [{"role": "user", "content": "Count to three."}]
                assert info["tools"][0]["function"]["name"] == "increase"  # type: ignore[index]
            (answer,), reward, terminated, _, _ = await games[0].step(call(by=3))
            assert (answer["content"], reward, terminated) == ('{"count": 3}', 0.0, False)
            (answer,), *_ = await games[1].step(call(by=-1))
            assert "422" in answer["content"]
            rewards = [(await game.step({"role": "assistant", "content": "done"}))[1:3] for game in games]
            assert rewards == [(1.0, True), (0.0, True)], "each episode has a session of its own"
            for game in games:
                await game.close()

    asyncio.run(play())


@pytest.mark.skipif(importlib.util.find_spec("openenv") is None, reason="NOT RUN: needs the package openenv")
def test_a_server_of_openenv_is_an_environment() -> None:
    import threading

    import uvicorn
    from openenv.core.env_server import create_fastapi_app
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State

    from examples.environments.openenv_client import OpenEnv

    class Say(Action):
        message: str

    class Heard(Observation):
        text: str = ""

    class Echo(Environment):  # type: ignore[misc, type-arg]
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed: int | None = None, episode_id: str | None = None, **rest: object) -> Heard:
            self.turns = 0
            return Heard(text=f"level {seed}")

        def step(self, action: Say, timeout_s: float | None = None, **rest: object) -> Heard:
            self.turns += 1
            return Heard(text=action.message.upper(), reward=float(self.turns), done=self.turns == 2)

        @property
        def state(self) -> State:
            return State(step_count=self.turns)

    app = create_fastapi_app(Echo, Say, Heard, max_concurrent_envs=4)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        pass
    port = server.servers[0].sockets[0].getsockname()[1]

    async def play() -> None:
        game = OpenEnv(f"http://127.0.0.1:{port}", observation="text")
        messages, _ = await game.reset(ROW)
        assert messages == [{"role": "user", "content": "Count."}, {"role": "user", "content": "level 7"}]
        found = await game.step({"role": "assistant", "content": "hey"})
        assert found == ([{"role": "user", "content": "HEY"}], 1.0, False, False, {})
        assert (await game.step({"role": "assistant", "content": "you"}))[1:3] == (2.0, True)
        await game.close()

    asyncio.run(play())
    server.should_exit = True
    thread.join(10)
