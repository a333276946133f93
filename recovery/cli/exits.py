"""What the exit codes mean."""

from enum import IntEnum

from recovery.errors import ConfigError, HostAwayError, RecoveryError, StoreUnavailableError, UnknownModelError


class Exit(IntEnum):
    """Exit codes; the README prints this list."""

    OK = 0
    REFUSED = 1
    USAGE = 2
    UNKNOWN_MODEL = 3
    AWAY = 4
    TIMED_OUT = 5
    INTERRUPTED = 130


MEANINGS = {
    Exit.OK: "done",
    Exit.REFUSED: "refused, or it failed; the text says why",
    Exit.USAGE: "arguments, settings or a fleet file that cannot be used",
    Exit.UNKNOWN_MODEL: "no such model, instance or incident",
    Exit.AWAY: "Redis or the model's host cannot be reached",
    Exit.TIMED_OUT: "no answer, or no outcome, in time; the command may still be carried out",
    Exit.INTERRUPTED: "ended by Ctrl-C",
}

EXIT_HELP = "Exit codes: " + ", ".join(f"{code.value} {text}" for code, text in MEANINGS.items()) + "."


class TimedOutError(RecoveryError):
    """Nobody answered in time, or the outcome did not come."""


class UnknownNameError(RecoveryError):
    """No instance or incident of that name."""


def exit_of(error: RecoveryError) -> Exit:
    """The exit code of an error."""
    match error:
        case ConfigError():
            return Exit.USAGE
        case UnknownModelError() | UnknownNameError():
            return Exit.UNKNOWN_MODEL
        case StoreUnavailableError() | HostAwayError():
            return Exit.AWAY
        case TimedOutError():
            return Exit.TIMED_OUT
        case _:
            return Exit.REFUSED
