"""Detection of the end of the process that started this one.

The end of stdin tells it too, but late if another process has the other end, as processes forked by the parent do.
"""

import os
import select
import sys
import threading
from collections.abc import Callable


def when_parent_ends(call: Callable[[], object]) -> None:
    """Call `call` once when the parent process ends, from a thread of its own. Does nothing on systems without process
    descriptors, which have only the end of stdin."""
    try:
        parent = os.pidfd_open(os.getppid())
    except (OSError, AttributeError):
        return

    def wait() -> None:
        poll = select.poll()
        poll.register(parent, select.POLLIN)
        poll.poll()
        call()

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def when_launcher_ends(call: Callable[[], object]) -> None:
    """Call `call` when the parent process ends, and when stdin ends, which does not happen before. It may be called
    twice."""

    def wait() -> None:
        sys.stdin.buffer.read()
        call()

    when_parent_ends(call)
    # It is a daemon, because nothing can wake it from its read, so the process must not wait for it.
    threading.Thread(target=wait, name="launcher-watch", daemon=True).start()
