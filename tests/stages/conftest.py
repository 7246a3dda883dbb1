from __future__ import annotations

import pyarrow as pa
import pytest

from raylabel.words.substitutes import Substitutes
from tests.stages import known_units


@pytest.fixture
def substitutes() -> Substitutes:
    """Real ones, of the planted language."""
    return known_units.substitutes()


@pytest.fixture
def samples() -> pa.Table:
    return known_units.corpus()


@pytest.fixture
def known() -> known_units.Known:
    """Units of known meaning, all the way through."""
    return known_units.known()
