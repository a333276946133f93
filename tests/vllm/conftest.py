"""
The real vLLM of this folder: skipped at home where it is not built, failed in CI.
"""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.loop.conftest import pytest_runtest_makereport
from tests.loop.plane import Plane, plane
from tests.vllm.server import HOME, VllmServer, is_built
from tests.vllm.supervised import Servers, servers

__all__ = ["pytest_runtest_makereport"]

BUILD = Path(__file__).parent / "setup" / "build.sh"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs it, says so, and gets the time it takes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(2400))


@pytest.fixture(scope="session", autouse=True)
def vllm_home() -> Path:
    """Folder of the build: `bin/vllm`, `tiny-model`."""
    if not is_built():
        said = f"no vLLM for CPU in {HOME}: build it with {BUILD}"
        if os.environ.get("CI"):
            pytest.fail(said)
        pytest.skip(said)
    return HOME


@pytest.fixture(scope="module", name="plane")
def _plane(vllm_home: Path) -> Iterator[Plane]:
    """The module's control plane."""
    with plane() as made:
        yield made


@pytest.fixture
def fleet(plane: Plane) -> Iterator[Servers]:
    """Servers of this test alone."""
    with servers(plane) as made:
        yield made


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def bare_vllm(tmp_path: Path, free_port: int) -> Iterator[Callable[..., VllmServer]]:
    """Starts bare servers, one log each: `bare_vllm("--flag", env={...}, model=..., command=[...])`; all are ended with the test."""
    started: list[VllmServer] = []

    def start(*flags: str, port: int | None = None, **options: Any) -> VllmServer:
        started.append(VllmServer(tmp_path / f"vllm-{len(started)}.log", port or free_port, flags, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()
