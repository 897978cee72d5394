"""Text comes whole: no half characters, no beginnings of stop strings, nothing after one."""

import itertools

import pytest

from hbserve.detokenizer import Detokenizer


class ByteTokenizer:
    """A token is a byte: every character that is not ASCII takes several."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


def pieces(text: str, size: int) -> list[list[int]]:
    return [list(piece) for piece in itertools.batched(text.encode(), size)] if hasattr(itertools, "batched") else [
        list(text.encode()[i : i + size]) for i in range(0, len(text.encode()), size)
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("text", ["hello", "介绍一下人工智能", "naïve 🙂 café", ""])
def test_characters_are_emitted_whole_and_nothing_is_lost(text, size):
    detokenizer = Detokenizer(ByteTokenizer())
    emitted = [detokenizer.feed(piece) for piece in pieces(text, size)] + [detokenizer.feed([], final=True)]
    assert "".join(emitted) == detokenizer.text == text
    assert not any("�" in part for part in emitted)


def test_a_character_that_never_gets_whole_is_shown_as_broken_at_the_end():
    detokenizer = Detokenizer(ByteTokenizer())
    assert detokenizer.feed("人".encode()[:2]) == ""
    assert detokenizer.feed([], final=True) == "�"


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_text_ends_before_a_stop_string_that_spans_tokens(size):
    detokenizer = Detokenizer(ByteTokenizer(), ["END", "停"])
    emitted = "".join(detokenizer.feed(piece) for piece in pieces("one ENEND two", size))
    assert emitted == detokenizer.text == "one EN"
    assert detokenizer.stopped
    assert detokenizer.feed(list(b"more")) == ""


def test_the_earliest_of_several_stop_strings_counts():
    detokenizer = Detokenizer(ByteTokenizer(), ["c", "b"])
    assert detokenizer.feed(list(b"abcd")) == "a"


def test_what_may_become_a_stop_string_is_held_back_until_it_is_not():
    detokenizer = Detokenizer(ByteTokenizer(), ["END"])
    assert [detokenizer.feed([byte]) for byte in b"aENx"] == ["a", "", "", "ENx"]
    assert detokenizer.feed(list(b"EN"), final=True) == "EN"
