"""The synchronous LLM with separate prefill and decode."""

import hbserve.llm


class LLM(hbserve.llm.LLM):
    """An `hbserve.LLM` whose prefill and decode run in processes of their own even without `kv_transfer_backend`.

    Its keywords are those of PdDisaggConfig.
    """

    _default_backend = "nccl"
