"""`python -m tests.cli.render_readme`: writes the README's tables anew, from the code."""

import re
from pathlib import Path

from recovery.cli.exits import MEANINGS
from recovery.core.states import TRANSITIONS
from recovery.settings import settings_table

README = Path(__file__).parents[2] / "README.md"
SECTIONS = {"environment": "Environment", "fleet": "Fleet file", "model": "Model"}


def exits() -> str:
    """The exit codes."""
    return _table(("code", "means"), [(str(code.value), text) for code, text in MEANINGS.items()])


def states() -> str:
    """The transition table: one row per state."""
    rows = []
    for state, moves in TRANSITIONS.items():
        rows.append((f"`{state.value}`", ", ".join(f"{event.value} → `{to.value}`" for event, to in moves.items())))
    return _table(("state", "when → next"), rows)


def settings() -> str:
    """Every setting, by section."""
    parts = []
    for section, title in SECTIONS.items():
        rows = [
            (f"`{row.name}`", f"`{row.default}`" if row.default else "", row.unit, row.meaning)
            for row in settings_table()
            if row.section == section
        ]
        parts.append(f"### {title}\n\n{_table(('name', 'default', 'unit', 'meaning'), rows)}")
    return "\n\n".join(parts)


BLOCKS = {"exits": exits, "states": states, "settings": settings}


def rendered(text: str) -> str:
    """The README with its generated blocks as the code has them."""
    for name, block in BLOCKS.items():
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        body = block()
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
