"""
The few lines of a vLLM log that count: errors, and the marks of its life (started, ready, serving, shutting down).

An error line is a record of level ERROR or above, the end of a traceback, an unprefixed `SomethingError:` line, argparse's
last word, or a C++ runtime's cry. Everything else is left out, whatever words it holds: prompts are logged at INFO or DEBUG
(each line of a record carries its prefix), warnings speak of OOM that did not happen, and source lines quoted in a traceback
say what could have been raised.

Read: vLLM from 0.2 to 0.32, with the prefixes that Ray, torchrun, docker, compose, kubernetes and journald put before it.
Fast enough for a file of 100 MB: a line without any of the words in `HINTS` costs a few substring searches.
"""

import json
import re
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from typing import Final, NamedTuple


class Kind(Enum):
    """What a line is to a reader who wants to know how the server fared."""

    ERROR = auto()
    STARTED = auto()  # a new process speaks for the first time: what stood before was another life
    READY = auto()
    ANSWERED = auto()  # an access line: it is up, whatever the excerpt left out
    SERVING = auto()  # the engine's regular statistics: whatever went wrong before did not end it
    SHUTDOWN = auto()  # an orderly shutdown begins
    SHUT_DOWN = auto()  # and has ended


class Line(NamedTuple):
    kind: Kind
    text: str
    """The message, without prefixes."""
    raw: str
    """The line as it stood in the log, without colours and the end of line."""


HINTS: Final = (
    "rror", "ERROR", "raceback", "xception", "CRITICAL", "FATAL", "[E", " E ", "atal", "terminate called", "what():", "SIG", "egfault",
    "egmentation", "Killed", "Aborted", "Interrupt", "INFO",
)  # fmt: skip
"""A line that holds none of these is none of `Kind`, unless a traceback is open."""

_INFO_HINTS: Final = ("HTTP/1.", "startup complete", "throughput", "hut", "version ")

_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PREFIX: Final = re.compile(
    r"""(?:
      \[?\d{4}-\d\d-\d\d[T\ ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?\]?\s(?!E\s)  # docker, kubectl --timestamps, Hugging Face
    | (?:stdout|stderr)\ [FP]\ ?                                                          # containerd
    | [A-Z][a-z]{2}\ [\ \d]\d\ \d\d:\d\d:\d\d\ \S+\ \S+?\[\d+\]:\s                        # journald, syslog
    | [\w.-]+\s+\|\s                                                                      # docker compose
    | \s*[|│]\s
    | \((?P<source>[\w.-]+(?:\ [\w=.]+)*?\ pid=\d+(?:,\ ip=[\d.a-f:]+)?)\)\s?              # vLLM and Ray
    | \(raylet\)\s
    | \[rank\d+\]:\s?                                                                     # torch
    )""",
    re.VERBOSE,
)
_RECORD: Final = re.compile(
    r"""(?P<head>(?P<level>DEBUG|INFO|WARN(?:ING)?|ERROR|CRITICAL|FATAL)
      (?: :(?=[\s\w])\s* | \s+ )
      (?: (?:\d{4}-)?\d\d-\d\d\ \d\d:\d\d(?::\d\d)?(?:[.,]\d+)?\s+ )?
      (?: \d+\s+ )?
      (?: \[?[\w./\\-]+\.[a-z]+:\d+[\]:]+(?:\s(?=\s)|\s?) )?
    )(?P<rest>.*)""",
    re.VERBOSE,
)
_EXCEPTION: Final = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Failure|Timeout|Died)(?:\(\w*\))?(?::|$)")
_ARGPARSE: Final = re.compile(r"[\w./-]+(?: [\w-]+)*: error: ")
_NATIVE: Final = re.compile(
    r"""\[E\d*\s | E\d{4}\s\d\d: | \[\d{4}-\d\d-\d\d\s[\d:,]+\sE\s | terminate\ called | \s*what\(\): | NVRM:\ Xid
      | Fatal\ Python\ error | \*\*\*\ SIG[A-Z]+ | !+\ Segfault | Segmentation\ fault | Killed$ | Aborted | Bus\ error""",
    re.VERBOSE,
)
_NATIVE_BELOW_ERROR: Final = re.compile(r"\[?[WI]\d{4} \d\d:|\[[WI] ")
"""A warning of torch's native code. It may stand in the middle of a traceback, and is no part of it."""
_NOT_AN_EVENT: Final = re.compile(r"Dumping |Error with model|Error in preprocessing prompt|Error while (?:processing|validating) request")
"""Records of level ERROR about a request, or that print what was in flight: their text is the client's."""

