"""Where the tensors of a model come from: safetensors files, or invented numbers (see dummy_checkpoint.py).

Tensors carry their Hugging Face names, such as "model.layers.0.self_attn.q_proj.weight".
"""

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from hbserve_core.errors import ModelFilesMissing, WeightsMismatch
from hbserve_core.model_config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SAMPLES_PER_TENSOR = 64


class TensorPart(NamedTuple):
    """Some rows of a tensor and, of a matrix, some columns of these. What lies beyond its end is not in it."""

    name: str
    rows: slice = slice(None)
    columns: slice = slice(None)

    def ranges(self, shape: tuple[int, ...]) -> tuple[range, ...]:
        """Rows, and of a matrix columns, of a whole tensor of this shape."""
        return tuple(range(size)[part] for size, part in zip(shape, (self.rows, self.columns), strict=False))


class TensorSource(Protocol):
    def read(self, part: TensorPart, target: torch.Tensor) -> None:
        """Write a part of a tensor to a tensor of its shape, in the target's dtype and on its device."""

    def sample(self, name: str) -> torch.Tensor:
        """The numbers at `sampled_places` of the whole tensor, float32, on the CPU: the same on every rank."""


def sampled_places(shape: tuple[int, ...]) -> range:
    """Fewer than 128 places in a flattened tensor, spread over it."""
    size = prod(shape)
    return range(0, size, max(1, size // _SAMPLES_PER_TENSOR))


def weights_digest(source: TensorSource, shapes: Shapes) -> str:
    """Of a sample of all tensors' numbers: two instances can tell by it whether they have the same weights without
    reading each other's files."""
    whole = hashlib.sha256()
    for name, shape in sorted(shapes.items()):
        whole.update(hashlib.sha256(f"{name} {shape}".encode() + source.sample(name).numpy().tobytes()).digest())
    return whole.hexdigest()[:32]


class Checkpoint:
    """The safetensors files of a model folder, checked against the shapes that the model needs.

    Raises:
        ModelFilesMissing: no weights in the folder, or a shard that the index names is not there.
        WeightsMismatch: a file that is not whole; or every missing, unexpected and misshapen tensor, in one message.
    """

    def __init__(self, config: ModelConfig, shapes: Shapes) -> None:
        files = [_open(path) for path in _weight_files(config.path)]
        self._places = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        self._check(config, shapes)

    def read(self, part: TensorPart, target: torch.Tensor) -> None:
        # A copy in any case: what safetensors maps into memory is slow to touch and keeps its file open.
        target.copy_(self._tensor(part.name)[(part.rows, part.columns)[: target.dim()]])

    def sample(self, name: str) -> torch.Tensor:
        tensor = self._tensor(name)
        return tensor.flatten()[:: sampled_places(tuple(tensor.shape)).step].float()

    def _tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._places[name].get_tensor(name)
        return tensor

    def _check(self, config: ModelConfig, shapes: Shapes) -> None:
        unexpected = [name for name in self._places if name not in shapes and not _may_be_ignored(name, config)]
        problems = [f"missing: {name}" for name in shapes if name not in self._places]
        problems += [f"unexpected: {name}" for name in unexpected]
        for name, shape in shapes.items():
            if name in self._places:
                found = tuple(self._places[name].get_slice(name).get_shape())
                if found != shape:
                    problems.append(f"{name} has shape {found}, config.json asks for {shape}")
        if problems:
            more = f" … and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise WeightsMismatch(f"weights in {str(config.path)!r}: {'; '.join(problems[:12])}{more}")


def _may_be_ignored(name: str, config: ModelConfig) -> bool:
    """Tied models may store the table twice; old exports store the RoPE frequencies, which follow from the config."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied_embeddings)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise WeightsMismatch(
            f"{path} is not a whole safetensors file ({error}): fetch it again; it may be cut off, or a Git LFS pointer"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.exists():
        names = _shard_names(index)
    elif (folder / _SINGLE).exists():
        names = [_SINGLE]
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


def _shard_names(index: Path) -> list[str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        return sorted(set(content["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsMismatch(f"{index} has no readable weight_map: {error}") from error
