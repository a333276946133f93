"""Nobody else sees or steers the fleet: tokens, roles, sessions, limits, and everything that is refused unread."""

import http.client
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recovery.api.auth import COOKIE, Gate, Role
from recovery.settings import Settings
from tests.api.conftest import Api, Fleet, MakeApi, Worker
from tests.helpers import wait_until

ADMIN, OPERATE, READ = "admin-token-of-this-test", "operate-token-of-this-test", "read-token-of-this-test"
TOKENS: dict[str, Any] = {"secure_mode": True, "bearer_token": ADMIN, "operate_tokens": (OPERATE,), "read_tokens": (READ,)}
PAGE = {"X-Recovery-Page": "1"}

READS = [
    "/api/llm/models",
    "/llm/models",
    "/api/llm/models/vllm",
    "/llm/models/vllm",
    "/api/llm/models/vllm/logs",
    "/api/llm/models/vllm/events",
    "/api/llm/models/vllm/incidents",
    "/api/llm/stream",
    "/api/llm/load",
    "/api/llm/door",
    "/api/hosts",
    "/api/me",
    "/api/tasks/00000000-0000-0000-0000-000000000000",
    "/metrics",
    "/openapi.json",
]
COMMANDS = [
    f"{prefix}/models/vllm/{verb}" for prefix in ("/api/llm", "/llm") for verb in ("restart", "start", "stop", "reset", "health-check")
]


def bearer(token: str) -> dict[str, str]:
    """The header of a token."""
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def guarded(make_api: MakeApi, fleet: Fleet) -> Iterator[Api]:
    """An API with three tokens and one model."""
    fleet.add()
    api = make_api(**TOKENS)
    wait_until(lambda: api.client.get("/api/llm/models/vllm", headers=bearer(READ)).status_code, 200, within_s=60)
    yield api


def test_every_path_of_the_document_is_in_these_lists(guarded: Api):
    """A new endpoint must take a place in the tests below."""
    document = guarded.client.get("/openapi.json", headers=bearer(READ)).json()
    listed = {path.replace("vllm/", "{model_id}/").replace("models/vllm", "models/{model_id}") for path in (*READS, *COMMANDS)}
    listed = {path.replace("00000000-0000-0000-0000-000000000000", "{task_id}") for path in listed}

    assert set(document["paths"]) - listed == {"/livez", "/readyz", "/api/session"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        {"Authorization": "Bearer"},
        {"Authorization": ADMIN},
        {"Authorization": f"Basic {ADMIN}"},
        {"Cookie": f"{COOKIE}=made-up"},
    ],
)
def test_without_a_good_token_everything_is_refused_and_nothing_changes(
    guarded: Api, fleet: Fleet, worker: Worker, headers: dict[str, str]
):
    before = fleet.row().version
    for path in READS:
        answer = guarded.client.get(path, headers=headers)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in COMMANDS:
        assert guarded.client.post(path, headers=headers).status_code == 401, path

    assert worker.sent == []
    assert fleet.row().version == before


def test_too_low_a_role_is_refused_and_nothing_changes(guarded: Api, fleet: Fleet, worker: Worker):
    before = fleet.row().version
    for path in COMMANDS:
        answer = guarded.client.post(path, headers=bearer(READ))
        assert (answer.status_code, answer.json()["detail"]) == (403, "This needs the role operate; yours is read"), path
    assert guarded.client.post(f"{COMMANDS[0]}?override=true", headers=bearer(OPERATE)).status_code == 403

    assert worker.sent == []
    assert fleet.row().version == before


def test_each_role_may_do_what_it_is_for(guarded: Api):
    assert guarded.client.get("/api/me", headers=bearer(READ)).json()["role"] == "read"
    assert guarded.client.post("/api/llm/models/vllm/restart?wait=false", headers=bearer(OPERATE)).status_code == 202
    assert guarded.client.post("/api/llm/models/vllm/restart?wait=false&override=true", headers=bearer(ADMIN)).status_code == 202


