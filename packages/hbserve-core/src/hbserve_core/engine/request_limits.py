"""Limits of what an engine can ever run. Other requests are refused at once, not when they get stuck."""

from collections.abc import Sequence as Ids
from random import SystemRandom

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.sequence import Sequence
from hbserve_rpc import InvalidRequest, SamplingParams
from hbserve_rpc.plain_values import plain_id, plain_token_ids, require_in_vocabulary, shown


class RequestLimits:
    """Limits of one engine: the model's, the pool's, and those of the configuration."""

    def __init__(self, config: InstanceConfig, vocab_size: int, max_model_len: int, num_blocks: int) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._num_blocks = num_blocks

    @property
    def max_prompt_len(self) -> int:
        """Most tokens that a prompt may have."""
        longest = min(self._max_model_len - 1, self._num_blocks * self._config.block_size)
        return longest if self._config.chunked_prefill_enabled else min(longest, self._config.max_num_batched_tokens)

    def sequence(self, request_id: str, prompt: Ids[int], params: SamplingParams, output: Ids[int] = ()) -> Sequence:
        """A request that can run, plain and shared with nobody. `output` are tokens that it has already.

        Raises:
            InvalidRequest: names what is wrong, the value and the limit.
        """
        request_id = plain_id("request_id", request_id)
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params={shown(params)}: expected SamplingParams")
        params = params.copied()
        params.require_vocabulary(self._vocab_size)
        prompt_ids, output_ids = plain_token_ids("prompt", prompt), plain_token_ids("output_token_ids", output)
        if not prompt_ids:
            raise InvalidRequest("prompt: expected at least one token")
        require_in_vocabulary("prompt", prompt_ids, self._vocab_size)
        require_in_vocabulary("output_token_ids", output_ids, self._vocab_size)
        num_prompt, num_output = len(prompt_ids), len(output_ids)
        if num_output >= params.max_tokens:
            raise InvalidRequest(f"output_token_ids: {num_output} tokens are all of max_tokens={params.max_tokens}")
        self._check_length(num_prompt, num_prompt + num_output)
        most = min(num_prompt + params.max_tokens, self._max_model_len)
        if params.n > 1 and params.seed is None:
            params.seed = SystemRandom().getrandbits(63)  # choices are told apart by their seeds
        sequence = Sequence(request_id, prompt_ids + output_ids, num_prompt, params, max_num_tokens=most)
        if params.prompt_logprobs is not None and not output_ids:
            sequence.num_scored_tokens = 1
        return sequence

    def _check_length(self, num_prompt: int, num_known: int) -> None:
        if num_known >= self._max_model_len:
            raise InvalidRequest(
                f"prompt: {num_known} tokens leave no room for another; max_model_len is {self._max_model_len}"
            )
        needed = -(-num_known // self._config.block_size)
        if needed > self._num_blocks:
            raise InvalidRequest(f"prompt: {num_known} tokens need {needed} blocks, the pool has {self._num_blocks}")
        budget = self._config.max_num_batched_tokens
        if not self._config.chunked_prefill_enabled and num_prompt > budget:
            raise InvalidRequest(
                f"prompt: {num_prompt} tokens do not fit max_num_batched_tokens={budget} while chunked prefill is off"
            )
