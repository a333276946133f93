"""The first five minutes of somebody who has never seen this: clone, make up, kill, the README's commands; or the wheel."""

import json
import os
import re
import signal
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.commands import ELSEWHERE, documents, exists, shown
from tests.deploy.newcomer import PATIENCE_S, UP, Newcomer, Running, cloned
from tests.helpers import wait_until

pytestmark = pytest.mark.timeout(900)
README = ("README.md", "CONTRIBUTING.md")


@pytest.fixture(scope="module")
def newcomer() -> Iterator[Newcomer]:
    """One clone for this file; the first test installs it."""
    made = cloned()
    try:
        made.outside("make", "install")
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def up(newcomer: Newcomer) -> Running:
    """`make up`, once everything is healthy."""
    running = newcomer.begin("make up")
    running.says(UP)
    return running


def test_make_up_on_a_clean_clone_and_a_kill_heals(newcomer: Newcomer, up: Running) -> None:
    """
    What it prints is enough to follow the README's first screen: the line to kill a model, and then the model coming back.
    """
    for name in ("llama-0", "qwen-0", "qwen-1"):
        assert re.search(rf"^  {name} +healthy after", up.said, re.MULTILINE), up.said
    line = re.search(r"kill -9 (\d+)   # (\S+)", up.said)
    assert line is not None
    before = len(up.said)
    os.kill(int(line[1]), signal.SIGKILL)
    wait_until(lambda: up.said[before:], lambda said: re.search(rf"{line[2]} serves after", said), within_s=PATIENCE_S)
    told = up.said[before:]
    assert re.search(rf"{line[2]}: killed by signal 9; restart 1 of 5 in", told) and f"{line[2]}: started (run " in told


def test_every_command_of_the_readme_runs(newcomer: Newcomer, up: Running) -> None:
    """
    Those of its console blocks and its crontab, as they stand there, with the defaults, beside `make up`; or another test runs them.
    """
    other = json.loads((newcomer.clone / "examples/fleet.json").read_text())
    (newcomer.clone / "other.json").write_text(json.dumps({**other, "port_range": [8200, 8219]}))
    ran = 0
    for each in shown(*README):
        if each.elsewhere is not None or each.bare == "make up":
            continue
        where = f"{each.document}:{each.line}: {each.text}"
        if each.forever:
            running = newcomer.begin(f"exec env {each.text}" if "=" in each.text.split()[0] else f"exec {each.text}")
            running.says(UP)
            assert running.interrupt() == 0, where
        else:
            done = newcomer.run(each.text)
            assert done.returncode == 0 and not re.search(r'"error"|unhealthy', done.stdout), f"{where}\n{done.stdout}{done.stderr}"
        ran += 1
    assert ran >= 8


def test_every_command_of_every_document_is_run_by_a_test() -> None:
    for test in ELSEWHERE.values():
        assert exists(test), test
    outside = [each for each in shown(*documents()) if each.document not in README and each.elsewhere is None]
    assert outside == [], "no test runs these"


def test_the_shell_completes(newcomer: Newcomer) -> None:
    """
    Commands are completed, and the script for it can be installed without a question.
    """
    words = {"_RECOVERY_COMPLETE": "complete_bash", "COMP_WORDS": "recovery re", "COMP_CWORD": "1"}
    assert newcomer.run("recovery", **words).stdout.split() == ["restart", "reset"]
    assert "complete" in newcomer.run("recovery --show-completion bash").stdout
    assert newcomer.run("recovery --install-completion bash").returncode == 0
    assert newcomer.run("source ~/.bashrc && complete -p recovery").returncode == 0


def test_wheel_and_sdist_install_into_an_empty_environment(newcomer: Newcomer, up: Running) -> None:
    """
    Both hold the same: all there is of the package, scripts, pages, rules and templates included. `recovery up` starts from
    another folder, with nothing of the repository in reach, and serves the page.
    """
    dist, empty, elsewhere = newcomer.folder / "dist", newcomer.folder / "empty", newcomer.folder / "elsewhere"
    newcomer.outside("python", "-m", "pip", "install", "--quiet", "hatchling")
    newcomer.outside("python", "-m", "hatchling", "build", "--directory", str(dist))
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    files = set(zipfile.ZipFile(wheel).namelist())
    kept = set(newcomer.outside("git", "ls-files", "recovery", "workers", "beat_schedule.py").split())
    assert {Path(name).suffix for name in kept} >= {".py", ".lua", ".html", ".js", ".css", ".yml", ".json", ".acl", ".service"}
    assert kept - files == set()
    assert not [name for name in files if name.startswith(("tests/", "examples/"))]

    newcomer.outside("python", "-m", "venv", str(empty))
    newcomer.outside(str(empty / "bin/python"), "-m", "pip", "install", "--quiet", str(wheel))

    elsewhere.mkdir()
    fleet = Path(newcomer.clone / "examples/fleet.json").read_text().replace("8110, 8129", "8310, 8329")
    (elsewhere / "fleet.json").write_text(fleet)
    ports = {"RECOVERY_API_PORT": "9199", "RECOVERY_FRONT_PORT": "9100", "RECOVERY_FLOWER_PORT": "6655"}
    there = {"PATH": newcomer.environ["PATH"].replace(str(newcomer.clone / ".venv/bin"), str(empty / "bin")), **ports}
    running = newcomer.begin("exec recovery up --fleet fleet.json", elsewhere, RECOVERY_HOME=str(newcomer.folder / "third"), **there)
    running.says(UP)
    page = newcomer.run("curl -sf http://127.0.0.1:9199/").stdout
    assets = re.findall(r'"(/static/[^"?]+)', page)
    assert assets, page
    for asset in assets:
        assert newcomer.run(f"curl -sf http://127.0.0.1:9199{asset}").returncode == 0, asset
    assert running.interrupt() == 0

    # The sdist makes the same wheel.
    with tarfile.open(sdist) as archive:
        archive.extractall(newcomer.folder / "unpacked", filter="data")
    (unpacked,) = (newcomer.folder / "unpacked").iterdir()
    newcomer.outside("python", "-m", "hatchling", "build", "-t", "wheel", "--directory", str(dist / "again"), cwd=unpacked)
    (again,) = (dist / "again").glob("*.whl")
    assert set(zipfile.ZipFile(again).namelist()) == files
