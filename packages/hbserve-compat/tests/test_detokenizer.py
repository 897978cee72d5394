"""Detokenizer: for any tokens, the pieces of text are the text of all tokens at once, up to the first stop string."""

import gc
import time
import weakref
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hbserve.text.detokenizer import Detokenizer
from hbserve.text.stop_strings import StopStrings
from hbserve.text.token_text import _BYTE_SYMBOLS, _CleanText
from hbserve_testing.narrowing import of_type

LETTERS = "abehlnostv"
SPECIAL = ["<unk>", "<s>", "</s>", "<|sep|>"]
MARKS = [".", "?", "!", ",", "'", "n't", "'m", "'s", "'ve", "'re"]
SYMBOLS = {byte: symbol for symbol, byte in _BYTE_SYMBOLS.items()}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def numbered(tokens):
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def byte_level():
    from hbserve.text.token_text import _BYTE_SYMBOLS

    symbols = {byte: symbol for symbol, byte in _BYTE_SYMBOLS.items()}
    several = [
        "".join(symbols[byte] for byte in text) for text in ("人".encode()[:2], "é".encode()[1:] + b"\xf0", b" a")
    ]
    made = Tokenizer(models.BPE(numbered([*SPECIAL, *SYMBOLS.values(), *several, "▁é"]), [], unk_token="<unk>"))
    made.decoder = decoders.ByteLevel()
    return made


def byte_level_and_more():
    """Make a byte-level tokenizer whose decoder has a further part, so that nothing is known about it."""
    made = byte_level()
    made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return made


