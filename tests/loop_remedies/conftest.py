"""One control plane for the module, with cards that a file plays and a webhook that a thread of the test listens to."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.loop.conftest import fleet, pytest_runtest_makereport
from tests.loop.plane import Plane, wait_until

__all__ = ["fleet", "pytest_runtest_makereport"]

NVML = Path(__file__).parent / "fake_nvml"


class Cards:
    """The cards that the host's worker sees."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._state: dict[str, Any] = {"cards": 4, "lost": [], "xids": []}
        self._write()

    def xid(self, card: int, number: int) -> None:
        """The driver complains of a card; the worker knows when this returns."""
        self._state["xids"].append([card, number])
        self._write()
        told = self._file.with_name(f"{self._file.name}.told")
        wait_until(lambda: int(told.read_text()), len(self._state["xids"]), within_s=60)

    def lose(self, *cards: int) -> None:
        """These cards no longer answer; all others do."""
        self._state["lost"] = list(cards)
        self._write()

    def _write(self) -> None:
        made = self._file.with_suffix(".new")
        made.write_text(json.dumps(self._state))
        made.rename(self._file)


class Listener:
    """An HTTP server that keeps what it is sent, after refusing the first `refuse` times."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.refuse = 0
        self.refused = 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if owner.refuse > owner.refused:
                    owner.refused += 1
                    self.send_response(503)
                else:
                    owner.got.append(json.loads(body))
                    self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/told?secret=hush"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def events(self, incident: str) -> list[str]:
        """What was told of one incident."""
        return [told["event"] for told in self.got if told["incident"]["id"] == incident]


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Cards:
    return Cards(tmp_path_factory.mktemp("nvml") / "cards.json")


@pytest.fixture(scope="module", name="plane")
def _plane(cards: Cards, listener: Listener) -> Iterator[Plane]:
    seen = {"PYTHONPATH": str(NVML), "FAKE_NVML": str(cards._file)}
    made = Plane(of={"host": seen, "control": {"RECOVERY_WEBHOOK_URL": listener.url}})
    try:
        yield made.up()
    finally:
        made.close()
