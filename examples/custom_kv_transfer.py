"""A KV transfer of one's own: each part is one TCP connection.

Run it: uv run python examples/custom_kv_transfer.py [MODEL_FOLDER]
"""

import asyncio
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.pd_disagg.kv_transfer.base import KVTransferBase
from hbserve.sampling_params import SamplingParams


class TcpTransfer(KVTransferBase):
    """Listens on a port of its own; what arrives waits in a queue for whoever asks for it."""

    def __init__(self, rank: int, options: Mapping[str, Any]) -> None:
        super().__init__(rank, options)
        self._arrived: defaultdict[str, asyncio.Queue[bytes]] = defaultdict(asyncio.Queue)
        self._ports: dict[int, int] = {}

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._receive, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()

    def describe(self) -> bytes:
        return str(self._port).encode()

    async def connect(self, rank: int, description: bytes) -> None:
        self._ports[rank] = int(description)

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request_id = (await reader.readline()).decode().strip()
        self._arrived[request_id].put_nowait(await reader.read())
        writer.close()

    async def send_kv_cache(self, request_id: str, kv_buffer: torch.Tensor, target_rank: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self._ports[target_rank])
        writer.write(request_id.encode() + b"\n")
        writer.write(kv_buffer.cpu().numpy().tobytes())
        writer.write_eof()
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> torch.Tensor:
        data = await self._arrived[request_id].get()
        del self._arrived[request_id]
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)


async def main(model_path: str | None) -> None:
    config = PdDisaggConfig(model_path=model_path, kv_transfer_backend="custom_kv_transfer:TcpTransfer")
    async with DisaggregatedLLM(config) as llm:
        (result,) = await llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
    print(f"{result['text']!r}: {result['kv_bytes']} bytes of KV moved by TcpTransfer")


if __name__ == "__main__":
    # The instances import this file by its name, so its folder must be on their path.
    import os

    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))
