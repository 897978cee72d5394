"""Rate of text of many streams in one client process: its scheduler, connection to an instance, and detokenizers.

    python benchmarks/text_streams.py                   256 streams of the demo model's tokenizer
    python benchmarks/text_streams.py --each            each token given as it comes, as the OpenAI server takes them
    python benchmarks/text_streams.py --streams 16 256 --profile

The instance is another process, which computes nothing. At each step it gives every stream a token, as an engine does,
when the client has asked for the step. So no token waits, and each is an event of its own. The output has tokens for
each second of the client's processor time, which on one core is its limit. Other work on the machine makes this
smaller, and least of all for the fastest tenth of the steps, which is printed too.
"""

import argparse
import asyncio
import cProfile
import pstats
import time
from collections.abc import Coroutine
from itertools import chain, pairwise
from statistics import quantiles
from typing import Any

from mock_instances import LIMITS, STEP, mock_instance, serve_steps, serve_until_killed, started

from hbserve.models.demo_model import find_model_folder
from hbserve.results import GenerationDelta
from hbserve.text.text_request import TextRequest
from hbserve.text.tokenizer import load_tokenizer
from hbserve_rpc import RpcClient, SamplingParams
from hbserve_rpc.messages import TokenEvent
from hbserve_rpc.own_process import freeze_heap
from hbserve_scheduler import CpuScheduler, SchedulerConfig

TEXT = (
    """Prefill computes keys and values of a prompt, decode adds one token after the other. Äpfel, naïve Größen, 你好,
and numbers like 3.14159 or 2,718 are in it too: def main() -> None: print("streams", len(streams))\n"""
    * 40
)
ROUNDS = 3
"""Number of rounds, of which the best counts."""


async def serve(model: str | None) -> None:
    server = mock_instance("mock-0", "hybrid", **LIMITS)
    serve_steps(server, load_tokenizer(await find_model_folder(model)).encode(TEXT))
    await serve_until_killed(server)


async def measure(address: str, tokenizer: Any, num_streams: int, num_tokens: int, *, by_each: bool) -> list[float]:
    """Return the processor time of each step."""
    scheduler = CpuScheduler(SchedulerConfig(heartbeat_interval_s=60, heartbeat_timeout_s=600))
    await scheduler.add_instance("mock-0", "hybrid", address)
    await scheduler.start()
    await scheduler.wait_ready(60)
    num_given, wanted, all_given = 0, 0, asyncio.Event()

    async def take(number: int) -> str:
        params = SamplingParams(0, num_tokens, ignore_eos=True)
        texts: list[str] = []
        request = TextRequest(scheduler, tokenizer, list(range(1, 2 + number)), params)

        def give(delta: GenerationDelta) -> bool:
            nonlocal num_given
            num_given += len(delta["token_ids"])
            if num_given >= wanted:
                all_given.set()
            texts.append(delta["text"])
            return False

        if by_each:
            await request.each(give)
        else:
            async for delta in request:
                give(delta)
        return "".join(texts)

    async with RpcClient(address) as client:
        taking = [asyncio.create_task(take(number)) for number in range(num_streams)]
        while len(scheduler.running_requests) < num_streams:  # noqa: ASYNC110  nothing tells
            await asyncio.sleep(0.01)
        ends_s = [time.process_time()]
        for step in range(num_tokens):
            wanted = num_streams * (step + 1)
            all_given.clear()
            await client.call(STEP, TokenEvent(num_streams, []), timeout_s=60)
            if num_given < wanted:
                await all_given.wait()
            ends_s.append(time.process_time())
        texts = await asyncio.gather(*taking)
    await scheduler.stop()
    assert all(len(text) > num_tokens for text in texts)
    return [end_s - begin_s for begin_s, end_s in pairwise(ends_s)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[256])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--each", action="store_true", help="without waking anybody for a token")
    parser.add_argument("--model", help="a folder with another tokenizer")
    parser.add_argument("--profile", action="store_true", help="functions by their own time; much slower")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.model))
        return
    tokenizer = load_tokenizer(asyncio.run(find_model_folder(arguments.model)))

    def one(num_streams: int) -> Coroutine[Any, Any, list[float]]:
        return measure(address, tokenizer, num_streams, arguments.tokens, by_each=arguments.each)

    model = [] if arguments.model is None else ["--model", arguments.model]
    freeze_heap()  # as a process of HBServe does
    with started(__file__, "--serve", *model) as (_, (address,)):
        for num_streams in arguments.streams:
            if arguments.profile:
                profile = cProfile.Profile()
                profile.runcall(asyncio.run, one(num_streams))
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)
                continue
            rounds = [asyncio.run(one(num_streams)) for _ in range(ROUNDS)]
            best = num_streams * arguments.tokens / min(map(sum, rounds))
            quick = num_streams / quantiles(chain(*rounds), n=10)[0]
            print(f"{num_streams:6} streams: {best:,.0f} tokens/s of a core, {1e6 / best:.1f} us a token", end="; ")
            print(f"of the quickest tenth of steps {quick:,.0f} and more, {1e6 / quick:.1f} us", flush=True)


if __name__ == "__main__":
    main()
