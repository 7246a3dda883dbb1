"""Real servers on loopback that speak the OpenAI protocol: answers by a function, faults by a list.

`served(answer)` runs one in a thread of its own. `answer(request)` gets the request's JSON and gives the text of the answer,
a dict (the JSON body as it is), or a web.Response; it may be a coroutine function.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web


class Served:
    """A server that runs: its `url`, the requests it got as JSON, and their headers."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.inside = self.most = 0


def body(text: str, prompt_tokens: int = 100, completion_tokens: int = 20, **choice: Any) -> dict[str, Any]:
    """A chat completion."""
    message = {"role": "assistant", "content": text, **choice.pop("message", {})}
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
                  "total_tokens": prompt_tokens + completion_tokens},
    }  # fmt: skip


@contextmanager
def served(answer: Callable[[dict[str, Any]], Any]) -> Iterator[Served]:
    """A server on a free port of the loopback interface."""
    state, ready, loop = Served(), threading.Event(), asyncio.new_event_loop()

    async def handle(request: web.Request) -> web.StreamResponse:
        given = await request.json()
        state.requests.append(given)
        state.headers.append(dict(request.headers))
        state.inside += 1
        state.most = max(state.most, state.inside)
        try:
            found = answer(given)
            if inspect.isawaitable(found):
                found = await found
        finally:
            state.inside -= 1
        if isinstance(found, web.StreamResponse):
            return found
        return web.json_response(body(found) if isinstance(found, str) else found)

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        state.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield state
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
