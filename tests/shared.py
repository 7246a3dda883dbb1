"""Recorded data that lies beside the repository on some machines; tests that need it skip, with a reason, elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
STORIES_MODEL = SHARED / "TinyStories-656K"
STORIES = SHARED / "tinystories-sample" / "tinystories_1000.json"

needs_shared = pytest.mark.skipif(not STORIES_MODEL.is_dir(), reason="no recorded data beside the repository")
