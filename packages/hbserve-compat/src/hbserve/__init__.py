"""HBServe: language models with prefill and decode on separate instances.

`from hbserve import LLM, SamplingParams` stands in for nano-vllm. Importing this package imports neither torch nor
transformers, so that a scheduler's process needs neither; an engine is imported when an LLM is made.
"""

from hbserve.llm import LLM as LLM
from hbserve.sampling_params import SamplingParams as SamplingParams

__all__ = ["LLM", "SamplingParams"]
