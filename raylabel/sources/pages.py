"""Pages as they were fetched, so that they can be read again without asking for them: content-addressed, packed.

`body/AA/SHA256.gz` holds a page, `url/AA/SHA256-OF-URL.json` says which page a URL gave, with what it takes to ask whether
it has changed, or why there is none. The folder may be a local path or any fsspec URL; processes may share it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from typing import Any

from raylabel.store.files import Files


class Pages:
    """A folder of pages."""

    def __init__(self, url: str) -> None:
        self.files = Files(url)

    def entry(self, url: str) -> dict[str, Any] | None:
        """What is known of a URL: `sha256`, `etag`, `modified`, or `failed` with the reason; None for nothing."""
        try:
            found = json.loads(self.files.read(_name(url)))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("url") == url else None

    def find(self, url: str) -> dict[str, Any] | None:
        """The entry of a page that is there."""
        found = self.entry(url)
        return found if found is not None and "sha256" in found and self.files.exists(_body(found["sha256"])) else None

    def read(self, entry: dict[str, Any]) -> bytes:
        """The bytes of a page; OSError where they are not what they were."""
        name = _body(entry["sha256"])
        try:
            data = gzip.decompress(self.files.read(name))
        except (EOFError, zlib.error) as error:
            raise OSError(f"{self.files.url}/{name}: {error}") from None
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise OSError(f"{self.files.url}/{name}: not what was fetched")
        return data

    def keep(self, url: str, body: bytes, tags: dict[str, str | None]) -> None:
        """Keeps a page, then what says that it is there."""
        digest = hashlib.sha256(body).hexdigest()
        if not self.files.exists(_body(digest)):
            self.files.write(_body(digest), gzip.compress(body, 1, mtime=0))
        self._note(url, {"sha256": digest, **{name: value for name, value in tags.items() if value}})

    def fail(self, url: str, reason: str) -> None:
        """Says why there is no page; one that was kept before stays."""
        if self.find(url) is None:
            self._note(url, {"failed": reason})

    def _note(self, url: str, what: dict[str, Any]) -> None:
        self.files.write(_name(url), json.dumps({"url": url, **what}).encode())


def _name(url: str) -> str:
    digest = hashlib.sha256(url.encode()).hexdigest()
    return f"url/{digest[:2]}/{digest}.json"


def _body(digest: str) -> str:
    return f"body/{digest[:2]}/{digest}.gz"
