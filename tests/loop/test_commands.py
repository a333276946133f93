"""What an operator asks for happens, in whatever state the server is, and nothing else is delayed by it."""

import signal
import sys

from tests.loop.fleet import Fleet, gone
from tests.loop.plane import wait_until


def test_a_stop_ends_it_in_good_order_and_it_stays_down(fleet: Fleet) -> None:
    one = fleet.model("stopped")
    pid = one.serves()

    answer = one.command("stop", by="test")

    assert answer["accepted"] and answer["instances"][0]["instance"] == one.instance
    row = one.reaches("stopped")
    assert gone(pid) and row.desired.value == "stopped" and row.restart_count == 0
    assert [line["code"] for line in one.lines if line["event"] == "exit"] == [0]  # SIGTERM, not SIGKILL
    fleet.plane.ticked()
    assert (one.state, one.starts) == ("stopped", 1)


def test_a_stop_during_load(fleet: Fleet) -> None:
    """
    vLLM may lose a SIGTERM while it loads: the second one ends it, long before the grace is over.
    """
    one = fleet.model("stopped-in-load", "--load-s", "1000", "--lose-sigterm", stop_grace_s=600)
    one.reaches("starting")
    wait_until(lambda: "EngineCore" in one.log)  # its handlers are in place
    pid = one.pid

    one.command("stop")

    row = one.reaches("stopped")
    assert gone(pid) and (row.restart_count, one.starts) == (0, 1)
    assert "killing" not in one.history


def test_a_stop_while_a_restart_is_due(fleet: Fleet) -> None:
    one = fleet.model("stopped-in-backoff", restart_delay=600, max_restart_delay=600)
    one.serves()
    one.kill()
    one.reaches("restarting")

    one.command("stop")

    row = one.reaches("stopped")
    fleet.plane.ticked()
    assert (one.state, one.starts, row.restart_count) == ("stopped", 1, 1)


def test_a_stop_of_a_server_that_ignores_sigterm(fleet: Fleet) -> None:
    """
    SIGKILL after the grace, engine and all; a death by signal 9 is no reason to start it again.
    """
    one = fleet.model("stubborn", "--ignore-sigterm", stop_grace_s=1)
    pid = one.serves()
    engine = one.engine

    one.command("stop")

    row = one.reaches("stopped")
    assert gone(pid) and gone(engine)
    assert "killing" in one.history and row.restart_count == 0
    fleet.plane.ticked()
    assert (one.state, one.starts) == ("stopped", 1)


def test_a_forced_stop_stays_down_or_counts_as_a_crash(fleet: Fleet) -> None:
    """
    `force` with `stay_down`: SIGKILL, and down. Without: as a crash, restarted by policy.
    """
    one = fleet.model("forced", "--ignore-sigterm", stop_grace_s=600)
    first = one.serves()

    assert one.command("stop", force=True, stay_down=False)["accepted"]
    one.serves(but=first)
    assert (one.row.restart_count, one.row.used) == (1, 1)

    assert one.command("stop", force=True)["accepted"]
    one.reaches("stopped")
    fleet.plane.ticked()
    assert (one.state, one.starts) == ("stopped", 2)


def test_a_stop_of_a_hung_server(fleet: Fleet) -> None:
    """
    A server under SIGSTOP takes no SIGTERM; its stop ends all the same.
    """
    one = fleet.model("frozen", stop_grace_s=1, restart_policy="no")
    pid = one.serves()
    one.kill(signal.SIGSTOP)

    one.command("stop")

    one.reaches("stopped")
    assert gone(pid)


def test_a_manual_restart_uses_no_budget(fleet: Fleet) -> None:
    one = fleet.model("restarted", max_restarts=1)
    first = one.serves()

    token = one.command("restart")["token"]

    second = one.serves(but=first)
    row = one.row
    assert row.run is not None and row.run >= token
    assert (row.restart_count, row.used, row.manual, row.restarts_total) == (1, 0, 1, 1)
    one.kill()
    one.serves(but=second)
    assert (one.row.restart_count, one.row.used) == (2, 1)
    assert (one.starts, one.overlaps) == (3, [])


def test_twenty_that_ignore_sigterm_stop_at_once(fleet: Fleet) -> None:
    """
    While all twenty are in their grace, a neighbour is looked at, killed and repaired as ever; then all twenty are killed at once.
    """
    crowd = fleet.model("crowd", "--engine", "none", "--ignore-sigterm", replicas=20, stop_grace_s=600, join=False, completion_check=False)
    one = fleet.model("neighbour")

    def states() -> set[str]:
        return {row.state.value for row in fleet.plane.store.load_all() if row.model == crowd.id}

    wait_until(states, {"healthy"}, within_s=120)
    first = one.serves()

    crowd.command("stop")

    wait_until(states, {"stopping"})
    one.looked(3)
    one.kill()
    one.serves(but=first)
    assert states() == {"stopping"}

    fleet.change(crowd, stop_grace_s=1)
    wait_until(states, {"stopped"})
    assert not [name for name in fleet.plane.host.instances() if name.startswith("crowd-") and fleet.plane.view(name).server_alive]


