"""The end of the process that has started this one.

The end of stdin says it too, but late where somebody else has its other end: what the parent has forked inherits that.
"""

import os
import select
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
