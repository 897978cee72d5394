"""The log does not wait for whoever reads it."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator

import pytest

from hbserve_rpc.stderr_log import MOST_PIECES, UnblockedHandler


class Reader:
    """The end of a small pipe, at whose other end a logger logs."""

    def __init__(self) -> None:
        self.fd, self.other = os.pipe()
        fcntl.fcntl(self.other, fcntl.F_SETPIPE_SZ, 4096)
        self.stream = os.fdopen(self.other, "w")
        self.log = logging.Logger("own", "INFO")
        self.handler = UnblockedHandler(self.stream)
        self.log.addHandler(self.handler)

    def lines(self) -> list[str]:
        """What comes until nothing more does, when it is read as it comes."""
        os.set_blocking(self.fd, False)
        content = b""
        while True:
            self.handler.flush()
            try:
                content += os.read(self.fd, 1 << 16)
            except BlockingIOError:
                return content.decode().splitlines()


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    with contextlib.suppress(OSError):
        os.close(made.fd)
    with contextlib.suppress(OSError):
        made.stream.close()


def test_lines_that_nobody_reads_hold_nobody_up_and_come_later_in_order_and_whole(reader):
    long = "x" * 10_000
    for number in range(500):
        reader.log.info("%d %s", number, long if number % 100 == 0 else "")
    assert reader.lines() == [f"{number} {long if number % 100 == 0 else ''}" for number in range(500)]


def test_more_lines_than_are_kept_are_counted_when_they_are_read_again(reader):
    for number in range(2 * MOST_PIECES):
        reader.log.info("%d", number)
    first = reader.lines()
    assert first == [str(number) for number in range(len(first))]
    assert len(first) >= MOST_PIECES
    reader.log.info("again")
    num_lost = 2 * MOST_PIECES - len(first)
    assert reader.lines() == [f"{num_lost} lines of this log are lost: they could not be written", "again"]


def test_a_line_that_is_read_at_once_is_there_at_once(reader):
    reader.log.info("caf\udce9 %s", "é")
    assert os.read(reader.fd, 100) == "caf\\udce9 é\n".encode()


def test_on_a_full_disk_lines_are_counted_until_there_is_room(reader):
    with open("/dev/full", "w") as full:
        place = os.dup(reader.other)
        os.dup2(full.fileno(), reader.other)
        for number in range(5):
            reader.log.info("%d", number)
        os.dup2(place, reader.other)
        os.close(place)
    reader.log.info("again")
    assert reader.lines() == ["5 lines of this log are lost: they could not be written", "again"]


def test_where_there_is_no_reader_any_more_nothing_waits(reader):
    os.close(reader.fd)
    for number in range(100):
        reader.log.info("%d", number)
    assert not reader.handler._pieces
