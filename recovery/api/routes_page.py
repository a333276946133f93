"""The status page: one shell for all its views. It holds no data; what it shows it asks of the API as anybody else."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from fastapi import Path as InPath
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, select_autoescape

from recovery import __version__
from recovery.api.schemas import MODEL_PATTERN

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent / "page"
ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER / "templates"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
)


@router.get("/", response_class=HTMLResponse)
async def fleet_page() -> str:
    """The fleet at a glance."""
    return _shell()


@router.get("/models/{model_id}", response_class=HTMLResponse)
async def model_page(model_id: Annotated[str, InPath(pattern=MODEL_PATTERN, max_length=64)]) -> str:
    """One model; the page reads which one off its address."""
    return _shell()


@cache
def _shell() -> str:
    files = sorted((FOLDER / "static").iterdir())
    stamp = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:10]
    return ENVIRONMENT.get_template("shell.html").render(version=__version__, stamp=stamp)
