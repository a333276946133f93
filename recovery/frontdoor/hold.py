"""The queue in which requests wait for a replica: bounded in number and bytes, fair between clients."""

from collections import deque
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What the queue needs to know of a request."""

    client_key: str
    """Whose request it is: the API key's name or the peer's address."""
    size: int
    """Bytes it keeps in memory."""


W = TypeVar("W", bound=Waiting)


class HoldQueue(Generic[W]):
    """Requests in order of arrival per client, taken from the clients in turn."""

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.max_requests, self.max_bytes = max_requests, max_bytes
        self.bytes = 0
        self._clients: dict[str, deque[W]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, request: W) -> bool:
        """
        Queue a request; False when there is no room.

        A full queue makes room for a client that holds less than its share: the newest request of the client
        with the most is for the caller to refuse, see `surplus`.
        """
        if self._count >= self.max_requests or self.bytes + request.size > self.max_bytes:
            return False
        self._clients.setdefault(request.client_key, deque()).append(request)
        self._count += 1
        self.bytes += request.size
        return True

    def surplus(self, client_key: str) -> W | None:
        """Return the newest request of the greediest client if it holds at least two more than `client_key` does, removed."""
        greedy = max(self._clients.values(), key=len, default=None)
        if greedy is None or len(greedy) < len(self._clients.get(client_key, ())) + 2:
            return None
        victim = greedy[-1]
        self.remove(victim)
        return victim

    def remove(self, request: W) -> bool:
        """Take a request out (its client left, its time is up); False when it was not there."""
        waiting = self._clients.get(request.client_key)
        if waiting is None or request not in waiting:
            return False
        waiting.remove(request)
        self._taken(request, waiting)
        return True

    def take_all(self) -> list[W]:
        """Take everybody out, one request of each client in turn."""
        out: list[W] = []
        while self._clients:
            for waiting in list(self._clients.values()):
                request = waiting.popleft()
                self._taken(request, waiting)
                out.append(request)
        return out

    def _taken(self, request: W, waiting: deque[W]) -> None:
        if not waiting:
            del self._clients[request.client_key]
        self._count -= 1
        self.bytes -= request.size
