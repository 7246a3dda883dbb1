"""A site on loopback that serves pages and, where it is told to, everything but a page. It knows who asked when."""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import logging
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from aiohttp import web

BOMB = gzip.compress(bytes(20_000_000))
logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
Page = Callable[[int, int], bytes]
"""The page of (layer, neuron)."""


class Site:
    """`with Site(page, {neuron: behaviour}) as site:` serves at `site.url`.

    Behaviours: `ok`; `404`, `410`, `500`; `500 once`, `429 once`, `503 date once`; `429` always; `hang`, `drip`, `hang once`;
    `truncate`, `truncate once`, `reset`; `moved` (the same site), `loop`, `elsewhere`, `inside` (a private address);
    `large`, `bomb`, `garbage` (no gzip), `foreign` (another neuron's page), `hostile` (markup in place of a page), `plain`.
    """

    def __init__(self, page: Page, rude: dict[int, str] | None = None, robots: str | int = 404, model: str = "tiny") -> None:
        self.page, self.rude, self.robots, self.model = page, rude or {}, robots, model
        self.times: list[float] = []
        self.paths: list[str] = []
        self.agents: set[str] = set()
        self.open, self.most = 0, 0
        self._seen: Counter[str] = Counter()

    def __enter__(self) -> Site:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/robots.txt", self._robots)
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.port}"

    async def _robots(self, request: web.Request) -> web.Response:
        self._note(request)
        if isinstance(self.robots, int):
            return web.Response(status=self.robots)
        return web.Response(text=self.robots)

    def _note(self, request: web.Request) -> None:
        self.times.append(time.monotonic())
        self.paths.append(request.path)
        self.agents.add(request.headers.get("User-Agent", ""))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            return await self._reply(request)
        finally:
            self.open -= 1

    async def _reply(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        moved = parts[0] == "moved"
        layer, neuron = int(parts[-2]), int(parts[-1].removesuffix(".html"))
        how = "ok" if moved else self.rude.get(neuron, "ok")
        self._seen[request.path] += 1
        if how.endswith(" once"):
            how = how.removesuffix(" once") if self._seen[request.path] == 1 else "ok"
        if how.isdigit():
            late = {"Retry-After": "1"} if how == "429" else {}
            return web.Response(status=int(how), headers=late)
        if how == "503 date":
            return web.Response(status=503, headers={"Retry-After": email.utils.formatdate(time.time() + 2, usegmt=True)})
        if how == "hang":
            await asyncio.sleep(30)
        if how in ("moved", "loop", "elsewhere", "inside"):
            where = {
                "moved": f"/moved/{layer}/{neuron}.html", "loop": request.path,
                "elsewhere": f"http://localhost:{self.port}{request.path}", "inside": "http://169.254.169.254/latest/meta-data",
            }[how]  # fmt: skip
            return web.Response(status=302, headers={"Location": where})
        if how == "hostile":
            return web.Response(body=b"<script>alert(1)</script><details><h2>Neuron 0</h2>" * 50 + b"</details>")
        if how == "plain":
            return web.Response(text="nothing to see here")
        body = self.page(layer, neuron + 1 if how == "foreign" else neuron)
        return await self._send(request, how, body)

    async def _send(self, request: web.Request, how: str, body: bytes) -> web.StreamResponse:
        tag = f'"{layer_tag(body)}"'
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304)
        if how in ("ok", "foreign"):
            response = web.Response(body=body, headers={"ETag": tag}, content_type="text/html")
            response.enable_compression()
            return response
        headers = {"Content-Type": "text/html"}
        if how == "bomb":
            body = BOMB
        if how in ("bomb", "garbage"):
            headers["Content-Encoding"] = "gzip"
        if how in ("truncate", "reset", "drip"):
            headers["Content-Length"] = str(len(body))
        stream = web.StreamResponse(headers=headers)
        await stream.prepare(request)
        if how == "large":
            for _ in range(400):
                await stream.write(b"x" * 50_000)
        elif how == "drip":
            for at in range(200):
                await stream.write(body[at : at + 1])
                await asyncio.sleep(0.1)
        else:
            await stream.write(body if how in ("bomb", "garbage") else body[: len(body) // 2])
            if how in ("truncate", "reset") and request.transport is not None:
                request.transport.close() if how == "truncate" else request.transport.abort()
        return stream


def layer_tag(body: bytes) -> str:
    """A tag that changes with the page."""
    return f"{zlib.crc32(body):08x}"