def test_liveness_and_the_shell_of_the_page_are_open_and_hold_no_data(guarded: Api):
    assert guarded.client.get("/livez").text == "ok"
    assert guarded.client.get("/readyz").text == "ok"
    assert "vllm-0" not in guarded.client.get("/").text


def test_a_session_does_what_its_token_may_and_ends_with_it(guarded: Api, make_api: MakeApi, fleet: Fleet):
    opened = guarded.client.post("/api/session", headers=bearer(OPERATE))

    cookie = opened.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert OPERATE not in cookie
    assert guarded.client.get("/api/me").json() == {"role": "operate", "by": "session", "secure": True, "version": opened.json()["version"]}
    assert guarded.client.post("/api/llm/models/vllm/restart?wait=false").status_code == 401, "without the page's own header"
    assert guarded.client.post("/api/llm/models/vllm/restart?wait=false", headers=PAGE).status_code == 202

    without = make_api(**{**TOKENS, "operate_tokens": ()})
    name = guarded.client.cookies[COOKIE]
    assert without.client.get("/api/me", headers={"Cookie": f"{COOKIE}={name}"}).status_code == 401, "its token was taken away"

    guarded.client.delete("/api/session", headers=PAGE)
    assert guarded.client.get("/api/me", headers={"Cookie": f"{COOKIE}={name}"}).status_code == 401, "logged out"


def test_a_wrong_token_opens_no_session(guarded: Api):
    answer = guarded.client.post("/api/session", headers=bearer("wrong"))

    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}])
def test_pages_of_another_origin_cannot_command(api: Api, fleet: Fleet, worker: Worker, headers: dict[str, str]):
    fleet.add()

    assert api.client.post("/api/llm/models/vllm/stop", headers=headers).status_code == 403
    assert worker.sent == []


def test_a_page_of_this_origin_can(api: Api, fleet: Fleet):
    fleet.add()
    wait_until(lambda: api.client.get("/api/llm/models/vllm").status_code, 200, within_s=60)

    assert api.client.post("/api/llm/models/vllm/reset", headers={"Origin": api.url}).status_code == 200


def test_without_tokens_only_the_names_of_this_machine_are_answered(api: Api):
    """A name that an attacker's DNS points at 127.0.0.1 must not get in."""
    assert api.client.get("/api/llm/models", headers={"Host": "evil.example:8099"}).status_code == 403
    assert api.client.get("/api/llm/models", headers={"Host": "localhost:8099"}).status_code == 200


def test_cors_is_off(api: Api):
    answer = api.client.get("/api/llm/models", headers={"Origin": "http://evil.example"})

    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert (
        api.client.options("/api/llm/models", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "GET"}).status_code
        == 405
    )


def test_the_page_may_load_nothing_from_elsewhere(api: Api):
    for path in ("/", "/models/vllm", "/static/app.js", "/api/llm/models", "/nowhere"):
        headers = api.client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    shell = api.client.get("/").text
    assert "http://" not in shell and "https://" not in shell and "<style" not in shell and " onclick" not in shell


