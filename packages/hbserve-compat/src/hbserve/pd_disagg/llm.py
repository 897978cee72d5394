"""LLM, synchronous, with prefill and decode apart."""

import hbserve.llm


class LLM(hbserve.llm.LLM):
    """`hbserve.LLM` whose prefill and decode run in processes of their own, also if no `kv_transfer_backend` is given.

    The other keywords are those of PdDisaggConfig.
    """

    _default_backend = "nccl"
