"""The layers keep apart: what pyproject.toml's contracts say, and that they would notice."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def _lint(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINT, "--no-cache", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=150, check=False)


def test_every_contract_is_kept() -> None:
    done = _lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_a_contract_that_is_broken_is_noticed(tmp_path: Path) -> None:
    """The core does import pydantic; a contract that forbids it must fail."""
    config = tmp_path / "broken.toml"
    config.write_text(
        "[tool.importlinter]\nroot_packages = ['recovery', 'workers']\ninclude_external_packages = true\n"
        "[[tool.importlinter.contracts]]\nname = 'broken'\ntype = 'forbidden'\n"
        "source_modules = ['recovery.core']\nforbidden_modules = ['pydantic']\n"
    )
    done = _lint(ROOT, "--config", str(config))
    assert done.returncode == 1 and "1 broken" in done.stdout, done.stdout
