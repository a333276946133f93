"""The pages in docs/: their tables are those of the code, every cause and alert has its place, no link or command leads nowhere."""

import re
from pathlib import Path

import pytest
import yaml

from recovery.cli import app
from recovery.core.causes import Cause
from tests.cli.render_readme import DOCUMENTS, rendered
from tests.deploy.compose import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_code(document: Path) -> None:
    text = document.read_text()
    assert rendered(text) == text, "run `make readme`"


def test_the_runbook_has_every_cause_and_every_alert() -> None:
    text = (ROOT / "docs/runbook.md").read_text()
    sections = dict(re.findall(r"^## (\S+)\n\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    for cause in [*(each.value for each in Cause), "unkillable", "spawn_failed"]:
        assert "**By itself:**" in sections[cause] and "**You:**" in sections[cause], cause
        assert len(sections[cause].split("<!--")[0].strip()) > 20, f"{cause}: how it looks is not said"
    rules = yaml.safe_load((ROOT / "recovery/monitoring/alerts.yml").read_text())
    for alert in (rule["alert"] for group in rules["groups"] for rule in group["rules"]):
        assert f"`{alert}`" in text, alert


def test_links_and_commands_lead_somewhere() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback is not None}
    commands |= {group.name for group in app.registered_groups if group.name}
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES):
        text = re.sub(r"<!-- generated.*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for name in re.findall(r"(?:`|^\$ )recovery ([a-z]+)", text, re.MULTILINE):
            assert name in commands, f"{page.name}: recovery {name}"
