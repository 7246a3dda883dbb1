"""A polite fetcher of one site: `Fetcher.get(path)` gives a page's bytes, or raises NotFetched with the reason.

Every request, retries and redirects included, takes a turn at the limiter it is given, while it holds one of the
connections. `Retry-After` pauses everyone. robots.txt is obeyed (RFC 9309): without one all is allowed, and while it cannot
be read nothing is. Redirects are followed within the site only. Addresses that are not public are refused unless allowed,
and the address that was looked at is the one that is connected to. A page is bounded in bytes, unpacked, and in time.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import aiohttp
import stamina
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from protego import Protego
from yarl import URL

from raylabel.limits import Limiter
from raylabel.sources.pages import Pages

# Each retry would be a line of the log; what comes of them is said of the page.
logging.getLogger("stamina").setLevel(logging.ERROR)

REDIRECTS = 5
LONGEST_PAUSE = 3600.0
"""Seconds of `Retry-After` that are waited for; a site that asks for more is left alone."""
ROBOTS_BYTES = 512_000
PASSING = frozenset((408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 524))
"""Statuses that another try may not meet."""
AGENT = "raylabel"


class NotFetched(Exception):
    """A page that could not be had; one line that says why."""


class _Passing(NotFetched):
    """What another try may not meet."""


@dataclass(frozen=True)
class Manners:
    """How a site is treated.

    Attributes:
        connections: at a time, of this process.
        timeout: seconds a request may take as a whole; to connect, and between two pieces of an answer, a third of it.
        largest: bytes of a page, unpacked.
        attempts: requests for a page at most, redirects apart.
        backoff: seconds before the second attempt; doubled for each further one, with as much again at random.
        allow_private: whether addresses that are not public may be connected to.
        contact: e-mail or URL in the user agent.
    """

    connections: int = 8
    timeout: float = 60.0
    largest: int = 50_000_000
    attempts: int = 5
    backoff: float = 1.0
    allow_private: bool = False
    contact: str | None = None


@dataclass
class Counts:
    """What was done."""

    requests: int = 0
    bytes: int = 0
    pages: int = 0
    cached: int = 0
    unchanged: int = 0
    retries: int = 0
    paused: float = 0.0
    """Seconds of `Retry-After` that were asked for, overlapping ones once."""


def public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is None and found in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return public(str(inner))
    return found.is_global and not found.is_multicast and not found.is_reserved


class PublicOnly(AbstractResolver):
    """Looks names up and keeps public addresses; what it gives is what is connected to."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        if kept := [one for one in found if public(one["host"])]:
            return kept
        raise NotFetched(_private(host))

    async def close(self) -> None:
        await self._inner.close()


def _private(host: str) -> str:
    return f"{host} is not a public address; allow_private: true allows it"


def retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds that a `Retry-After` header (seconds or an HTTP date) asks to wait; None for no or an unreadable one."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(min(int(text[:12]), 10**9))
    try:
        when = email.utils.parsedate_to_datetime(text)
        return max(when.timestamp() - (time.time() if now is None else now), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def same_site(asked: URL, given: URL) -> bool:
    """Whether a redirect stays where it was: host and port the same, https no less."""
    upgraded = (asked.scheme, given.scheme) == ("http", "https") and asked.is_default_port() and given.is_default_port()
    same = asked.scheme == given.scheme and asked.port == given.port
    return asked.host == given.host and (same or upgraded) and given.user is None


@dataclass
class _Robots:
    rules: Any = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    why_not: str | None = None


class Fetcher:
    """One site: `async with Fetcher(url, limiter, pages) as site: await site.get("gpt2-small/0/3.html")`."""

    def __init__(
        self, url: str, turns: Limiter, pages: Pages, manners: Manners = Manners(), *, refresh: bool = False,
        accept: Callable[[bytes], str | None] | None = None, per_second: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Args:
            url: of the site.
            pages: where pages are kept; one that is there is not asked for.
            refresh: ask whether kept pages have changed.
            accept: what is wrong with a page that arrived; it is then asked for again.
            per_second: the limiter's rate, to be held against a `Crawl-delay`.
            headers: sent along with every request; no request leaves the site.
        """
        self.base = URL(url.rstrip("/") + "/")
        self.counts = Counts()
        self._turns, self._pages, self._manners = turns, pages, manners
        self._refresh, self._accept, self._rate = refresh, accept, per_second
        self._headers = headers or {}
        self._slots = asyncio.Semaphore(manners.connections)
        self._robots: dict[URL, _Robots] = {}
        self._until = 0.0

    async def __aenter__(self) -> Fetcher:
        manners = self._manners
        third = manners.timeout / 3
        resolver: AbstractResolver = ThreadedResolver()
        connector = aiohttp.TCPConnector(
            limit=manners.connections, resolver=resolver if manners.allow_private else PublicOnly(resolver)
        )
        about = f"{AGENT}/{metadata.version('raylabel')}" + (f" (+{manners.contact})" if manners.contact else "")
        self._session = aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": about, "Accept-Encoding": "gzip, deflate", **self._headers},
            timeout=aiohttp.ClientTimeout(total=manners.timeout, sock_connect=third, sock_read=third),
        )  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, path: str) -> bytes:
        """The page at a path below the site's URL. Raises NotFetched."""
        url = self.base.join(URL(path))
        kept, body = await asyncio.to_thread(self._kept, str(url))
        if kept is not None and not self._refresh:
            self.counts.cached += 1
            return body
        asked: dict[str, str] = {}
        if kept is not None:
            tags = (("If-None-Match", kept.get("etag")), ("If-Modified-Since", kept.get("modified")))
            asked = {name: value for name, value in tags if value}
        status, fresh, headers = await self._patiently(url, asked, robots=True)
        if status == 304:
            self.counts.unchanged += 1
            return body
        self.counts.pages += 1
        tags_given = {"etag": headers.get("ETag"), "modified": headers.get("Last-Modified")}
        await asyncio.to_thread(self._pages.keep, str(url), fresh, tags_given)
        return fresh

    def _kept(self, url: str) -> tuple[dict[str, Any] | None, bytes]:
        """The entry of a page that is there, and the page; one that is damaged is not there."""
        entry = self._pages.find(url)
        try:
            return entry, self._pages.read(entry) if entry else b""
        except OSError:
            return None, b""

    async def _patiently(self, url: URL, asked: dict[str, str], robots: bool) -> tuple[int, bytes, Any]:
        """Another try where that may help; (status, body, headers) of a success, or of a 304."""
        attempt = 0
        manners = self._manners
        retries = stamina.retry_context(
            on=_Passing, attempts=manners.attempts, timeout=None, wait_initial=manners.backoff,
            wait_max=max(60.0, manners.backoff), wait_jitter=manners.backoff,
        )  # fmt: skip
        try:
            async for one in retries:
                with one:
                    attempt += 1
                    self.counts.retries += attempt > 1
                    return await self._follow(url, asked, robots)
        except _Passing as error:
            raise NotFetched(f"{error}; tried {attempt} times") from None
        raise AssertionError("a retry ends in an answer or an error")

    async def _follow(self, url: URL, asked: dict[str, str], robots: bool) -> tuple[int, bytes, Any]:
        """One try, redirects included."""
        at = url
        for _ in range(REDIRECTS + 1):
            if robots:
                await self._allowed(at)
            status, body, headers = await self._request(at, asked, robots)
            if status not in (301, 302, 303, 307, 308):
                return status, body, headers
            try:
                to = at.join(URL(headers.get("Location", "")))
            except ValueError:
                raise NotFetched(f"{status}, a redirect to what is no address") from None
            if not headers.get("Location") or not same_site(at, to):
                raise NotFetched(f"{status}, a redirect away from the site: {str(to)[:100]}")
            at = to
        raise NotFetched(f"more than {REDIRECTS} redirects")

    async def _request(self, url: URL, asked: dict[str, str], page: bool) -> tuple[int, bytes, Any]:
        if not self._manners.allow_private and _is_address(url.host or "") and not public(url.host or ""):
            raise NotFetched(_private(url.host or ""))
        # The connection comes first: turns taken while all are busy would be used all at once.
        async with self._slots:
            await self._turns.take()
            self.counts.requests += 1
            try:
                async with self._session.get(url, headers=asked, allow_redirects=False) as response:
                    return await self._answer(response, page, bool(asked))
            except NotFetched:
                raise
            except aiohttp.InvalidURL as error:
                raise NotFetched(f"{url.host} is no address: {error}") from None
            except (TimeoutError, aiohttp.ClientError, OSError, ssl.SSLError, ValueError) as error:
                refusal = _refusal(error)
                if refusal is not None:
                    raise refusal from None
                raise _Passing(_words(error, self._manners.timeout)) from None

    async def _answer(self, response: aiohttp.ClientResponse, page: bool, asked: bool) -> tuple[int, bytes, Any]:
        status, reason = response.status, (response.reason or "")[:40]
        if status in PASSING:
            await self._heed(response.headers.get("Retry-After"), status)
            raise _Passing(f"{status} {reason}".strip())
        if status != 200:
            if (status == 304 and asked) or status in (301, 302, 303, 307, 308) or not page:
                return status, b"", response.headers
            raise NotFetched(f"{status} {reason}".strip())
        largest = self._manners.largest if page else ROBOTS_BYTES
        parts: list[bytes] = []
        size = 0
        async for part in response.content.iter_chunked(1 << 16):
            size += len(part)
            if size > largest:
                if not page:
                    break
                # Its rest is not read: the connection is closed.
                response.close()
                raise NotFetched(f"more than {largest} bytes")
            parts.append(part)
        self.counts.bytes += size
        body = b"".join(parts)
        wrong = self._accept(body) if page and self._accept else None
        if wrong:
            raise _Passing(wrong)
        return status, body, response.headers

    async def _heed(self, value: str | None, status: int) -> None:
        """Makes everyone wait as long as the site asks for."""
        seconds = retry_after(value)
        if seconds is None:
            return
        if seconds > LONGEST_PAUSE:
            raise NotFetched(f"{status}, and the site asks to wait {seconds:.0f} s")
        now = time.monotonic()
        self.counts.paused += max(now + seconds - max(self._until, now), 0.0)
        self._until = max(self._until, now + seconds)
        await self._turns.pause(seconds)

    async def _allowed(self, url: URL) -> None:
        """Raises NotFetched where robots.txt does not allow it."""
        robots = self._robots.setdefault(url.origin(), _Robots())
        async with robots.lock:
            if robots.rules is None and robots.why_not is None:
                try:
                    robots.rules = await self._read_robots(url)
                except NotFetched as error:
                    robots.why_not = f"robots.txt cannot be read ({error})"
        if robots.why_not:
            raise NotFetched(robots.why_not)
        if not robots.rules.can_fetch(str(url), AGENT):
            raise NotFetched("robots.txt does not allow it")
        delay = robots.rules.crawl_delay(AGENT)
        if delay and self._rate is not None and self._rate * delay > 1:
            raise NotFetched(f"robots.txt asks for {delay:g} s between requests: {1 / delay:g} a second")

    async def _read_robots(self, url: URL) -> Any:
        status, body, _ = await self._patiently(url.join(URL("/robots.txt")), {}, robots=False)
        return Protego.parse(body.decode("utf-8", "replace") if status == 200 else "")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _refusal(error: BaseException | None) -> NotFetched | None:
    """The refusal that an error of the client was raised from."""
    while error is not None and not isinstance(error, NotFetched):
        error = error.__cause__ or error.__context__
    return error


def _words(error: BaseException, timeout: float) -> str:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return f"no connection within {timeout / 3:g} s"
    if isinstance(error, aiohttp.SocketTimeoutError):
        return f"no answer for {timeout / 3:g} s"
    if isinstance(error, TimeoutError):
        return f"not whole within {timeout:g} s"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the answer was cut short or cannot be unpacked"
    text = " ".join(str(error).split())[:120]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
