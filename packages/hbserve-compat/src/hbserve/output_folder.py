"""Of a file that is to be written: what can be known before the work that it is about."""

from pathlib import Path


def require_folder_of(option: str, path: Path) -> None:
    """Raises FileNotFoundError: the folder of the file that this option names is not there."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option}={path}: there is no folder {path.parent}")
