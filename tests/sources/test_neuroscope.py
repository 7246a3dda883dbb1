"""From pages to results: a tiny model's activations served as pages, scraped, identified, verified by measuring again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from raylabel.config import RunConfig, build_config
from raylabel.engine.pipeline import run_pipeline
from raylabel.errors import BadInput
from raylabel.limits import set_provider
from raylabel.sources.neuroscope import MODELS, downloads, estimate, page, pieces
from raylabel.stages import settled
from raylabel.store.rundir import RunDir
from tests.conftest import Command
from tests.rundirs import differing
from tests.served import Recorded
from tests.sources.rude_site import Site

NEURONS = 12


@pytest.fixture(autouse=True)
def fresh() -> None:
    set_provider(None)


@pytest.fixture(scope="session")
def recorded(tiny_model: Path, tiny_corpus: Path) -> Recorded:
    texts = [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()]
    return Recorded(tiny_model, texts)


@pytest.fixture
def site(recorded: Recorded) -> Iterator[Site]:
    with Site(recorded.page) as site:
        yield site


def config(model: Path | str, url: str, out: Path, rate: float = 400, **sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "subject": {"model": str(model), "device": "cpu", "bos": "always", "context": 32, "layers": [0, 1, 2],
                    "neurons": [0, NEURONS]},
        "exemplars": {
            "source": "neuroscope", "top": 6, "quantile": 3, "random": 4, "before": 5, "after": 3,
            "neuroscope": {"model": "tiny", "url": url, "requests_per_second": rate, "allow_private": True, "timeout": 2.4,
                           "attempts": 3},
        },
        "identify": {"fdr": 0.9},
        "optimize": {"evaluations": 8, "examples": 16, "rounds": 1, "restarts": 1, "steps": 4},
        "run": {"out": str(out), "address": "inline", "max_failures": 0.5},
    }  # fmt: skip
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return build_config(tree)


def test_scrape_identify_verify_results(tiny_model: Path, recorded: Recorded, site: Site, tmp_path: Path) -> None:
    report = run_pipeline(config(tiny_model, site.url, tmp_path / "run"))
    run = RunDir(str(tmp_path / "run"))
    assert report.failures == 0
    assert run.table("statistics").num_rows == 3 * NEURONS
    results = run.table("results").to_pylist()
    assert {(r["layer"], r["neuron"]) for r in results} == {(la, n) for la in range(3) for n in range(NEURONS)}
    for layer in range(3):
        for row in run.table("exemplars", layer).to_pylist():
            texts = {tuple(t.values): t for t in recorded.shown(layer, row["neuron"])}
            assert row["activation"] == pytest.approx(max(row["activations"])) and row["source"] == "neuroscope"
            assert any(abs(max(values) - row["activation"]) < 1e-5 for values in texts)
    agreement = json.loads(run.files.read("agreement.json"))
    assert list(agreement["reproduced"].values()) == [agreement["recordings"]] and agreement["recordings"] > 20
    flagged = [r for r in results if r["flagged"]]
    verified = run.table("verifications").to_pylist()
    assert len(flagged) >= 3 and len(verified) == len(flagged)
    assert {row["reproduced"] for row in verified} == {1.0}


def test_again_asks_for_nothing_and_other_settings_read_what_is_kept(tiny_model: Path, site: Site, tmp_path: Path) -> None:
    fetch_only = {"run": {"stages": ["fetch"]}, "identify": {"vectors": "unused.bin"}}
    run_pipeline(config(tiny_model, site.url, tmp_path / "run", **fetch_only))
    pages = [p for p in site.paths if p != "/robots.txt"]
    assert len(pages) == len(set(pages)) == 3 * NEURONS
    run_pipeline(config(tiny_model, site.url, tmp_path / "run", **fetch_only, exemplars={"top": 7}))
    assert [p for p in site.paths if p != "/robots.txt"] == pages
    assert max(RunDir(str(tmp_path / "run")).table("exemplars").column("rank").to_pylist()) == 6


@pytest.mark.slow
def test_on_ray_with_a_worker_killed_while_it_fetches_the_tables_are_the_same(
    tiny_model: Path, recorded: Recorded, tmp_path: Path
) -> None:
    struck: list[int] = []

    def page_of(layer: int, neuron: int) -> bytes:
        # The pages that are measured again have come; these are fetched by two workers.
        if not struck and len(site.paths) > 26:
            ours = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::")]
            for p in ours:
                if not struck and any(c.raddr and c.raddr.port == site.port for c in p.net_connections("tcp")):
                    struck.append(p.pid)
                    p.kill()
        return recorded.page(layer, neuron)

    with Site(page_of) as site:
        report = run_pipeline(config(tiny_model, site.url, tmp_path / "run", rate=12, run={"address": "local", "workers": 2}))
        assert struck and report.failures == 0
        run_pipeline(config(tiny_model, site.url, tmp_path / "whole"))
    run = RunDir(str(tmp_path / "run"))
    assert run.table("verifications").num_rows >= 3
    assert not differing(RunDir(str(tmp_path / "whole")), run)


def test_a_run_that_is_stopped_while_it_fetches_asks_for_the_rest_alone(
    tiny_model: Path, recorded: Recorded, tmp_path: Path
) -> None:
    fetch_only: dict[str, Any] = {"run": {"stages": ["fetch"]}, "identify": {"vectors": "unused.bin"}}

    class Stopped(BaseException):
        pass

    def stop(line: str) -> None:
        if "download 1/3" in line:
            raise Stopped

    with Site(recorded.page) as site:
        run_pipeline(config(tiny_model, site.url, tmp_path / "whole", **fetch_only))
        site.paths.clear()
        wanted = config(tiny_model, site.url, tmp_path / "run", **fetch_only)
        with pytest.raises(Stopped):
            run_pipeline(wanted, stop)
        first = Counter(site.paths)
        assert 16 < len(first) < 3 * NEURONS
        site.paths.clear()
        run_pipeline(wanted)
    again = Counter(site.paths)
    assert set(first) & set(again) == {"/robots.txt"} and len(set(first) | set(again)) == 3 * NEURONS + 1
    assert not differing(RunDir(str(tmp_path / "whole")), RunDir(str(tmp_path / "run")))


def test_what_a_page_shows_at_bos_is_no_peak(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    loud = Recorded(tiny_model, [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()][:30])
    for _, acts in loud.texts:
        for found in acts.values():
            found[0] = 9.0
    with Site(loud.page) as site:
        fetch_only: dict[str, Any] = {"run": {"stages": ["fetch"]}, "identify": {"vectors": "unused.bin"}}
        run_pipeline(config(tiny_model, site.url, tmp_path / "run", **fetch_only))
    run = RunDir(str(tmp_path / "run"))
    rows = run.table("exemplars").to_pylist()
    assert len(rows) > 100 and not run.table("failures").num_rows
    for row in rows:
        first = int(row["start"] == 0)
        assert row["activation"] == max(row["activations"][first:]) == row["activations"][row["position"]] < 9
    assert max(run.table("statistics").column("max").to_pylist()) < 9


RUDE = {1: "404", 2: "500", 3: "500 once", 4: "hang once", 5: "truncate", 6: "moved", 7: "elsewhere", 8: "foreign", 9: "hostile"}
WHY = {
    1: "404 Not Found", 2: "500 Internal Server Error; tried 3 times", 5: "cut short or cannot be unpacked; tried 3 times",
    7: "a redirect away from the site", 8: "asked for neuron 8 of layer 0, the page is about 9 of 0",
    9: "a script that is no widget",
}  # fmt: skip


def test_a_page_that_fails_costs_its_neuron_and_says_why(tiny_model: Path, recorded: Recorded, tmp_path: Path) -> None:
    with Site(recorded.page, RUDE) as site:
        wanted = config(tiny_model, site.url, tmp_path / "run", subject={"layers": [0]})
        report = run_pipeline(wanted)
    run = RunDir(str(tmp_path / "run"))
    failures = {row["neuron"]: row["reason"] for row in run.table("failures").to_pylist()}
    assert report.failures == len(WHY) and set(failures) == set(WHY)
    for neuron, why in WHY.items():
        assert why in failures[neuron] and f"/tiny/0/{neuron}.html" in failures[neuron]
    rows = {row["neuron"]: row["status"] for row in run.table("results").to_pylist()}
    assert set(rows) == set(range(NEURONS))
    assert set(run.table("statistics").column("neuron").to_pylist()) == set(range(NEURONS)) - set(WHY)


@pytest.mark.parametrize("served, asked, words", [
    ({"bos": "never"}, {}, "without BOS"),
    ({"site": "attn_out"}, {}, "name the model that was recorded"),
])  # fmt: skip
def test_recordings_of_another_place_are_refused_before_the_rest_is_fetched(
    served: dict[str, str], asked: dict[str, str], words: str, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    texts = [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()]
    other = Recorded(tiny_model, texts, **served)
    with Site(other.page) as site:
        with pytest.raises(BadInput, match=r"gives back \d+ of \d+ sampled recordings") as error:
            run_pipeline(config(tiny_model, site.url, tmp_path / "run", subject={**asked, "neurons": [0, 16]}))
        assert words in str(error.value)
        assert len([p for p in site.paths if p != "/robots.txt"]) == 16


def test_recordings_before_a_layernorm_are_named_where_the_subject_is_read_behind_it(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    texts = [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()][:30]
    with Site(Recorded("demo", texts, "mlp_mid").page) as site:
        wanted = config("demo", site.url, tmp_path / "run", subject={"layers": [0, 1], "neurons": [0, 8]})
        with pytest.raises(BadInput, match=r"mlp_post with BOS, but (\d+) at mlp_mid; set subject\.site"):
            run_pipeline(wanted)


def test_the_subject_is_read_where_the_recordings_were_made_unless_told_otherwise(tmp_path: Path) -> None:
    def site(model: str, **subject: str) -> str:
        tree = {"subject": {"model": model, **subject}, "exemplars": {"source": "neuroscope", "neuroscope": {"model": model}}}
        return settled(build_config(tree)).subject.site

    assert (site("solu-8l-pile"), site("gpt2-small"), site("gelu-1l")) == ("mlp_mid", "mlp_post", "mlp_post")
    assert site("solu-8l-pile", site="mlp_post") == "mlp_post"


def test_a_site_that_is_gone_stops_the_run(
    tiny_model: Path, recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raylabel.sources.neuroscope.HOPELESS", 20)
    with Site(recorded.page, dict.fromkeys(range(1, 40), "404")) as site:
        wanted = config(tiny_model, site.url, tmp_path / "run", subject={"layers": [0, 1, 2], "neurons": [0, 40]})
        with pytest.raises(BadInput, match=r"exemplars\.neuroscope\.url: 20 pages in a row .* 404 Not Found"):
            run_pipeline(wanted)
        assert len(site.paths) < 16 + 60


def test_check_says_what_would_be_fetched_and_fetches_nothing(tmp_path: Path, command: Command) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "subject: {model: solu-8l-pile, layers: [5, 6]}\nexemplars: {source: neuroscope, neuroscope: {model: solu-8l-pile}}\n"
    )
    code, out, _ = command("check", file, "--json")
    found = json.loads(out)
    assert (code, found["pages"], found["recorded at"]) == (0, 8192, "mlp.hook_mid")
    assert found["fetch seconds"] == pytest.approx(8192 / 4.9, abs=0.1)
    assert found["bytes at most"] > 8192 * 100_000


@pytest.mark.parametrize("subject, section, key", [
    ({}, {"model": None}, "exemplars.neuroscope.model is required"),
    ({}, {"model": "../../etc"}, "exemplars.neuroscope.model: '../../etc' is no name"),
    ({}, {"url": "ftp://x"}, "exemplars.neuroscope.url: expected http"),
    ({}, {"url": "https://u:hunter2@x"}, "exemplars.neuroscope.url: holds a user name or password"),
    ({"layers": "all"}, {}, "exemplars.neuroscope.model: tiny is none of the site's"),
    ({"layers": [12]}, {"model": "gpt2-small"}, "gpt2-small has layers 0 to 11 of neurons 0 to 3071"),
])  # fmt: skip
def test_bad_settings_are_named(subject: dict[str, Any], section: dict[str, Any], key: str, tmp_path: Path) -> None:
    wanted = config("gpt2", "http://127.0.0.1:9", tmp_path / "run", subject=subject)
    tree = wanted.model_dump(mode="json")
    tree["exemplars"]["neuroscope"].update(section)
    with pytest.raises(BadInput) as error:
        estimate(build_config(tree))
    assert key in str(error.value)
    assert "hunter2" not in str(error.value).replace("user or password, not 'https://u:secret@x'", "secret" * (key == ""))


def test_the_table_of_models() -> None:
    assert len(MODELS) == 25
    assert {name for name, known in MODELS.items() if known.site == "mlp_mid"} == {n for n in MODELS if n.startswith("solu")}
    assert page("solu-8l-pile", 6, 64) == "solu-8l-pile/6/64.html"


def test_pieces_cover_what_is_wanted_once(tmp_path: Path) -> None:
    wanted = build_config({
        "subject": {"model": "gpt2", "units": [[3, 5], [3, 900], [0, 1]]},
        "exemplars": {"source": "neuroscope", "neuroscope": {"model": "gpt2-small"}}, "run": {"out": str(tmp_path)},
    })  # fmt: skip
    assert pieces(wanted) == [{"layer": 0, "first": 1, "last": 2}, {"layer": 3, "first": 5, "last": 901}] == downloads(wanted)
