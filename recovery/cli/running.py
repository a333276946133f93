"""`recovery up` and `down`, and each part by itself for compose and systemd."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.status import Status

from recovery import up as ups
from recovery import wiring
from recovery.adapters.processes import Processes
from recovery.cli.asking import err, out
from recovery.cli.exits import Exit
from recovery.core.instance import Instance
from recovery.core.states import State
from recovery.errors import ConflictError, RecoveryError, StoreUnavailableError
from recovery.part_list import FLOWER_USER, Listed, all_parts, beat, control, door, flower, flower_password_file, host
from recovery.part_list import api as api_part
from recovery.ports import Sender
from recovery.settings import Settings, load_settings, unknown_names

PARTS_S = 90.0
"""Time for all parts to begin their work; the slowest needs 3 s on an idle machine."""
LOADED = frozenset({State.HEALTHY, State.FAILED, State.COMPLETED, State.STOPPED})

FleetOption = Annotated[Path | None, typer.Option("--fleet", help="fleet file [default: RECOVERY_FLEET]", show_default=False)]
HostOption = Annotated[str | None, typer.Option("--host", help="name of this GPU host [default: RECOVERY_HOST]", show_default=False)]
RUNNING = "Running"


def register(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command("up", rich_help_panel=RUNNING)(up)
    app.command("down", rich_help_panel=RUNNING)(down)
    app.command("host", rich_help_panel=RUNNING)(host_main)
    for name, text in _ALONE.items():
        app.command(name, rich_help_panel=RUNNING, help=text)(_alone(name))


def up(
    fleet: FleetOption = None,
    leave_models: Annotated[bool, typer.Option("--leave-models", help="Ctrl-C ends the parts only; the models serve on")] = False,
    host: HostOption = None,
) -> int:
    """Run everything on this machine: Redis (when REDIS_URL is not set), workers, clock, API, front door, Flower and the fleet."""
    settings = _settings(fleet, host)
    ups.check_fleet(settings)
    where = ups.place(settings)
    wired = wiring.build(settings)
    listed = all_parts(settings, wired.store)
    ending = ups.Ending()
    ending.leave_models = leave_models
    ending.listen()
    installation = ups.Installation(where, listed, wired.store, _say)
    with _progress("starting"):
        installation.start("up")
    try:
        return _run(installation, wired, ending)
    except BaseException:
        installation.stop(hurry=True)  # a defect of ours must not take the models along
        raise


def _run(installation: ups.Installation, wired: wiring.Wiring, ending: ups.Ending) -> int:
    settings, models = wired.settings, ups.Models(wired, _sender())
    with _progress("starting") as status:
        late = ups.wait_ready(installation, PARTS_S, lambda names: status.update(f"waiting for {', '.join(names)}"), ending.asked)
    for name in late if not ending.asked.is_set() else ():
        err.print(f"{name} does not do its work yet; see {installation.place.logs / f'{name}.log'}")
    with contextlib.suppress(RecoveryError):
        if resumed := models.resume():
            out.print(f"starting again what the last end stopped: {', '.join(resumed)}")
    _print_where(installation, wired)
    with contextlib.suppress(StoreUnavailableError):
        _load(models, settings, ending)
    if not ending.asked.is_set():
        _print_how(installation, models, settings, leave_models=ending.leave_models)
    _follow(wired, ending)
    return _end(installation, models, ending)


def _load(models: ups.Models, settings: Settings, ending: ups.Ending) -> None:
    """Show each model as it comes up."""
    shown: dict[str, State] = {}
    with _progress("the fleet loads") as status:
        while not ending.asked.wait(0.2):
            rows = models.rows()
            for row in rows:
                if row.state in LOADED and shown.get(row.id) is not row.state:
                    shown[row.id] = row.state
                    out.print(_model_line(row, settings))
            loading = [f"{row.id} ({row.state.value})" for row in rows if row.state not in LOADED]
            if rows and not loading:
                return
            status.update(f"waiting for {', '.join(loading) or 'the fleet'}")


def _model_line(row: Instance, settings: Settings) -> str:
    pid = _pid(row, settings)
    took = f" after {row.load_s:.1f} s" if row.load_s is not None and row.state is State.HEALTHY else ""
    where = f"  {row.base_url}" if row.base_url else ""
    why = f"  {row.reason}" if row.state is not State.HEALTHY else ""
    return f"  {row.id:<14} {row.state.value}{took}{where}{f'  pid {pid}' if pid else ''}{why}"


def _pid(row: Instance, settings: Settings) -> int | None:
    view = Processes(settings.home).look(row.id)
    return view.run.server_pid if view.run is not None and view.server_alive else None


def _print_where(installation: ups.Installation, wired: wiring.Wiring) -> None:
    settings = wired.settings
    pids = installation.pids()
    out.print(f"recovery runs as pid {os.getpid()}; everything it keeps is in {settings.home}")
    notes = {
        "door": "OpenAI-compatible front door",
        "api": "management API and status page",
        "flower": f"user {FLOWER_USER}, "
        + (f"password in {flower_password_file(settings)}" if settings.flower_password is None else "password as RECOVERY_FLOWER_PASSWORD"),
    }
    embedded = f"  (embedded, pid {pids['redis']})" if "redis" in pids else ""
    out.print(f"  {'redis':<8} {wired.url.safe}{embedded}")
    for each in installation.listed:
        where = f"{each.url}  {notes.get(each.part.name, '')}" if each.url else f"pid {pids.get(each.part.name)}"
        out.print(f"  {each.part.name:<8} {where}")
    out.print(f"  logs     {installation.place.logs}")


def _print_how(installation: ups.Installation, models: ups.Models, settings: Settings, *, leave_models: bool) -> None:
    with contextlib.suppress(StoreUnavailableError):
        victim = next(((row, pid) for row in models.rows() if (pid := _pid(row, settings)) is not None), None)
        if victim is not None:
            out.print(f"Kill a model and watch it come back:  kill -9 {victim[1]}   # {victim[0].id}")
    ends = "only the parts; the models serve on until the next `up` adopts them" if leave_models else "the parts and the models"
    out.print(f"Ctrl-C ends {ends}.")


def _follow(wired: wiring.Wiring, ending: ups.Ending) -> None:
    """Print what happens to the fleet until the operator asks for the end."""
    feed = _Feed(wired)
    while not ending.asked.is_set():
        try:
            feed.show(block_s=0.5)
        except StoreUnavailableError:
            ending.asked.wait(0.5)
        except OSError:
            ending.asked.wait()  # the terminal is gone; the fleet is not


class _Feed:
    """New lines of the models' histories."""

    def __init__(self, wired: wiring.Wiring) -> None:
        self._store = wired.store
        self._position: str | None = None
        self._seen: dict[str, str] = {}

    def show(self, block_s: float) -> None:
        """Print what is new, waiting up to `block_s` for it."""
        if self._position is None:
            self._position, rows = self._store.snapshot()
            for model in {row.model for row in rows}:
                newest = self._store.events(model, 1)
                self._seen[model] = newest[-1]["id"] if newest else "0-0"
            return
        changes = self._store.follow(self._position, block_s)
        if changes is None:
            self._position = None
            return
        for model in dict.fromkeys(change.model for change in changes):
            for event in self._store.events(model, 100, after=self._seen.get(model, "0-0")):
                self._seen[model] = event["id"]
                out.print(f"{_clock(float(event['at']))}  {event['text'] or event['kind']}")
        if changes:
            self._position = changes[-1].id


