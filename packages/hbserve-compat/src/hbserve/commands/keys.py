"""`hbserve keys`: the files by which the processes of a deployment know each other."""

import os
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from hbserve_rpc import Keys, KeysError, load_keys, make_keys
from hbserve_rpc.keys import PARTIES, Party, add_keys, drop_keys, save_keys, switch_keys


class Rotation(StrEnum):
    """Steps from keys to the next ones; after each the files are copied, and all processes restarted, in any order."""

    ADD = "add"
    SWITCH = "switch"
    DROP = "drop"


STEPS = {Rotation.ADD: add_keys, Rotation.SWITCH: switch_keys, Rotation.DROP: drop_keys}
NEXT = {
    Rotation.ADD: "the next keys are accepted too; copy the files, restart all, then: --rotate switch",
    Rotation.SWITCH: "the next keys are in use; copy the files, restart all, then: --rotate drop",
    Rotation.DROP: "only one key of each is accepted; copy the files, and restart all",
}


def write_keys(folder: Path, rotation: Rotation | None) -> None:
    """Make a folder's files, or bring them a step further. Says on stdout which, and on stderr what to do with them.

    Raises:
        KeysError: there are some already, or none; or that step is not the next one.
        OSError: they cannot be written.
    """
    if rotation is None:
        if there := [party for party in PARTIES if (Path(os.path.expanduser(folder)) / f"{party}.key").exists()]:
            raise KeysError(f"{folder}: has keys of {', '.join(there)} already; --rotate changes them")
        keys: Mapping[Party, Keys] = make_keys()
        line = f"security: {{keys: {folder}}}"
        advice = f"`{line}` in the deployment's file uses them; each host needs only those of what runs there"
    else:
        keys = STEPS[rotation]({party: load_keys(folder, party) for party in PARTIES})
        advice = NEXT[rotation]
    for path in save_keys(keys, folder):
        sys.stdout.write(f"{path}\n")
    sys.stderr.write(f"{advice}\n")
