"""What `--help` says: every command has an example, and each example is a command line that this program takes."""

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from recovery.cli import app
from recovery.cli.examples import EXAMPLES

PROGRAM = typer.main.get_command(app)


def commands(group: Any, words: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its words."""
    for name, each in group.commands.items():
        if hasattr(each, "commands"):
            yield from commands(each, f"{words}{name} ")
        else:
            yield f"{words}{name}", each


def parsed(line: str) -> str:
    """Parse a line of a shell as the program would; the words of the command that would run. Nothing is run."""
    pieces = shlex.shlex(line, posix=True, punctuation_chars="|&>")
    pieces.whitespace_split = True
    words = list(pieces)
    words = words[words.index("recovery") + 1 :]
    words = words[: next((at for at, word in enumerate(words) if set(word) <= set("|&>")), len(words))]
    command, context, path = PROGRAM, PROGRAM.make_context("recovery", words), []
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        path.append(name)
        context = command.make_context(name, rest, parent=context)
    return " ".join(path)


@pytest.mark.parametrize(("words", "command"), list(commands(PROGRAM)), ids=lambda each: each if isinstance(each, str) else "")
def test_every_command_shows_examples_that_it_takes(words: str, command: Any) -> None:
    assert EXAMPLES.get(words), f"no example for `recovery {words}`"
    for line in EXAMPLES[words]:
        assert parsed(line) == words, line


def test_help_ends_with_the_examples(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for words in ("drill", "brake release", "status"):
        PROGRAM.main([*words.split(), "--help"], standalone_mode=False)
        shown = capsys.readouterr().out
        lines = [line.strip() for line in shown.splitlines() if line.strip()]
        assert lines[-len(EXAMPLES[words]) - 1 :] == ["Examples:", *EXAMPLES[words]]


def test_no_example_is_of_a_command_that_does_not_exist() -> None:
    assert set(EXAMPLES) == {words for words, _ in commands(PROGRAM)}


def test_a_line_that_the_program_would_refuse_is_noticed() -> None:
    for line in ("recovery drill llama", "recovery logs llama --lines many", "recovery nothing"):
        with pytest.raises(Exception, match=r".") as refused:
            parsed(line)
        assert any(base.__name__ == "UsageError" for base in type(refused.value).__mro__)
