"""The safetensors files of a model folder."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from hbserve_core.errors import ModelFilesMissing, WeightsMismatch
from hbserve_core.model_config import ModelConfig
from hbserve_core.safetensors_file import DTYPES, SafetensorsFile, StoredTensor
from hbserve_core.staged_reader import StagedReader
from hbserve_core.tensor_source import Shapes, TensorPart, sampled_places

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Checkpoint:
    """The safetensors files of a model folder, checked against the shapes that the model needs.

    Raises:
        ModelFilesMissing: no weights in the folder, or a shard that the index names is not there.
        WeightsMismatch: a file that is not whole; or in one message every tensor that is missing, unexpected, or of a
            wrong shape or kind.
    """

    def __init__(self, config: ModelConfig, shapes: Shapes, device: torch.device) -> None:
        self._stored: dict[str, StoredTensor] = {}
        with contextlib.ExitStack() as opened:
            for path in _weight_files(config.path):
                file = SafetensorsFile(path)
                opened.callback(file.close)
                self._stored |= file.tensors
            self._check(config, shapes)
            self._reader = StagedReader(device)
            opened.callback(self._reader.close)
            self._opened = opened.pop_all()

    def read(self, part: TensorPart, target: torch.Tensor) -> None:
        stored = self._stored[part.name]
        self._reader.read(stored, *part.ranges(stored.shape), target)

    def sample(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        return stored.pick(sampled_places(stored.shape)).float()

    def close(self) -> None:
        self._opened.close()

    def _check(self, config: ModelConfig, shapes: Shapes) -> None:
        unexpected = [name for name in self._stored if name not in shapes and not _may_be_ignored(name, config)]
        problems = [f"missing: {name}" for name in shapes if name not in self._stored]
        problems += [f"unexpected: {name}" for name in unexpected]
        for name, stored in self._stored.items():
            if name in shapes and stored.shape != shapes[name]:
                problems.append(f"{name} has shape {stored.shape}, config.json asks for {shapes[name]}")
            if name in shapes and stored.dtype not in DTYPES:
                problems.append(f"{name} has dtype {stored.dtype}, expected one of {', '.join(DTYPES)}")
        if problems:
            more = f" … and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise WeightsMismatch(f"weights in {str(config.path)!r}: {'; '.join(problems[:12])}{more}")


def _may_be_ignored(name: str, config: ModelConfig) -> bool:
    """Tied models may store the table twice; old exports store the RoPE frequencies, which follow from the config."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied_embeddings)


def _weight_files(folder: Path) -> list[Path]:
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


def _shard_names(index: Path) -> list[str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        return sorted(set(content["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsMismatch(f"{index} has no readable weight_map: {error}") from error
