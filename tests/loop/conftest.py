"""One control plane per module, and per test a fleet with models of its own."""

from collections.abc import Generator, Iterator

import pytest

from tests.loop.fleet import Fleet, fleet_of
from tests.loop.plane import Plane, plane


@pytest.fixture(scope="module", name="plane")
def _plane(request: pytest.FixtureRequest) -> Iterator[Plane]:
    """The module's plane; a module that wants another one says so in `PLANE`, a dict of `Plane`'s options."""
    with plane(**getattr(request.module, "PLANE", {})) as made:
        yield made


@pytest.fixture
def fleet(plane: Plane) -> Iterator[Fleet]:
    """The test's models."""
    with fleet_of(plane) as made:
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the ends of the workers' logs and the rows beside a failure."""
    report = yield
    plane = getattr(item, "funcargs", {}).get("plane")
    if report.when == "call" and report.failed and isinstance(plane, Plane):
        for name in ("host", "control", "beat"):
            if plane.log_file(name).exists():
                report.sections.append((f"{name}.log", plane.log_file(name).read_text(errors="replace")[-6000:]))
        for model in plane.models:
            lines = [f"{event['kind']}: {event['text']}" for event in plane.store.events(model, 60)]
            report.sections.append((f"history of {model}", "\n".join(lines)))
    return report
