"""Pages that are kept: what was put there comes back, wherever it lies, and what is damaged does not."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from raylabel.sources.pages import Pages


@pytest.fixture(params=["folder", "store"])
def pages(request: pytest.FixtureRequest, tmp_path: Path) -> Pages:
    return Pages(str(tmp_path / "pages") if request.param == "folder" else f"memory://{uuid.uuid4().hex}")


def test_pages_come_back_and_equal_ones_are_kept_once(pages: Pages) -> None:
    pages.keep("http://a/1", b"one", {"etag": '"x"', "modified": None})
    pages.keep("http://a/2", b"one", {})
    entry = pages.find("http://a/1")
    assert entry is not None and entry["etag"] == '"x"' and "modified" not in entry
    assert pages.read(entry) == b"one"
    assert len(pages.files.sizes("body")) == 1 and len(pages.files.sizes("url")) == 2
    assert pages.find("http://a/3") is None


def test_a_failure_says_why_and_takes_no_page_away(pages: Pages) -> None:
    pages.fail("http://a/1", "404 Not Found")
    assert pages.find("http://a/1") is None and pages.entry("http://a/1") == {"url": "http://a/1", "failed": "404 Not Found"}
    pages.keep("http://a/1", b"one", {})
    pages.fail("http://a/1", "503")
    entry = pages.find("http://a/1")
    assert entry is not None and pages.read(entry) == b"one"


def test_what_is_damaged_is_not_read(pages: Pages) -> None:
    pages.keep("http://a/1", b"one" * 100, {})
    entry = pages.find("http://a/1")
    assert entry is not None
    [name] = pages.files.sizes("body")
    whole = pages.files.read(name)
    for data in (whole[:-9], b"", b"no gzip", b"\x1f\x8b" + whole[2:-12] + bytes(12)):
        pages.files.write(name, data)
        with pytest.raises(OSError):
            pages.read(entry)
    [noted] = pages.files.sizes("url")
    pages.files.write(noted, b"{")
    assert pages.find("http://a/1") is None
