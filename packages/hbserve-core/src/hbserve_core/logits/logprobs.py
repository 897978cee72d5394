"""Log-probabilities of tokens: of one token for each row, and of the most likely ones.

They are computed from the model's own logits in float32, before temperature, penalties and whatever else a request
asks for, as in the OpenAI API and in vLLM.
Shapes: N rows, V vocab_size, K most tokens that one of the rows asks for.
"""

import torch

from hbserve_core.engine.step import DrawnToken
from hbserve_rpc.messages import TokenLogprobs


class Logprobs:
    """Log-probabilities of the most likely tokens of rows of logits. Later, when a token of each row is known, the
    results are sent to the host.

    Nothing waits for the device: `read` may only be called when the device has done everything that was queued so far.
    """

    def __init__(self, logits: torch.Tensor, counts: list[int | None]) -> None:
        """logits: (N, V) float32. counts: number of most likely tokens to read for each row, besides its own; None if
        only its own token is read, without log-probabilities."""
        self._counts = counts
        most = min(max((count or 0 for count in counts), default=0), logits.shape[1])
        self._total = logits.logsumexp(-1, keepdim=True)
        self._top = logits.topk(most)

    def send(self, logits: torch.Tensor, tokens: torch.Tensor) -> "Logprobs":
        """Send the results to the host, with one token of each row. logits: (N, V), the same as before; tokens:
        (N,)."""
        tokens = tokens.long()[:, None]
        # The sampled value may not be a token. Then nothing of its row is read.
        chosen = logits.gather(1, tokens.clamp(min=0)).float()
        self._values = _to_host(torch.cat((chosen, self._top.values), 1) - self._total)
        self._ids = _to_host(torch.cat((tokens, self._top.indices), 1))
        return self

    def read(self) -> list[DrawnToken]:
        """Return for each row its token, and the most likely tokens in order. If the token is not among these, it comes
        last."""
        rows = zip(self._counts, self._ids.tolist(), self._values.tolist(), strict=True)
        return [(ids[0], None if count is None else _named(ids, values, count)) for count, ids, values in rows]


def _named(ids: list[int], values: list[float], count: int) -> TokenLogprobs:
    named = dict(zip(ids[1 : count + 1], values[1 : count + 1], strict=True))
    named.setdefault(ids[0], values[0])
    return named


def _to_host(values: torch.Tensor) -> torch.Tensor:
    if values.device.type == "cpu":
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
