"""Which fault comes when: a pure function of the seed. How fast the machine is decides only how long it takes."""

import random
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What can be done to an installation."""

    SERVER_KILLED = "server killed"
    SERVER_CRASHED = "server crashed"
    SERVER_OOM = "server out of memory"
    SERVER_FROZEN = "server frozen"
    ENGINE_KILLED = "engine killed"
    ENGINE_FROZEN = "engine frozen"
    KEEPER_KILLED = "keeper killed"
    KEEPER_AND_SERVER_KILLED = "keeper and server killed"
    KEEPER_FROZEN = "keeper frozen"
    HOST_KILLED = "host worker killed"
    HOST_FROZEN = "host worker frozen"
    HOST_DOUBLED = "second host worker"
    HOST_HALF_OPEN = "half-open connections"
    CONTROL_KILLED = "control worker killed"
    CONTROL_FROZEN = "control worker frozen"
    BEAT_KILLED = "clock killed"
    BEAT_FROZEN = "clock frozen"
    API_KILLED = "api killed"
    API_FROZEN = "api frozen"
    PARTS_KILLED = "all parts killed"
    REDIS_KILLED = "redis killed"
    REDIS_FROZEN = "redis frozen"
    REDIS_FORGOT = "redis lost its last second"
    REDIS_WIPED = "redis wiped"
    DISK_FULL = "log disk full"
    OPERATOR_RESTART = "restart by the operator"
    OPERATOR_STOP = "stop and start by the operator"


class Planned(NamedTuple):
    """One fault to come. `target` picks among what there is then; `hold_s` is how long it lasts, `pause_s` what follows it."""

    kind: Kind
    target: int
    hold_s: float
    pause_s: float
    settle: bool
    """Whether the next fault waits until all is well again; else it comes on top of this one."""


LONG_HOLDS = frozenset({Kind.HOST_DOUBLED})
HOLD_S, LONG_HOLD_S = (0.5, 6.0), (5.0, 12.0)
PAUSE_S = (0.0, 2.0)
ON_TOP = 0.4
"""Share of faults that do not wait for the end of the one before."""


def plan(seed: int, kinds: Sequence[Kind] = tuple(Kind)) -> Iterator[Planned]:
    """Faults without end: each kind once in every round, in an order that differs from round to round."""
    chance = random.Random(seed)
    while True:
        for kind in chance.sample(list(kinds), len(kinds)):
            low, high = LONG_HOLD_S if kind in LONG_HOLDS else HOLD_S
            yield Planned(kind, chance.randrange(1000), chance.uniform(low, high), chance.uniform(*PAUSE_S), chance.random() >= ON_TOP)
