"""
A proxy between unix sockets whose open connections can go half-open: they stay, and nothing comes through any more.

New connections work. While Redis is down it does not listen, so that its clients are refused as they would be without it.
"""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

CHUNK = 1 << 16


class Proxy:
    """Listens on `front`, speaks to `back`. Runs in a thread of its own; every method may be called from any thread."""

    def __init__(self, front: Path, back: Path) -> None:
        self.front, self._back = front, back
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True).start()

    def open(self) -> None:
        """Begin to accept connections."""
        self._do(self._open())

    def shut(self) -> None:
        """Refuse connections and end those there are."""
        self._do(self._shut())

    def go_half_open(self) -> int:
        """Cut all present connections without telling either side; how many."""
        for link in (living := [link for link in self._links if not link.dead]):
            link.dead = True
        return len(living)

    def close(self) -> None:
        """End it for good."""
        self.shut()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _open(self) -> None:
        if self._server is None:
            self.front.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._accept, str(self.front))

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self.front.unlink(missing_ok=True)
        for link in list(self._links):
            link.end()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back_reader, back_writer = await asyncio.open_unix_connection(str(self._back))
        except OSError:
            writer.close()
            return
        link = _Link(writer, back_writer)
        self._links.add(link)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await asyncio.gather(link.carry(reader, back_writer), link.carry(back_reader, writer))
        finally:
            link.end()
            self._links.discard(link)
            self._tasks.discard(task)


class _Link:
    """One connection through the proxy. A dead one swallows what it is told, and a close as well."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.dead = False
        self._writers = writers

    async def carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(CHUNK):
                if not self.dead:
                    sink.write(data)
                    await sink.drain()
        if not self.dead:
            self.end()

    def end(self) -> None:
        for writer in self._writers:
            writer.close()
