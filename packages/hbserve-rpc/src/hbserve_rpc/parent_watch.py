"""The end of the process that has started this one.

The end of stdin says it too, but late where somebody else has its other end: what the parent has forked inherits that.
"""

import os
import select
import sys
import threading
from collections.abc import Callable


def when_parent_ends(call: Callable[[], object]) -> None:
    """Call it once, from a thread of its own. Systems without process descriptors have only stdin."""
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
    """The same, and also when stdin ends, which it does not before. The call may come twice."""

    def wait() -> None:
        sys.stdin.buffer.read()
        call()

    when_parent_ends(call)
    # A daemon: nothing can wake it from its read, so the process must not wait for it.
    threading.Thread(target=wait, name="launcher-watch", daemon=True).start()
