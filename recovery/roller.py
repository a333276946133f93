"""Rolls and what they need: begin one, and advance all of them, a step each tick."""

from collections.abc import Callable
from typing import Any

from recovery.committing import Committer
from recovery.core.change import ModelEvent
from recovery.core.commanding import Command, Verb, on_command
from recovery.core.decision import Decision, due_at, new_token
from recovery.core.fleet import Fleet, ModelSpec, Placement, instance_id
from recovery.core.fleet_plan import spare_ports, uses
from recovery.core.instance import Desired, Instance
from recovery.core.rolling import ROLL_TTL_S, Roll, RollStep, next_step
from recovery.core.states import State
from recovery.errors import ConflictError, UnknownModelError, VersionConflictError
from recovery.ports import Store

ROLLS = "roll:"


class Roller:
    """Rolling restarts. All state is in Redis; whoever ticks advances them."""

    def __init__(self, store: Store, committer: Committer, fleet: Callable[[], Fleet] | None) -> None:
        self._store, self._committer, self._fleet = store, committer, fleet

    def begin(self, model: str, only: tuple[str, ...] = ()) -> Roll:
        """
        Begin a roll of a model's replicas (`only` these when given); return the one under way if there is one.

        Raises `UnknownModelError`, and `ConflictError` when no replica is wanted running.
        """
        under_way = self.of(model)
        if under_way is not None and under_way.state == "running":
            return under_way
        rows = self._rows(model)
        if not rows:
            raise UnknownModelError(f"cannot roll {model[:80]!r}: there is no such model in the fleet")
        order = tuple(row.id for row in rows if row.desired is Desired.RUNNING and (not only or row.id in only))
        if not order:
            raise ConflictError(f"cannot roll {model!r}: none of its replicas is wanted running; start it first")
        now = self._store.now()
        surge = self._spare_place(rows) if len(rows) == 1 else None
        roll = Roll(
            model=model,
            id=f"{model}-{int(now * 1000)}",
            started_at=now,
            order=order,
            surge=surge,
            surge_id=instance_id(model, surge.replica) if surge is not None else None,
            reason="begun",
        )
        self._keep(roll)
        self._say(roll, f"roll begun: {', '.join(order)}" + (", a second replica first" if surge else ""))
        return roll

    def of(self, model: str) -> Roll | None:
        """Return the last roll of a model, if it is still remembered."""
        found = self._store.get(f"{ROLLS}{model}")
        return Roll.model_validate(found) if found is not None else None

    def advance(self) -> None:
        """Take the next step of every roll under way."""
        for found in self._store.get_many(ROLLS).values():
            roll = Roll.model_validate(found)
            if roll.state == "running" and self._store.once(f"rolling:{roll.model}", 400):
                self._act(next_step(roll, self._rows(roll.model), self._store.now()), roll)

    def _act(self, step: RollStep, before: Roll) -> None:
        roll = step.roll
        match step.kind:
            case "restart" if step.instance is not None:
                decision = self._command(step.instance, Command(verb=Verb.RESTART, override=True, by="roll"))
                roll = roll.evolve(token=decision.after.token if decision is not None else None)
            case "surge" if step.instance is not None and roll.surge is not None:
                self._make_surge(roll)
            case "drop_surge" if step.instance is not None:
                self._command(step.instance, Command(verb=Verb.STOP, by="roll"))
            case "finish":
                self._say(roll, f"roll {roll.state}: {roll.reason}")
            case _:
                pass
        if roll != before:
            self._keep(roll)

    def _command(self, instance: str, command: Command) -> Decision | None:
        decision = self._committer.apply(instance, lambda row, now: on_command(row, command, now))
        return decision if isinstance(decision, Decision) else None

    def _make_surge(self, roll: Roll) -> None:
        """The row of the replica that serves meanwhile; its host starts it like any other."""
        first = self._rows(roll.model)[0]
        now = self._store.now()
        row = Instance(
            id=roll.surge_id,
            model=roll.model,
            replica=roll.surge.replica if roll.surge is not None else 1,
            surge=True,
            policy=first.policy,
            placement=roll.surge,
            planned=roll.surge,
            hosts=first.hosts,
            spec_digest=first.spec_digest,
            wanted=first.wanted,
            desired=Desired.RUNNING,
            state=State.RESTARTING,
            entered_at=now,
            token=new_token(first, now),
            reason="serves while the model is rolled",
            **due_at(now),
        )
        try:
            self._committer.create(row)
        except VersionConflictError:
            return

    def _spare_place(self, rows: tuple[Instance, ...]) -> Placement | None:
        """Where a second replica of a one-replica model may serve: a spare port, and cards with room (or none at all)."""
        row = rows[0]
        spec = self._spec(row.model)
        if self._fleet is None or spec is None or not uses(spec, "port") or not self._room_on_cards(row):
            return None
        ports = [port for port in spare_ports(self._fleet(), row.model, row.placement.host) if port != row.placement.port]
        return row.placement.model_copy(update={"port": ports[0], "replica": row.replica + 1}) if ports else None

    def _room_on_cards(self, row: Instance) -> bool:
        if not row.placement.gpus:
            return True
        readings: dict[int, Any] = {int(card["index"]): card for card in self._store.hosts().get(row.placement.host, {}).get("gpus", ())}
        cards = [readings.get(gpu) for gpu in row.placement.gpus]
        return all(card is not None and card["total_bytes"] - card["used_bytes"] > card["used_bytes"] for card in cards)

    def _spec(self, model: str) -> ModelSpec | None:
        return self._fleet().models.get(model) if self._fleet is not None else None

    def _rows(self, model: str) -> tuple[Instance, ...]:
        return tuple(sorted((row for row in self._store.load_all() if row.model == model), key=lambda row: row.replica))

    def _keep(self, roll: Roll) -> None:
        self._store.put(f"{ROLLS}{roll.model}", roll.model_dump(mode="json"), ROLL_TTL_S)

    def _say(self, roll: Roll, text: str) -> None:
        self._store.add_event(roll.model, ModelEvent(kind="roll", text=text, data={"roll": roll.id, "state": roll.state}))
