"""The OpenAPI document against the API: no 5xx, no undocumented status, no answer of another shape."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from recovery.core.instance import ProbeMemory
from recovery.core.states import State
from recovery.errors import RecoveryError
from tests.api.conftest import Api, Fleet, MakeApi, Worker
from tests.api.test_streams import log_of
from tests.helpers import wait_until

TOKEN = "admin-token-of-this-test"


@pytest.fixture
def host(fleet: Fleet) -> Iterator[None]:
    """A host that looks at its server whenever it is asked to."""
    fleet.add()
    end = threading.Event()

    def look() -> None:
        while not end.wait(0.05):
            row = fleet.row()
            if row.look_at is not None:
                with contextlib.suppress(RecoveryError):
                    fleet.change(look_at=None, state=State.HEALTHY, run=row.token, probe=ProbeMemory(last_at=fleet.store.now()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield
    end.set()
    thread.join(60)


def guarded(make_api: MakeApi, fleet: Fleet, worker: Worker) -> Api:
    """An API with a token and one model on a host that answers."""
    worker.on_host["recovery.read_logs"] = lambda kwargs: log_of("line")
    api = make_api(secure_mode=True, bearer_token=TOKEN)
    api.client.headers["Authorization"] = f"Bearer {TOKEN}"
    wait_until(lambda: api.client.get("/api/llm/models/vllm").status_code, 200, within_s=60)
    return api


def test_schemathesis_finds_nothing(make_api: MakeApi, fleet: Fleet, worker: Worker, host: None, tmp_path: Path):
    api = guarded(make_api, fleet, worker)
    checks = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{api.url}/openapi.json", "--header", f"Authorization: Bearer {TOKEN}"]
    command += [
        "--checks",
        ",".join(checks),
        "--exclude-path",
        "/api/llm/stream",
        "--max-examples",
        "25",
        "--phases",
        "examples,coverage,fuzzing",
    ]
    command += ["--request-timeout", "60", "--no-color", "--generation-database", "none"]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.api.schema_hooks", "PYTHONPATH": str(Path(__file__).parents[2])}

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False)

    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert worker.sent, "it got through to the commands"


def test_every_operation_says_what_it_does_and_which_errors_it_has(make_api: MakeApi, fleet: Fleet, worker: Worker, host: None):
    document = guarded(make_api, fleet, worker).client.get("/openapi.json").json()

    operations = [(path, operation) for path, methods in document["paths"].items() for operation in methods.values()]
    assert len(operations) > 15
    assert len({operation["operationId"] for _, operation in operations}) == len(operations)
    for path, operation in operations:
        assert operation["summary"] and operation["description"], path
        for status, answer in operation["responses"].items():
            if status >= "4":
                assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/Problem"), (path, status)
    assert document["paths"]["/api/llm/models"]["get"]["responses"]["200"]["content"]["application/json"]["example"]["total"] == 1


def test_the_documentation_names_every_path(make_api: MakeApi, fleet: Fleet, worker: Worker, host: None):
    document = guarded(make_api, fleet, worker).client.get("/openapi.json").json()
    there = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()

    assert set(re.findall(r"`((?:GET|POST|DELETE) /[^`?]*)`", text)) - {"GET /openapi.json"} == there
