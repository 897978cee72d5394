"""The tokenizer of a model folder. transformers is imported when one is loaded."""

from pathlib import Path
from typing import Any


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


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of the text, without a chat template."""
    ids: list[int] = tokenizer.encode(prompt)
    return ids


def apply_chat_template(tokenizer: Any, text: str) -> str:
    """The text as a user's message, if the model has a template for it."""
    if not getattr(tokenizer, "chat_template", None):
        return text
    message = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
