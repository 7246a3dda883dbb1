"""Files of a run directory, on a local disk or any fsspec object store, addressed by paths relative to its root.

A write is seen whole or not at all: locally a temporary name is flushed and renamed, on an object store the key is put
once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
import pyarrow.fs as pafs

from raylabel.errors import BadInput

TEMPORARY = ".tmp-"
STORES = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "s3fs")
"""Libraries whose errors are those of an object store or the way to it."""


def store_error(error: BaseException) -> bool:
    """Whether a disk, a store or a network is at fault."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in STORES


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Everything that a store's libraries raise, as OSError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not store_error(error):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def _local_sizes(path: str) -> Iterator[tuple[str, int]]:
    """(path, bytes) of every file below a folder, or of the file that it is."""
    try:
        entries = list(os.scandir(path))
    except NotADirectoryError:
        yield path, os.stat(path).st_size
        return
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _local_sizes(entry.path)
        elif entry.is_file(follow_symlinks=False):
            with contextlib.suppress(FileNotFoundError):
                yield entry.path, entry.stat(follow_symlinks=False).st_size


@dataclass(frozen=True)
class Written:
    """What a write left behind: path relative to the root, bytes, and sha256 as hex."""

    path: str
    bytes: int
    sha256: str


class Files:
    """A directory given by a local path or an fsspec URL."""

    def __init__(self, url: str) -> None:
        self.url = str(url).rstrip("/")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return fsspec.core.url_to_fs(self.url)

    @property
    def fs(self) -> Any:
        """The fsspec file system."""
        return self._opened[0]

    @property
    def root(self) -> str:
        """The directory's path within the file system."""
        return str(self._opened[1]).rstrip("/")

    @property
    def local(self) -> bool:
        """Whether the directory is on this machine's own file system."""
        protocol = self.fs.protocol
        return "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Files, (self.url,)

    def path(self, name: str) -> str:
        """`name` as the file system wants it; BadInput for one that leads out of the directory."""
        if name.startswith("/") or ".." in name.split("/"):
            raise BadInput(f"{self.url}: names a file outside of itself, {name[:200]!r}; it was tampered with")
        return f"{self.root}/{name}" if name else self.root

    def arrow(self) -> pafs.FileSystem:
        """The same file system for pyarrow."""
        return pafs.LocalFileSystem() if self.local else pafs.PyFileSystem(pafs.FSSpecHandler(self.fs))

    @_as_os_error()
    def write(self, name: str, data: bytes) -> Written:
        """Writes `data` whole or not at all."""
        target = self.path(name)
        if self.local:
            folder, base = os.path.split(target)
            os.makedirs(folder, exist_ok=True)
            temporary = f"{folder}/{TEMPORARY}{uuid.uuid4().hex[:12]}-{base}"
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except OSError:
                # On a full disk the half that was written takes the room that the run needs to go on.
                with contextlib.suppress(OSError):
                    os.remove(temporary)
                raise
        else:
            self.fs.pipe_file(target, data)
        return Written(name, len(data), hashlib.sha256(data).hexdigest())

    @_as_os_error()
    def read(self, name: str) -> bytes:
        """The file's bytes; FileNotFoundError if there is none."""
        if self.local:
            with open(self.path(name), "rb") as file:
                return file.read()
        return bytes(self.fs.cat_file(self.path(name)))

    @_as_os_error()
    def read_all(self, names: list[str]) -> dict[str, bytes]:
        """The bytes of those files that are there; from an object store many at a time."""
        if not self.local:
            found = self.fs.cat([self.path(name) for name in names], on_error="return") if names else {}
            for data in found.values():
                if isinstance(data, BaseException) and not isinstance(data, FileNotFoundError):
                    raise data
            pairs = ((name, found.get(self.path(name))) for name in names)
            return {name: data for name, data in pairs if isinstance(data, bytes)}
        read = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                read[name] = self.read(name)
        return read

    @_as_os_error()
    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        self._forget()
        return bool(self.fs.exists(self.path(name)))

    @_as_os_error()
    def sizes(self, name: str) -> dict[str, int]:
        """Every file below folder `name` with its size in bytes; nothing if there is no such folder."""
        cut = len(self.root) + 1
        if self.local:
            return {path[cut:]: size for path, size in sorted(_local_sizes(self.path(name)))}
        self._forget()
        try:
            found = self.fs.find(self.path(name), detail=True)
        except FileNotFoundError:
            return {}
        return {path[cut:]: int(info["size"]) for path, info in found.items() if info["type"] == "file"}

    @_as_os_error()
    def names(self) -> list[str]:
        """Names of the files and folders directly in the directory; nothing if there is no such directory."""
        self._forget()
        try:
            return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False))
        except FileNotFoundError:
            return []

    def sweep(self) -> None:
        """Removes the temporary files of writes that never ended."""
        if self.local:
            for name in self.sizes(""):
                if name.rsplit("/", 1)[-1].startswith(TEMPORARY):
                    self.delete(name)

    @_as_os_error()
    def delete(self, name: str) -> None:
        """Removes the file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def _forget(self) -> None:
        if not self.local:
            self.fs.invalidate_cache()