def sentencepiece(strip=True):
    words = ["▁", "▁▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS), "▁人"]
    made = Tokenizer(models.BPE(numbered([*SPECIAL, *BYTES, *words]), [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    return made


def metaspace():
    words = ["▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS), *MARKS, *(f"▁{mark}" for mark in MARKS)]
    made = Tokenizer(models.Unigram([(token, -1.0) for token in numbered([*SPECIAL, *words])], unk_id=0))
    made.decoder = decoders.Metaspace()
    return made


def wordpiece():
    words = [*LETTERS, *(f"##{letter}" for letter in LETTERS), *MARKS, "##n't"]
    made = Tokenizer(models.WordPiece(numbered([*SPECIAL, *words]), unk_token="<unk>"))
    made.decoder = decoders.WordPiece()
    return made


def wordlevel():
    return Tokenizer(models.WordLevel(numbered([*SPECIAL, *LETTERS, *MARKS, "hello", "人"]), unk_token="<unk>"))


def word_ends():
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    made = Tokenizer(models.BPE(numbered([*SPECIAL, *words]), [], unk_token="<unk>"))
    made.decoder = decoders.BPEDecoder()
    return made


KINDS = {
    "byte level": byte_level,
    "byte level and more": byte_level_and_more,
    "SentencePiece with bytes": sentencepiece,
    "SentencePiece with bytes, first space kept": lambda: sentencepiece(strip=False),
    "Metaspace": metaspace,
    "WordPiece": wordpiece,
    "WordLevel": wordlevel,
    "word ends": word_ends,
    "Metaspace, cleaned up": metaspace,
    "WordLevel, cleaned up": wordlevel,
}


@cache
def tokenizer_of(kind):
    made = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        clean_up_tokenization_spaces="cleaned" in kind,
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": ["<|sep|>"]})
    made.add_tokens(["<think>"])  # added, and not special
    return made


def token_ids(kind, tokens):
    return [tokenizer_of(kind).get_vocab()[token] for token in tokens]


def in_pieces(detokenizer, ids, sizes):
    """Feed tokens in groups of these sizes, again and again, and then the end. Returns the text of each."""
    texts, first = list[str](), 0
    while first < len(ids):
        size = sizes[len(texts) % len(sizes)]
        texts.append(detokenizer.feed(ids[first : first + size]))
        first += size
    return [*texts, detokenizer.feed([], final=True)]


TOKENS = st.lists(st.integers(0, 299), max_size=40)  # more than some tokenizers have
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=3)
KIND = st.sampled_from(list(KINDS))


@settings(deadline=None, max_examples=600)
@given(kind=KIND, ids=TOKENS, sizes=SIZES, skip=st.booleans())
def test_text_in_pieces_is_the_text_of_all_tokens_at_once(kind, ids, sizes, skip):
    # Known elsewhere: tokenizers #1141, SGLang #31598.
    tokenizer = tokenizer_of(kind)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    texts = in_pieces(detokenizer, ids, sizes)
    assert "".join(texts) == detokenizer.text == tokenizer.decode(ids, skip_special_tokens=skip)
    assert detokenizer.token_ids == ids


@settings(deadline=None, max_examples=600)
@given(kind=KIND, ids=TOKENS, sizes=SIZES, skip=st.booleans(), data=st.data())
def test_text_in_pieces_ends_before_the_stop_string_that_is_complete_first(kind, ids, sizes, skip, data):
    tokenizer = tokenizer_of(kind)
    searched = tokenizer.decode(ids)
    parts = [searched[i : i + n] for i in range(len(searched)) for n in (1, 2, 3, 7)]
    stops = data.draw(st.lists(st.sampled_from([*parts, "</s>", "a b", "人", "never"]), min_size=1, max_size=4))
    detokenizer = Detokenizer(tokenizer, stops, skip_special_tokens=skip)
    text = "".join(in_pieces(detokenizer, ids, sizes))
    assert text == detokenizer.text
    including = Detokenizer(tokenizer, stops, skip_special_tokens=skip, include_stop_str_in_output=True)
    longer = "".join(in_pieces(including, ids, sizes))
    assert longer == including.text
    assert (including.stop_string, including.token_ids) == (detokenizer.stop_string, detokenizer.token_ids)
    ends = [(place + len(stop), place) for stop in stops if (place := searched.find(stop)) >= 0]
    assert detokenizer.stopped == bool(ends)
    if not ends:
        assert text == longer == tokenizer.decode(ids, skip_special_tokens=skip)
    elif not skip:
        end, begin = min(ends)
        assert (text, detokenizer.stop_string) == (searched[:begin], searched[begin:end])
        assert longer == searched[:end]


@settings(deadline=None, max_examples=300)
@given(kind=KIND, ids=TOKENS, sizes=SIZES, data=st.data())
def test_skipping_special_tokens_changes_no_token_at_which_a_stop_string_ends_the_text(kind, ids, sizes, data):
    # Known elsewhere: vLLM #2123, #792.
    tokenizer = tokenizer_of(kind)
    stops = data.draw(st.lists(st.sampled_from(["</s>", "<|sep|>", "a", "b<s>", "<think>", " "]), min_size=1))
    ended = []
    for skip in (False, True):
        detokenizer = Detokenizer(tokenizer, stops, skip_special_tokens=skip)
        in_pieces(detokenizer, ids, sizes)
        ended.append((detokenizer.stopped, detokenizer.token_ids))
    assert ended[0] == ended[1]


def test_a_stop_string_that_is_a_special_token_ends_the_text_where_these_are_skipped():
    ids = token_ids("byte level", ["h", "e", "<|sep|>", "l", "</s>", "o"])
    detokenizer = Detokenizer(tokenizer_of("byte level"), ["</s>"])
    assert detokenizer.feed(ids) == "hel"
    assert detokenizer.stopped
    assert detokenizer.token_ids == ids[:5]


def test_a_stop_string_may_be_partly_a_special_token():
    kind = "SentencePiece with bytes"
    detokenizer = Detokenizer(tokenizer_of(kind), ["b<|sep|> h"])
    assert [detokenizer.feed([each]) for each in token_ids(kind, ["a", "b", "<|sep|>", "▁h", "e"])] == ["a", *[""] * 4]
    assert detokenizer.stopped


def test_the_space_of_a_word_after_a_skipped_token_stays():
    kind = "SentencePiece with bytes"
    ids = token_ids(kind, ["▁h", "e", "<|sep|>", "▁s", "o"])
    assert in_pieces(Detokenizer(tokenizer_of(kind)), ids, [1]) == ["h", "e", "", " s", "o", ""]


@pytest.mark.parametrize("kind", ["byte level", "byte level and more"])
def test_characters_come_whole_and_as_soon_as_they_are(kind):
    ids = token_ids(kind, [SYMBOLS[byte] for byte in "é人b".encode()])
    assert in_pieces(Detokenizer(tokenizer_of(kind)), ids, [1]) == ["", "é", "", "", "人", "b", ""]


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("Metaspace, cleaned up", ["▁a", "▁.", "▁b"]), ("WordLevel, cleaned up", ["a", ".", "b"])],
)
def test_spaces_before_marks_are_removed_where_the_tokenizer_says_so(kind, tokens):
    ids = token_ids(kind, tokens)
    assert in_pieces(Detokenizer(tokenizer_of(kind)), ids, [1]) == ["", "", "", "a. b"]
    assert tokenizer_of(kind).decode(ids) == "a. b"


def test_a_character_that_never_gets_whole_is_shown_as_broken_at_the_end():
    kind = "SentencePiece with bytes"
    detokenizer = Detokenizer(tokenizer_of(kind))
    assert detokenizer.feed(token_ids(kind, ["a", "<0xE4>", "<0xBA>"])) == "a"
    assert detokenizer.feed([], final=True) == "��"


def test_only_what_may_become_a_stop_string_is_held_back():
    kind = "Metaspace"
    detokenizer = Detokenizer(tokenizer_of(kind), ["able", "hello"])
    ids = token_ids(kind, ["s", "a", "b", "a", "b", "l", "o", "h", "e", "l", "l"])
    expected = ["s", "", "", "ab", "", "", "ablo", "", "", "", "", "hell"]
    assert in_pieces(detokenizer, ids, [1]) == expected


def test_a_stop_string_that_belongs_to_the_text_holds_nothing_back():
    kind = "Metaspace"
    detokenizer = Detokenizer(tokenizer_of(kind), ["abel", "bel"], include_stop_str_in_output=True)
    ids = token_ids(kind, ["a", "b", "a", "b", "e", "l", "l"])
    assert in_pieces(detokenizer, ids, [1]) == ["a", "b", "a", "b", "e", "l", "", ""]
    assert (detokenizer.stop_string, detokenizer.token_ids) == ("abel", ids[:6])


def test_a_stop_string_that_is_a_skipped_token_is_not_shown_though_it_belongs_to_the_text():
    ids = token_ids("byte level", ["h", "</s>", "o"])
    detokenizer = Detokenizer(tokenizer_of("byte level"), ["</s>"], include_stop_str_in_output=True)
    assert (detokenizer.feed(ids), detokenizer.stop_string) == ("h", "</s>")


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, 0), (1, 2), (2, 2), (3, 4), (4, 4), (5, 6), (9, 6)])
def test_in_the_text_of_the_tokens_that_must_come_no_stop_string_is_looked_for(min_tokens, expected):
    kind = "Metaspace"
    for skip in (False, True):
        text = Detokenizer(tokenizer_of(kind), ["ab"], skip_special_tokens=skip, min_tokens=min_tokens)
        shown = in_pieces(text, token_ids(kind, "ababab"), [1])
        assert "".join(shown) == text.text == "ababab"[:expected]
        assert text.stopped is (min_tokens < 5)


