"""Checkpoint: the safetensors files of a model folder."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch

from hbserve_core.errors import WeightsMismatch
from hbserve_core.model.checkpoint.packed_weights import PackedWeight, empty_biases, find_packed, without_parts
from hbserve_core.model.checkpoint.safetensors_file import DTYPES, SafetensorsFile, StoredTensor
from hbserve_core.model.checkpoint.staged_reader import Read, StagedReader
from hbserve_core.model.checkpoint.tensor_source import (
    Shapes,
    TensorPart,
    columns_by_group,
    row_pieces,
    sampled_places,
    targets_of,
)
from hbserve_core.model.checkpoint.weight_scales import KV_SCALES, find_kv_scales, find_scales, is_scale
from hbserve_core.model.model_config import ModelConfig
from hbserve_core.model.narrow_weight import NarrowWeight, fused, in_words, step_of
from hbserve_core.model.weight_files import ADAPTER, weight_files

logger = logging.getLogger(__name__)

_PREFIX = "model."
_EMBEDDING, _HEAD = f"{_PREFIX}embed_tokens.weight", "lm_head.weight"
_PIECE_BYTES = 16 << 20
"""Bytes of a tensor that are read at once when it is compared or widened."""


class Checkpoint:
    """Safetensors files of a model folder, checked against the shapes that the model needs.

    Raises:
        ModelFilesMissing: there are no weights in the folder, or a shard that the index names is missing.
        WeightsMismatch: a file is not whole; or tensors are missing, unexpected, or of a wrong shape or kind, which one
        message lists.
    """

    def __init__(self, config: ModelConfig, shapes: Shapes, device: torch.device) -> None:
        with contextlib.ExitStack() as opened:
            self._stored = opened.enter_context(_stored_tensors(config))
            if (config.path / ADAPTER).exists():
                logger.warning(
                    "%s: the adapter beside the weights is not applied: merge it into them (peft: merge_and_unload(), "
                    "then save_pretrained), or take %s away",
                    config.path,
                    ADAPTER,
                )
            if config.tied_embeddings and _EMBEDDING not in self._stored and _HEAD in self._stored:
                # The one tensor may have either name: safetensors' save_model keeps the name that comes first in the
                # alphabet.
                self._stored[_EMBEDDING] = self._stored.pop(_HEAD)
            self._packed: dict[str, PackedWeight] = {}
            self._scales, problems = find_scales(self._stored, config.scale_block) if config.scale_block else ({}, [])
            if config.packing:
                self._packed, problems = find_packed(self._stored, config.packing)
                self._stored = without_parts(self._stored)
                for name in empty_biases(self._stored, self._packed) - shapes.keys():
                    del self._stored[name]
            self._kv_scales, kv_problems = find_kv_scales(self._stored)
            self._check(config, shapes, problems + kv_problems)
            self._shapes = shapes
            self._path, self._keeps_inputs = config.path, config.keeps_inputs
            self._widened: set[str] = set()
            self._reader = StagedReader(device)
            opened.callback(self._reader.close)
            self._opened = opened.pop_all()

    def read(self, parts: Sequence[TensorPart], target: torch.Tensor) -> None:
        plain = []
        for part, own in targets_of(parts, self._shapes, target):
            if part.name in self._packed or part.name in self._scales:
                self._widened.add(part.name)
                self._widen(part, own)
            else:
                stored = self._stored[part.name]
                plain.append(Read(stored, *part.ranges(stored.shape), own))
        self._reader.read(plain)

    def _widen(self, part: TensorPart, target: torch.Tensor) -> None:
        rows, columns = part.ranges(self._shapes[part.name])
        if packed := self._packed.get(part.name):
            target.copy_(packed.widened(rows, columns, target.device))
            return
        stored, scales = self._stored[part.name], self._scales[part.name]
        for piece in row_pieces(len(rows), len(columns) * 4, _PIECE_BYTES):
            narrow = torch.empty(target[piece].shape, dtype=torch.float8_e4m3fn, device=target.device)
            self._reader.read([Read(stored, rows[piece], columns, narrow)])
            target[piece].copy_(narrow.float().mul_(scales.of(rows[piece], columns, target.device)))

    def read_narrow(self, parts: Sequence[TensorPart], device: torch.device) -> NarrowWeight | None:
        if all(part.name in self._packed for part in parts):
            return fused(self._reader.map(lambda part: self._packed_part(part, device), parts))
        if not all(part.name in self._scales for part in parts):
            return None
        ranges = [part.ranges(self._shapes[part.name]) for part in parts]
        # For each part, how many inputs share a scale, and which columns of scales belong to it.
        groups = [
            columns_by_group(part.name, columns, self._scales[part.name].block[1], self._shapes[part.name][1])
            for part, (_, columns) in zip(parts, ranges, strict=True)
        ]
        (width, group), *others = {(len(columns), by) for (_, columns), by in zip(ranges, groups, strict=True)}
        if others or group is None:
            return None
        values = torch.empty((sum(len(rows) for rows, _ in ranges), width), dtype=torch.float8_e4m3fn, device=device)
        targets = targets_of(parts, self._shapes, values)
        self._reader.read(
            Read(self._stored[part.name], *each, own) for (part, own), each in zip(targets, ranges, strict=True)
        )
        # Blocks are few, so their scales are copied for each row only on the device.
        blocks = [self._scales[part.name].of_blocks(rows) for part, (rows, _) in zip(parts, ranges, strict=True)]
        size, own_columns = group
        scales = torch.cat([each[:, own_columns.start : own_columns.stop] for each, _ in blocks]).to(device)
        by_row = scales.repeat_interleave(torch.cat([counts for _, counts in blocks]).to(device), 0)
        words = in_words(values, step_of(size))
        return NarrowWeight(words, by_row.t().contiguous(), None, size, keeps_inputs=self._keeps_inputs)

    def _packed_part(self, part: TensorPart, device: torch.device) -> NarrowWeight | None:
        packed = self._packed[part.name]
        return packed.narrow(part.name, *part.ranges(packed.shape), device)

    def sample(self, name: str, count: int) -> torch.Tensor:
        if packed := self._packed.get(name):
            return packed.sample(count)
        stored = self._stored[name]
        sampled, scales = stored.pick(sampled_places(stored.shape, count)).float(), self._scales.get(name)
        # Equal numbers with different scales are different weights.
        return (
            sampled
            if scales is None
            else torch.cat((sampled, scales.values.flatten()[:: 1 + scales.values.numel() // 64]))
        )

    def kv_scale(self, attention: str, kind: Literal["k", "v"]) -> float:
        names = f"{attention}.{kind}_scale", f"{attention}.{kind}_proj.{kind}_scale"
        return next((self._kv_scales[name] for name in names if name in self._kv_scales), 1.0)

    def close(self) -> None:
        if self._widened:
            logger.warning(
                "%s: %d weights are %s; they are kept and multiplied in 16 bits or more, which takes the memory of "
                "weights that are not quantised",
                self._path,
                len(self._widened),
                "8-bit floats" if self._scales else "of 4 bits",
            )
        self._opened.close()

    def _check(self, config: ModelConfig, shapes: Shapes, problems: list[str]) -> None:
        unexpected = [name for name in self._stored if name not in shapes and not _may_be_ignored(name, config)]
        unexpected += [name for name in self._packed if name not in shapes]
        given = {name: each.shape for name, each in self._stored.items()}
        given |= {name: each.shape for name, each in self._packed.items()}
        problems = [*problems, *(f"missing: {name}" for name in shapes if name not in given)]
        problems += [f"unexpected: {name}" for name in unexpected]
        for name, shape in given.items():
            if name in shapes and shape != shapes[name]:
                problems.append(f"{name} has shape {shape}, config.json asks for {shapes[name]}")
        for name, stored in self._stored.items():
            if name in shapes and stored.dtype not in DTYPES and name not in self._scales:
                problems.append(f"{name} has dtype {stored.dtype}, expected one of {', '.join(DTYPES)}")
        if problems:
            more = f" … and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise WeightsMismatch(f"weights in {str(config.path)!r}: {'; '.join(problems[:12])}{more}")


def with_stored_head(config: ModelConfig) -> ModelConfig:
    """Return the config as untied if the files have a head that differs from the embedding although config.json calls
    them tied, as transformers does. Such files are of fine-tunes. The log says so.

    Raises:
        ModelFilesMissing, WeightsMismatch: see `Checkpoint`.
    """
    if not config.tied_embeddings:
        return config
    with _stored_tensors(config) as stored:
        if _EMBEDDING not in stored or _HEAD not in stored or _are_equal(stored[_EMBEDDING], stored[_HEAD]):
            return config
    logger.warning(
        "%s: config.json has tie_word_embeddings, but %s and %s are stored with different numbers: both are used",
        config.path,
        _EMBEDDING,
        _HEAD,
    )
    return replace(config, tied_embeddings=False)


@contextlib.contextmanager
def _stored_tensors(config: ModelConfig) -> Iterator[dict[str, StoredTensor]]:
    """Keep all weight files open, and give their tensors by our names (see `Switches.renamed`), which are those of a
    model with a head. In exports without a head, names lack the prefix."""
    stored: dict[str, StoredTensor] = {}
    with contextlib.ExitStack() as opened:
        for path in weight_files(config.path):
            file = SafetensorsFile(path)
            opened.callback(file.close)
            stored |= {_our_name(name, config): tensor for name, tensor in file.tensors.items()}
        if _EMBEDDING.removeprefix(_PREFIX) in stored:
            stored = {name if name == _HEAD else _PREFIX + name: tensor for name, tensor in stored.items()}
        yield stored


def _our_name(name: str, config: ModelConfig) -> str:
    """Return our name for a tensor of a checkpoint."""
    for theirs, ours in config.switches.renamed:
        name = name.replace(theirs, ours)
    return name


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape or len(one.shape) != 2 or not {one.dtype, other.dtype} <= set(DTYPES):
        return False
    pieces = row_pieces(one.shape[0], one.shape[1] * 8, _PIECE_BYTES)
    return all(torch.equal(_rows(one, piece), _rows(other, piece)) for piece in pieces)


def _rows(stored: StoredTensor, piece: slice) -> torch.Tensor:
    """Read some rows as float64, because two tensors that are compared may be stored in different dtypes."""
    rows = torch.empty((piece.stop - piece.start, stored.shape[1]), dtype=DTYPES[stored.dtype], device="cpu")
    stored.read(range(piece.start, piece.stop), range(stored.shape[1]), rows.view(-1).view(torch.uint8).numpy().data)
    return rows.double()


def _may_be_ignored(name: str, config: ModelConfig) -> bool:
    """Return whether a tensor that the model does not need may be ignored. Tied models may store the table twice, and
    old exports store the RoPE frequencies, which follow from the config."""
    is_known = name.endswith(("rotary_emb.inv_freq", *KV_SCALES)) or (name == _HEAD and config.tied_embeddings)
    return is_known or (config.scale_block is not None and is_scale(name))