@pytest.mark.parametrize(
    "path",
    [
        "/api/llm/models/../../etc/passwd",
        "/api/llm/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/api/llm/models/..%2f..%2fetc%2fpasswd/logs",
        "/api/llm/models/vllm%00/logs",
        "/api/llm/models/vllm%0d%0aX-Evil:1",
        "/api/llm/models/" + "a" * 5000,
        "/api/llm/models/vllm/logs?run=../../etc/passwd",
        "/api/llm/models/vllm/logs?run=-1",
        "/api/llm/models/vllm/logs?run=99999999999999999999999",
        "/api/llm/models/vllm/logs?lines=0",
        "/api/llm/models/vllm/logs?lines=10001",
        "/api/llm/models/vllm/events?after=*",
        "/api/llm/models/vllm/events?after=27600509109948590944-5",
        "/api/tasks/..%2f..%2fetc",
        "/static/../auth.py",
        "/static/..%2fauth.py",
        "/static/%2e%2e/%2e%2e/auth.py",
    ],
)
def test_path_tricks_are_refused(api: Api, fleet: Fleet, worker: Worker, path: str):
    fleet.add()
    connection = http.client.HTTPConnection("127.0.0.1", int(api.url.rsplit(":", 1)[1]), timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()

    assert answer.status in (400, 404, 422)
    assert b"detail" in answer.read()
    assert worker.sent == []
    connection.close()


def test_a_large_body_is_refused_unread_with_and_without_its_length(api: Api, fleet: Fleet, worker: Worker):
    fleet.add()
    body = b"x" * 10_000_000

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    for content, status in ((body, 413), (pieces(), 411)):
        try:
            answer = api.client.post("/api/llm/models/vllm/reset", content=content)
        except Exception as error:  # it may close the connection while we still send
            assert "Write" in type(error).__name__ or "Read" in type(error).__name__ or "Remote" in type(error).__name__
        else:
            assert answer.status_code == status
            assert answer.json().keys() == {"detail"}
    assert worker.sent == []


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(header=st.binary(min_size=0, max_size=300).filter(lambda text: b"\n" not in text and b"\r" not in text and b"\0" not in text))
def test_fuzzed_authorization_headers_are_refused(guarded: Api, header: bytes):
    connection = http.client.HTTPConnection("127.0.0.1", int(guarded.url.rsplit(":", 1)[1]), timeout=60)
    try:
        connection.putrequest("GET", "/api/llm/models")
        connection.putheader("Authorization", header)
        connection.endheaders()
        assert connection.getresponse().status in (400, 401)
    finally:
        connection.close()


def test_the_methods_that_are_not_there_have_the_one_form_of_errors(api: Api):
    answer = api.client.delete("/api/llm/models")

    assert (answer.status_code, answer.json()) == (405, {"detail": "Method Not Allowed"})
    assert api.client.get("/nowhere").json() == {"detail": "Not Found"}


@pytest.mark.parametrize(("kind", "path", "limit"), [("restart", "restart?wait=false", 10), ("logs", "logs", 30)])
def test_the_specifications_limits_are_per_model(make_api: MakeApi, fleet: Fleet, worker: Worker, kind: str, path: str, limit: int):
    fleet.add()
    fleet.add(model="other")
    worker.on_host["recovery.read_logs"] = lambda _: {"lines": [], "total_lines": 0, "run": 7, "runs": [7], "end": "7:1:0"}
    one, two = make_api(per_minute=None), make_api(per_minute=None)
    wait_until(lambda: [each.client.get("/api/llm/models").json()["total"] for each in (one, two)], [2, 2], within_s=60)
    method = "POST" if kind == "restart" else "GET"

    answers = [each.client.request(method, f"/api/llm/models/vllm/{path}").status_code for each in [one, two] * (limit // 2)]
    refused = one.client.request(method, f"/llm/models/vllm/{path}")

    assert 429 not in answers
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 61
    assert f"at most {limit} a minute" in refused.json()["detail"]
    assert two.client.request(method, f"/api/llm/models/other/{path}").status_code != 429


def test_no_token_is_in_any_log_task_or_error(guarded: Api, worker: Worker, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    texts = [guarded.client.post("/api/session", headers=bearer(OPERATE)).text]
    for token in (ADMIN, OPERATE, READ):
        texts.append(guarded.client.post("/api/llm/models/vllm/restart?wait=false", headers=bearer(token)).text)
        texts.append(guarded.client.get("/api/llm/models/nope", headers=bearer(token)).text)
        texts.append(guarded.client.get("/metrics", headers=bearer(token)).text)
    texts += [caplog.text, repr(worker.sent), repr(Settings(**TOKENS))]

    for token in (ADMIN, OPERATE, READ):
        assert not [text for text in texts if token in text]


def test_roles_are_told_by_digest(fleet: Fleet):
    gate = Gate(Settings(**TOKENS), fleet.store)

    assert [gate.role_of(token) for token in (READ, OPERATE, ADMIN, "", "x" * 5000, ADMIN + " ")] == [
        Role.READ,
        Role.OPERATE,
        Role.ADMIN,
        None,
        None,
        None,
    ]
    assert not [value for value in vars(gate).values() if ADMIN in repr(value)]
