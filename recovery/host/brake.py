"""Limits on simultaneous loads, and the fleet brake: what makes a start wait though nothing of its own is in the way."""

from recovery.core import braking
from recovery.core.change import ModelEvent
from recovery.core.decision import Decision
from recovery.core.fleet import Fleet
from recovery.core.instance import Instance
from recovery.host.context import HostContext


class FleetBrake:
    """Asks for the brake, puts it on and lets it go."""

    def __init__(self, here: HostContext) -> None:
        self._here = here

    def why_wait(self, row: Instance, fleet: Fleet, now: float) -> str | None:
        """Why a start has to wait for others; None when it need not."""
        brake = self._brake()
        rows = self._here.store.load_all()
        if brake is not None and brake.released_at is None and braking.over((other for other in rows if other.id != row.id), brake):
            self._here.store.put(braking.BRAKE_KEY, brake.evolve(released_at=now).model_dump(mode="json"), braking.BRAKE_TTL_S)
        return braking.why_wait(row, rows, fleet, brake, now)

    def put_on(self, decision: Decision) -> None:
        """After a failure: stop mass repair if many instances failed with this one cause."""
        if decision.failure is None:
            return
        cause = decision.failure.cause
        brake = braking.should_brake(self._here.store.load_all(), cause, self._here.fleet(), self._brake(), self._here.store.now())
        if brake is not None:
            self._here.store.put(braking.BRAKE_KEY, brake.model_dump(mode="json"), braking.BRAKE_TTL_S)
            text = f"fleet brake put on: {len(brake.instances)} instances failed with {cause}; `recovery brake release` lifts it"
            self._here.store.add_event(
                decision.after.model, ModelEvent(kind="brake", text=text, data={"cause": cause, "instances": list(brake.instances)})
            )

    def _brake(self) -> braking.Brake | None:
        found = self._here.store.get(braking.BRAKE_KEY)
        return braking.Brake.model_validate(found) if found is not None else None
