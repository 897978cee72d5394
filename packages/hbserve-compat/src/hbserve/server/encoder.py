"""Encoding of a server's prompts. Long ones are encoded in a thread, so that they do not delay streams."""

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from hbserve.text.tokenizer import encode, encode_messages
from hbserve_rpc.prompt_shape import PromptShape, shape_of

T = TypeVar("T")

SHORT = 4096
"""Most characters, or tokens, whose encoding takes less time than handing it to a thread."""


class Encoder:
    """Encodes short prompts in the event loop, and long ones in a thread. Has two tokenizers, because two threads must
    not use the same one at once."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        """Copy the tokenizer for the thread. If `tokenizer` is None, texts and messages are refused."""
        self.tokenizer = tokenizer
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        self._of_thread = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(1, "hbserve-encoder")

    async def text(self, text: str, *, add_special_tokens: bool = True, length: int = 0) -> tuple[int, ...]:
        """Encode a text as it is. Raises InvalidRequest. `length` is that of all texts of its request, which are long
        together if not one by one."""
        return await self._call(
            max(len(text), length),
            lambda tokenizer: tuple(encode(tokenizer, text, add_special_tokens=add_special_tokens)),
        )

    async def messages(self, messages: list[dict[str, Any]], **settings: Any) -> tuple[int, ...]:
        """Encode messages by the chat template. Raises InvalidRequest."""
        length = sum(len(message["content"]) for message in messages)
        if length <= SHORT:  # tools and earlier calls may be long all the same
            length = _length((messages, settings))
        return await self._call(
            length,
            lambda tokenizer: tuple(encode_messages(tokenizer, messages, chat_template=self.chat_template, **settings)),
        )

    async def shape(self, token_ids: tuple[int, ...], block_size: int) -> PromptShape:
        """Call `shape_of`, which takes long for a long prompt too."""
        return await self._call(len(token_ids), lambda _: shape_of(token_ids, block_size))

    async def _call(self, length: int, job: Callable[[Any], T]) -> T:
        if length <= SHORT:
            return job(self.tokenizer)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, job, self._of_thread)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _length(values: Any) -> int:
    """Return about how many characters all texts in these values have."""
    try:
        return len(msgspec.json.encode(values, enc_hook=str))
    except RecursionError:  # nested too deep to be short
        return SHORT + 1
