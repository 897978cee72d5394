"""Output files of commands: checks before the work whose result they get, and errors of writing them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hbserve_rpc import InvalidRequest


def require_folder_of(option: str, path: Path) -> None:
    """Check the file that an option names. Raises FileNotFoundError if its folder does not exist, and InvalidRequest if
    it is a folder itself."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option}={path}: there is no folder {path.parent}")
    if path.is_dir():
        raise InvalidRequest(f"{option}={path}: is a folder; expected the name of a file")


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
