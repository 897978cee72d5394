"""`hbserve keys`: writes the key files with which the processes of a deployment authenticate each other."""

import os
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from hbserve_rpc import Keys, KeysError, load_keys, make_keys
from hbserve_rpc.keys import PARTIES, Party, add_keys, drop_keys, save_keys, switch_keys


class Rotation(StrEnum):
    """Steps from the present keys to the next ones. After each step, the operator copies the files and restarts all
    processes, in any order."""

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
    """Make the key files of a folder, or take the next step of a rotation. Prints the files on stdout, and what to do
    with them on stderr.

    Raises:
        KeysError: there are keys already (no rotation), or none (a rotation), or this step is not the next one.
        OSError: the files cannot be written.
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
