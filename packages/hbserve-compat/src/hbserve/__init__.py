"""HBServe: language models with prefill and decode on separate instances.

`from hbserve import LLM, SamplingParams` stands in for nano-vllm. What a name needs is imported with it, and neither
torch nor transformers before an LLM is made: a command begins at once, and a scheduler's process needs neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbserve.llm import LLM
    from hbserve.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]


_HOMES = {"LLM": "llm", "SamplingParams": "sampling_params"}


def __getattr__(name: str) -> Any:
    """Called for names that are not here yet (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return __all__
