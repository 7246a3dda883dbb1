"""The report in a real browser, from disk: a search, a sort, a unit, foreign text as text, no complaint, no network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raylabel.report.page import write_report
from raylabel.store.rundir import RunDir
from tests.report.dressed import HOSTILE, dress
from tests.report.page.browser import Watched, browser, needs_browser, wait

pytestmark = needs_browser


@pytest.fixture(scope="module")
def dressed(finished: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return dress(finished, tmp_path_factory.mktemp("dressed") / "run")


@pytest.fixture(scope="module")
def report(dressed: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(dressed, tmp_path_factory.mktemp("report") / "a folder & more").parent


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture
def watched(chromium: Any, report: Path) -> Iterator[Watched]:
    found = Watched(chromium, report)
    yield found
    found.context.close()
    assert found.complaints == []
    assert found.asked and all(url.startswith(("file://", "about:", "data:")) for url in found.asked)


def first_cells(page: Any, column: int) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll('#units tbody tr')].map(r => r.cells[{column}].innerText)")


def test_the_table_shows_all_units_in_the_order_of_show(watched: Watched, dressed: RunDir) -> None:
    from raylabel.cli import top_units

    page = watched.open("units.html")
    rows, _ = top_units(dressed, 10_000)
    names = [f"{r['layer']}.{r['neuron']}{'−' if r['polarity'] < 0 else ''}" for r in rows]
    assert first_cells(page, 0) == names[:100]
    assert f"{len(names):,} of {len(names):,} units" in page.inner_text("#count")


def test_a_search_finds_labels_words_and_numbers(watched: Watched, dressed: RunDir) -> None:
    page = watched.open("units.html")
    page.keyboard.press("/")
    page.keyboard.type("KIND 14")
    wait(page, "document.querySelector('#count').innerText.startsWith('1 of')")
    assert page.inner_text("#units mark") == "kind 14"
    page.fill("#find", "no such thing")
    wait(page, "document.querySelector('#count').innerText.startsWith('0 of')")
    phrase = next(r["phrases"][0] for r in dressed.table("results").to_pylist() if r["phrases"]).strip()
    page.fill("#find", phrase)
    page.check("#phrases")
    wanted = sum(any(phrase.lower() in p.lower() for p in r["phrases"] or []) for r in dressed.table("results").to_pylist())
    wait(page, f"document.querySelector('#count').innerText.startsWith('{wanted} of')")
    page.fill("#find", "1.3")
    page.press("#find", "Enter")
    wait(page, "document.body?.dataset.ready === '1.3'")
    page.keyboard.press("/")
    page.keyboard.type("kind 14")
    page.keyboard.press("Enter")
    wait(page, "document.querySelector('#count')?.innerText.startsWith('1 of')")


def test_data_that_is_asked_for_twice_at_once_comes_to_both(watched: Watched) -> None:
    page = watched.open("units.html")
    both = "Promise.all([1, 2].map(() => raylabel.loadColumns('phrases-000'))).then((a) => a.map((one) => one.rows))"
    rows = page.evaluate(both)
    assert rows[0] == rows[1] > 0


def test_a_sort_by_a_number_a_code_and_a_text(watched: Watched, dressed: RunDir) -> None:
    page = watched.open("units.html")
    rows = {(r["layer"], r["neuron"]): r for r in dressed.table("results").to_pylist()}

    def place(name: str) -> tuple[int, int]:
        layer, neuron = name.split(".")
        return int(layer), int(neuron)

    page.click("th button:has-text('norm.')")
    values = [rows[place(n)]["normalised_activation"] for n in first_cells(page, 0)]
    known = [v for v in values if v is not None]
    assert known == sorted(known, reverse=True) and values[: len(known)] == known
    page.click("th button:has-text('norm.')")
    again = [rows[place(n)]["normalised_activation"] for n in first_cells(page, 0)]
    assert again[: len(known)] == sorted(known) and all(v is None for v in again[len(known) :])
    assert page.get_attribute("th[aria-sort]", "aria-sort") == "ascending"
    page.click("th button:has-text('evidence')")
    kinds = [rows[place(n)]["evidence"] for n in first_cells(page, 0)]
    assert [k for k in kinds if k] == sorted(k for k in kinds if k) and (None not in kinds or kinds[-1] is None)
    assert "sort=evidence" in page.url
    page.click("th button >> nth=0")
    named = [place(name) for name in first_cells(page, 0)]
    assert named == sorted(named)
    page.click("th button >> nth=0")
    assert [place(name) for name in first_cells(page, 0)] == named[::-1]
    page.click("th button >> nth=1")
    labels = [(rows[place(n)]["label"] or "") for n in first_cells(page, 0)]
    assert [text for text in labels if text.isascii() and text.startswith("animals")] == sorted(
        (text for text in labels if text.isascii() and text.startswith("animals")), key=str.lower
    )
    page.locator("th button", has_text="evidence").click()
    page.reload()
    wait(page, "document.body?.dataset.ready === 'all'")
    assert [rows[place(n)]["evidence"] for n in first_cells(page, 0)] == kinds
    page.check("#verified")
    assert len(first_cells(page, 0)) == sum(r["verified"] for r in rows.values())


def test_a_unit_is_opened_by_keys_and_shows_what_the_run_knows(watched: Watched, dressed: RunDir) -> None:
    from raylabel.api import Run
    from raylabel.cli import top_units

    page = watched.open("units.html")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#unit h1")
    row = top_units(dressed, 1)[0][0]
    wait(page, f"document.body?.dataset.ready === '{row['layer']}.{row['neuron']}'")
    unit = Run(dressed).unit(row["layer"], row["neuron"])
    text = page.inner_text("#unit")
    assert ("verified" in text and "Borne out on held-back text" in text) or "Not borne out on held-back text" in text
    assert "0.80 [0.70, 0.90]" in text
    assert page.locator(".exemplars >> nth=0").locator(".exemplar").count() == min(12, len(unit.top()))
    drop = unit.verification["drop_mat"]
    assert f"Swapping the word at the peak costs {drop:.2f}" in text
    assert page.locator("section:has(h2:has-text('Scores')) tbody tr").count() == 2
    assert page.locator(".mat").count() == page.locator(".exemplar").count()
    # The frame stands on the peak.
    peak = unit.top()[0]
    assert page.locator(".exemplar .mat").first.text_content() is not None and peak["position"] >= 0
    # The weaker the activation, the larger the share of firing tokens that are as strong.
    said = page.locator("details[open] .value small").all_inner_texts()
    shares = [0.05 if "<" in text else float(text.split()[0]) for text in said]
    assert shares and shares == sorted(shares) and 0 < shares[-1] <= 100
    before = page.url
    page.keyboard.press("ArrowRight")
    wait(page, f"location.href !== '{before}'")
    page.go_back()
    wait(page, f"document.body?.dataset.ready === '{row['layer']}.{row['neuron']}'")


def test_a_unit_that_is_not_there(watched: Watched) -> None:
    page = watched.open("units.html")
    page.goto(page.url.split("#")[0].replace("units.html", "unit.html") + "#layer=0&neuron=31&polarity=1")
    page.wait_for_selector("h1:has-text('No unit 0.31')")


def test_foreign_text_stays_text(watched: Watched, dressed: RunDir) -> None:
    rows = dressed.table("results").to_pylist()
    for i, hostile in enumerate(HOSTILE[:-1]):
        row = rows[i]
        page = watched.open(f"unit.html#layer={row['layer']}&neuron={row['neuron']}&polarity={row['polarity']}")
        for summary in page.locator("summary").all():
            if summary.locator("..").get_attribute("open") is None:
                summary.click()
        assert page.locator("#unit script, #unit img").count() == 0
        heading = page.inner_text("#unit h1")
        shown = hostile.replace("\n", "⏎").replace("\t", "⇥")
        shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)
        assert heading == shown
        assert not set(page.inner_text("body")) & set("\x00\x07\x1b\u202e\u2028")
    page = watched.open("units.html")
    assert page.locator("#units script, #units img").count() == 0
    page = watched.open("index.html")
    assert page.locator("main script, main img").count() == 0


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_pages_fit_and_are_legible(chromium: Any, report: Path, width: int, scheme: str) -> None:
    watched = Watched(chromium, report, width, 844, scheme)
    for place in ("index.html", "units.html", "unit.html#layer=0&neuron=1"):
        page = watched.open(place)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{place} is wider than {width}"
        assert page.evaluate(CONTRAST) == [], place
        assert page.evaluate("[...document.querySelectorAll('svg.plot, svg.stack')].every(s => s.ariaLabel || s.ariaHidden)")
        assert page.evaluate(
            "[...document.querySelectorAll('input, select, button')].every(e => e.ariaLabel || e.labels?.length || e.innerText)"
        )
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == ("light" if scheme == "dark" else "dark")
    assert page.evaluate(CONTRAST) == []
    watched.context.close()
    assert watched.complaints == []


CONTRAST = """() => {
  const rgb = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => { const f = (v) => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; };
    return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
  const over = (top, under) => { const a = top.length > 3 ? top[3] : 1; return under.map((u, i) => a * top[i] + (1 - a) * u); };
  const ground = (e) => { const layers = [];
    for (let n = e; n; n = n.parentElement) layers.unshift(rgb(getComputedStyle(n).backgroundColor));
    return layers.reduce((u, t) => over(t, u), [255, 255, 255]); };
  const poor = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.getClientRects().length || e.closest('.hidden, .skip, noscript, script, svg, :disabled')) continue;
    const g = ground(e), c = over(rgb(getComputedStyle(e).color), g), [a, b] = [light(g), light(c)].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5)
      poor.push(`${e.tagName}.${e.className} ${e.innerText?.slice(0, 20)} ${((a + .05) / (b + .05)).toFixed(2)}`);
  }
  return poor.slice(0, 5);
}"""
"""Texts whose contrast with what lies under them is below 4.5 (WCAG 2.1, 1.4.3)."""
