"""Whom the scheduler does not reach: it says so at once, then ever more rarely, and once when that is over."""

import logging
import socket

import pytest

from hbserve_scheduler import instances


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.WARNING)

    def about(words: str) -> list[str]:
        return [record.message for record in caplog.records if words in record.message]

    return about


async def test_an_instance_that_was_never_there_is_named_at_the_first_failure_and_once_when_it_comes(
    make_scheduler, pair, lines, until
):
    # Known elsewhere: SGLang #2778.
    prefill, late = pair
    address = late.address
    await late.server.stop()
    scheduler = await make_scheduler(prefill, ready=False, heartbeat_timeout_s=0.3)
    await scheduler.add_instance("d0", "decode", address)
    await until(lambda: lines("not reachable for"))
    (said,) = lines("not reachable for")
    assert f"still trying: d0 (decode) at {address}: " in said
    assert "was silent for" in said
    late.server = late._make_server(int(address.rpartition(":")[2]))
    await late.server.start()
    await scheduler.wait_ready(30)
    assert len(lines("not reachable for")) == 1, "the next ones are later"
    (said,) = lines("is reachable, after")
    assert f"d0 at {address}" in said


async def test_a_call_without_an_answer_is_told_before_its_deadline(make_scheduler, lines, until, monkeypatch):
    monkeypatch.setattr(instances, "SAY_AFTER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        scheduler = await make_scheduler(ready=False, heartbeat_timeout_s=600.0)
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        await scheduler.add_instance("d0", "decode", address)
        await until(lambda: lines(f"still trying: d0 (decode) at {address}: it has not answered yet"))
        await scheduler.stop()


async def test_whoever_answers_at_an_address_and_is_another_is_named(make_scheduler, make_instance, lines, until):
    other = await make_instance("decode", "d1")
    scheduler = await make_scheduler(ready=False)
    await scheduler.add_instance("d0", "decode", other.address)
    await until(lambda: lines("still trying: d0 (decode)"))
    assert "is decode instance 'd1', not decode instance 'd0'" in lines("still trying")[0]
    await scheduler.remove_instance("d0")


async def test_an_instance_that_was_lost_is_told_once_and_its_return_too(make_scheduler, pair, lines, until, caplog):
    caplog.set_level(logging.INFO)  # it says goodbye, which is no warning
    scheduler = await make_scheduler(*pair, heartbeat_timeout_s=0.3)
    _, decode = pair
    await decode.server.stop()
    await until(lambda: lines("d0 at") and "is lost" in lines("d0 at")[-1])
    decode.server = decode._make_server(decode.server.port)
    await decode.server.start()
    await scheduler.wait_ready(30)
    assert len(lines("is lost")) == len(lines("is reachable, after")) == 1
    assert not lines("not reachable for")
