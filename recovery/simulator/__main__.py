"""Start a simulated vLLM server. The engine is forked before asyncio is imported, so that it stays small."""

import os
import socket
import sys
from typing import NoReturn

from recovery.simulator import lines
from recovery.simulator.engine import load_error, log_load_error, spawn, spawn_orphan
from recovery.simulator.journal import ENGINE, ORPHAN, Journal, identity
from recovery.simulator.options import Options, parse


def bind(options: Options) -> socket.socket:
    """The port, bound but not listening: clients are refused while the model loads. `OSError` if somebody listens there."""
    listener = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((options.host, options.port))
    options.port = listener.getsockname()[1]
    return listener


def this_start_fails(options: Options) -> bool:
    """Whether this is one of the first `--fail-first` starts: each adds a byte to `--fail-file`."""
    if not options.fail_first:
        return False
    counter = os.open(options.fail_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(counter, b".")
        return os.fstat(counter).st_size <= options.fail_first
    finally:
        os.close(counter)


def main() -> None:
    options = parse(sys.argv[1:])
    instance, token = identity(options.instance, f"{options.name}@{options.port}", os.environ)
    journal = Journal(options.journal, instance, token)
    journal.begin()

    def leave(code: int) -> NoReturn:
        journal.end(code=code)
        os._exit(code)

    for text in options.say:
        lines.write(lines.STDERR if options.say_on == "stderr" else lines.STDOUT, text)
    lines.log(lines.API, "INFO", "api_utils.py:347", f"non-default args: {{'model_tag': '{options.model}', 'port': {options.port}}}")
    try:
        listener = bind(options)
    except OSError as cannot:
        lines.fail(
            lines.STDERR, lines.API, lines.ADDRESS_IN_USE if cannot.errno == 98 else f"OSError: [Errno {cannot.errno}] {cannot.strerror}"
        )
        leave(1)
    error = load_error(options)
    if this_start_fails(options):
        error = options.load_error
        if not error:
            leave(options.exit_code)
    if error in lines.CONFIG_ERRORS:
        log_load_error(error, options)
        leave(1)
    if options.orphan:
        spawn_orphan(options, journal)
    else:
        journal.release(ORPHAN)
    child = None
    if options.engine == "process":
        child = spawn(options, journal, error)
    else:
        journal.release(ENGINE)

    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]  # asyncio does without: 20 ms and 5 MB less
    import asyncio

    from recovery.simulator.server import Simulator

    async def live() -> None:
        await Simulator(options, journal, listener).run(child, error)

    asyncio.run(live())


if __name__ == "__main__":
    main()
