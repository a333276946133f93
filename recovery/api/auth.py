"""
Who may do what: bearer tokens with the roles read, operate, admin, and sessions of the status page.

A session is a random name in an HttpOnly, SameSite=Strict cookie; Redis holds its role, and which token opened it, by
digest. It ends after twelve hours, at logout, or as soon as that token is taken out of the environment. Requests that
change something by cookie must also carry the header `X-Recovery-Page`, which no page of another origin can set.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Coroutine
from enum import IntEnum
from typing import Annotated, Any, NamedTuple

from anyio import to_thread
from fastapi import Depends, HTTPException, Request
from pydantic import SecretStr

from recovery.api.web import UNSAFE
from recovery.ports import Store
from recovery.settings import Settings

COOKIE = "recovery_session"
PAGE_HEADER = "x-recovery-page"
SESSION_S = 12 * 3600.0
MAX_TOKEN = 4096
"""Bytes of a token that are looked at; a longer one is refused unread."""


class Role(IntEnum):
    """What a caller may do; a higher one may do what the lower ones may."""

    READ = 1  # look
    OPERATE = 2  # start, stop, restart, check, reset
    ADMIN = 3  # also override the policy and the budget


class Caller(NamedTuple):
    """Who asks."""

    role: Role
    by: str
    """How it was told: `open` (no tokens in use), `token` or `session`."""


class Gate:
    """Knows the tokens, by digest, and the sessions."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.secure = settings.secure
        self._store = store
        bearer = (settings.bearer_token,) if settings.bearer_token is not None else ()
        self._roles: dict[bytes, Role] = {}
        for role, tokens in (
            (Role.READ, settings.read_tokens),
            (Role.OPERATE, settings.operate_tokens),
            (Role.ADMIN, (*settings.admin_tokens, *bearer)),
        ):
            self._roles |= {_digest(token): role for token in tokens}

    def role_of(self, token: str) -> Role | None:
        """Return the role of a token, None for an unknown one. Takes the same time for every wrong one."""
        if not token or len(token) > MAX_TOKEN:
            return None
        given = _digest(SecretStr(token))
        found: Role | None = None
        for known, role in self._roles.items():
            if hmac.compare_digest(known, given):
                found = role
        return found

    def open_session(self, token: str) -> str | None:
        """Return the name of a new session for a good token, None for another. Writes to Redis: not on the event loop."""
        role = self.role_of(token)
        if role is None:
            return None
        name = secrets.token_urlsafe(32)
        self._store.put(_session_key(name), {"role": int(role), "token": _digest(SecretStr(token)).hex()}, SESSION_S)
        return name

    def close_session(self, name: str) -> None:
        """End a session. Writes to Redis."""
        self._store.remove(_session_key(name))

    def session_role(self, name: str) -> Role | None:
        """Return the role of a session whose token is still in use. Reads Redis."""
        if not name or len(name) > 128:
            return None
        held = self._store.get(_session_key(name))
        if not isinstance(held, dict):
            return None
        return self._roles.get(bytes.fromhex(held["token"]))

    async def caller(self, request: Request) -> Caller | None:
        """Return who asks, None for somebody unknown."""
        if not self.secure:
            return Caller(Role.ADMIN, "open")
        header = request.headers.get("authorization")
        if header is not None:
            scheme, _, token = header.partition(" ")
            role = self.role_of(token.strip()) if scheme.lower() == "bearer" else None
            return Caller(role, "token") if role is not None else None
        cookie = request.cookies.get(COOKIE)
        if cookie is None or (request.method in UNSAFE and PAGE_HEADER not in request.headers):
            return None
        role = await to_thread.run_sync(self.session_role, cookie)
        return Caller(role, "session") if role is not None else None


def _digest(token: SecretStr) -> bytes:
    return hashlib.sha256(token.get_secret_value().encode()).digest()


def _session_key(name: str) -> str:
    return f"session:{hashlib.sha256(name.encode()).hexdigest()}"


def needs(role: Role) -> Callable[..., Coroutine[Any, Any, Caller]]:
    """A dependency: the caller, who has at least `role`; 401 without a good token, 403 with too low a role."""

    async def check(request: Request) -> Caller:
        gate: Gate = request.app.state.gate
        caller = await gate.caller(request)
        if caller is None:
            raise HTTPException(401, "Not authenticated: send 'Authorization: Bearer <token>'", {"www-authenticate": "Bearer"})
        if caller.role < role:
            raise HTTPException(403, f"This needs the role {role.name.lower()}; yours is {caller.role.name.lower()}")
        return caller

    return check


Reader = Annotated[Caller, Depends(needs(Role.READ))]
Operator = Annotated[Caller, Depends(needs(Role.OPERATE))]
