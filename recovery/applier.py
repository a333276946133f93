"""
Brings a changed fleet file into force: shown first, done step by step, taken back where a replica does not come up.
"""

from collections.abc import Callable
from pathlib import Path

from recovery.core.applying import Action, actions, in_force
from recovery.core.fleet import Fleet
from recovery.core.instance import Instance
from recovery.core.rolling import Roll
from recovery.core.states import State
from recovery.errors import ConfigError, ConflictError
from recovery.ports import Sender, Store
from recovery.queues import host_queue
from recovery.roller import Roller

PREVIOUS = ".previous"
Wait = Callable[[str, Callable[[], bool], float], bool]
"""Shows a text while it waits for a condition, up to some seconds; False = it did not come."""


class Applier:
    """One application of one fleet file. `wait` belongs to whoever shows progress."""

    def __init__(self, store: Store, sender: Sender, roller: Roller, installed: Path, wait: Wait, say: Callable[[str], None]) -> None:
        self._store, self._sender, self._roller = store, sender, roller
        self._installed, self._wait, self._say = installed, wait, say
        self._kept = False

    def plan(self, fleet: Fleet) -> tuple[Action, ...]:
        """What would be done."""
        return actions(self._store.load_all(), fleet)

    def apply(self, source: Path, fleet: Fleet) -> None:
        """Do it; raise `ConflictError` after everything was taken back."""
        todo = self.plan(fleet)
        self._install(source)
        self._join()
        try:
            self._carry_out(todo, fleet)
        except ConflictError as error:
            if not self._take_back():
                raise ConflictError(f"{error}; there is no earlier file to go back to") from None
            self._join()
            touched = tuple(action.instance for action in todo if action.kind == "restart")
            for model in dict.fromkeys(action.model for action in todo if action.kind == "restart"):
                self._roll(model, tuple(row.id for row in self._rows(model) if row.id in touched and row.launched != row.wanted))
            raise ConflictError(f"{error}; the earlier fleet file is in force again") from None

    def _carry_out(self, todo: tuple[Action, ...], fleet: Fleet) -> None:
        added = tuple(action.instance for action in todo if action.kind in ("add", "move"))
        if added:
            self._serving(added, fleet)
        for model in dict.fromkeys(action.model for action in todo if action.kind == "restart"):
            self._roll(model, tuple(action.instance for action in todo if action.model == model and action.kind == "restart"))
        limit = max((spec.drain_timeout_s + spec.stop_grace_s + spec.kill_deadline_s for spec in fleet.models.values()), default=60.0)
        if not self._wait("waiting for the rest to settle", lambda: in_force(self._store.load_all(), fleet), limit + 60.0):
            left = ", ".join(f"{action.kind} {action.instance}" for action in self.plan(fleet))
            self._say(f"not settled yet: {left or 'some replicas do not serve'}; `recovery status` shows how it goes on")

    def _serving(self, instances: tuple[str, ...], fleet: Fleet) -> None:
        """Wait until new instances serve; those of models with autostart off only have to be there."""
        limit = max(spec.startup_timeout_s for spec in fleet.models.values()) + 30.0

        def settled() -> bool:
            rows = {row.id: row for row in self._store.load_many(instances)}
            return len(rows) == len(instances) and all(row.state in (State.HEALTHY, State.STOPPED, State.FAILED) for row in rows.values())

        came = self._wait(f"waiting for {', '.join(instances)}", settled, limit)
        failed = [row for row in self._store.load_many(instances) if row.state is State.FAILED]
        if failed or not came:
            why = f"{failed[0].id}: {failed[0].reason}" if failed else f"{', '.join(instances)} not serving after {limit:.0f} s"
            raise ConflictError(f"cannot bring the new fleet file into force: {why}")

    def _roll(self, model: str, only: tuple[str, ...]) -> Roll | None:
        rows = self._rows(model)
        if not only or not any(row.id in only for row in rows):
            return None
        begun = self._roller.begin(model, only)
        limit = len(only) * max(row.policy.startup_timeout_s + row.policy.drain_timeout_s + row.policy.stop_grace_s for row in rows) + 60.0
        self._wait(f"rolling {model}", lambda: self._ended(model, begun.id), limit)
        roll = self._roller.of(model)
        if roll is None or roll.state != "done":
            raise ConflictError(f"cannot bring the new fleet file into force: {model}: {roll.reason if roll else 'its roll was lost'}")
        return roll

    def _ended(self, model: str, roll_id: str) -> bool:
        roll = self._roller.of(model)
        return roll is None or roll.id != roll_id or roll.state != "running"

    def _rows(self, model: str) -> tuple[Instance, ...]:
        return tuple(row for row in self._store.load_all() if row.model == model and not row.surge)

    def _install(self, source: Path) -> None:
        """Put the file where the hosts read it, and keep the one that was there."""
        if source.resolve() == self._installed.resolve():
            return
        try:
            previous = self._installed.with_name(self._installed.name + PREVIOUS)
            if self._installed.exists():
                previous.write_bytes(self._installed.read_bytes())
                previous.chmod(self._installed.stat().st_mode)
                self._kept = True
            self._write(source.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot install {source} as {self._installed}: {error.strerror}; nothing was changed") from None

    def _take_back(self) -> bool:
        previous = self._installed.with_name(self._installed.name + PREVIOUS)
        if not self._kept:
            return False
        self._write(previous.read_bytes())
        return True

    def _write(self, content: bytes) -> None:
        temporary = self._installed.with_name(f".{self._installed.name}.new")
        temporary.write_bytes(content)
        if self._installed.exists():
            temporary.chmod(self._installed.stat().st_mode)
        temporary.replace(self._installed)

    def _join(self) -> None:
        """Have every host read its file now, and wait until their rows say so."""
        for host in self._store.hosts():
            self._sender.send("recovery.join_host", {}, queue=host_queue(host))
        self._wait("waiting for the hosts to read the file", lambda: self._read_by_all(), 15.0)

    def _read_by_all(self) -> bool:
        from recovery.settings import load_fleet  # the file as it lies there now

        fleet = load_fleet(self._installed, next(iter(self._store.hosts()), None))
        return not any(action.kind in ("add", "rules") for action in self.plan(fleet))
