"""Keys by which the processes of a deployment recognise each other (CURVE): how they are made, stored and replaced.

A folder that `make_keys` and `save_keys` make has a file for each party. Each has that party's own secret key, and the
public keys of all, so a host needs only the files of the parties that run there:

    client.key       whoever asks a scheduler
    scheduler.key    schedulers and front ends: may ask instances, and each other
    instance.key     instances: may send KV to each other, and register with a scheduler

Each party may have two valid keys at a time, so that all keys can be replaced without a stop. After each step the files
are copied to their hosts, and the processes are restarted in any order: `add_keys` makes everybody accept the next keys
too, `switch_keys` makes everybody use them, and `drop_keys` makes everybody refuse the old ones.
"""

import itertools
import logging
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
import zmq
from zmq.utils import z85

from hbserve_rpc.errors import KeysError

logger = logging.getLogger(__name__)

Party = Literal["client", "scheduler", "instance"]
PARTIES: tuple[Party, ...] = get_args(Party)
NUM_BYTES, NUM_CHARACTERS = 32, 40
"""Length of a key, and of its text in Z85."""
ZAP_DOMAIN = b"hbserve"


class Keys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keys that one process needs: its own, and the public ones of all parties. Its `repr` does not show the secrets.

    Raises:
        KeysError: the keys do not belong together, or this ZeroMQ has no CURVE.
    """

    party: Party
    secret_key: str
    next_secret_key: str | None = None
    """Secret key that `switch_keys` will put into use; set between `add_keys` and `switch_keys`."""
    public_keys: dict[Party, Annotated[list[str], msgspec.Meta(min_length=1, max_length=2)]]
    """Public keys that are accepted, by party; the first of each is in use."""

    def __post_init__(self) -> None:
        _require_curve()
        for each in itertools.chain([self.secret_key], *self.public_keys.values()):
            _require_key(each)
        if missing := [party for party in PARTIES if party not in self.public_keys]:
            raise KeysError(f"public_keys: the keys of {', '.join(missing)} are missing")
        if self.public_key not in self.public_keys[self.party]:
            raise KeysError(f"secret_key: its public key is not one of public_keys.{self.party}")

    def __repr__(self) -> str:
        return f"Keys(party={self.party!r})"

    @property
    def public_key(self) -> str:
        return zmq.curve_public(self.secret_key.encode()).decode()

    def server_options(self) -> dict[int, int | bytes]:
        """Return options for a socket that binds. The Doorkeeper in its context decides whom it lets in; without one it
        lets nobody in."""
        return {
            zmq.CURVE_SERVER: 1,
            zmq.CURVE_SECRETKEY: self.secret_key.encode(),
            zmq.ZAP_DOMAIN: ZAP_DOMAIN,
            zmq.ZAP_ENFORCE_DOMAIN: 1,
        }

    def client_options(self, server_key: str) -> dict[int, int | bytes]:
        """Return options for a socket that connects to the holder of `server_key`, a public key."""
        return {
            zmq.CURVE_SERVERKEY: server_key.encode(),
            zmq.CURVE_PUBLICKEY: self.public_key.encode(),
            zmq.CURVE_SECRETKEY: self.secret_key.encode(),
        }


def make_keys() -> dict[Party, Keys]:
    """Make the keys of a new deployment."""
    pairs = {party: _pair() for party in PARTIES}
    public: dict[Party, list[str]] = {party: [pairs[party][0]] for party in PARTIES}
    return {party: Keys(party=party, secret_key=secret, public_keys=public) for party, (_, secret) in pairs.items()}


def add_keys(keys: Mapping[Party, Keys]) -> dict[Party, Keys]:
    """Make the next keys, which are accepted beside those in use. Raises KeysError if there are two already."""
    if any(len(each) > 1 for each in keys["client"].public_keys.values()):
        raise KeysError("there are two keys of each party already: switch to the new ones, then drop the old ones")
    pairs = {party: _pair() for party in PARTIES}
    public = {party: [*known, pairs[party][0]] for party, known in keys["client"].public_keys.items()}
    return {
        party: msgspec.structs.replace(keys[party], next_secret_key=pairs[party][1], public_keys=public)
        for party in PARTIES
    }


def switch_keys(keys: Mapping[Party, Keys]) -> dict[Party, Keys]:
    """Put the next keys into use; the ones before are still accepted. Raises KeysError if there are no next ones."""
    public = {party: known[::-1] for party, known in keys["client"].public_keys.items()}
    switched: dict[Party, Keys] = {}
    for party in PARTIES:
        secret = keys[party].next_secret_key
        if secret is None:
            raise KeysError("there are no new keys yet: add them first, and let every process read them")
        switched[party] = Keys(party=party, secret_key=secret, public_keys=public)
    return switched


def drop_keys(keys: Mapping[Party, Keys]) -> dict[Party, Keys]:
    """Keep only the keys in use."""
    public = {party: known[:1] for party, known in keys["client"].public_keys.items()}
    return {party: Keys(party=party, secret_key=keys[party].secret_key, public_keys=public) for party in PARTIES}


def load_keys(folder: str | Path, party: Party) -> Keys:
    """Read the file of one party in a folder.

    Raises:
        KeysError: the file is missing, cannot be read, or does not have this party's keys.
    """
    path = _path(folder, party)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Keys)
        is_open = path.stat().st_mode & 0o077
    except FileNotFoundError:
        raise KeysError(f"{path}: there is no such file; `hbserve keys {folder}` makes it") from None
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KeysError(f"{path}: {error}") from None
    if found.party != party:
        raise KeysError(f"{path}: it has the keys of a party {found.party!r}; expected those of {party!r}")
    if is_open:
        logger.warning("%s: other users of this host may read it; chmod 600 %s", path, path)
    return found


def save_keys(keys: Mapping[Party, Keys], folder: str | Path) -> list[Path]:
    """Write a folder's files, which only their owner may read. Each is replaced as a whole, or stays as it was.

    Raises:
        OSError: the files cannot be written.
    """
    Path(os.path.expanduser(folder)).mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = []
    for party, each in keys.items():
        path = _path(folder, party)
        descriptor, name = tempfile.mkstemp(dir=path.parent)  # which nobody else may read
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(each)) + b"\n")
            os.replace(name, path)
        except OSError as error:
            os.unlink(name)
            raise OSError(error.errno, error.strerror, str(path)) from None  # for a full disk, `error` names no file
        paths.append(path)
    return paths


def _path(folder: str | Path, party: Party) -> Path:
    return Path(os.path.expanduser(folder)) / f"{party}.key"


def has_curve() -> bool:
    """Whether this build of ZeroMQ can use keys."""
    return bool(zmq.has("curve"))


def _require_curve() -> None:
    if not has_curve():
        raise KeysError(
            f"keys need CURVE, which this ZeroMQ ({zmq.zmq_version()}) was built without; the wheels of pyzmq have it: "
            "pip install --force-reinstall --only-binary pyzmq pyzmq"
        )


def _require_key(text: str) -> None:
    try:
        if len(text) == NUM_CHARACTERS and len(z85.decode(text)) == NUM_BYTES:
            return
    except (KeyError, struct.error):  # a character outside Z85, or a number that does not fit into four bytes
        pass
    raise KeysError(f"it is not a key: expected {NUM_CHARACTERS} characters of Z85, as `hbserve keys` writes them")


def _pair() -> tuple[str, str]:
    """Make a public key and its secret key. Raises KeysError if this ZeroMQ has no CURVE."""
    _require_curve()
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()
