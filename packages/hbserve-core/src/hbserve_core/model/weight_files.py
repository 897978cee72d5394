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
"""The dtype in which a model of such tensors is computed."""


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
    """Of a model whose config.json does not say it: as in transformers, of the first tensor in the first file that has
    one of at least 16 bits. None: there is no such tensor, or no file.

    Raises:
        WeightsMismatch: a file, or the index, cannot be read.
    """
    try:
        files = weight_files(folder)
    except ModelFilesMissing:  # weights may be invented, and who reads them says it
        return None
    return next((name for path in files for kind in _kinds(path) if (name := _DTYPES.get(kind))), None)


def require_whole(path: Path) -> None:
    """Check a file's header; none of its tensors is read.

    Raises:
        WeightsMismatch: the file is cut off, no safetensors file, or cannot be read.
    """
    _kinds(path)


def _kinds(path: Path) -> list[str]:
    """Dtypes of a file's tensors, by the names that the format has for them. Raises what `require_whole` raises."""
    try:
        with safe_open(path, framework="np") as file:  # of what it is asked for it imports; torch is not needed here
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
    # Of the names alone: what they name may be a link out of the folder, as all files in Hugging Face's cache are.
    if outside := sorted(str(path) for path in paths if path.is_absolute() or ".." in path.parts):
        raise WeightsMismatch(f"{index}: its weight_map names {outside[0]!r}, which is outside of the model's folder")
    return sorted(map(str, paths))
