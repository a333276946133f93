"""
The one setting that says where Redis is, rendered into what each client wants.

    unix:///run/recovery/redis.sock?db=0
    redis://user:password@host:6379/0
    rediss://host:6380/0?ssl_ca_certs=/etc/ssl/redis-ca.pem
    sentinel://host:26379,host:26379/service/0?password=...
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from recovery.errors import ConfigError

SOCKET_TIMEOUT_S = 2.0
CONNECT_TIMEOUT_S = 1.0
SOCKET_PATH_LIMIT = 107
"""A unix socket's path must be shorter than this many bytes (sun_path holds 108 with its end)."""

FORMS = "unix:///path, redis://host:6379/0, rediss://host:6380/0 or sentinel://host:26379,host:26379/service/0"
_CREDENTIALS = frozenset({"username", "password"})
_TLS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
_ALLOWED = {
    "unix": _CREDENTIALS | {"db", "virtual_host"},
    "redis": _CREDENTIALS | {"db"},
    "rediss": _CREDENTIALS | {"db"} | _TLS,
    "sentinel": _CREDENTIALS | {"db", "sentinel_username", "sentinel_password", "ssl"} | _TLS,
}


@dataclass(frozen=True)
class RedisUrl:
    """Where Redis is and how to enter. `str()` gives the safe form: a password shows nowhere by accident."""

    scheme: str
    path: str = ""
    hosts: tuple[tuple[str, int], ...] = ()
    db: int = 0
    service: str = ""
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: tuple[tuple[str, str], ...] | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the address; `ConfigError` says what is wrong with it, without the password in it."""
        text = text.strip()
        if text.startswith("/"):
            text = f"unix://{text}"
        try:
            parts = urlsplit(text)
            scheme = "unix" if parts.scheme == "redis+socket" else parts.scheme
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            if scheme not in _ALLOWED:
                raise ConfigError(f"cannot use a Redis URL of the form {scheme!r}: write {FORMS}")
            if unknown := sorted(set(query) - _ALLOWED[scheme]):
                raise ConfigError(
                    f"cannot use {', '.join(unknown)} in a {scheme}:// Redis URL: allowed are {', '.join(sorted(_ALLOWED[scheme]))}"
                )
            return cls._of(scheme, parts, query)
        except ValueError:  # its text may quote a piece of the password
            raise ConfigError(f"cannot read the Redis URL: write {FORMS}, with the password percent-encoded") from None

    @classmethod
    def unix(cls, path: Path, db: int = 0) -> Self:
        """Return the address of a unix socket."""
        return cls(scheme="unix", path=_socket_path(str(path)), db=db)

    @classmethod
    def _of(cls, scheme: str, parts: SplitResult, query: dict[str, str]) -> Self:
        credentials, _, netloc = parts.netloc.rpartition("@")
        username, _, password = credentials.partition(":")
        address = cls(
            scheme=scheme,
            username=unquote(username) or query.get("username") or None,
            password=unquote(password) or query.get("password") or None,
            db=_db(query.get("db") or query.get("virtual_host") or "0"),
        )
        if scheme == "unix":
            if netloc:
                raise ConfigError(f"cannot use the socket path of the Redis URL: write unix:///{netloc}{parts.path} with three slashes")
            return replace(address, path=_socket_path(unquote(parts.path)))
        segments = [unquote(part) for part in parts.path.split("/") if part]
        if scheme == "sentinel":
            if len(segments) not in (1, 2) or (len(segments) == 2 and not segments[1].isdigit()):
                raise ConfigError("cannot find the service in the sentinel URL: write sentinel://host:26379,host:26379/service/0")
            secure = query.get("ssl", "false").lower() in {"true", "1", "yes"} or bool(_TLS & set(query))
            return replace(
                address,
                hosts=tuple(_host(part, 26379) for part in netloc.split(",")),
                service=segments[0],
                db=_db(segments[1]) if len(segments) == 2 else address.db,
                sentinel_username=query.get("sentinel_username"),
                sentinel_password=query.get("sentinel_password"),
                tls=_tls(query) if secure else None,
            )
        if len(segments) > 1:
            raise ConfigError(f"cannot read the database in the Redis URL: write {scheme}://host:6379/0")
        return replace(
            address,
            hosts=(_host(netloc, 6379),),
            db=_db(segments[0]) if segments else address.db,
            tls=_tls(query) if scheme == "rediss" else None,
        )

    # What each client wants

    @property
    def celery(self) -> str:
        """The broker URL for Celery. Sentinels also need `transport_options`, TLS also `use_ssl`."""
        if self.scheme == "unix":
            return f"redis+socket://{self._credentials}{quote(self.path)}?virtual_host={self.db}"
        return ";".join(f"{self.scheme}://{self._credentials}{_authority(host)}/{self.db}" for host in self.hosts)

    @property
    def result_backend(self) -> str:
        """
        The result backend's URL: the same database, so that a Redis with one database serves too.

        Results are named `celery-task-meta-...`, which no key of ours begins with.
        """
        return self.celery

    @property
    def transport_options(self) -> dict[str, Any]:
        """What `broker_transport_options` and `result_backend_transport_options` need beside the time-outs."""
        if self.scheme != "sentinel":
            return {}
        return {"master_name": self.service, "sentinel_kwargs": self._sentinel_kwargs}

    @property
    def use_ssl(self) -> dict[str, Any] | None:
        """`broker_use_ssl` and `redis_backend_use_ssl`; None without TLS."""
        return dict(_ssl_settings(self.tls)) if self.tls is not None else None

    @property
    def flower(self) -> str:
        """The URL that Flower reads queue lengths from. On a unix socket it looks at database 0 only; of sentinels it takes one."""
        return self.celery.split(";")[0]

    @property
    def redis_py(self) -> dict[str, Any]:
        """Arguments for `redis.Redis`: the address without time-outs. Not for sentinels; see `client`."""
        credentials = {"username": self.username, "password": self.password}
        known = {name: value for name, value in credentials.items() if value is not None}
        if self.scheme == "unix":
            return {"unix_socket_path": self.path, "db": self.db, **known}
        tls = {"ssl": True, **_ssl_settings(self.tls)} if self.tls is not None else {}
        if self.scheme == "sentinel":
            return {"db": self.db, **known, **tls}
        host, port = self.hosts[0]
        return {"host": host, "port": port, "db": self.db, **known, **tls}

    def client(self, timeout_s: float = SOCKET_TIMEOUT_S, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> redis.Redis:
        """
        Return a client that gives up soon and never tries again by itself.

        redis-py would try three times with growing pauses: with a frozen Redis that is half a minute of silence. A
        connection that died while it lay idle is found to be dead and made anew before anything is sent on it.
        """
        manners: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": connect_timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        if self.scheme != "sentinel":
            return redis.Redis(**self.redis_py, **manners)
        make: Any = Sentinel  # redis-py leaves it untyped
        sentinel = make(self.hosts, sentinel_kwargs={**self._sentinel_kwargs, **manners}, **self.redis_py, **manners)
        client: redis.Redis = sentinel.master_for(self.service)
        return client

    @property
    def safe(self) -> str:
        """The address without its password, for people and logs."""
        user = (
            f"{quote(self.username or '', safe='')}:***@" if self.password else f"{quote(self.username, safe='')}@" if self.username else ""
        )
        if self.scheme == "unix":
            return f"unix://{user}{self.path}?db={self.db}"
        service = f"/{self.service}" if self.service else ""
        return f"{self.scheme}://{user}{','.join(_authority(host) for host in self.hosts)}{service}/{self.db}"

    @property
    def secret(self) -> str:
        """The whole setting as text that `parse` reads, password included: for the environment of our own parts only."""
        query = {
            "sentinel_username": self.sentinel_username,
            "sentinel_password": self.sentinel_password,
            **dict(self.tls or ()),
            **({"ssl": "true"} if self.scheme == "sentinel" and self.tls is not None else {}),
        }
        tail = urlencode({name: value for name, value in query.items() if value is not None})
        if self.scheme == "unix":
            return f"unix://{self._credentials}{quote(self.path)}?db={self.db}"
        service = f"/{quote(self.service, safe='')}" if self.service else ""
        hosts = ",".join(_authority(host) for host in self.hosts)
        return f"{self.scheme}://{self._credentials}{hosts}{service}/{self.db}{'?' + tail if tail else ''}"

    def __str__(self) -> str:
        return self.safe

    @property
    def _credentials(self) -> str:
        if not (self.username or self.password):
            return ""
        return f"{quote(self.username or '', safe='')}:{quote(self.password or '', safe='')}@"

    @property
    def _sentinel_kwargs(self) -> dict[str, Any]:
        credentials = {"username": self.sentinel_username, "password": self.sentinel_password}
        tls = {"ssl": True, **_ssl_settings(self.tls)} if self.tls is not None else {}
        times = {"socket_timeout": SOCKET_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S}
        return {**times, **{name: value for name, value in credentials.items() if value is not None}, **tls}


def _socket_path(path: str) -> str:
    if not path.startswith("/"):
        raise ConfigError("cannot use a Redis socket without an absolute path: write unix:///path/to/redis.sock")
    if len(path.encode()) >= SOCKET_PATH_LIMIT:
        raise ConfigError(
            f"cannot use the Redis socket {path}: its path has {len(path.encode())} bytes and must stay under {SOCKET_PATH_LIMIT}; "
            "choose a shorter directory"
        )
    return path


def _host(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ConfigError(f"cannot find a host in the Redis URL: write {FORMS}")
    return parts.hostname, parts.port or default_port


def _authority(host: tuple[str, int]) -> str:
    name, port = host
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _db(text: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"cannot use {text!r} as a Redis database: it is a whole number from 0")
    return int(text)


def _tls(query: dict[str, str]) -> tuple[tuple[str, str], ...]:
    given = {name: query[name] for name in sorted(_TLS & set(query))}
    if given.get("ssl_cert_reqs", "required") not in {"required", "optional", "none"}:
        raise ConfigError("cannot use that ssl_cert_reqs in the Redis URL: required, optional or none")
    if given.get("ssl_check_hostname", "true") not in {"true", "false"}:
        raise ConfigError("cannot use that ssl_check_hostname in the Redis URL: true or false")
    return tuple(given.items())


def _ssl_settings(tls: tuple[tuple[str, str], ...] | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"ssl_cert_reqs": "required", **dict(tls or ())}
    if "ssl_check_hostname" in settings:
        settings["ssl_check_hostname"] = settings["ssl_check_hostname"] == "true"
    elif settings["ssl_cert_reqs"] == "none":
        settings["ssl_check_hostname"] = False  # the ssl module refuses to check names of certificates that it does not check
    return settings
