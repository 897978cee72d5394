"""Output files of commands: checks before the work whose result they get, and errors of writing them."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from hbserve_rpc import InvalidRequest


def require_writable(option: str, path: Path) -> None:
    """Check that the file that an option names can be written. Raises InvalidRequest or OSError: it is a folder, cannot
    be written, or cannot be made, because its folder does not exist or may not be written, or its disk is full."""
    if not os.path.isdir(path.parent):
        raise InvalidRequest(f"{option}={path}: there is no folder {path.parent}")
    if os.path.isdir(path):
        raise InvalidRequest(f"{option}={path}: is a folder; expected the name of a file")
    try:
        is_there = path.is_file()
        if is_there:
            path.open("ab").close()
        elif path.exists():
            return  # a device or pipe is as its owner made it
        with (
            suppress(PermissionError) if is_there else nullcontext(),  # it may be written, and its folder not
            tempfile.TemporaryFile(dir=path.resolve().parent) as file,
        ):
            file.write(b"a full disk takes no block for it")
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{option}={path}") from None


def write_results(path: Path, text: str, *, append: bool = False) -> None:
    """Write what a command has measured. If the file takes no more, print it, so that the work is not lost. What was in
    the file stays if this was to be appended.

    Raises:
        OSError: the file could not be written, and the text was printed.
    """
    before = path.stat().st_size if append and path.is_file() else None
    try:
        with writing(path, in_parts=before is not None), path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        sys.stdout.write(text)
        if before is not None:
            os.truncate(path, before)
        raise OSError(error.errno, f"{error.strerror}; the results are on stdout instead", str(path)) from None


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
