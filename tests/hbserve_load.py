"""A load for a scheduler, AT_ONCE requests at a time until stdin ends: `python hbserve_load.py HOST:PORT AT_ONCE`.

Prints one line of JSON for each request that has ended, and at the end one with what the deployment still holds.
"""

import asyncio
import itertools
import json
import sys
from typing import Any

from hbserve_rpc import HBServeRpcError, SamplingParams
from hbserve_rpc.messages import GenerateRequest, RequestFinished
from hbserve_scheduler import RemoteScheduler

PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
EMPTY_S = 30.0


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def request(scheduler: RemoteScheduler, lane: int, number: int) -> None:
    prompt = tuple(3 + (7 * i * i + 11 * i + 13 * lane) % 250 for i in range(60))
    tokens: list[int] = []
    try:
        async with scheduler.submit(GenerateRequest(f"{lane}-{number}", prompt, PARAMS)) as events:
            async for event in events:
                if isinstance(event, RequestFinished):
                    end = event
                else:
                    tokens += event.token_ids
    except HBServeRpcError as error:
        say(lane=lane, error=str(error))
        raise
    say(lane=lane, tokens=tokens, instances=[end.prefill_instance, end.decode_instance], attempts=end.num_attempts)


async def leftovers(scheduler: RemoteScheduler) -> dict[str, int]:
    """Return the figures that are not zero although nothing runs."""
    stats = await scheduler.fetch_stats()
    found = {"waiting": stats.waiting_requests, "running": stats.running_requests}
    for each in stats.instances:
        held = each.num_blocks - each.free_blocks
        gauges = {"requests": each.active_requests, "transfers": each.active_transfers, "blocks": held}
        gauges |= {"quarantined": each.quarantined_blocks, "not ready": each.status != "ready"}
        found |= {f"{each.instance_id}: {name}": value for name, value in gauges.items()}
    return {name: value for name, value in found.items() if value}


async def main(address: str, at_once: int) -> None:
    scheduler = RemoteScheduler(address)
    await scheduler.start()
    await scheduler.find(timeout_s=60)
    is_over = asyncio.Event()
    watch = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    watch.add_done_callback(lambda _: is_over.set())

    async def lane(lane: int) -> None:
        for number in itertools.count():
            if is_over.is_set():
                return
            await request(scheduler, lane, number)
            await asyncio.sleep(0.5)  # leaves the processor to the others

    async with asyncio.TaskGroup() as group:
        for number in range(at_once):
            group.create_task(lane(number))
    deadline_s = asyncio.get_running_loop().time() + EMPTY_S
    while (left := await leftovers(scheduler)) and asyncio.get_running_loop().time() < deadline_s:
        await asyncio.sleep(0.1)
    say(leftovers=left)
    await scheduler.stop()


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
