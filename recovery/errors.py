"""
The error tree. A branch is what the caller can do about it.

Messages begin with "cannot ...", carry the values and say what to do.
"""


class RecoveryError(Exception):
    """Anything this project raises on purpose; its text is fit to be shown to a user."""


class ConfigError(RecoveryError):
    """Fix the fleet file or a setting and run again. `problems` holds one line per fault."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class UnknownModelError(RecoveryError):
    """No model of that id in the fleet."""


class ConflictError(RecoveryError):
    """The command does not fit the present state or policy; the text says which."""


class HostAwayError(RecoveryError):
    """The host that would have to act has no fresh heartbeat."""


class LeaseHeldError(RecoveryError):
    """Somebody else is on it; the next tick looks again."""


class StaleTokenError(RecoveryError):
    """A newer decision exists. Stop: nothing was written."""


class VersionConflictError(RecoveryError):
    """The row moved between read and commit; read and decide again."""


class StoreUnavailableError(RecoveryError):
    """Redis cannot be asked. Nothing is known, so nothing is done."""


class SpawnError(RecoveryError):
    """The server could not be started at all; counts as a failed start. `retry`: whether trying again can help."""

    def __init__(self, message: str, *, retry: bool = True) -> None:
        super().__init__(message)
        self.retry = retry


class DiskError(RecoveryError):
    """The host's own record cannot be read or written; nothing may be started on it."""


class IllegalTransitionError(RecoveryError):
    """The transition table has no such row."""


class SchemaError(RecoveryError):
    """State written by a newer version of this project; upgrade this part first."""


class WebhookError(RecoveryError):
    """The webhook did not take what it was told; tell it again later."""
