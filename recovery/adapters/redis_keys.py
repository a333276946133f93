"""
The names of all keys, and how many or how long each is kept. No key grows without one of the two.
"""

from recovery.core.change import Incident

CHANGES_KEPT = 10_000
"""Entries of the change stream: at 100 commits/s, 100 s for a reader to come back without a new snapshot."""
EVENTS_KEPT = 1_000
"""Lines of one model's history."""
INCIDENTS_KEPT = 1_000
"""Incidents of the whole fleet; the oldest go first."""
HISTORY_TTL_S = 90 * 24 * 3600
"""How long incidents and the history of a model are kept after their last line."""
SEEN_TTL_S = 24 * 3600
"""How long a host that went away is still shown."""


class Keys:
    """The names of the keys under one prefix."""

    def __init__(self, prefix: str) -> None:
        self.rows = f"{prefix}:rows"  # set of ids: bounded by the fleet
        self.queue_hosts = f"{prefix}:queue_hosts"  # set of hosts with a due or looks set: bounded by the fleet
        self.changes = f"{prefix}:changes"  # stream: CHANGES_KEPT
        self.counters = f"{prefix}:counters"  # hash: bounded by the labels in use
        self.incidents = f"{prefix}:incidents"  # sorted set by opened_at: INCIDENTS_KEPT
        self.hosts = f"{prefix}:hosts"  # sorted set by last heartbeat: SEEN_TTL_S
        self.values = f"{prefix}:values"  # sorted set of small values by their end: as long as they
        self.row_stem = f"{prefix}:row:"  # hash: bounded by the fleet
        self.due_stem = f"{prefix}:due:"  # sorted set per host: bounded by the fleet
        self.looks_stem = f"{prefix}:looks:"  # sorted set per host: bounded by the fleet
        self.events_stem = f"{prefix}:events:"  # stream per model: EVENTS_KEPT and HISTORY_TTL_S
        self.incident_stem = f"{prefix}:incident:"  # JSON: HISTORY_TTL_S
        self.host_stem = f"{prefix}:host:"  # JSON: SEEN_TTL_S
        self.value_stem = f"{prefix}:value:"  # JSON: its own TTL
        self.once_stem = f"{prefix}:once:"  # its own TTL

    def row(self, instance_id: str) -> str:
        """The hash of one instance."""
        return self.row_stem + instance_id

    def queue(self, queue: str, host: str) -> str:
        """The sorted set of a host: `steps` (stored as due:) or `looks`."""
        return (self.due_stem if queue == "steps" else self.looks_stem) + host

    def events(self, model: str) -> str:
        """The history of one model."""
        return self.events_stem + model


def incident_member(incident: Incident) -> str:
    """The incident's entry in the index: its id and its model, so that one model's are found without reading the rest."""
    return f"{incident.id} {incident.model}"
