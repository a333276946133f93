"""Which queue a task belongs to: `control`, or the queue of the one host that may touch the processes."""

CONTROL_QUEUE = "control"


def host_queue(host: str) -> str:
    """The queue of a GPU host."""
    return f"gpu.{host}"
