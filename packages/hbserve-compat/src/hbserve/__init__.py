"""HBServe: language models with prefill and decode on separate instances.

`from hbserve import LLM, SamplingParams` stands in for nano-vllm. Each name is imported at its first use, and torch and
transformers only when an LLM is made: so a command starts at once, and a scheduler's process needs neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbserve.llm import LLM
    from hbserve.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]


_HOMES = {"LLM": "llm", "SamplingParams": "sampling_params"}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return __all__