def test_nothing_comes_after_a_stop_string():
    kind = "WordLevel"
    detokenizer = Detokenizer(tokenizer_of(kind), ["lo"])
    assert detokenizer.feed(token_ids(kind, ["a", "hello", "a"])) == "a hel"
    assert detokenizer.feed(token_ids(kind, ["b"]), final=True) == ""
    assert detokenizer.text == "a hel"


def test_a_stop_string_that_only_the_end_of_the_answer_completes_is_found():
    kind = "SentencePiece with bytes"
    detokenizer = Detokenizer(tokenizer_of(kind), ["人"])
    assert detokenizer.feed(token_ids(kind, ["a", *(f"<0x{byte:02X}>" for byte in "人".encode())])) == "a"
    assert detokenizer.feed([], final=True) == ""
    assert detokenizer.stopped


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("byte level", ["\u0122"]),  # a byte that begins no character, so that each text so far ends as if incomplete
        ("SentencePiece with bytes", ["<0x80>"]),
        ("SentencePiece with bytes", ["▁"]),
        ("SentencePiece with bytes", ["<s>"]),
        ("Metaspace, cleaned up", ["'", "."]),
        ("WordPiece", ["a"]),
        ("WordLevel", None),  # an id that the tokenizer does not know
    ],
)
@pytest.mark.parametrize("stops", [[], ["ab" * 500, "a" * 999 + "b"]])
def test_the_time_is_linear_in_the_tokens(kind, tokens, stops):
    # Known elsewhere: SGLang #34852.
    pattern = [299] if tokens is None else token_ids(kind, tokens)

    def seconds(count):
        detokenizer = Detokenizer(tokenizer_of(kind), stops)
        began_s = time.process_time()
        for _ in range(count // len(pattern)):
            for each in pattern:
                detokenizer.feed([each])
        detokenizer.feed([], final=True)
        return time.process_time() - began_s

    seconds(100)
    short = min(seconds(1000) for _ in range(3))
    assert any(seconds(8000) < 8 * 3 * short + 0.05 for _ in range(2))


@given(text=st.text("ab", max_size=60), stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4))
@example("abab", ["abc", "bc"])
def test_stop_strings_are_found_where_they_are_first_complete_however_the_text_is_cut(text, stops):
    whole = StopStrings(stops)
    after = whole.feed(text)
    ends = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    if ends:
        assert len(text) - after == min(ends)[1]
        assert whole.found == text[min(ends)[1] : min(ends)[0]]
    else:
        assert whole.found is None
        tails = [n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])]
        assert after == max(tails)
    piecewise = StopStrings(stops)
    for place, character in enumerate(text):
        after = piecewise.feed(character)
        if piecewise.found:
            assert place + 1 - after == min(ends)[1]
            break
    assert piecewise.found == whole.found


@given(words=st.lists(st.sampled_from([*LETTERS, *MARKS, " ", "  ", " ' ", "x7", "_"]), max_size=30))
def test_what_is_cleaned_up_in_pieces_is_what_is_cleaned_up_at_once(words):
    clean = tokenizer_of("WordLevel, cleaned up").clean_up_tokenization

    class Words:
        def feed(self, number):
            return words[number]

        def finish(self):
            return ""

    text = _CleanText(Words(), clean)
    assert "".join(text.feed(i) for i in range(len(words))) + text.finish() == clean("".join(words))


def test_tokens_that_are_added_to_a_tokenizer_are_heeded_from_then_on():
    made = PreTrainedTokenizerFast(tokenizer_object=wordlevel(), unk_token="<unk>")
    assert Detokenizer(made).feed(of_type(list, made.convert_tokens_to_ids(["a"]))) == "a"
    made.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert Detokenizer(made).feed(of_type(list, made.convert_tokens_to_ids(["a", "<new>"]))) == "a"


def test_a_tokenizer_is_collected_when_nobody_has_it():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    assert Detokenizer(tokenizer).feed([1, 0], final=True)
    watched = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert watched() is None
