"""What a host tells of its logs: the right lines, from a position on, through cuts, and without secrets."""

import os
from pathlib import Path

import pytest

from recovery import wiring
from recovery.adapters.processes import Processes
from recovery.adapters.redis_store import RedisStore
from recovery.adapters.redis_url import RedisUrl
from recovery.adapters.run_logs import log_path
from recovery.host.logs import keep_tails, read_logs
from recovery.host.service import HostService
from recovery.settings import load_settings

FLEET = '{"redact_patterns": ["purple \\\\w+"], "llmModels": {"a": {"command": "python", "env": {"HF_TOKEN": "tops3cretvalue"}}}}'


class _Nobody:
    """A sender whose messages all get lost."""

    def send(self, *_arguments: object, **_options: object) -> None:
        return None


@pytest.fixture
def service(tmp_path: Path, store: RedisStore, redis_url: RedisUrl) -> HostService:
    """A host that knows model a, whose instance has never been started."""
    fleet = tmp_path / "fleet.json"
    fleet.write_text(FLEET)
    told = {"RECOVERY_HOME": str(tmp_path), "RECOVERY_HOST": "here", "RECOVERY_FLEET": str(fleet)}
    made = wiring.Wiring(load_settings(told), redis_url, store)
    return wiring.host_service(made, _Nobody(), lambda _instance: None)


def _log(service: HostService, token: int, text: str, piece: int | None = None) -> Path:
    """Write a log as a server or its keeper does."""
    assert isinstance(service.host, Processes)
    folder = service.host.disk.prepare("a-0")
    path = log_path(folder, token)
    path = path if piece is None else path.with_name(f"{path.name}.{piece}")
    with path.open("a") as file:
        file.write(text)
    return path


def test_the_last_lines_of_the_newest_run(service: HostService) -> None:
    _log(service, 1, "old\n")
    _log(service, 2, "one\ntwo\nthree\nunfinished")
    told = read_logs(service, "a-0", 2)
    assert (told["lines"], told["total_lines"], told["run"], told["runs"]) == (["two\n", "three\n"], 3, 2, [1, 2])
    assert read_logs(service, "a-0", 2, run=1)["lines"] == ["old\n"]


def test_what_came_after_a_position(service: HostService) -> None:
    _log(service, 1, "one\ntwo\nhal")
    end = read_logs(service, "a-0", 1)["end"]
    assert read_logs(service, "a-0", 10, after=end)["lines"] == []
    _log(service, 1, "f\nfour\n")
    told = read_logs(service, "a-0", 10, after=end)
    assert told["lines"] == ["half\n", "four\n"]
    assert read_logs(service, "a-0", 10, after=told["end"])["lines"] == []


def test_a_position_holds_when_the_keeper_cuts_the_log(service: HostService) -> None:
    """
    The keeper copies the live file into a piece and empties it; a byte offset alone would now mean another place.
    """
    log = _log(service, 1, "one\ntwo\n")
    end = read_logs(service, "a-0", 1)["end"]
    _log(service, 1, "one\ntwo\nthree\n", piece=1)
    os.truncate(log, 0)
    _log(service, 1, "four\n")
    told = read_logs(service, "a-0", 10, after=end)
    assert (told["lines"], told["total_lines"]) == (["three\n", "four\n"], 4)
    assert read_logs(service, "a-0", 3)["lines"] == ["two\n", "three\n", "four\n"]


def test_a_position_of_another_run_gives_the_new_run_from_its_start(service: HostService) -> None:
    _log(service, 1, "old\n")
    end = read_logs(service, "a-0", 1)["end"]
    _log(service, 2, "new\n")
    told = read_logs(service, "a-0", 10, after=end)
    assert (told["run"], told["lines"]) == (2, ["new\n"])
    assert read_logs(service, "a-0", 10, after="nonsense")["lines"] == ["new\n"]


def test_secrets_do_not_leave_the_host(service: HostService) -> None:
    """Those with a form, those of the server's own environment by value, and what the fleet's patterns describe."""
    service.join()
    _log(service, 1, "key sk-abcdefghijklmnopqrstuvwxyz0123456789ABCD\nusing tops3cretvalue\nthe purple elephant\n")
    said = "".join(read_logs(service, "a-0", 10)["lines"])
    assert not any(secret in said for secret in ("sk-abcdef", "tops3cretvalue", "elephant"))
    assert said.count("[redacted]") == 3


def test_what_is_not_there_is_said_by_name(service: HostService, tmp_path: Path) -> None:
    assert read_logs(service, "a-0")["error"] == "never_started"
    _log(service, 1, "one\n")
    assert "there are: 1" in read_logs(service, "a-0", run=7)["detail"]
    runs = tmp_path / "instances" / "a-0" / "runs"
    (runs / "1.log").unlink()
    runs.rmdir()
    assert read_logs(service, "a-0")["error"] == "no_directory"


def test_a_tail_is_kept_in_redis_when_it_has_changed(service: HostService) -> None:
    seen: dict[str, tuple[int, str]] = {}
    _log(service, 1, "".join(f"{number}\n" for number in range(300)))
    assert [keep_tails(service, seen), keep_tails(service, seen)] == [1, 0]
    _log(service, 1, "the purple elephant\n")
    assert keep_tails(service, seen) == 1
    kept = service.store.get("logtail:a-0")
    assert (len(kept["lines"]), kept["run"], kept["lines"][-1]) == (200, 1, "the [redacted]\n")
