"""A Redis that speaks TLS only, with the shipped access rules; certificates made for the occasion."""

import subprocess
import tempfile
from pathlib import Path
from typing import Self

import redis

from recovery.adapters.redis_url import RedisUrl
from recovery.deploy import access
from tests.cli.installation import free_ports
from tests.helpers import RedisServer, wait_until


def certificates(folder: Path) -> None:
    """An authority (ca.crt) and a server's certificate for localhost (server.crt, server.key)."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    openssl("req", "-x509", *curve, "-days", "2", "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.crt", *usage)
    openssl("req", *curve, "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr")
    signing = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
    openssl("x509", "-req", "-in", "server.csr", *signing, "-out", "server.crt")


class TlsRedis:
    """Started by `with`; `url(role)` is what that role's REDIS_URL is."""

    def __init__(self, prefix: str = "recovery") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rec-tls-"))
        certificates(self.folder)
        self.passwords = access.passwords(self.folder / "passwords")
        (self.folder / "users.acl").write_text(access.rules(self.passwords, prefix))
        (self.port,) = free_ports(1)
        extra = ["--tls-port", str(self.port), "--tls-cert-file", "server.crt", "--tls-key-file", "server.key"]
        extra += ["--tls-ca-cert-file", "ca.crt", "--tls-auth-clients", "no", "--aclfile", str(self.folder / "users.acl")]
        self.server = RedisServer(self.folder, *extra)

    def url(self, role: str, password: str | None = None) -> str:
        """The whole address of a role."""
        return f"rediss://{role}:{password or self.passwords[role]}@localhost:{self.port}/0?ssl_ca_certs={self.folder / 'ca.crt'}"

    def client(self, role: str) -> redis.Redis:
        """A plain client with a role's user."""
        return RedisUrl.parse(self.url(role)).client(timeout_s=30, connect_timeout_s=30)

    def __enter__(self) -> Self:
        self.server.run(self.server._command)
        wait_until(lambda: self.client("admin").ping(), True, within_s=60)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