def _clock(at: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(at).strftime("%H:%M:%S")


def _end(installation: ups.Installation, models: ups.Models, ending: ups.Ending) -> int:
    code: int = Exit.OK
    if not ending.leave_models:
        out.print("ending the models, then the parts; Ctrl-C again: at once")
        with _progress("ending the models") as status:
            try:
                if not models.end(lambda rows: status.update(_ending_text(rows)), lambda: ending.times > 1 or ending.leave_models):
                    err.print("not every model ended in time; the rest is killed")
            except RecoveryError as error:
                err.print(f"{error}; the models are ended directly")
    else:
        out.print("ending the parts; the models are left as they are")
    with _progress("ending the parts"):
        installation.stop(hurry=not ending.leave_models or ending.times > 1)
    if not ending.leave_models:
        try:
            ups.end_directly(installation.place.home, _say)
        except ConflictError as error:
            err.print(f"error: {error}")
            code = Exit.REFUSED
    out.print("ended")
    return code


def _ending_text(rows: tuple[Instance, ...]) -> str:
    return f"ending {', '.join(f'{row.id} ({row.state.value})' for row in rows)}" if rows else "the models have ended"


def down(
    keep_models: Annotated[bool, typer.Option("--keep-models", help="end the parts only; the models serve on")] = False,
) -> int:
    """End whatever `recovery up` left running on RECOVERY_HOME, even after its kill -9; the next `up` starts the same models again."""
    wired = wiring.build(load_settings())
    with _progress("looking") as status:
        found = ups.down(wired, _sender(), keep_models=keep_models, say=_say, show=lambda rows: status.update(_ending_text(rows)))
    if not found:
        out.print(f"nothing runs on {wired.settings.home}")
        return Exit.OK
    left = ups.remains(wired.settings.home.resolve()).models
    out.print(f"ended; still serving: {', '.join(left)}" if left else "ended")
    return Exit.OK


# --- single parts --------------------------------------------------------------------------------------------------

_ALONE = {
    "control": "Run only the control worker, in the foreground.",
    "beat": "Run only the clock, in the foreground.",
    "api": "Run only the management API and status page, in the foreground.",
    "door": "Run only the front door, in the foreground.",
    "flower": "Run only Flower, in the foreground.",
}


def _alone(name: str):  # type: ignore[no-untyped-def]  # typer reads the signature of what is returned
    def command(fleet: FleetOption = None, host: HostOption = None) -> None:
        settings = _settings(fleet, host)
        where = ups.place(settings)
        store = wiring.build(settings).store
        made = {
            "control": lambda: control(settings, store),
            "beat": lambda: beat(settings, store),
            "api": lambda: api_part(settings),
            "door": lambda: door(settings),
            "flower": lambda: flower(settings),
        }
        part = made[name]().part
        sys.stdout.flush()
        os.execve(part.argv[0], part.argv, {**where.environ, **part.env})

    return command


def host_main(
    fleet: FleetOption = None,
    host_name: HostOption = None,
    drain: Annotated[
        bool, typer.Option("--drain", help="SIGTERM first stops this host's models in good order (a container that ends takes them along)")
    ] = False,
) -> int:
    """Run only this GPU host's worker, and bring it back when it dies: the main process of a GPU host's container or unit."""
    settings = _settings(fleet, host_name)
    ups.check_fleet(settings)
    wired = wiring.build(settings)
    listed: tuple[Listed, ...] = (host(settings, wired.store),)
    ending = ups.Ending()
    ending.listen()
    installation = ups.Installation(ups.place(settings), listed, wired.store, _say)
    installation.start("host", to_files=False, redis=False)
    models = ups.Models(wired, _sender())
    resumed = False
    while not ending.asked.wait(1.0):
        if not resumed:
            with contextlib.suppress(RecoveryError):
                if listed[0].ready():
                    models.resume()
                    resumed = True
    if drain and not ending.leave_models:
        try:
            models.end(lambda _rows: None, lambda: ending.times > 1)
        except RecoveryError as error:
            _say(str(error))
    installation.stop()
    return Exit.OK


# --- small things --------------------------------------------------------------------------------------------------


def _settings(fleet: Path | None, host: str | None) -> Settings:
    given = {"RECOVERY_FLEET": str(fleet.absolute()) if fleet is not None else None, "RECOVERY_HOST": host}
    os.environ.update({name: value for name, value in given.items() if value is not None})
    for name in unknown_names(os.environ):
        err.print(f"warning: no setting is called {name}; is it misspelt?")
    return load_settings()


def _sender() -> Sender:
    from workers.app import app  # here, because Celery takes half a second to import
    from workers.sending import CelerySender

    return CelerySender(app)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        err.print(text)


def _progress(text: str) -> Status:
    """A line that moves on a terminal, and nothing at all elsewhere."""
    return err.status(text)
