"""Licences of everything that is installed, and its known vulnerabilities where an advisory service can be reached.

    python .ci/dependencies.py constraints.txt

Ends with 1 for a licence that is not on the list, or a known vulnerability. Without `pip-audit` or a service the second half
is said to be left out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ALLOWED = re.compile(
    r"\b(MIT|MIT-0|BSD|0BSD|Apache|ISC|ISCL|PSF|PSFL|Python Software Foundation|Python-2\.0|CNRI-Python|MPL|Mozilla|Unlicense"
    r"|Zlib|ZPL|HPND|CC0|Public Domain|BlueOak|LLVM|Boost|BSL-1\.0)(?![A-Za-z])", re.IGNORECASE,
)  # fmt: skip
FORBIDDEN = re.compile(r"\b(A?GPL|GNU (Affero )?General Public|SSPL|BUSL|Commons Clause|NonCommercial|proprietary)", re.I)
LESSER = re.compile(r"LGPL|Lesser General", re.IGNORECASE)
CANARY = ("django", "3.2")
"""A package that is not used, in a version with many known vulnerabilities: a service that names none of them says nothing."""
KNOWN = {"nvidia": "NVIDIA's own, beside torch builds for its GPUs"}
"""Beginnings of names whose licence is not open, and why they are there."""


def licence(found: metadata.Distribution) -> str:
    """What a distribution says of its licence, in one line."""
    said = found.metadata.get("License-Expression") or ""
    classifiers = [c.rpartition(" :: ")[2] for c in found.metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    text = found.metadata.get("License") or ""
    short = said or "; ".join(classifiers) or " ".join(text.split())[:200]
    if not short:
        files = [f for f in found.files or [] if re.search(r"(LICEN[CS]E|COPYING)", f.name, re.IGNORECASE)]
        short = " ".join(Path(str(found.locate_file(files[0]))).read_text("utf-8", "replace").split())[:200] if files else ""
    return short


def licences() -> list[str]:
    """Lines about what is not on the list."""
    wrong = []
    for found in metadata.distributions():
        name, said = found.metadata["Name"], licence(found)
        if any(name.lower().startswith(known) for known in KNOWN) or name == "raylabel":
            continue
        # A choice of several needs one that is allowed; the lesser GPL binds no program that only imports.
        rest = LESSER.sub("MPL", said)
        if not ALLOWED.search(rest) or (FORBIDDEN.search(rest) and " OR " not in rest.upper()):
            wrong.append(f"{name}: {said or 'says nothing of a licence'}")
    return sorted(wrong)


def vulnerabilities(constraints: str) -> tuple[int, str]:
    """Exit code and words about the known vulnerabilities of the pinned versions."""
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run([sys.executable, "-m", "venv", folder], capture_output=True, check=False)
        install = [f"{folder}/bin/pip", "install", "-q", "--disable-pip-version-check", "pip-audit"]
        if made.returncode or subprocess.run(install, capture_output=True, check=False).returncode:
            return 0, "known vulnerabilities: not checked (pip-audit cannot be installed here)"
        pinned = f"{folder}/pinned.txt"
        Path(pinned).write_text(Path(constraints).read_text("utf-8") + f"\n{'=='.join(CANARY)}\n", "utf-8")
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json"]
        command = [f"{folder}/bin/pip-audit", "-r", pinned, *options]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
            told = {found["name"]: found.get("vulns", []) for found in json.loads(done.stdout)["dependencies"]}
        except (subprocess.TimeoutExpired, ValueError, KeyError):
            return 0, "known vulnerabilities: not checked (no advisory service answers here)"
    if not told.pop(CANARY[0], []):
        return 0, f"known vulnerabilities: not checked (the advisory service here knows none of {' '.join(CANARY)})"
    found = [(name, v["id"], ", ".join(v["fix_versions"])) for name, known in told.items() for v in known]
    lines = [f"{name}: {number}, mended in {versions or 'no version'}" for name, number, versions in found]
    return (1, "\n".join(lines)) if lines else (0, "known vulnerabilities: none")


def main() -> int:
    wrong = licences()
    print("\n".join(wrong) if wrong else "licences: all on the list")
    code, said = vulnerabilities(sys.argv[1])
    print(said)
    return 1 if wrong else code


if __name__ == "__main__":
    sys.exit(main())
