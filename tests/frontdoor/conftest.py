"""The world of the front door's tests: real simulators, a real door."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontdoor.world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Processes for one test, gone afterwards whatever happened."""
    world = World(tmp_path)
    yield world
    world.close()
