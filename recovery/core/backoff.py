"""How long to wait before a restart."""

from typing import Final

from recovery.core.fleet import Policy

MAX_DOUBLINGS: Final = 64
"""Beyond this no cap below the age of the universe is out of reach; it keeps the power a float."""


def delay_s(attempt: int, policy: Policy, u: float) -> float:
    """
    Seconds between a failure and the restart that follows `attempt` earlier ones (the first has 0).

    `restart_delay * 2^attempt`: 5, 10, 20, 40, 80, 160 with the defaults (FAILURE-MODES.md, 1b). Up to `restart_jitter` of it is
    added, so that what died together does not come back together, and `max_restart_delay` caps the sum. The caller draws `u` in [0, 1).
    """
    doubled = policy.restart_delay * 2.0 ** min(max(attempt, 0), MAX_DOUBLINGS)
    return min(policy.max_restart_delay, doubled * (1.0 + u * policy.restart_jitter))
