"""Token ids of a server's prompts. Encoding a long prompt takes long, so it is done in a thread, and delays no
stream."""

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from hbserve.text.tokenizer import encode, encode_messages
from hbserve_rpc.prompt_shape import PromptShape, shape_of

T = TypeVar("T")

SHORT = 4096
"""Up to this many characters, or tokens, encoding takes less time than starting a thread."""


class Encoder:
    """Two tokenizers, because one must not be used by two threads at once: one for short prompts here, one in a
    thread."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        """`tokenizer` is None if there is none: then there can be no text and no messages."""
        self.tokenizer = tokenizer
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        self._of_thread = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(1, "hbserve-encoder")

    async def text(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text as it is. Raises InvalidRequest."""
        return await self._call(
            len(text), lambda tokenizer: tuple(encode(tokenizer, text, add_special_tokens=add_special_tokens))
        )

    async def messages(self, messages: list[dict[str, Any]], **settings: Any) -> tuple[int, ...]:
        """Token ids of messages, by the chat template. Raises InvalidRequest."""
        length = sum(len(message["content"]) for message in messages)
        return await self._call(
            length,
            lambda tokenizer: tuple(encode_messages(tokenizer, messages, chat_template=self.chat_template, **settings)),
        )

    async def shape(self, token_ids: tuple[int, ...], block_size: int) -> PromptShape:
        """See `shape_of`: computing that of a long prompt takes a while too."""
        return await self._call(len(token_ids), lambda _: shape_of(token_ids, block_size))

    async def _call(self, length: int, job: Callable[[Any], T]) -> T:
        if length <= SHORT:
            return job(self.tokenizer)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, job, self._of_thread)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
