"""Joining: Redis, the fleet file and this host's disk and processes are made to agree, whatever any of them missed."""

import contextlib
from collections.abc import Iterator

from recovery.core import joining, stepping
from recovery.core.failing import on_exit
from recovery.core.host import ExitRecord, HostView
from recovery.core.instance import Desired, Instance
from recovery.core.launch import launch
from recovery.core.states import AT_REST
from recovery.errors import DiskError, LeaseHeldError, SchemaError, SpawnError, VersionConflictError
from recovery.host.context import HostContext, Place
from recovery.host.ends import Ended, Ends


class Joins:
    """Brings this host into the fleet, at its start and again and again."""

    def __init__(self, here: HostContext, ends: Ends) -> None:
        self._here = here
        self._ends = ends

    def join(self) -> dict[str, str]:
        """
        Bring Redis and this host together: rows for what the file and the disk know, ends reported, servers taken over.

        Called before the first heartbeat and every few seconds. Only an instance whose row does not fit what this host
        knows of it is looked at, so that a hundred healthy ones cost milliseconds. One that cannot be joined hinders no
        other: its problem is in the answer, by its id.
        """
        fleet = self._here.fleet()
        places = self._here.places(fleet)
        rows = {row.id: row for row in self._here.store.load_all()}
        problems: dict[str, str] = {}
        for instance_id, place in places.items():
            if place.planned.placement.host == self._here.name:
                with self._alone(instance_id, problems):
                    self._join_one(place, rows.get(instance_id))
        for row in rows.values():
            at = places.get(row.id)
            if row.placement.host == self._here.name and (at is None or at.planned.placement.host != self._here.name):
                with self._alone(row.id, problems):
                    self.reconcile(row.id) if self._here.may_stay(row, fleet) else self._retire(row)
        return problems

    @contextlib.contextmanager
    def _alone(self, instance_id: str, problems: dict[str, str]) -> Iterator[None]:
        """What cannot be done for one instance (its folder is full, damaged or walled off) is said in its row, and delays no other."""
        try:
            yield
        except (DiskError, SchemaError, SpawnError) as error:
            problems[instance_id] = text = str(error)
            self._here.apply(instance_id, lambda row, _: joining.hindered(row, text))

    def _join_one(self, place: Place, row: Instance | None) -> None:
        planned, spec = place.planned, place.spec
        if row is not None and row.placement.host != self._here.name:
            self._yield(row)
            return
        if row is None:
            view = self._here.host.look(planned.id)
            at, overrides = joining.last_place(planned, view.record)
            url = launch(spec, at, overrides, self._here.env).base_url
            known = planned.id in self._here.host.instances()
            made = joining.new_row(
                planned, spec, digest=place.digest, base_url=url, hosts=place.hosts, view=view, known=known, now=self._here.store.now()
            )
            try:
                row = self._here.committer.create(made)
            except VersionConflictError:
                return
        elif row.spec_digest != place.digest or row.hosts != place.hosts or (row.run is None and row.planned != planned.placement):
            url = launch(spec, planned.placement, (), self._here.env).base_url
            self._here.apply(
                row.id,
                lambda now_row, _: joining.changed(now_row, planned, spec, digest=place.digest, base_url=url, hosts=place.hosts),
            )
        if not self._here.fits(row):
            self.reconcile(row.id)

    def _yield(self, row: Instance) -> None:
        """A row that lives on another host now: whatever this host still has of it is older and goes."""
        try:
            with self._here.host.step_lock(row.id):
                view = self._here.host.look(row.id)
                if view.run is not None and view.run.token < row.token and (view.server_alive or view.strays):
                    self._here.end_all(row.id, view)
        except LeaseHeldError:
            return

    def _retire(self, row: Instance) -> None:
        """A row whose model left the file: stopped first, then forgotten."""
        if row.state in AT_REST and not self._here.host.look(row.id).server_alive:
            self._here.forget(row)
            return
        if row.desired is not Desired.STOPPED:
            self._here.apply(row.id, joining.retired)

    def reconcile(self, instance_id: str) -> None:
        """Make row and processes agree where no message did: an end nobody reported, a keeper that died, a run nobody watches."""
        try:
            with self._here.host.step_lock(instance_id):
                view = self._here.host.look(instance_id)
                ended = self._reconcile(instance_id, view)
        except LeaseHeldError:
            return
        if ended is not None:
            self._ends.afterwards(ended, view)

    def _reconcile(self, instance_id: str, view: HostView) -> Ended | None:
        if view.server_alive and not view.keeper_alive:
            self._here.host.adopt(instance_id)
        self._here.met[instance_id] = max(view.record.token, self._here.met.get(instance_id, 0))
        row = self._here.store.load(instance_id)
        if row is None:
            return None
        if view.record.token > row.token:
            self._here.raise_row(instance_id, view)
        ended = self._ends.report(instance_id, view)
        if ended is not None:
            return ended
        if view.run is not None and (view.keeper_alive or view.server_alive):
            token = view.run.token
            if view.server_alive:
                self._here.apply(instance_id, lambda now_row, now: stepping.found(now_row, token, now))
            self._here.lives(instance_id, token)
            return None
        self._here.alive.pop(instance_id, None)
        if row.run is not None and view.run is None:
            lost = ExitRecord(token=row.run, at=self._here.clocks.wall(), unknown=True, reason="no trace of it on this host")
            seen = self._ends.exit_seen(row, lost, view, self._here.store.now())
            self._here.apply(instance_id, lambda now_row, now: on_exit(now_row, seen, now, self._here.clocks.chance()))
        return None
