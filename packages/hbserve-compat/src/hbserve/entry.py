"""Entry of the command `hbserve`: so small that a Ctrl-C is no traceback even while the rest is imported."""

import os
import signal


def main() -> None:
    """Run the command line. Until a command runs, which ends in order, Ctrl-C ends the process as SIGTERM does."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Of an engine in this process (`profile`, `bench engine`), as of instances: see `launcher.WAIT_POLITELY`.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hbserve.__main__ import main as run_command_line

    run_command_line()
