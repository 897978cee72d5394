"""Files of a model folder that hold its weights."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hbserve_core.errors import ModelFilesMissing, WeightsMismatch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """Paths of the files that hold a model's weights.

    Raises:
        ModelFilesMissing: there are none, or a shard that the index names is not there.
        WeightsMismatch: the index cannot be read, or names a file outside of the folder.
    """
    index = folder / _INDEX
    if (folder / _SINGLE).exists():
        # As transformers has it: an index beside it is of an older export.
        names = [_SINGLE]
    elif index.exists():
        names = _shard_names(index)
    else:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12])
        raise ModelFilesMissing(
            f"model folder {str(folder)!r} has neither {_SINGLE} nor {_INDEX} (it has: {found}); "
            "other weight formats must be saved as safetensors first, or load_format='dummy' chosen"
        )
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelFilesMissing(f"model folder {str(folder)!r} lacks {', '.join(missing)}, which {_INDEX} names")
    return [folder / name for name in names]


def require_whole(path: Path) -> None:
    """Reads its header, and none of its tensors.

    Raises:
        WeightsMismatch: the file is cut off, no safetensors file, or cannot be read.
    """
    try:
        with safe_open(path, framework="np"):  # of what it is asked for it imports; torch is not needed for that
            pass
    except SafetensorError as error:
        raise WeightsMismatch(
            f"{path} is not a whole safetensors file ({error}): fetch it again; it may be cut off, or a Git LFS pointer"
        ) from error
    except OSError as error:
        raise WeightsMismatch(f"{path} cannot be read: {error}") from error


def _shard_names(index: Path) -> list[str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        paths = {Path(name) for name in content["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsMismatch(f"{index} has no readable weight_map: {error}") from error
    # Of the names alone: what they name may be a link out of the folder, as all files in Hugging Face's cache are.
    if outside := sorted(str(path) for path in paths if path.is_absolute() or ".." in path.parts):
        raise WeightsMismatch(f"{index}: its weight_map names {outside[0]!r}, which is outside of the model's folder")
    return sorted(map(str, paths))
