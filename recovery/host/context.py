"""
What the use cases of one host share: its store, its processes, its part of the fleet file, and what it has seen.

The order is always: disk before row, row before deed.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from recovery.committing import Committer
from recovery.core import joining
from recovery.core.decision import Decision, due_at
from recovery.core.fleet import Fleet, InstancePlan, ModelSpec, digest
from recovery.core.fleet_plan import plan
from recovery.core.host import HostRecord, HostView
from recovery.core.instance import Instance, Value
from recovery.core.launch import Launch, launch
from recovery.core.states import State
from recovery.errors import LeaseHeldError
from recovery.host.repairs import Repairs
from recovery.ports import Host, Sender, Store


class Clocks(Value):
    """This host's clocks and chance, handed in so that tests can move them."""

    wall: Callable[[], float]
    chance: Callable[[], float]


class Place(NamedTuple):
    """One instance of the fleet file with what its row carries of the file; worked out once per file."""

    planned: InstancePlan
    spec: ModelSpec
    digest: str
    hosts: tuple[str, ...]


class HostContext:
    """
    One GPU host. Thread-safe: what must not overlap is serialised by `step.lock` and by the row's version.

    `met`: the highest token seen of each instance; `alive`: the run of each that is watched.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        sender: Sender,
        host: Host,
        fleet: Callable[[], Fleet],
        clocks: Clocks,
        operator_env: Mapping[str, str],
        repairs: Repairs,
        on_run: Callable[[str], None] = lambda _instance: None,
    ) -> None:
        self.name = name
        self.store = store
        self.host = host
        self.fleet = fleet
        self.clocks = clocks
        self.repairs = repairs
        self.env = operator_env
        self.committer = Committer(store, sender)
        self.met: dict[str, int] = {}
        self.alive: dict[str, int] = {}
        self._on_run = on_run
        self._planned: tuple[Fleet | None, Mapping[str, Place]] = (None, {})

    # --- rows and records ----------------------------------------------------------------------------------------

    def apply(self, instance_id: str, decide: Callable[[Instance, float], Decision | None], *, send: bool = True) -> Decision | None:
        """Commit what `decide` says of the row, and send what becomes due unless told not to; None: nothing was decided."""

        def caught_up(row: Instance, now: float) -> Decision | None:
            """Redis may have lost its last second: a row that is behind what this host has seen is not decided about as it is."""
            behind = row.token < self.met.get(instance_id, 0)
            return decide(joining.caught_up(row, self.host.read_record(instance_id), now) if behind else row, now)

        decision = self.committer.apply(instance_id, caught_up, send=send)
        return decision if isinstance(decision, Decision) else None

    def write(self, instance_id: str, record: HostRecord) -> None:
        """Put the host's own record on disk; `DiskError` when it cannot be."""
        self.host.write_record(instance_id, record)
        self.met[instance_id] = max(record.token, self.met.get(instance_id, 0))

    def remember(self, row: Instance) -> None:
        """Bring the host's own record up to the row: what it needs to know when Redis has forgotten."""
        self.write(row.id, joining.recorded(row, self.host.read_record(row.id)))

    def raise_row(self, instance_id: str, view: HostView) -> None:
        """Raise a row that is behind to what this host has seen: Redis lost its last second, or everything."""

        def decide(row: Instance, now: float) -> Decision:
            after = joining.caught_up(row, view.record, now)
            if after.state is State.RESTARTING and after.token != row.token:
                after = after.evolve(lease_until=0.0, **due_at(now))  # the message of the higher token is lost
            return Decision(after=after, reason="raised to the host's record")

        self.apply(instance_id, decide)

    def forget(self, row: Instance) -> None:
        """Delete a row that is at rest and has left the fleet; its token stays on disk."""
        self.write(row.id, joining.forgotten(self.host.read_record(row.id)))
        self.store.delete(row.id)

    def lives(self, instance_id: str, token: int) -> None:
        """A run's server lives: have its keeper watched."""
        self.alive[instance_id] = token
        self._on_run(instance_id)

    def fits(self, row: Instance) -> bool:
        """Whether the row says what this host last saw: nothing newer on disk, and its run is the one that is watched."""
        return self.met.get(row.id, -1) in range(row.token + 1) and self.alive.get(row.id) == row.run

    def places(self, fleet: Fleet) -> Mapping[str, Place]:
        """Every instance of the file, by id."""
        if self._planned[0] is not fleet:
            specs = fleet.models
            digests = {model: digest(spec) for model, spec in specs.items()}
            hosts = {model: fleet.hosts_of(spec) for model, spec in specs.items()}
            places = {each.id: Place(each, specs[each.model], digests[each.model], hosts[each.model]) for each in plan(fleet)}
            self._planned = (fleet, places)
        return self._planned[1]

    def spec_of(self, row: Instance) -> tuple[Fleet, InstancePlan, ModelSpec] | None:
        """What the file says of a row; None when it says nothing, or that the row belongs to another host."""
        fleet = self.fleet()
        spec = fleet.models.get(row.model)
        if spec is None:
            return None
        if row.surge:
            return fleet, InstancePlan(id=row.id, model=row.model, replica=row.replica, placement=row.planned or row.placement), spec
        place = self.places(fleet).get(row.id)
        if place is None or (place.planned.placement.host != self.name and not self.may_stay(row, fleet)):
            return None
        return fleet, place.planned, spec

    def may_stay(self, row: Instance, fleet: Fleet) -> bool:
        """Rows on this host that its plan does not name: one that serves during a roll, one that was moved here."""
        spec = fleet.models.get(row.model)
        if spec is None:
            return False
        if row.surge:
            roll = self.store.get(f"roll:{row.model}")
            return roll is not None and roll["state"] == "running"
        return spec.reschedule and self.name in fleet.hosts_of(spec) and row.id in self.places(fleet)

    def launch_of(self, row: Instance) -> Launch | None:
        """How the row's run was or would be started; None when this host's file does not know its model."""
        found = self.spec_of(row)
        return launch(found[2], row.placement, row.overrides, self.env) if found else None

    def end_all(self, instance_id: str, view: HostView) -> None:
        """SIGKILL to everything of the instance, the live run included; also to a keeper that does not act though its server is dead."""
        if view.run is not None:
            self.host.kill(instance_id, view.run.token)
            if view.keeper_alive and not view.server_alive and not view.strays:
                self.host.end_keeper(instance_id, view.run.token)
        self.host.end_strays(instance_id)

    def end_left_overs(self) -> None:
        """SIGKILL to what is left of any instance's runs that are over: it may hold the card or the port that another needs."""
        for instance_id in self.host.instances():
            with contextlib.suppress(LeaseHeldError), self.host.step_lock(instance_id):
                self.host.end_strays(instance_id)

    def tokens(self) -> Mapping[str, int]:
        """The highest token this host has seen of each instance it has had to do with."""
        return dict(self.met)
