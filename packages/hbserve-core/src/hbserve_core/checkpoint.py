"""Where the tensors of a model come from: safetensors files, or random numbers of the same shapes.

Tensors carry their Hugging Face names, such as "model.layers.0.self_attn.q_proj.weight".
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from hbserve_core.errors import ModelFilesMissing, WeightsMismatch
from hbserve_core.model_config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SAMPLES_PER_TENSOR = 64


class TensorSource(Protocol):
    def get(self, name: str) -> torch.Tensor:
        """The tensor, of the checkpoint's dtype or the engine's, on the CPU or on the engine's device."""


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

    def get(self, name: str) -> torch.Tensor:
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


class DummyCheckpoint:
    """Random weights that depend on the tensor's name and shape only: every process makes the same ones."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype) -> None:
        self._shapes = shapes
        self._dtype = dtype

    def get(self, name: str) -> torch.Tensor:
        tensor = torch.empty(self._shapes[name], dtype=self._dtype, device="cpu")
        if "norm" in name:
            return tensor.fill_(1)
        if name.endswith(".bias"):
            return tensor.zero_()
        generator = torch.Generator(device="cpu")
        generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
        return tensor.normal_(0, 0.02, generator=generator)


class DigestingSource:
    """Passes tensors through and digests a sample of their numbers, so that two instances can tell whether they hold
    the same weights without reading each other's files."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._digests: dict[str, bytes] = {}

    def get(self, name: str) -> torch.Tensor:
        tensor = self._source.get(name)
        flat = tensor.flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLES_PER_TENSOR)].float().cpu().numpy()
        self._digests[name] = hashlib.sha256(f"{name} {tuple(tensor.shape)}".encode() + sample.tobytes()).digest()
        return tensor

    def digest(self) -> str:
        """Of all tensors read so far, whatever their order."""
        return hashlib.sha256(b"".join(self._digests[name] for name in sorted(self._digests))).hexdigest()[:32]


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
