"""Feeders that need no Redis: a JSON file that is read again when it changes, and JSON lines on a stream."""

import asyncio
import logging
import sys
from pathlib import Path

from pydantic import ValidationError

from recovery.errors import ConfigError
from recovery.frontdoor.view import Snapshot, View

log = logging.getLogger(__name__)


class FileFeeder:
    """A snapshot in a file, read again whenever it changes; what cannot be read leaves the view as it is."""

    def __init__(self, path: Path, interval_s: float = 0.1) -> None:
        self._path, self._interval_s = path, interval_s
        self._seen: tuple[int, int, int] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, view: View) -> None:
        """Read the file once (`ConfigError` if that fails) and follow it."""
        try:
            self._look(view)
        except (OSError, ValidationError) as error:
            raise ConfigError(f"cannot read the view {self._path}: {error}") from error
        self._task = asyncio.get_running_loop().create_task(self._follow(view))

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _look(self, view: View) -> None:
        stat = self._path.stat()
        mark = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if mark != self._seen:
            view.apply(Snapshot.model_validate_json(self._path.read_bytes()))
            self._seen = mark

    async def _follow(self, view: View) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                self._look(view)
            except (OSError, ValidationError) as error:
                if view.fed:
                    log.warning("cannot read the view %s, keeping the last: %s", self._path, error)
                view.lost()


class LineFeeder:
    """Snapshots as JSON lines on standard input; at its end the last one stands."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    def start(self, view: View) -> None:
        self._task = asyncio.get_running_loop().create_task(self._follow(view))

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _follow(self, view: View) -> None:
        reader = asyncio.StreamReader(limit=16 * 1024 * 1024)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
        while line := await reader.readline():
            try:
                view.apply(Snapshot.model_validate_json(line))
            except ValidationError as error:
                log.warning("cannot read a snapshot, keeping the last: %s", error)
        view.lost()
