"""`hbserve chat`: a conversation in the terminal, with a deployment that it starts here or with a server at a URL."""

import asyncio
import io
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from hbserve.client.chat_client import ChatClient
from hbserve.commands.command import shown_at_terminal
from hbserve.models.demo_model import find_model_folder
from hbserve.processes.start_notice import telling_at_terminal
from hbserve.text.text_request import TextRequest
from hbserve.text.tokenizer import encode_messages, require_tokenizer_of
from hbserve_rpc import HBServeRpcError, InvalidRequest, SamplingParams, own_process
from hbserve_rpc.plain_values import one_line
from hbserve_scheduler import ConfigError, load_config

Message = dict[str, str]
Answer = Callable[[list[Message]], AsyncIterator[tuple[str, str | None]]]
"""Streams the text of an answer to a conversation; its last piece comes with the reason why it ended."""
QUOTES = '"""'
CLEAR = "/clear"
HELP = (
    f"Ctrl-C stops an answer; Ctrl-D, or Ctrl-C where there is none, ends; {QUOTES} begins and ends several lines; "
    f"{CLEAR} forgets what was said.\n"
)
MOST_OF_LINE = 4095
"""Number of bytes that a terminal's driver keeps of one line. It loses the others, and tells nobody."""


@dataclass(frozen=True)
class ChatArgs:
    """The command's arguments."""

    url: str | None
    api_key: str | None
    system: str | None
    model: Path | None
    config: Path | None
    sampling: dict[str, Any]
    """Keywords of SamplingParams, which are fields of a chat's body too."""
    log_level: str


async def chat(args: ChatArgs) -> None:
    """Run a conversation. Raises, if possible, whatever is wrong before anything is started."""
    if sys.stdin is None:
        raise OSError("stdin is closed: there is nobody to talk to")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a character shows its number
        sys.stdout.reconfigure(errors="backslashreplace")
    async with AsyncExitStack() as stack:
        answer = await _asking(args) if args.url is not None else await _starting(args, stack)
        sys.stderr.write(HELP)
        await Conversation(answer, args.system).run()


async def _asking(args: ChatArgs) -> Answer:
    for name in ("model", "config"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name}={getattr(args, name)}: not with --url, whose server sets it")
    key = args.api_key or os.environ.get("HBSERVE_API_KEY")
    client = ChatClient(args.url or "", key, **args.sampling)
    await client.require_server()
    return client.answer


async def _starting(args: ChatArgs, stack: AsyncExitStack) -> Answer:
    from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig

    params = SamplingParams(**args.sampling)
    config = PdDisaggConfig.from_deployment(load_config(args.config)) if args.config else PdDisaggConfig()
    config.model_path = await find_model_folder(args.model or config.model_path)
    require_tokenizer_of(config.model_path)
    sys.stderr.write("hbserve: starting a prefill and a decode instance\n")
    llm = DisaggregatedLLM(config, log_level=args.log_level)
    stack.push_async_callback(llm.stop)
    async with telling_at_terminal(llm.waiting_for):
        await llm.start(lambda tokenizer: _try_template(tokenizer, args.system))

    async def answer(messages: list[Message]) -> AsyncIterator[tuple[str, str | None]]:
        prompt = encode_messages(llm.tokenizer, messages)
        async with aclosing(aiter(TextRequest(llm.scheduler, llm.tokenizer, prompt, params))) as deltas:
            async for delta in deltas:
                yield delta["text"], delta["finish_reason"]

    return answer


def _try_template(tokenizer: Any, system: str | None) -> None:
    """Raise InvalidRequest if the model's chat template would refuse every question."""
    encode_messages(tokenizer, [*_first(system), {"role": "user", "content": "Hello"}])


