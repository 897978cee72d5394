"""Figures of `hbserve bench serve` and of `vllm bench serve`: the same load on the same server, in turns.

    python benchmarks/load_beside_vllm.py --vllm VENV/bin/vllm --tokenizer FOLDER
    python benchmarks/load_beside_vllm.py --vllm VENV/bin/vllm --tokenizer FOLDER --url http://127.0.0.1:8000

Without --url the server is in this process. Its first token comes after 50 ms, and 31 more follow, one each 10 ms,
whatever is requested; so any difference between the two sets of figures comes from the generators. `vllm` needs no GPU
for this: install it by `pip install --no-deps vllm`, with torch for the CPU and whatever its imports ask for.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from hbserve_testing.processes import run_in_order

FIRST_S, GAP_S, NUM_TOKENS = 0.05, 0.01, 32
FIGURES = ("median_ttft_ms", "median_tpot_ms", "median_itl_ms", "p99_itl_ms", "request_throughput", "output_throughput")


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection: /v1/models, and completions as events."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = head.partition("content-length: ")[2].split("\r\n")[0]
            await reader.readexactly(int(length or 0))
            if head.startswith("get /v1/models"):
                body = json.dumps({"data": [{"id": "m", "root": "m"}]}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
                writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            elif head.startswith("post /v1/completions"):
                await stream(writer)
            else:
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def stream(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    due_s = asyncio.get_running_loop().time() + FIRST_S
    for _ in range(NUM_TOKENS):
        await asyncio.sleep(due_s - asyncio.get_running_loop().time())
        send(writer, {"choices": [{"index": 0, "text": "a"}]})
        due_s += GAP_S
    usage = {"prompt_tokens": 16, "completion_tokens": NUM_TOKENS, "total_tokens": 16 + NUM_TOKENS}
    send(writer, {"choices": [], "usage": usage})
    writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def send(writer: asyncio.StreamWriter, event: object) -> None:
    data = b"data: " + json.dumps(event).encode() + b"\n\n"
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


async def measured(command: list[str], options: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        saving = ["--save-result", "--result-dir", folder, "--result-filename", "r.json", "--disable-tqdm"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = await asyncio.create_subprocess_exec(
            *command, *options, *saving, env=environment, stdout=asyncio.subprocess.DEVNULL
        )
        if await process.wait() != 0:
            raise SystemExit(f"{' '.join(command)} has failed")
        found: dict[str, float] = json.loads((Path(folder) / "r.json").read_text())
        return found


async def compare(arguments: argparse.Namespace) -> None:
    server = None
    if not arguments.url:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        arguments.url = "http://{}:{}".format(*server.sockets[0].getsockname())
    options = ["--backend", "openai", "--base-url", arguments.url, "--tokenizer", arguments.tokenizer]
    options += ["--dataset-name", "random", "--random-input-len", "16", "--random-output-len", str(NUM_TOKENS)]
    options += ["--num-prompts", str(arguments.requests), "--request-rate", str(arguments.rate), "--ignore-eos"]
    tools = {
        "hbserve": [sys.executable, "-m", "hbserve", "bench", "serve"],
        "vllm": [arguments.vllm, "bench", "serve"],
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in tools}
    for _ in range(arguments.rounds):
        for name, command in tools.items():
            found[name].append(await measured(command, options))
    print(f"{'':22}{'hbserve':>12}{'vllm':>12}{'ratio':>8}")
    for figure in FIGURES:
        ours, theirs = (statistics.median(each[figure] for each in found[name]) for name in tools)
        print(f"{figure:22}{ours:12.2f}{theirs:12.2f}{ours / theirs:8.3f}")
    if server is not None:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the program")
    parser.add_argument("--tokenizer", required=True, help="a folder")
    parser.add_argument("--url", default="")
    parser.add_argument("--rate", type=float, default=20)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    run_in_order(compare(arguments))


if __name__ == "__main__":
    main()
