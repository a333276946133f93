"""`recovery systemd print`: units that systemd takes, with a host worker whose end leaves the models alone."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from recovery.cli import run
from recovery.deploy.units import WHAT


class _Many(dict[str, object]):
    """A section in which a key may come again, as in unit files."""

    def __setitem__(self, key: str, value: object) -> None:
        before = self.get(key)
        if isinstance(before, list) and isinstance(value, list):
            before.extend(value)
        else:
            super().__setitem__(key, value)


def parsed(text: str) -> dict[str, dict[str, list[str]]]:
    """A unit file: every value of every key of every section; fails where it is none."""
    parser = configparser.RawConfigParser(strict=False, dict_type=_Many, comment_prefixes=("#", ";"), delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    return {section: {key: str(value).split("\n") for key, value in parser[section].items()} for section in parser.sections()}


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command prints."""
    assert run(["systemd", "print", *words]) == 0
    return capsys.readouterr().out


def test_every_part_has_a_unit_that_says_what_it_must(capsys: pytest.CaptureFixture[str]) -> None:
    for part in WHAT:
        service = parsed(printed(capsys, part, "--user", "me", "--fleet", "/srv/my fleet.json"))["Service"]
        assert service["User"] == ["me"]
        assert service["ExecStart"][0].endswith(f"/recovery {part}") and service["ExecStart"][0].startswith("/")
        assert service["Restart"] == ["always"]
        assert "-/etc/recovery/recovery.env" in service["EnvironmentFile"] and f"-/etc/recovery/{part}.env" in service["EnvironmentFile"]
        assert '"RECOVERY_FLEET=/srv/my fleet.json"' in service["Environment"]
        assert not [value for values in service.values() for value in values if "@" in value]
        # What the end of the main process takes along: nothing at all on a GPU host, everything elsewhere.
        assert service.get("KillMode") == (["process"] if part == "host" else None)
        assert service.get("OOMPolicy") == (["continue"] if part == "host" else None)
        assert service.get("ProtectSystem") == (None if part == "host" else ["strict"])
    assert printed(capsys).count("[Service]") == len(WHAT)


def test_systemd_itself_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """
    `systemd-analyze verify`, where there is one (the test above reads them either way): not a word about any unit.
    """
    printed(
        capsys,
        "--user",
        "root",
        "--into",
        str(tmp_path),
        "--home",
        "/srv/my home",
        "--redis-url",
        "rediss://redis:6380/0?ssl_ca_certs=/etc/recovery/ca%20x.crt",
    )
    files = sorted(str(file) for file in tmp_path.iterdir())
    assert len(files) == len(WHAT)
    for file in files:
        assert "REDIS_URL=rediss://redis:6380/0?ssl_ca_certs=/etc/recovery/ca%%20x.crt" in Path(file).read_text()
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True, check=False)
        about = [line for line in done.stderr.splitlines() if "recovery-" in line]
        assert about == [], done.stderr


def test_a_password_does_not_get_into_a_unit(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["systemd", "print", "beat", "--redis-url", "redis://beat:secret@redis:6379/0"]) == 2
    told = capsys.readouterr()
    assert "secret" not in told.out + told.err and "/etc/recovery/beat.env" in told.err
    assert run(["systemd", "print", "worker"]) == 2
    assert "host, control, beat" in capsys.readouterr().err
