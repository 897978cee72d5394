"""Process that tries grammars: python -m hbserve_core.grammars.trials_main SETTINGS.

Its stdin is a socket, over which it receives one socket for each trial. When stdin closes, the process ends with all
trials.
"""

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from hbserve_core.grammars.compilation import compile_grammar, read_tokenizer
from hbserve_core.grammars.trials import BEGUN, ENDED, TrialSettings
from hbserve_core.grammars.workers import Workers
from hbserve_rpc import InvalidRequest, StructuredOutputsParams

_NICENESS = 5
"""Niceness of a trial, because the engine may want the core."""


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=TrialSettings)
    tokenizer = read_tokenizer(Path(settings.tokenizer), settings.vocab_size, settings.eos_token_ids)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a trial
    with socket.socket(fileno=os.dup(0)) as connection:
        while given := socket.recv_fds(connection, 1, 1)[1]:
            if os.fork() == 0:
                _run(tokenizer, socket.socket(fileno=given[0]), settings.cpu_limit_s)
            os.close(given[0])
    os.killpg(0, signal.SIGKILL)


def _run(tokenizer: Any, connection: socket.socket, cpu_limit_s: float) -> None:
    """Run a trial. Does not return; the system ends it at its limit, whatever it is doing."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
    try:
        os.nice(_NICENESS)
        connection.sendall(BEGUN)
        Workers(1, "trial").submit(lambda: _try(tokenizer, connection)).result()
        connection.sendall(ENDED)
    finally:
        os._exit(0)


def _try(tokenizer: Any, connection: socket.socket) -> None:
    encoded = b""
    while more := connection.recv(1 << 16):
        encoded += more
    try:
        compiled = compile_grammar(tokenizer, msgspec.msgpack.decode(encoded, type=StructuredOutputsParams))
        compiled.compute_bitmask()
    except InvalidRequest:  # it is compiled again where it is wanted, and the request is refused there
        pass


if __name__ == "__main__":
    main()