def _first(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


class Conversation:
    """A conversation with questions from stdin and answers on stdout. Each question is sent with all that was said
    before."""

    def __init__(self, answer: Answer, system: str | None = None) -> None:
        self._answer = answer
        self._system = system
        self._messages = _first(system)
        self._answering: asyncio.Task[str | None] | None = None
        self._is_shown = sys.stdin.isatty()
        self._held = b""
        """Input that was read, but not asked yet."""

    async def run(self) -> None:
        """Ask and answer until there is no more input, or until a Ctrl-C while nothing is being answered."""
        task, is_left = asyncio.current_task(), False
        assert task is not None

        def interrupt(_: signal.Signals) -> None:
            nonlocal is_left
            is_left = self._answering is None
            (self._answering or task).cancel()

        try:
            with own_process.on_signals([signal.SIGINT], interrupt):
                while (question := await self._question()) is not None:
                    if question:
                        await self._ask(question)
        except asyncio.CancelledError:
            if not is_left:  # another signal, or the caller, has cancelled this
                raise
        sys.stdout.write("\n")

    async def _question(self) -> str | None:
        """Return a line, or what stands between triple quotes, or None at the end of the input."""
        if (text := await self._read("> ")) is None:
            return None
        if text.strip() == CLEAR:
            self._messages = _first(self._system)
            return ""
        if text.lstrip().startswith(QUOTES):
            text = text.lstrip().removeprefix(QUOTES)
            while not text.rstrip().endswith(QUOTES) and (line := await self._read(". ")) is not None:
                text += f"\n{line}"
            text = text.rstrip().removesuffix(QUOTES)
        if self._is_shown and any(len(line.encode()) >= MOST_OF_LINE for line in text.split("\n")):
            cure = f"use shorter lines, between {QUOTES}, or a pipe"
            sys.stderr.write(f"error: a terminal loses what exceeds {MOST_OF_LINE} bytes of a line: {cure}\n")
            return ""
        return text.strip()

    async def _read(self, prompt: str) -> str | None:
        """Return the next line, or None at the end of the input."""
        if self._is_shown:
            sys.stdout.write(prompt)
            sys.stdout.flush()
        while b"\n" not in self._held:
            await _readable(sys.stdin)
            if not (part := os.read(sys.stdin.fileno(), 1 << 16)):
                break
            self._held += part
        line, end, self._held = self._held.partition(b"\n")
        return line.decode(errors="replace") if line or end else None

    async def _ask(self, question: str) -> None:
        """Show the answer to a question. At a terminal an error ends this question, which is forgotten; elsewhere it
        ends the conversation, since nobody is there who could ask again."""
        self._messages.append({"role": "user", "content": question})
        parts: list[str] = []
        self._answering = asyncio.create_task(self._show(parts))
        reason = None
        try:
            reason = await self._answering
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():  # not only the answer was cancelled
                raise
            sys.stdout.write(" [stopped]")
        except HBServeRpcError as error:
            sys.stdout.write("\n" * bool(parts))
            if not self._is_shown:
                raise
            del self._messages[-1]
            # With what was said, it is probably too long; without, only another question helps.
            is_long = isinstance(error, InvalidRequest) and self._messages != _first(self._system)
            cure = f"; {CLEAR} forgets what was said, and leaves more room" if is_long else ""
            sys.stderr.write(f"error: {one_line(str(error))}{cure}\n")
            return
        finally:
            self._answering = None
        sys.stdout.write("\n")
        sys.stdout.flush()
        if reason == "length":
            sys.stderr.write("hbserve: the answer is cut here: --max-tokens, or the model's length, allows no more\n")
        self._messages.append({"role": "assistant", "content": "".join(parts)})

    async def _show(self, parts: list[str]) -> str | None:
        """Write an answer as it comes, and return why it ended."""
        answer: Any = self._answer(self._messages)
        end: str | None = None
        async with aclosing(answer):
            async for text, reason in answer:
                parts.append(text)
                sys.stdout.write(shown_at_terminal(text))
                sys.stdout.flush()
                end = reason or end
        return end


async def _readable(file: TextIO) -> None:
    """Wait until there is input, or its end. A read in a thread would not do: it could not be cancelled."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(file, ready.set)
    except PermissionError:  # a regular file, whose reads never wait
        return
    try:
        await ready.wait()
    finally:
        loop.remove_reader(file)
