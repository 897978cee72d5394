"""Safetensors file, read by ranges of bytes into memory that the caller gives. Nothing else is read.

safe_open checks the file (`require_whole`), but does not read it. It maps the file into memory, which costs a page
fault for every few pages, and the process if the file is cut off meanwhile; or it reads whole tensors while no other
thread can run.
"""

import json
import os
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hbserve_core.errors import WeightsMismatch
from hbserve_core.model.weight_files import require_whole

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes in which weights may be stored, by the format's names."""
STORED_DTYPES = DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "I32": torch.int32}
"""DTYPES, and the dtypes in which weights with scales may be stored."""


class StoredTensor(NamedTuple):
    """Tensor in a file, stored row after row without gaps."""

    file: "SafetensorsFile"
    offset: int
    """Position of its first byte in the file."""
    dtype: str
    shape: tuple[int, ...]

    def read(self, rows: range, columns: range, buffer: memoryview) -> None:
        """Fill `buffer` with these columns of these rows; a vector is a matrix with one column. Any thread may call."""
        itemsize = STORED_DTYPES[self.dtype].itemsize
        row_bytes, width = prod(self.shape[1:]) * itemsize, len(columns) * itemsize
        first = self.offset + rows.start * row_bytes + columns.start * itemsize
        if width == row_bytes:
            self.file.read(first, buffer)
            return
        for row in range(len(rows)):
            self.file.read(first + row * row_bytes, buffer[row * width : (row + 1) * width])

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def whole(self) -> torch.Tensor:
        """Read the whole tensor, on the CPU."""
        found = torch.empty(self.shape, dtype=STORED_DTYPES[self.dtype], device="cpu")
        self.file.read(self.offset, found.view(-1).view(torch.uint8).numpy().data)
        return found

    def pick(self, places: range) -> torch.Tensor:
        """Read the numbers at these places of the flattened tensor, on the CPU."""
        picked = torch.empty(len(places), dtype=STORED_DTYPES[self.dtype], device="cpu")
        itemsize, buffer = picked.itemsize, picked.view(torch.uint8).numpy().data
        if places.step == 1:
            self.file.read(self.offset + places.start * itemsize, buffer)
            return picked
        for number, place in enumerate(places):
            self.file.read(self.offset + place * itemsize, buffer[number * itemsize : (number + 1) * itemsize])
        return picked


class SafetensorsFile:
    """Safetensors file that is open until `close`.

    Raises:
        WeightsMismatch: the file is not whole.
    """

    def __init__(self, path: Path) -> None:
        require_whole(path)
        self._path = path
        self._file = path.open("rb", buffering=0)
        size = int.from_bytes(self._file.read(8), "little")
        header: dict[str, Any] = json.loads(self._file.read(size))
        self.tensors = {
            name: StoredTensor(self, 8 + size + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on. Raises WeightsMismatch if the file has become shorter."""
        while buffer:
            count = os.preadv(self._file.fileno(), [buffer], offset)
            if not count:
                raise WeightsMismatch(f"{self._path} was cut off while it was read: fetch it again")
            buffer, offset = buffer[count:], offset + count

    def close(self) -> None:
        self._file.close()
