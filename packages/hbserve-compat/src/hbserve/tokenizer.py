"""The tokenizer of a model folder. transformers is imported when one is loaded."""

from pathlib import Path
from typing import Any

from hbserve_rpc import InvalidRequest
from hbserve_rpc.plain_values import plain_text, shown


def load_tokenizer(folder: str | Path) -> Any:
    """A transformers tokenizer from a local folder; never from a hub.

    Raises:
        FileNotFoundError: the folder has no tokenizer; says which files would do.
    """
    path = Path(folder).expanduser()
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise FileNotFoundError(f"{path}: no tokenizer.json, tokenizer_config.json or tokenizer.model there")
    if (path / "tokenizer.json").exists():
        # That file says all there is to say. AutoTokenizer would read the same, but imports torch first: 4 s at start.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of the text, without a chat template.

    As the tokenizer has it, but with one BOS: a text that begins with it, as chat templates make them, gets none.
    """
    ids: list[int] = tokenizer.encode(text)
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos and text.startswith(bos) and ids[:2] == [bos_id, bos_id]:
        as_it_stands: list[int] = tokenizer.encode(text, add_special_tokens=False)
        if ids[1 : len(as_it_stands) + 1] == as_it_stands:
            return ids[1:]
    return ids


def encode_message(tokenizer: Any, text: str) -> list[int]:
    """Token ids of the text as a user's message, if the model has a chat template; else of the text as a prompt.

    Raises:
        InvalidRequest: (a ValueError) it is not Unicode text, or the template refuses it, or cannot be read; says why.
    """
    text = plain_text("prompt", text)
    if not getattr(tokenizer, "chat_template", None):
        return encode(tokenizer, text)
    message = [{"role": "user", "content": text}]
    try:
        ids: list[int] = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates are programs, and raise what they like
        raise InvalidRequest(f"prompt={shown(text)}: the model's chat template cannot be applied: {error}") from error
    return ids
