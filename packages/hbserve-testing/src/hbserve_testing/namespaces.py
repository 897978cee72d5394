"""Network namespaces of this host, by the names that `ip netns` gives them."""

import ctypes
import os
from pathlib import Path
from typing import Any

_CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_SLAVE = 0x20000, 0x1000, 0x4000, 0x80000  # linux/sched.h, linux/mount.h


def enter(namespace: str) -> int:
    """Move this thread, and what it starts, to a network namespace. Returns a descriptor of the one before."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    set_namespace(os.open(f"/var/run/netns/{namespace}", os.O_RDONLY))
    return before


def mount_files(namespace: str) -> None:
    """Mount the files of /etc/netns/NAMESPACE over those of /etc, for this process and what it starts, as
    `ip netns exec` does. Most namespaces have no such files."""
    if not (folder := Path("/etc/netns") / namespace).is_dir():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    calls: list[tuple[Any, list[Any]]] = [
        (libc.unshare, [_CLONE_NEWNS]),
        (libc.mount, [b"none", b"/", None, _MS_SLAVE | _MS_REC, None]),
    ]
    for each in folder.iterdir():
        calls.append((libc.mount, [bytes(each), bytes(Path("/etc") / each.name), b"none", _MS_BIND, None]))
    for call, arguments in calls:
        if call(*arguments):
            raise OSError(ctypes.get_errno(), f"{call.__name__}{arguments}")


def set_namespace(file: int) -> None:
    """Move this thread to a network namespace, and close its `file`. Python 3.11 does not have os.setns."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(file, 0):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(file)
