"""Tensors from files to a device: several threads read pieces of them, for a GPU into pinned memory on the way.

While one thread's piece is on its way to the device, others read. No more of a model than a few pieces is in the host's
memory beside the system's page cache.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch

from hbserve_core.model.checkpoint.safetensors_file import STORED_DTYPES, StoredTensor
from hbserve_core.model.checkpoint.tensor_source import row_pieces

_Read = tuple[StoredTensor, range, range, torch.Tensor]

# Small, so that each thread has some of every large tensor.
_PIECE_BYTES = 4 << 20
# A few saturate memory.
_MOST_THREADS = 8


class StagedReader:
    """Reads into tensors on one device. On a GPU they are there for later work on its default stream."""

    def __init__(self, device: torch.device) -> None:
        num_threads = min(_MOST_THREADS, torch.get_num_threads())
        self._device = device
        self._pool = ThreadPoolExecutor(num_threads, "hbserve-weights", self._begin_thread)
        self._free: SimpleQueue[torch.Tensor] = SimpleQueue()
        for _ in range(num_threads):
            self._free.put(torch.empty(_PIECE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda"))

    def _begin_thread(self) -> None:
        # A new thread's device is the first one, where another rank lives.
        if self._device.index is not None:
            torch.cuda.set_device(self._device)

    def read(self, stored: StoredTensor, rows: range, columns: range, target: torch.Tensor) -> None:
        """Write these columns of these rows to `target`, contiguous. A vector is a matrix with one column.

        Raises:
            WeightsMismatch: the file has become shorter.
        """
        dtype = STORED_DTYPES[stored.dtype]
        matrix, row_bytes = target.view(len(rows), len(columns)), len(columns) * dtype.itemsize
        assert row_bytes <= _PIECE_BYTES
        pieces = row_pieces(len(rows), row_bytes, _PIECE_BYTES)
        reads = [(stored, rows[piece], columns, matrix[piece]) for piece in pieces]
        if self._device.type != "cpu":
            self._run(self._read_staged, reads)
        elif target.dtype == dtype:
            self._run(self._read_directly, reads)
        else:
            # Not in several threads: torch converts with all of its own.
            for read in reads:
                self._read_staged(*read)

    def _run(self, function: Callable[..., None], reads: Sequence[_Read]) -> None:
        jobs = [self._pool.submit(function, *read) for read in reads]
        for job in jobs:
            job.result()

    @staticmethod
    def _read_directly(stored: StoredTensor, rows: range, columns: range, target: torch.Tensor) -> None:
        stored.read(rows, columns, target.view(torch.uint8).numpy().data.cast("B"))

    @torch.inference_mode()
    def _read_staged(self, stored: StoredTensor, rows: range, columns: range, target: torch.Tensor) -> None:
        dtype = STORED_DTYPES[stored.dtype]
        buffer = self._free.get()
        try:
            staged = buffer[: target.numel() * dtype.itemsize]
            stored.read(rows, columns, staged.numpy().data)
            # `to` returns when it has copied, so the buffer is free then; the device converts.
            target.copy_(staged.view(dtype).view(target.shape).to(self._device))
        finally:
            self._free.put(buffer)

    def close(self) -> None:
        self._pool.shutdown()
