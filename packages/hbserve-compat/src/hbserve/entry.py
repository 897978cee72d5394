"""Entry point of the command `hbserve`. It is so small that even a Ctrl-C during the imports prints no traceback."""

import os
import signal


def main() -> None:
    """Run the command line. Until a command runs and handles Ctrl-C itself, Ctrl-C ends the process as SIGTERM does."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # For an engine in this process (`profile`, `bench engine`), as for instances: see `launcher.WAIT_POLITELY`.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hbserve.__main__ import main as run_command_line

    run_command_line()
