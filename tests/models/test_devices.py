"""Models over several devices. The double of two devices changes torch for good: its tests have a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).resolve().parents[2]


def test_models_on_two_devices() -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot be given a device that it does not know")
    plain = ["-q", "-n0", "-p", "no:cacheprovider", "-p", "no:logging"]
    command = [sys.executable, "-m", "pytest", *plain, "tests/models/two_devices.py"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout[-6000:]
