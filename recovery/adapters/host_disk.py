"""
An instance's files on its host: one directory each, JSON records that are replaced in one step.

    <home>/instances/<instance>/host.json run.json exit.json gone.json spec.json run.lock step.lock keeper.log tmp/ runs/<token>.log
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from pydantic import BaseModel, ValidationError

from recovery.core.host import HOST_SCHEMA, HostRecord
from recovery.errors import DiskError, LeaseHeldError, SchemaError

RecordT = TypeVar("RecordT", bound=BaseModel)


class HostDisk:
    """The records of all instances under one home."""

    def __init__(self, home: Path) -> None:
        self.home = home.resolve()

    # --- places ---

    def folder(self, instance: str) -> Path:
        """The instance's directory; whatever the id holds, it is one name directly under instances/."""
        name = quote(instance, safe="")
        return self.home / "instances" / (f"%2E{name[1:]}" if name.startswith(".") else name)

    def instances(self) -> tuple[str, ...]:
        """The ids of all instances that this host has a directory for, sorted."""
        try:
            return tuple(sorted(unquote(path.name) for path in (self.home / "instances").iterdir() if path.is_dir()))
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise _disk_error("read", self.home / "instances", error) from error

    def marker(self, instance: str, token: int) -> str:
        """What RECOVERY_RUN says in every process of that run."""
        return f"{self.home}/{self.folder(instance).name}/{token}"

    def parse_marker(self, marker: str) -> tuple[str, int] | None:
        """The instance and token of a marker, or None if it is not one of this home's."""
        folder, _, token = marker.rpartition("/")
        home, _, name = folder.rpartition("/")
        return (unquote(name), int(token)) if home == str(self.home) and token.isdigit() else None

    def prepare(self, instance: str) -> Path:
        """The instance's directory, made with its subdirectories; readable to its owner only."""
        folder = self.folder(instance)
        for path in (folder, folder / "runs", folder / "tmp"):
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise _disk_error("make", path, error) from error
        return folder

    # --- records ---

    def read_record(self, instance: str) -> HostRecord:
        """host.json, or the defaults for an instance this host has never seen."""
        path = self.folder(instance) / "host.json"
        data = _load(path)
        if data is None:
            return HostRecord()
        if isinstance(data, dict) and data.get("schema", 0) > HOST_SCHEMA:
            raise SchemaError(f"cannot read {path}: schema {data['schema']}, this version knows {HOST_SCHEMA}; upgrade it")
        try:
            return HostRecord.model_validate(data)
        except ValidationError as error:
            raise DiskError(f"cannot read {path}: {error}; mend it, or remove it to forget this instance") from error

    def write_record(self, instance: str, record: HostRecord) -> None:
        """Put host.json in its place, forced to disk: when this returns, a power cut does not take it back."""
        write_json(self.prepare(instance) / "host.json", record.model_dump(mode="json", by_alias=True), sync=True)

    def read(self, instance: str, name: str, kind: type[RecordT]) -> RecordT | None:
        """
        One of the keeper's records; None if it is not there or does not make sense.

        The keeper does not force exit.json and gone.json to disk, so a power cut may leave one empty: that run was
        ended by the boot, which the boot id in run.json says.
        """
        try:
            data = _load(self.folder(instance) / name)
            return None if data is None else kind.model_validate(data)
        except (DiskError, ValidationError):
            return None

    # --- locks ---

    @contextmanager
    def step_lock(self, instance: str) -> Iterator[None]:
        """Hold step.lock: one step at a time per instance, across threads and workers. Taken: `LeaseHeldError`, at once."""
        path = self.prepare(instance) / "step.lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise _disk_error("open", path, error) from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LeaseHeldError(f"cannot act on {instance}: another step holds {path}") from None
            yield
        finally:
            os.close(fd)

    def run_locked(self, instance: str) -> bool:
        """Whether a keeper holds run.lock. Looks by taking it, shared, for a moment; keepers allow for that."""
        try:
            fd = os.open(self.folder(instance) / "run.lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(fd)

    def disk_free(self, path: Path | None = None) -> int:
        """Bytes that are free to us where `path` (default: this home) lies."""
        place = path or self.home
        try:
            return shutil.disk_usage(place).free
        except OSError as error:
            raise _disk_error("look at", place, error) from error


def write_json(path: Path, data: dict[str, Any], *, sync: bool = False) -> None:
    """Replace a JSON file in one step; with `sync`, wait until it and its name are on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with open(fd, "w", closefd=False) as file:
                json.dump(data, file)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
        if sync:
            fd = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    except OSError as error:
        raise _disk_error("write", path, error) from error


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _disk_error("read", path, error) from error
    except ValueError as error:
        raise DiskError(f"cannot read {path}: {error}; mend it, or remove it to forget this instance") from error


def _disk_error(verb: str, path: Path, error: OSError) -> DiskError:
    return DiskError(f"cannot {verb} {path}: {error.strerror}; free space or mend the permissions of {path.parent}")
