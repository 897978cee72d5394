"""Server-sent events are read correctly, however the body is cut into pieces."""

import pytest

from hbserve.client.event_data import EventData

BODY = b': a comment\ndata: {"a":1}\n\nevent: x\r\ndata:{"b":\xc3\xa9}\r\n\r\ndatum: {}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("size", [1, 2, 7, len(BODY)])
def test_events_are_read_wherever_their_body_is_cut(size):
    events = EventData()
    found = [data for i in range(0, len(BODY), size) for data in events.feed(BODY[i : i + size])]
    assert found == [b'{"a":1}', b'{"b":\xc3\xa9}']


def test_an_event_is_told_with_the_end_of_its_line_and_not_before():
    events = EventData()
    assert [events.feed(piece) for piece in (b"data: 1", b"2", b"\n")] == [[], [], [b"12"]]
