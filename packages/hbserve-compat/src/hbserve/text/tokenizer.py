"""The tokenizer of a model folder. transformers is imported only when one is loaded."""

import logging
import os
import re
from pathlib import Path
from typing import Any

from hbserve_core import BrokenTokenizer
from hbserve_rpc import InvalidRequest
from hbserve_rpc.plain_values import one_line, plain_text, shown

logger = logging.getLogger(__name__)

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
"""Files of tokenizers. A folder without any of them has no tokenizer."""


def load_tokenizer(folder: str | Path) -> Any:
    """Load a transformers tokenizer from a local folder, never from a hub. Returns None if the folder has none: then it
    serves token ids only.

    Raises:
        BrokenTokenizer: the folder has files of a tokenizer, but it cannot be read; the message says why.
    """
    path = Path(os.path.expanduser(folder))
    if not any((path / name).exists() for name in FILES):
        return None
    try:
        tokenizer = _read(path)
        tokenizer.decode(tokenizer.encode("a"))  # some of its settings are looked at only now
    except Exception as error:  # any kind: each format is read by another library, which has its own errors
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        raise BrokenTokenizer(f"{path}: its tokenizer cannot be read: {reason}") from error
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # transformers takes a missing vocabulary as empty
        raise BrokenTokenizer(f"{path}: its tokenizer has no vocabulary; is tokenizer.json missing, or cut off?")
    named = tokenizer.chat_template or {}
    for template in named.values() if isinstance(named, dict) else (named,):
        if problem := why_no_template(template):
            logger.warning("%s: messages will be refused, its chat template cannot be read: %s", path, problem)
    return tokenizer


def why_no_template(text: str) -> str | None:
    """Return what is wrong with the syntax of a chat template, and where; None if nothing is."""
    import jinja2

    known = re.sub(r"({%-?)\s*(end)?generation\b", r"\1 set _ = 0", text)  # a tag of transformers' own
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(known)
    except jinja2.TemplateSyntaxError as error:
        return f"{error.message} (line {error.lineno})"
    return None


def require_tokenizer_of(folder: str | Path) -> None:
    """Raise FileNotFoundError unless a folder has a tokenizer. For commands that need text."""
    path = Path(os.path.expanduser(folder))
    if not any((path / name).exists() for name in FILES):
        raise FileNotFoundError(f"{path}: has no tokenizer, which text needs: none of {', '.join(FILES)}")


def require_tokenizer(tokenizer: Any, name: str) -> None:
    """Raise InvalidRequest if there is no tokenizer, so that text cannot be used. `name` is what was given as text."""
    if tokenizer is None:
        raise InvalidRequest(
            f"{name}: is text, but the model folder has no tokenizer, none of {', '.join(FILES)}; expected token ids"
        )


def _read(path: Path) -> Any:
    if (path / "tokenizer.json").exists():
        # This file is enough. AutoTokenizer would read the same, but imports torch first, which takes 4 s at start.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Encode a text without a chat template.

    Special tokens are added as the tokenizer does it, but never a second BOS: a text that begins with one, as the text
    of chat templates does, gets none. Without `add_special_tokens` nothing is added.

    Raises:
        InvalidRequest: (a ValueError) there is no tokenizer.
    """
    require_tokenizer(tokenizer, "prompt")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if add_special_tokens and bos and text.startswith(bos) and ids[:2] == [bos_id, bos_id]:
        as_it_stands: list[int] = tokenizer.encode(text, add_special_tokens=False)
        if ids[1 : len(as_it_stands) + 1] == as_it_stands:
            return ids[1:]
    return ids


def encode_message(tokenizer: Any, text: str, system: str | None = None) -> list[int]:
    """Encode a text as a user's message, after a system message if there is one. If the model has no chat template, and
    there is no system message, encode the text alone.

    Raises:
        InvalidRequest: (a ValueError) this is not Unicode text, or the template refuses it or cannot be read; the
            message says why.
    """
    text = plain_text("prompt", text)
    if system is None and not getattr(tokenizer, "chat_template", None):
        return encode(tokenizer, text)
    before = [] if system is None else [{"role": "system", "content": plain_text("system", system)}]
    return encode_messages(tokenizer, [*before, {"role": "user", "content": text}], name="prompt")


def encode_messages(
    tokenizer: Any, messages: list[dict[str, Any]], *, name: str = "messages", **settings: Any
) -> list[int]:
    """Encode messages by the tokenizer's chat template, or by `chat_template` among the settings, which are those of
    transformers. `name` is the name of the messages in errors.

    Raises:
        InvalidRequest: (a ValueError) there is no template, it refuses the messages, or it cannot be read; the message
            says why.
    """
    require_tokenizer(tokenizer, name)
    settings = {"add_generation_prompt": True} | settings
    try:
        ids: list[int] = tokenizer.apply_chat_template(messages, return_dict=False, **settings)
    except Exception as error:  # any kind: templates are programs, which may raise anything
        given = shown(messages[0]["content"] if len(messages) == 1 else messages)
        why = str(error) or type(error).__name__
        raise InvalidRequest(f"{name}={given}: the model's chat template cannot be applied: {why}") from error
    return ids
