"""
One setting, rendered for each client; what a URL may not be.
"""

from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from flower.utils.broker import Broker
from kombu import Connection

from recovery.adapters.redis_url import RedisUrl
from recovery.errors import ConfigError
from tests.helpers import RedisServer

URLS = [
    "unix:///run/recovery/redis.sock?db=0",
    "unix://user:p%40ss@/run/recovery/redis.sock?db=3",
    "redis://localhost:6379/0",
    "redis://user:p%40ss%2F@redis.example:6380/2",
    "redis://:secret@[::1]:6379/0",
    "rediss://user:secret@redis.example:6380/0?ssl_ca_certs=%2Fetc%2Fca.pem&ssl_cert_reqs=required",
    "sentinel://one:26379,two:26380/mymaster/1",
    "sentinel://user:secret@one:26379,two:26379/mymaster/0?sentinel_password=other&ssl_ca_certs=%2Fetc%2Fca.pem&ssl=true",
]


@pytest.mark.parametrize("text", URLS)
def test_a_url_survives_being_handed_to_our_own_parts(text: str) -> None:
    url = RedisUrl.parse(text)
    assert RedisUrl.parse(url.secret) == url


@pytest.mark.parametrize("text", URLS)
def test_no_password_shows_where_people_look(text: str) -> None:
    url = RedisUrl.parse(text)
    for shown in (url.safe, str(url), repr(url), f"{url}"):
        assert not any(secret in shown for secret in ("secret", "p@ss", "p%40ss", "other")), shown


@pytest.mark.parametrize(
    ("text", "path", "db"),
    [
        ("/run/r.sock", "/run/r.sock", 0),
        ("unix:///run/r.sock", "/run/r.sock", 0),
        ("unix:///run/r.sock?db=4", "/run/r.sock", 4),
        ("redis+socket:///run/r.sock?virtual_host=4", "/run/r.sock", 4),
        ("unix:///run/with%20space%3F.sock", "/run/with space?.sock", 0),
    ],
)
def test_forms_of_a_socket(text: str, path: str, db: int) -> None:
    url = RedisUrl.parse(text)
    assert (url.scheme, url.path, url.db) == ("unix", path, db)
    assert url.redis_py == {"unix_socket_path": path, "db": db}


def test_a_socket_for_each_client() -> None:
    url = RedisUrl.unix(Path("/run/r.sock"))
    assert url.celery == url.result_backend == url.flower == "redis+socket:///run/r.sock?virtual_host=0"
    assert url.safe == "unix:///run/r.sock?db=0"
    assert (url.transport_options, url.use_ssl) == ({}, None)


def test_a_user_and_a_password_reach_each_client() -> None:
    url = RedisUrl.parse("redis://user:p%40ss%2F@redis.example:6380/2")
    assert url.celery == "redis://user:p%40ss%2F@redis.example:6380/2"
    assert url.redis_py == {"host": "redis.example", "port": 6380, "db": 2, "username": "user", "password": "p@ss/"}
    assert url.safe == "redis://user:***@redis.example:6380/2"
    assert RedisUrl.parse("redis://h?username=user&password=pw").redis_py["password"] == "pw"
    assert RedisUrl.parse("redis://:pw@h").redis_py == {"host": "h", "port": 6379, "db": 0, "password": "pw"}


def test_tls_for_each_client() -> None:
    url = RedisUrl.parse("rediss://h/0?ssl_ca_certs=/etc/ca.pem")
    assert url.use_ssl == {"ssl_cert_reqs": "required", "ssl_ca_certs": "/etc/ca.pem"}
    assert {name: url.redis_py[name] for name in ("ssl", "ssl_cert_reqs", "ssl_ca_certs")} == {
        "ssl": True,
        "ssl_cert_reqs": "required",
        "ssl_ca_certs": "/etc/ca.pem",
    }
    unchecked = RedisUrl.parse("rediss://h/0?ssl_cert_reqs=none").use_ssl
    assert unchecked == {"ssl_cert_reqs": "none", "ssl_check_hostname": False}


