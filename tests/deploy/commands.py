"""The commands that the documents show, and which test runs each that is not run as it stands."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.deploy.compose import ROOT

FOREVER = ("make up", "recovery up", "recovery host", "recovery roll")
"""What goes on until it is interrupted."""

ELSEWHERE = {
    "make check": ".ci/run",
    "make test": ".ci/run",
    "make test-vllm": "Makefile",
    "make bench": "Makefile",
    "make shares": ".ci/run",
    "docker compose": "tests/deploy/test_compose.py::test_every_service_becomes_healthy_and_a_model_heals",
    "sh examples/deploy/secrets.sh": "tests/deploy/test_compose.py::test_every_secret_is_demanded_and_none_has_a_default",
    "recovery systemd print": "tests/deploy/test_systemd.py::test_systemd_itself_takes_them",
    "systemctl": "tests/deploy/test_systemd.py::test_every_part_has_a_unit_that_says_what_it_must",
    "recovery acl print": "tests/deploy/test_access.py::test_each_part_does_its_work_with_its_user",
    "redis-cli": "tests/deploy/test_access.py::test_each_part_does_its_work_with_its_user",
    "git clone": "tests/deploy/test_first_minutes.py::test_make_up_on_a_clean_clone_and_a_kill_heals",
    "pip install": "tests/deploy/test_first_minutes.py::test_wheel_and_sdist_install_into_an_empty_environment",
    "recovery up --fleet examples/fleet.json": "tests/deploy/test_first_minutes.py::test_wheel_and_sdist_install_into_an_empty_environment",
    "curl -sf http://localhost:8099/llm/models/vllm": "tests/api/test_specification.py::test_the_cron_example_in_its_working_form",
    "recovery --install-completion": "tests/deploy/test_first_minutes.py::test_the_shell_completes",
}
"""By how a command begins."""


class Shown(NamedTuple):
    """A command of a document."""

    document: str
    line: int
    text: str

    @property
    def bare(self) -> str:
        """Without assignments and comments."""
        return re.sub(r"\s+#\s.*$", "", re.sub(r"^(\w+=\S+\s+)+", "", self.text))

    @property
    def elsewhere(self) -> str | None:
        """Which test runs it, where that is not the one that runs them as they stand."""
        return next((test for start, test in ELSEWHERE.items() if self.bare.startswith(start)), None)

    @property
    def forever(self) -> bool:
        """Whether it goes on until it is interrupted."""
        return self.bare.startswith(FOREVER)


def shown(*documents: str) -> Iterator[Shown]:
    """
    Every line after a `$` in the console blocks of these documents, and what their crontabs would run.

    A line that ends with a backslash goes on.
    """
    for document in documents:
        text = (ROOT / document).read_text()
        for block in re.finditer(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            before = text[: block.start(1)].count("\n") + 1
            for command in re.finditer(r"^\$ ((?:.*\\\n)*.*)$", block[1], re.MULTILINE):
                yield Shown(document, before + block[1][: command.start()].count("\n"), command[1])
        for line in re.finditer(r"^(?:[*\d/,-]+ ){5}(.+)$", text, re.MULTILINE):
            yield Shown(document, text[: line.start()].count("\n") + 1, line[1])


def documents() -> list[str]:
    """Every document a user reads."""
    return ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


def exists(test: str) -> bool:
    """Whether `path::name` is a test, or `path` a file."""
    path, _, name = test.partition("::")
    file: Path = ROOT / path
    return file.exists() and (not name or f"def {name}(" in file.read_text())
