"""TextLogprobs finds the tokens of which an answer's text is made."""

import pytest

from hbserve.server.answers.text_logprobs import TextLogprobs


def entries(*tokens):
    return [{"token": token, "bytes": list(token.encode())} for token in tokens]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(["a", "b"], [("text", "ab")])], ["a", "b"]),
        ([(["<", "/think>", "\n", "a"], [("reasoning", "x"), ("text", "a")])], ["a"]),
        ([(["<"], []), (["think>"], []), (["x"], [("reasoning", "x")]), (["y"], [("text", "y")])], ["y"]),
        ([(["a\n", "<tool"], [("text", "a")]), (["_call>"], [("call", "")])], ["a\n"]),
        ([(["a", "\n", "<b"], [("text", "a")]), ([">"], [("text", "\n<b>")])], ["a", "\n", "<b", ">"]),
        ([(["x", "a", "{}"], [("reasoning", "x"), ("text", "a"), ("call", "{}")])], ["a"]),
        ([(["a"], [("text", "a")]), (["</s>"], [])], ["a", "</s>"]),
        ([(["\u2581a"], [("text", "a")]), (["</s>"], [])], ["\u2581a", "</s>"]),
        ([(["\u00bf\u2581"], [("text", " ")])], ["\u00bf\u2581"]),
        ([(["x", "</s>"], [("reasoning", "x")])], []),
        ([([], [])], []),
    ],
)
def test_tokens_of_the_text_are_found_among_those_of_tags_reasoning_and_calls(steps, expected):
    logprobs, found = TextLogprobs(), []
    for number, (tokens, pieces) in enumerate(steps):
        found += logprobs.feed(entries(*tokens), pieces, final=number == len(steps) - 1)
    assert [each["token"] for each in found] == expected
