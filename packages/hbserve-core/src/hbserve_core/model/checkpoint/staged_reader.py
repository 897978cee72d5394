"""Reading of tensors from files to a device: several threads read pieces of them, for a GPU by way of pinned memory.

While one thread's piece is on its way to the device, other threads read. Apart from the system's page cache, only a few
pieces of a model are in the host's memory.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import torch

from hbserve_core.model.checkpoint.safetensors_file import STORED_DTYPES, StoredTensor
from hbserve_core.model.checkpoint.tensor_source import row_pieces

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")

# Pieces are small, so that each thread gets some of every large tensor.
_PIECE_BYTES = 4 << 20
# A few threads saturate memory.
_MOST_THREADS = 8
# Bytes of a row outside the wanted columns up to which it is faster to read them too than to read row by row.
_SHORT_GAP = 32 << 10


class Read(NamedTuple):
    """Request to read some columns of some rows of a tensor into a contiguous target. A vector is a matrix with one
    column."""

    stored: StoredTensor
    rows: range
    columns: range
    target: torch.Tensor

    def columns_read(self) -> range:
        """Return the columns to read: the whole row if the others are few, otherwise the wanted ones."""
        whole, itemsize = range(prod(self.stored.shape[1:])), STORED_DTYPES[self.stored.dtype].itemsize
        return whole if (len(whole) - len(self.columns)) * itemsize <= _SHORT_GAP else self.columns


class StagedReader:
    """Reader into tensors on one device. On a GPU they are ready for later work on its default stream."""

    def __init__(self, device: torch.device) -> None:
        num_threads = min(_MOST_THREADS, torch.get_num_threads())
        self._device = device
        self._pool = ThreadPoolExecutor(num_threads, "hbserve-weights", self._begin_thread)
        self._free: SimpleQueue[torch.Tensor] = SimpleQueue()
        for _ in range(num_threads):
            self._free.put(torch.empty(_PIECE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda"))

    def _begin_thread(self) -> None:
        # A new thread uses the first device, where another rank lives.
        if self._device.index is not None:
            torch.cuda.set_device(self._device)

    def read(self, reads: Iterable[Read]) -> None:
        """Carry out all of these reads. Many at once are faster, because threads need not wait until a tensor is
        complete.

        Raises:
            WeightsMismatch: a file has become shorter.
        """
        pieces = [piece for read in reads for piece in _pieces(read)]
        if self._device.type != "cpu":
            self.map(self._read_staged, pieces)
            return
        as_stored = [each for each in pieces if each.target.dtype == STORED_DTYPES[each.stored.dtype]]
        self.map(self._read_as_stored, as_stored)
        # These are not read in several threads, because torch converts with all of its own threads.
        for each in pieces:
            if each.target.dtype != STORED_DTYPES[each.stored.dtype]:
                self._read_staged(each)

    def map(self, function: Callable[[_Given], _Made], given: Iterable[_Given]) -> list[_Made]:
        """Apply a function to each item in several threads, which are in inference mode if the caller is. Raises what
        the first failing call has raised."""
        in_threads = torch.inference_mode(torch.is_inference_mode_enabled())(function)
        return list(self._pool.map(in_threads, given))

    def _read_as_stored(self, read: Read) -> None:
        if read.columns_read() == read.columns:
            read.stored.read(read.rows, read.columns, read.target.view(-1).view(torch.uint8).numpy().data)
        else:
            self._read_staged(read)

    def _read_staged(self, read: Read) -> None:
        dtype, columns = STORED_DTYPES[read.stored.dtype], read.columns_read()
        buffer = self._free.get()
        try:
            staged = buffer[: len(read.rows) * len(columns) * dtype.itemsize]
            read.stored.read(read.rows, columns, staged.numpy().data)
            # `to` returns when it has copied, so the buffer is free then. The device converts.
            found = staged.view(dtype).view(len(read.rows), len(columns)).to(self._device)
            first = read.columns.start - columns.start
            read.target.copy_(found[:, first : first + len(read.columns)])
        finally:
            self._free.put(buffer)

    def close(self) -> None:
        self._pool.shutdown()


def _pieces(read: Read) -> Iterator[Read]:
    """Split a read into reads that are small enough for a buffer."""
    stored, rows, columns, target = read
    row_bytes = len(read.columns_read()) * STORED_DTYPES[stored.dtype].itemsize
    matrix = target.view(len(rows), len(columns))
    assert row_bytes <= _PIECE_BYTES
    for piece in row_pieces(len(rows), row_bytes, _PIECE_BYTES):
        yield Read(stored, rows[piece], columns, matrix[piece])
