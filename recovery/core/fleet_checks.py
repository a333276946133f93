"""What must hold between the fields of a fleet file, each fault explained. Nothing here: filled in the next commit."""

from collections.abc import Mapping

from recovery.core.fleet import Fleet, ModelSpec


def problems_of(fleet: Fleet, models: Mapping[str, ModelSpec]) -> tuple[str, ...]:
    """One line per fault."""
    return ()
