"""Of a file that is to be written: what can be known before the work that it is about, and what became of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hbserve_rpc import InvalidRequest


def require_folder_of(option: str, path: Path) -> None:
    """Raises FileNotFoundError or InvalidRequest: the folder of the file that this option names is not there, or the
    file is one itself."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option}={path}: there is no folder {path.parent}")
    if path.is_dir():
        raise InvalidRequest(f"{option}={path}: is a folder; expected the name of a file")


@contextmanager
def writing(path: Path, *, in_parts: bool = False) -> Iterator[None]:
    """Around what opens and writes the file, of which nothing is left if it cannot be written to its end, unless it is
    written in parts that are of use without the others.

    Raises:
        OSError: it cannot be opened or written; has its name. The system's own error of a full disk has none.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:  # it was not opened
            raise
        if not in_parts and path.is_file():  # and no device
            path.resolve().unlink()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
