"""Output files of commands: checks before the work whose result they get, and errors of writing them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hbserve_rpc import InvalidRequest


def require_writable(option: str, path: Path) -> None:
    """Check that the file that an option names can be written. Raises InvalidRequest or OSError: it is a folder, cannot
    be written, or cannot be made, because its folder does not exist, may not be written, or is on a full disk."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option}={path}: there is no folder {path.parent}")
    if path.is_dir():
        raise InvalidRequest(f"{option}={path}: is a folder; expected the name of a file")
    try:
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():  # and no device or pipe, which are as their owners made them
            with tempfile.TemporaryFile(dir=path.parent) as file:
                file.write(b"a full disk takes no block for it")
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{option}={path}") from None


@contextmanager
def writing(path: Path, *, in_parts: bool = False) -> Iterator[None]:
    """Wrap the code that opens and writes a file. A file that cannot be written to its end is removed, unless it is
    written `in_parts` that are of use without the others.

    Raises:
        OSError: the file cannot be opened or written. Has its name, which the system's own error of a full disk lacks.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:  # the file was not opened
            raise
        if not in_parts and path.is_file():  # not a device
            path.resolve().unlink()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
