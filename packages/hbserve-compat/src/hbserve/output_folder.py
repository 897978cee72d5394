"""Of a file that is to be written: what can be known before the work that it is about."""

from pathlib import Path

from hbserve_rpc import InvalidRequest


def require_folder_of(option: str, path: Path) -> None:
    """Raises FileNotFoundError or InvalidRequest: the folder of the file that this option names is not there, or the
    file is one itself."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option}={path}: there is no folder {path.parent}")
    if path.is_dir():
        raise InvalidRequest(f"{option}={path}: is a folder; expected the name of a file")