def test_sentinels_for_each_client() -> None:
    url = RedisUrl.parse("sentinel://one:26379,two/mymaster/1?password=pw&sentinel_password=other")
    assert url.hosts == (("one", 26379), ("two", 26379))
    assert url.celery == "sentinel://:pw@one:26379/1;sentinel://:pw@two:26379/1"
    assert url.flower == "sentinel://:pw@one:26379/1"
    assert url.transport_options["master_name"] == "mymaster"
    assert url.transport_options["sentinel_kwargs"]["password"] == "other"
    assert url.safe == "sentinel://:***@one:26379,two:26379/mymaster/1"


@pytest.mark.parametrize("text", [*URLS, "rediss://h/0?ssl_cert_reqs=none"])
def test_celery_kombu_and_flower_take_what_they_are_given(text: str) -> None:
    """They only build their clients here; what they are told of the address is read back from them."""
    url = RedisUrl.parse(text)
    app = Celery("test", broker=url.celery, backend=url.result_backend)
    options = {"broker_transport_options": url.transport_options, "result_backend_transport_options": url.transport_options}
    app.conf.update(**options, broker_use_ssl=url.use_ssl, redis_backend_use_ssl=url.use_ssl)
    backend: Any = app.backend
    host, port = (url.hosts or (("", 0),))[0]
    told = backend.connparams["hosts"][0] if url.scheme == "sentinel" else backend.connparams
    assert (told.get("host") or "", told.get("port") or 0, int(told["db"])) == (host, port, url.db)
    assert (told.get("path") or "", told.get("password"), told.get("username")) == (url.path, url.password, url.username)
    extra = {"broker_use_ssl": url.use_ssl} if url.use_ssl else {}
    flower: Any = Broker(url.flower, broker_options=url.transport_options, **extra)
    if url.scheme != "sentinel":
        told = flower.redis.connection_pool.connection_kwargs
        assert (told.get("host") or "", told.get("path") or "", told.get("password")) == (host, url.path, url.password)


def test_celery_speaks_to_a_real_socket(redis_server: RedisServer) -> None:
    with Connection(redis_server.url.celery, transport_options={"socket_timeout": 30}) as connection:
        queue = connection.SimpleQueue("test-redis-url")
        queue.put({"hello": 1})
        assert queue.get(timeout=60).payload == {"hello": 1}
        queue.close()
    with redis_server.client() as client:
        client.delete("_kombu.binding.test-redis-url")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "write unix:///path"),
        ("http://host", "'http'"),
        ("localhost:6379", "write unix:///path"),
        ("redis://", "cannot find a host"),
        ("redis://h:port/0", "cannot read the Redis URL"),
        ("redis://h/zero", "'zero'"),
        ("redis://h/0/1", "redis://host:6379/0"),
        ("redis://h/0?dbb=1", "cannot use dbb"),
        ("redis://h/0?ssl_ca_certs=/x", "cannot use ssl_ca_certs in a redis://"),
        ("rediss://h/0?ssl_cert_reqs=perhaps", "required, optional or none"),
        ("rediss://h/0?ssl_check_hostname=perhaps", "true or false"),
        ("sentinel://h:26379", "cannot find the service"),
        ("sentinel://h:26379/mymaster/zero", "cannot find the service"),
        ("unix://run/r.sock", "three slashes"),
        ("unix://", "absolute path"),
        (f"unix:///{'x' * 106}", "107 bytes and must stay under 107"),
        (f"unix:///{'ü' * 53}", "must stay under 107"),
    ],
)
def test_a_bad_url_is_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RedisUrl.parse(text)


def test_the_longest_socket_path_works() -> None:
    assert RedisUrl.parse(f"unix:///{'x' * 105}").path == "/" + "x" * 105


@pytest.mark.parametrize(
    "text", ["redis://user:pa/ss@host/0", "redis://user:hunter2@host:port/0", "redis://:hunter2#x@host", "ftp://u:hunter2@h"]
)
def test_an_error_quotes_no_password(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RedisUrl.parse(text)
    assert "hunter2" not in str(caught.value) and "pa/" not in str(caught.value).replace("/path", "") and "'pa'" not in str(caught.value)
