"""Files of a model folder that hold its weights."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hbserve_core.errors import ModelFilesMissing, WeightsMismatch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtype in which a model with such tensors is computed, by the format's names of dtypes."""


def weight_files(folder: Path) -> list[Path]:
    """Return the paths of the files that hold a model's weights.

    Raises:
        ModelFilesMissing: there are no such files, or a shard that the index names is missing.
        WeightsMismatch: the index cannot be read, or names a file outside of the folder.
    """
    index = folder / _INDEX
    if (folder / _SINGLE).exists():
        # As in transformers, an index beside this file is considered to be from an older export.
        names = [_SINGLE]
    elif index.exists():
        names = _shard_names(index)
    else:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12])
        cure = "other weight formats must be saved as safetensors first, or load_format='dummy' chosen"
        if (folder / ADAPTER).exists():  # some trainers put the model's config.json beside it
            cure = "a LoRA adapter must be merged into its model first (peft: merge_and_unload(), then save_pretrained)"
        raise ModelFilesMissing(
            f"model folder {str(folder)!r} has neither {_SINGLE} nor {_INDEX} (it has: {found}); {cure}"
        )
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelFilesMissing(f"model folder {str(folder)!r} lacks {', '.join(missing)}, which {_INDEX} names")
    return [folder / name for name in names]


def stored_dtype(folder: Path) -> str | None:
    """Return the dtype of a model whose config.json does not say it: as in transformers, that of the first
    floating-point tensor of at least 16 bits. Returns None if there is no such tensor, or no file.

    Raises:
        WeightsMismatch: a file, or the index, cannot be read.
    """
    try:
        files = weight_files(folder)
    except ModelFilesMissing:  # weights may be generated ("dummy"); reading them reports it otherwise
        return None
    return next((name for path in files for kind in _kinds(path) if (name := _DTYPES.get(kind))), None)


def require_whole(path: Path) -> None:
    """Check a file's header without reading its tensors.

    Raises:
        WeightsMismatch: the file is cut off, is not a safetensors file, or cannot be read.
    """
    _kinds(path)


def _kinds(path: Path) -> list[str]:
    """Return the dtypes of a file's tensors, by the format's names. Raises what `require_whole` raises."""
    try:
        with safe_open(path, framework="np") as file:  # it imports the framework; torch is not needed here
            return [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118
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
    # Only the names are checked: the files may be links out of the folder, as all files in Hugging Face's cache are.
    if outside := sorted(str(path) for path in paths if path.is_absolute() or ".." in path.parts):
        raise WeightsMismatch(f"{index}: its weight_map names {outside[0]!r}, which is outside of the model's folder")
    return sorted(map(str, paths))