def test_a_long_backoff_delays_nobody(fleet: Fleet) -> None:
    """
    One waits 160 s and more for its restart, another is killed and repaired meanwhile, and a start ends the wait.
    """
    slow = fleet.model("slow", restart_delay=160, max_restart_delay=600, join=False)
    quick = fleet.model("quick")
    slow.serves()
    first = quick.serves()

    slow.kill()
    row = slow.reaches("restarting")
    assert row.not_before - row.entered_at > 100
    for _ in range(2):
        quick.kill()
        first = quick.serves(but=first)
    assert (slow.state, slow.starts, quick.row.used) == ("restarting", 1, 2)

    slow.command("start")
    slow.serves()


def test_an_unknown_model_is_named_with_those_there_are(fleet: Fleet) -> None:
    one = fleet.model("known")
    one.serves()

    for verb in ("start", "stop", "restart", "check", "reset"):
        answer = fleet.plane.call(f"recovery.{verb}", "unknown")
        assert (answer["accepted"], answer["status"]) == (False, "unknown_model")
        assert "cannot find a model 'unknown'" in answer["reason"] and "known" in answer["reason"]

    answer = fleet.plane.call("recovery.stop", {"model": "known"})
    assert answer["status"] == "refused" and "the model id must be a text" in answer["reason"]
    answer = fleet.plane.call("recovery.stop", "known", force="perhaps")
    assert answer["status"] == "refused" and "cannot read the arguments" in answer["reason"]
    assert one.state == "healthy"


def test_a_command_that_does_not_exist(fleet: Fleet) -> None:
    """
    A failed start with a named error, retried from its budget and given up; another model keeps running.
    """
    other = fleet.model("other", join=False)
    one = fleet.model("missing", command="/no/such/vllm", max_restarts=2)

    row = one.reaches("failed")

    assert "/no/such/vllm" in row.reason and "correct the command in the fleet file" in row.last_exit.evidence  # type: ignore[union-attr]
    assert (row.restart_count, row.last_exit.cause) == (2, "spawn_failed")  # type: ignore[union-attr]
    assert other.serves() and other.row.restart_count == 0

    fleet.change(one, command=sys.executable)
    one.command("reset")
    one.serves()


def test_a_folder_that_cannot_be_used_holds_up_nobody_else(fleet: Fleet) -> None:
    """
    One instance's records cannot be kept: its row says where and what to do, and the rest of the host's fleet is repaired as ever.
    """
    folder = fleet.plane.home / "instances" / "walled-0"
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("")  # root can write into any directory, but not below a file
    try:
        one = fleet.model("walled", join=False)
        other = fleet.model("beside")
        first = other.serves()
        one.until(lambda row: str(folder) in row.reason and "mend the permissions" in row.reason)
        other.kill()
        other.serves(but=first)
        assert one.row.restart_count == 0
    finally:
        folder.unlink(missing_ok=True)
    one.serves()


def test_a_log_folder_that_cannot_be_written(fleet: Fleet) -> None:
    """
    A failed start that names the file, tried again from the budget; it serves when the folder is mended.
    """
    one = fleet.model("no-logs", max_restarts=0, max_restart_delay=1, join=False)
    other = fleet.model("logs")
    first = one.serves()
    runs = fleet.plane.home / "instances" / one.instance / "runs"
    runs.rename(runs.with_name("kept"))
    runs.symlink_to("/sys")  # where not even root can make a file

    one.kill()

    row = one.until(lambda row: row.last_exit is not None and row.last_exit.cause == "spawn_failed")
    assert "/runs/" in row.reason and "mend the permissions" in row.reason
    one.until(lambda row: row.used >= 3)
    other.kill()
    other.serves()

    runs.unlink()
    runs.with_name("kept").rename(runs)
    one.serves(but=first)


def test_a_full_disk(fleet: Fleet) -> None:
    """
    No space for the record of a start: nothing is started, the row says why, and it serves when there is space again.
    """
    one = fleet.model("full", max_restarts=0, max_restart_delay=1, join=False)
    other = fleet.model("dry")
    first = one.serves()
    record = fleet.plane.home / "instances" / one.instance / ".host.json.tmp"
    record.symlink_to("/dev/full")

    one.kill()

    one.until(lambda row: "No space left on device" in row.reason and "free space" in row.reason)
    other.kill()
    other.serves()
    assert one.starts == 1

    record.unlink()
    one.serves(but=first)
    assert one.overlaps == []
