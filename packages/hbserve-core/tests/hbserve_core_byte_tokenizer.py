"""A tokenizer whose tokens are bytes, so that a test can spell out what may come next."""

import json

import numpy as np

EOS, VOCAB_SIZE = 2, 320


def byte_tokenizer() -> str:
    """tokenizer.json of bytes, token 3 + i for the i-th of `BYTES`."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {symbol: 3 + place for place, symbol in enumerate(SYMBOLS)}
    special = [{"id": i, "content": each, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False} for i, each in enumerate(["<unk>", "<s>", "</s>"])]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": special,
            "pre_tokenizer": level,
            "decoder": level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>"},
        }
    )


def _symbols() -> dict[str, int]:
    """GPT-2's characters for bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(others)}


SYMBOLS = _symbols()
BYTES = list(SYMBOLS.values())


def ids(text: str) -> list[int]:
    return [3 + BYTES.index(byte) for byte in text.encode()]


def text_of(tokens: list[int]) -> str:
    return bytes(BYTES[token - 3] for token in tokens if token != EOS).decode()


def allowed_by(matcher):
    return np.flatnonzero(np.unpackbits(matcher.mask.view(np.uint8), bitorder="little")).tolist()
