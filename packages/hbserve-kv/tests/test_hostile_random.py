"""A sender that says anything, in any order, broken in any place: nobody else notices, and nothing of it is left."""

import asyncio
import random
from typing import Any

import msgspec
import pytest

from hbserve_kv import Outcome
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.messages import (
    Abandon,
    AnnouncedPart,
    Asked,
    Begin,
    Commit,
    Fetch,
    Handshake,
    Keep,
    Nothing,
    PartsAnnounced,
    Told,
)
from hbserve_rpc import HBServeRpcError, Method, Notification, RemoteError, RpcClient, StreamMethod

NO_TEXT, DEEP, NO_CODE = (msgspec.Raw(each) for each in (b"\xa3\xff\xfe\xfd", b"\x91" * 3000 + b"\x00", b"\xc1"))
ODD = [0, -1, 65, 1 << 62, (1 << 64) - 1, "", "x" * 2000, "\0", b"", None, True, 1.5, float("nan"), [], {}, [[0]] * 99]
encode = msgspec.msgpack.encode


def broken(chance: random.Random, value: Any) -> Any:
    """With one place of it changed, left out or repeated."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        rest = {each: kept for each, kept in value.items() if each != key}
        return rest if chance.random() < 0.1 else rest | {key: broken(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return (
            value * 2 if chance.random() < 0.2 else [*value[:place], broken(chance, value[place]), *value[place + 1 :]]
        )
    if isinstance(value, bytes) and value and chance.random() < 0.5:
        return value[: chance.randrange(len(value))]
    return chance.choice([*ODD, NO_TEXT, DEEP, NO_CODE])


class Liar:
    """One connection, and what is asked over it."""

    def __init__(self, client: RpcClient, hello: Handshake, others: str, chance: random.Random) -> None:
        self._client, self._hello, self._others, self._chance = client, hello, others, chance
        self.good = ""
        """Id of a transfer that is another's."""
        self.asking: list[asyncio.Task[None]] = []
        self.failures: list[str] = []
        self._ask(messages.LINK, hello)

    def say_something(self) -> None:
        chance = self._chance
        link = chance.choice([self._hello.link] * 4 + [self._others, "nobody's"])
        name = chance.choice(["mine", "tensor", self.good, "offer", "nobody's"])
        parts = [
            AnnouncedPart(chance.randrange(3), chance.randrange(3), chance.randrange(3))
            for _ in range(chance.randrange(4))
        ]
        size = chance.choice([None, None, 0, 100, 1 << 40])
        sums = chance.choice([{}, {0: 1, 99: 2}])
        method, message = chance.choice(
            [
                (messages.LINK, msgspec.structs.replace(self._hello, link=chance.choice("ab"))),
                (messages.TELL, Told(link, chance.choice("ab"), b"value")),
                (messages.ASK, Asked(link, "a")),
                (messages.BEGIN, Begin(name, link, size)),
                (messages.BEGIN, Begin(name, link, size)),
                (messages.PARTS, PartsAnnounced(name, link, parts)),
                (messages.COMMIT, Commit(name, link, len(parts), 384 * chance.randrange(3), 0.1, b"", sums)),
                (messages.ABANDON, Abandon(name, link, "why", chance.random() < 0.5, chance.random() < 0.5)),
                (messages.KEEP, Keep(name, "", chance.randrange(3))),
                (messages.FETCH, Fetch(name, b"", chance.randrange(3))),
                (messages.ALIVE, Nothing()),
            ]
        )
        body = encode(message)
        if chance.random() < 0.6:
            body = encode(broken(chance, msgspec.msgpack.decode(body)))
        self._ask(method, msgspec.Raw(body[: chance.randrange(len(body))] if chance.random() < 0.1 else body))

    def _ask(self, method: Any, message: Any) -> None:
        if isinstance(method, Notification):
            self._client.notify(method, message)
        else:
            self.asking.append(asyncio.create_task(self._until_answered(method, message)))

    async def _until_answered(self, method: Method[Any, Any] | StreamMethod[Any, Any], message: Any) -> None:
        try:
            if isinstance(method, Method):
                await self._client.call(method, message, timeout_s=60)
            else:
                async for _ in self._client.stream(method, message):
                    pass
        except RemoteError as error:  # a handler has raised what it should not
            self.failures.append(f"{error} of {message}")
        except HBServeRpcError:
            pass


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backend", ["ipc", "nccl"])
async def test_whatever_a_sender_says_others_go_on_and_nothing_is_left(managers, backend, seed, caplog):
    chance = random.Random(seed)
    receiver, sender = await managers(1, backend, expiry_s=0.5), await managers(0, backend, name="good")
    await sender.open_link(receiver.endpoint)
    ((others, link),) = receiver._receiver.links.items()
    hello = msgspec.structs.replace(link.hello, link="liar", address="127.0.0.1:9", epoch="another", name="liar")
    mine, offer = receiver.post_receive("mine", [20, 21]), receiver.offer("offer", lease_s=0.5)
    before = receiver._memory.pool.clone()
    offer.push([1])
    offer.commit()
    async with RpcClient(receiver.address, heartbeat_timeout_s=60) as client:
        liar = Liar(client, hello, others, chance)
        for number in range(10):
            liar.good = f"good {number}"
            posted = receiver.post_receive(liar.good, [10, 11], sender="good")
            transfer = await sender.open_send(liar.good, posted.grant)
            for first in range(2):
                for _ in range(8):
                    liar.say_something()
                await client.call(messages.ALIVE, Nothing(), timeout_s=60)
                transfer.push([first], first)
            async with asyncio.timeout(60):
                assert (await transfer.commit()).outcome is Outcome.COMPLETED
                assert (await posted.wait()).outcome is Outcome.COMPLETED
        for task in liar.asking:
            task.cancel()
        await asyncio.gather(*liar.asking, return_exceptions=True)
    mine.fail("over")
    assert liar.failures == []
    assert "Traceback" not in caplog.text
    ungranted = [block for block in range(64) if block not in (10, 11, 20, 21)]
    assert receiver._memory.pool[ungranted].equal(before[ungranted])
