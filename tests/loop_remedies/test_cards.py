"""What is done about a card: another one after repeated failures, none at all once it is lost."""

from pathlib import Path

from tests.helpers import wait_until
from tests.loop.fleet import Fleet
from tests.loop.plane import PATIENCE_S
from tests.loop_remedies.conftest import Cards
from tests.loop_remedies.test_remedies import closed, kinds, newest

FAILS = ("--serve-error-after", "1.5", "--serve-error")


def test_illegal_access_again_and_again_moves_to_another_card(fleet: Fleet, cards: Cards) -> None:
    """
    Two restarts on its card, then another card of its pool that nobody has; its neighbour keeps its own.
    """
    fleet.model("neighbour", gpus=[1]).serves()
    one = fleet.model("illegal", *FAILS, "illegal", gpus=[0, 1, 2], gpus_per_replica=1, max_restarts=4, restart_delay=0.05, validate_s=30)

    one.until(lambda row: row.placement.gpus == (2,))
    row = one.row
    assert row.sees["illegal_access@0"] == 3
    assert "moving from GPU 0 to GPU 2" in row.reason or one.state in ("starting", "healthy")
    one.serves()
    env = dict(line.split("=", 1) for line in _environ(one.pid) if "=" in line)
    assert env["CUDA_VISIBLE_DEVICES"] == "2"
    wait_until(lambda: kinds(newest(one))[:3], ["restart", "restart", "other_gpu"], within_s=PATIENCE_S)


def test_a_lost_card_gets_no_restart(fleet: Fleet, cards: Cards) -> None:
    """
    Xid 79: another card at once; where there is none, a human, and not one start on the lost card.
    """
    one = fleet.model("off-the-bus", gpus=[0, 3], gpus_per_replica=1)
    first = one.serves()
    cards.xid(0, 79)
    one.kill()
    one.serves(but=first)

    incident = closed(one)
    assert (incident.cause, kinds(incident), one.row.placement.gpus) == ("gpu_lost", ["other_gpu"], (3,))
    assert "Xid 79" in str(incident.evidence)

    second = one.pid
    cards.xid(3, 95)
    starts = one.starts
    one.kill()
    row = one.reaches("failed")
    assert "Xid 95" in row.reason and "no other to move to" in row.reason
    assert (one.starts, one.server, second) == (starts, None, second)


def test_another_models_lost_card_is_no_cause(fleet: Fleet, cards: Cards) -> None:
    cards.lose(1)
    try:
        one = fleet.model("elsewhere", gpus=[2])
        first = one.serves()
        one.kill()
        one.serves(but=first)
        assert closed(one).cause == "killed"
    finally:
        cards.lose()


def _environ(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
