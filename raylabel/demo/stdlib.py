"""The built-in corpus: the source text of the running interpreter's standard library.

`documents()` yields (name, text) in a fixed order: each module cut along its definitions into documents of
roughly 1,500 to 3,000 characters, docstrings, comments and code as they stand, then each `pydoc` topic. Nothing
is imported and nothing is executed. Licence headers, tests and generated tables stay out; files that cannot be
read or parsed are skipped, so a stripped installation gives fewer documents, perhaps none.
`split(text)` is "train" or "held-out", a function of the text alone.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SHORT, LONG = 1_500, 3_000
TABLE = 4_000
HELD_OUT = 0.05

_SKIPPED_FOLDERS = frozenset(
    (
        *("__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "lib-dynload", "pgen2"),
        *("site-packages", "test", "tests", "turtledemo"),
    )
)
_SKIPPED_FILES = re.compile(
    r"(^|/)(_sysconfigdata\w*|_sysconfig_vars\w*|stringprep|entities|topics|pgen|sbom\S*)\.py$|^config-"
)
_LICENCE = re.compile(
    r"copyright (\(c\)|\d{4}|by\b)|all rights reserved|permission (is hereby|to use)|licen[sc]ed (to|under)"
    r"|(psf|mit|bsd|gnu|apache|software) licen[sc]e|licen[sc]e: *(psf|python)|between two licen[sc]es"
    r"|licensing (terms|details)|redistributions? (in|of)|disclaims all|warranties of",
    re.IGNORECASE,
)
_EDITOR_LINE = re.compile(r"^#.*(coding[:=]|\bvim?:|-\*-).*$")
_CREDIT_NAMES = frozenset(
    ("__copyright__", "__license__", "__licence__", "__author__", "__email__", "__credits__", "__date__")
)

Span = tuple[int, int]


def split(text: str, held_out: float = HELD_OUT) -> str:
    """The text's part: "held-out" for about `held_out` of all texts, else "train"; a function of the text alone."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "held-out" if int.from_bytes(digest[:8], "big") < held_out * 2**64 else "train"


def documents(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Every document of the standard library (or of the source tree `root`), modules by path, then topics by name."""
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    for path in _modules(folder):
        yield from _module_documents(path.relative_to(folder).as_posix(), _read(path))
    yield from _topics(folder / "pydoc_data" / "topics.py")


def _modules(folder: Path) -> list[Path]:
    found = []
    for path in folder.rglob("*.py"):
        relative = path.relative_to(folder)
        if not _SKIPPED_FOLDERS.intersection(relative.parts) and not _SKIPPED_FILES.search(relative.as_posix()):
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\f", "")
    except (OSError, UnicodeDecodeError):
        return ""


def _parse(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _module_documents(name: str, source: str) -> Iterator[tuple[str, str]]:
    tree = _parse(source) if source.strip() else None
    if tree is None or not tree.body:
        return
    lines = source.split("\n")
    pieces: list[tuple[int, str]] = []
    for start, end in _spans(tree.body, 0, len(lines), lines):
        text = _clean("\n".join(lines[start:end]))
        if text.strip():
            pieces.append((start + 1, text))
    for line, text in _group(pieces):
        yield f"{name}:{line}", text


def _spans(body: list[ast.stmt], start: int, end: int, lines: list[str]) -> Iterator[Span]:
    """Half-open line ranges covering [start, end), one a statement, comments with what they precede."""
    at = start
    for node, following in zip(body, [*body[1:], None], strict=True):
        stop = end if following is None else max(at, node.end_lineno or at)
        if following is not None and _first_line(following) <= stop:
            continue
        if not _is_left_out(node, stop - at, lines[at:stop]):
            yield from _cut_class(node, at, stop, lines)
        at = stop


def _cut_class(node: ast.stmt, start: int, end: int, lines: list[str]) -> Iterator[Span]:
    size = sum(len(line) + 1 for line in lines[start:end])
    if not isinstance(node, ast.ClassDef) or size <= LONG or _first_line(node.body[0]) <= node.lineno:
        yield start, end
        return
    yield from _spans(node.body, start, end, lines)


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def _is_left_out(node: ast.stmt, height: int, lines: list[str]) -> bool:
    """Credits, and long tables of constants."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    if any(isinstance(target, ast.Name) and target.id in _CREDIT_NAMES for target in targets):
        return True
    is_table = height > 1 and sum(map(len, lines)) > TABLE
    return is_table and not any(isinstance(part, (ast.Call, ast.Lambda)) for part in ast.walk(node))


def _clean(text: str) -> str:
    """The text without comment blocks and docstring paragraphs that are licences, and without editor lines."""
    kept: list[str] = []
    for block in _blocks(text.split("\n")):
        if not _LICENCE.search("\n".join(block)):
            kept.extend(line for line in block if not _EDITOR_LINE.match(line))
        elif block[-1].strip() == '"""':
            kept.append(block[-1])
    return "\n".join(kept)


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of comment lines at the margin, and of other lines between blank ones."""
    block: list[str] = []
    for line in lines:
        is_comment = line.startswith("#")
        if block and (is_comment != block[-1].startswith("#") or not line.strip()):
            yield block
            block = []
        block.append(line)
    if block:
        yield block


def _group(pieces: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Consecutive pieces joined while the whole stays under LONG characters."""
    line, size = 0, 0
    texts: list[str] = []
    for first, text in pieces:
        if texts and (size + len(text) > LONG or size >= (SHORT + LONG) // 2):
            yield line, "\n".join(texts).strip("\n")
            texts, size = [], 0
        line = line if texts else first
        texts.append(text)
        size += len(text)
    if texts:
        yield line, "\n".join(texts).strip("\n")


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    tree = _parse(_read(path))
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            try:
                topics = ast.literal_eval(node.value)
            except ValueError:
                continue
            for name, text in sorted(topics.items()):
                if isinstance(text, str) and text.strip():
                    yield f"topics/{name}", text.strip("\n")