_ACCESS: Final = re.compile(r'[\w.:\[\]]+ - "[A-Z]+ \S+ HTTP/')

_AFTER_EXCEPTION: Final = 12
"""Lines that an exception's message may go on for (pydantic's and the hub's do)."""


class _Traceback:
    """How far a traceback of one source has come."""

    __slots__ = ("in_frames", "left")

    def __init__(self) -> None:
        self.in_frames = True
        self.left = 0


def plain(line: str) -> str:
    """`line` without its end, colours and docker's JSON."""
    if line.startswith('{"log":'):
        try:
            line = str(json.loads(line)["log"])
        except (ValueError, KeyError):
            return line.rstrip()
    if "\x1b" in line:
        line = _COLOUR.sub("", line)
    return line.rstrip(" \t\r\n│")


def unprefixed(line: str) -> tuple[str, str]:
    """The source that a line names (`EngineCore pid=7`, else empty) and the line without any prefix."""
    source, at = "", 0
    while found := _PREFIX.match(line, at):
        source = found["source"] or source
        at = found.end()
    return source, line[at:]


def read(lines: Iterable[str]) -> Iterator[Line]:
    """The lines that count, in order. Streams: nothing is kept but the open tracebacks, one per process that speaks."""
    open_: dict[str, _Traceback] = {}
    muted: dict[str, str] = {}
    for line in lines:
        if not open_ and not any(hint in line for hint in HINTS):
            continue
        raw = plain(line)
        source, text = unprefixed(raw)
        record = _RECORD.match(text)
        if record is None:
            if _NATIVE_BELOW_ERROR.match(text):
                continue
            if source in open_:
                yield from _in_traceback(open_, source, text, raw)
            elif text.startswith("Traceback (most recent call last)"):
                open_[source] = _Traceback()
            elif _EXCEPTION.match(text) or _ARGPARSE.match(text) or _NATIVE.match(text):
                yield Line(Kind.ERROR, text, raw)
            continue
        level, head, rest = record["level"], record["head"], record["rest"]
        if level not in ("ERROR", "CRITICAL", "FATAL"):
            open_.pop(source, None)
            if level == "INFO" and any(hint in rest for hint in _INFO_HINTS) and (kind := _mark(rest)):
                yield Line(kind, rest, raw)
            continue
        key = f"{source}\0error"
        if _NOT_AN_EVENT.match(rest):
            muted[source] = head
            open_.pop(key, None)
        elif muted.get(source) == head:
            continue
        elif key in open_:
            yield from _in_traceback(open_, key, rest, raw)
        elif rest.startswith("Traceback (most recent call last)"):
            open_[key] = _Traceback()
        else:
            yield Line(Kind.ERROR, rest, raw)


def _in_traceback(open_: dict[str, _Traceback], key: str, text: str, raw: str) -> Iterator[Line]:
    """One more line of the traceback open under `key`: frames are left out, the exception and what it says come through."""
    state = open_[key]
    if text.startswith("Traceback (most recent call last)"):
        state.in_frames = True
    elif state.in_frames:
        if text and text[0] not in " \t^|":
            state.in_frames, state.left = False, _AFTER_EXCEPTION
            yield Line(Kind.ERROR, text, raw)
    else:
        state.left -= 1
        if state.left <= 0:
            del open_[key]
        if text.strip():
            yield Line(Kind.ERROR, text.strip(), raw)


def _mark(text: str) -> Kind | None:
    """Which mark of the server's life an INFO record is, if any."""
    if _ACCESS.match(text):
        return Kind.ANSWERED
    if text.startswith("Application startup complete"):
        return Kind.READY
    if "Avg prompt throughput" in text:
        return Kind.SERVING
    if text.startswith(("vLLM API server version", "vLLM server version")) or ("█" in text and " version " in text):
        return Kind.STARTED
    if text.startswith(("[shutdown] API server: shutdown triggered", "Shutting down")):
        return Kind.SHUTDOWN
    if text.startswith("Application shutdown complete"):
        return Kind.SHUT_DOWN
    return None
