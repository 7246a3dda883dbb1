"""The fetcher against a site that does everything wrong: each page arrives or fails with its reason, at the rate allowed."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from yarl import URL

from raylabel.config import build_config
from raylabel.limits import LATE, limiter, set_provider
from raylabel.sources import neuroscope
from raylabel.sources.fetch import Counts, Fetcher, Manners, NotFetched, public, retry_after, same_site
from raylabel.sources.neuroscope_page import looks_whole
from raylabel.sources.pages import Pages
from tests.sources.neuroscope_pages import Shown, build
from tests.sources.rude_site import Site
from tests.test_limits import excess

QUICK = Manners(connections=8, timeout=2.4, largest=2_000_000, attempts=3, backoff=0.05, allow_private=True)


def page(layer: int, neuron: int) -> bytes:
    return build("tiny", layer, neuron, [Shown(["<|endoftext|>", f" n{neuron}"], [0.0, 1.0 + neuron])])


@pytest.fixture(autouse=True)
def fresh() -> None:
    set_provider(None)


def fetch(
    site: Site, neurons: list[int], folder: Path, manners: Manners = QUICK, per_second: float = 300, **options: object
) -> tuple[dict[int, bytes | str], Counts]:
    """What became of each page, bytes or the reason why not, all asked for at once."""

    async def run() -> tuple[dict[int, bytes | str], Counts]:
        found: dict[int, bytes | str] = {}
        url = str(options.pop("url", site.url))
        turns = limiter("site", per_second)
        async with Fetcher(
            url, turns, Pages(str(folder)), manners, accept=looks_whole, per_second=per_second, **options  # type: ignore[arg-type]
        ) as fetcher:

            async def one(neuron: int) -> None:
                try:
                    found[neuron] = await fetcher.get(f"tiny/0/{neuron}.html")
                except NotFetched as error:
                    found[neuron] = str(error)

            await asyncio.gather(*map(one, neurons))
        return found, fetcher.counts

    return asyncio.run(run())


def test_nothing_is_kept_of_a_page_but_its_file(tmp_path: Path) -> None:
    import gc
    import tracemalloc

    sizes = []
    with Site(large) as site:
        config = build_config({
            "subject": {"model": "none", "layers": [0], "neurons": [0, 160]}, "run": {"out": str(tmp_path)},
            "exemplars": {"source": "neuroscope", "neuroscope": {
                "model": "tiny", "url": site.url, "requests_per_second": 2000, "allow_private": True,
            }},
        })  # fmt: skip
        tracemalloc.start()
        try:
            for first in range(0, 160, 40):
                notes = neuroscope.fetch_pages(config, [(0, n) for n in range(first, first + 40)])
                assert notes["pages"] == 40 and notes["bytes"] > 40 * 20_000
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    # A page has twenty thousand bytes and more; clients have caches of addresses, and the test's site remembers who asked.
    assert sizes[-1] - sizes[1] < 80 * 4000


def large(layer: int, neuron: int) -> bytes:
    words = [f" {'word' * 20}{neuron}"] * 250
    return build("tiny", layer, neuron, [Shown(["<|endoftext|>", *words], [0.0, *map(float, range(250))])])


RUDE = {
    1: ("404", "404 Not Found"), 2: ("410", "410 Gone"), 3: ("500", "500 Internal Server Error; tried 3 times"),
    4: ("500 once", None), 5: ("hang", "no answer for 0.8 s; tried 3 times"), 6: ("hang once", None),
    7: ("drip", "not whole within 2.4 s; tried 3 times"), 8: ("truncate", "cut short or cannot be unpacked; tried 3 times"),
    9: ("truncate once", None), 10: ("reset", "tried 3 times"), 11: ("moved", None), 12: ("loop", "more than 5 redirects"),
    13: ("elsewhere", "a redirect away from the site: http://localhost"),
    14: ("inside", "a redirect away from the site: http://169.254"), 15: ("large", "more than 2000000 bytes"),
    16: ("bomb", "more than 2000000 bytes"), 17: ("garbage", "cannot be unpacked; tried 3 times"),
    18: ("plain", "not a page of a neuron; tried 3 times"),
}  # fmt: skip


def test_every_page_arrives_or_fails_with_its_reason(tmp_path: Path) -> None:
    with Site(page, {n: how for n, (how, _) in RUDE.items()}) as site:
        found, counts = fetch(site, list(range(30)), tmp_path)
    assert sorted(found) == list(range(30))
    for neuron, result in found.items():
        why = RUDE.get(neuron, ("ok", None))[1]
        if why is None:
            assert result == page(0, neuron)
        else:
            assert isinstance(result, str) and why in result, (neuron, result)
    assert site.most <= QUICK.connections
    assert counts.requests == len(site.times)
    assert excess(site.times, 300, 1, LATE + 0.1) <= 0
    assert {agent.split("/")[0] for agent in site.agents} == {"raylabel"}


def test_retry_after_stops_everyone(tmp_path: Path) -> None:
    with Site(page, {3: "429 once"}) as site:
        found, counts = fetch(site, list(range(60)), tmp_path, per_second=60)
    assert all(isinstance(result, bytes) for result in found.values())
    assert counts.paused == pytest.approx(1, abs=0.1)
    asked = next(t for t, path in zip(site.times, site.paths, strict=True) if path.endswith("/3.html"))
    # What is on its way when the answer comes still arrives.
    after = [t - asked for t in site.times if t > asked + 0.15]
    assert min(after) >= 0.95 and len(after) >= 20


def test_retry_after_as_a_date_and_one_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Site(page, {3: "503 date once"}) as site:
        started = time.monotonic()
        found, _ = fetch(site, [3], tmp_path)
        assert found == {3: page(0, 3)} and time.monotonic() - started > 0.9
    monkeypatch.setattr("raylabel.sources.fetch.LONGEST_PAUSE", 0.5)
    with Site(page, {4: "429"}) as site:
        assert fetch(site, [4], tmp_path)[0] == {4: "429, and the site asks to wait 1 s"}
        assert len(site.times) == 2


@pytest.mark.parametrize("value, seconds", [
    ("120", 120.0), (" 0 ", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 60.0), ("Wed, 21 Oct 2015 07:26:00 GMT", 0.0),
    ("soon", None), ("-3", None), ("²", None), (None, None), ("9" * 5000, 1e9),
])  # fmt: skip
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, now=1445412420.0) == seconds


def test_kept_pages_are_not_asked_for_and_asked_about_where_wanted(tmp_path: Path) -> None:
    changed: set[int] = set()
    with Site(lambda layer, n: page(layer, n + (100 if n in changed else 0))) as site:
        first, _ = fetch(site, [1, 2, 3], tmp_path)
        before = len(site.times)
        assert fetch(site, [1, 2, 3], tmp_path)[0] == first and len(site.times) == before
        changed.add(2)
        found, counts = fetch(site, [1, 2, 3], tmp_path, refresh=True)
        assert found == {**first, 2: page(0, 102)} and (counts.unchanged, counts.pages) == (2, 1)
        [damaged] = [f for f in (tmp_path / "body").rglob("*.gz") if f.stat().st_size and first[1] == _unpacked(f)]
        damaged.write_bytes(damaged.read_bytes()[:-9])
        assert fetch(site, [1], tmp_path)[0] == {1: first[1]}


def _unpacked(file: Path) -> bytes:
    import gzip

    return gzip.decompress(file.read_bytes())


@pytest.mark.parametrize("robots, why", [
    ("User-agent: *\nDisallow: /tiny/0/", "robots.txt does not allow it"),
    ("User-agent: raylabel\nDisallow: /\n\nUser-agent: *\nAllow: /", "robots.txt does not allow it"),
    ("User-agent: *\nCrawl-delay: 2", "robots.txt asks for 2 s between requests: 0.5 a second"),
    (503, "robots.txt cannot be read (503 Service Unavailable; tried 3 times)"),
    ("User-agent: *\nDisallow: /other/", None), (403, None), ("\x00<html>", None),
])  # fmt: skip
def test_robots_are_obeyed(robots: str | int, why: str | None, tmp_path: Path) -> None:
    with Site(page, robots=robots) as site:
        found, _ = fetch(site, [1, 2], tmp_path)
        assert set(found.values()) == {why} if why else found == {n: page(0, n) for n in (1, 2)}
        assert site.paths.count("/robots.txt") == (3 if robots == 503 else 1)
        assert why is None or not [p for p in site.paths if p != "/robots.txt"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]"])
def test_addresses_inside_are_refused_whatever_they_are_called(host: str, tmp_path: Path) -> None:
    with Site(page) as site:
        inside = Manners(timeout=2, attempts=2, backoff=0.01)
        found, _ = fetch(site, [1], tmp_path, inside, url=f"http://{host}:{site.port}")
        assert "address" in str(found[1]) and site.times == []


def test_a_name_that_changes_its_address_is_looked_at_when_it_is_connected_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that gives a public address to whoever looks first and a private one to whoever connects."""
    import socket

    asked = []

    def rebinding(host: str, port: int, *_: object, **__: object) -> list[tuple[object, ...]]:
        asked.append(host)
        address = "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    with Site(page) as site:
        monkeypatch.setattr(socket, "getaddrinfo", rebinding)
        found, _ = fetch(site, [1], tmp_path, Manners(timeout=2, attempts=1), url=f"http://rebind.example:{site.port}")
        assert "is not a public address" in str(found[1]) and site.times == [] and asked


@pytest.mark.parametrize("address, good", [
    ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("10.0.0.1", False), ("169.254.169.254", False), ("0.0.0.0", False),
    ("100.64.0.1", False), ("::", False), ("fe80::1%eth0", False), ("::ffff:10.0.0.1", False), ("64:ff9b::7f00:1", False),
    ("2002:7f00:1::", False), ("224.0.0.1", False), ("ff02::1", False), ("64:ff9b::5db8:d822", True),
])  # fmt: skip
def test_public_addresses(address: str, good: bool) -> None:
    assert public(address) is good


@pytest.mark.parametrize("asked, given, same", [
    ("http://a/x", "http://a/y", True), ("http://a/x", "https://a/y", True), ("https://a/x", "http://a/y", False),
    ("http://a:8080/x", "https://a/y", False), ("http://a/x", "http://b.a/y", False), ("http://a/", "http://u@a/", False),
])  # fmt: skip
def test_redirects_stay_on_the_site(asked: str, given: str, same: bool) -> None:
    assert same_site(URL(asked), URL(given)) is same
