"""Whether a request can ever run."""

from collections.abc import Sequence

from hbserve_rpc import InvalidRequest
from hbserve_rpc.messages import GenerateRequest, InstanceInfo


def check_request(request: GenerateRequest, infos: Sequence[InstanceInfo]) -> None:
    """Check a request against the instances that are ready; while there are none, they check it themselves later.

    Raises:
        InvalidRequest: says what is wrong, and what is allowed.
    """
    request.params.validate()
    if not request.prompt_token_ids:
        raise InvalidRequest("prompt: expected at least one token")
    if len(request.output_token_ids) >= request.params.max_tokens:
        raise InvalidRequest(
            f"output_token_ids: {len(request.output_token_ids)} tokens; expected fewer than "
            f"max_tokens={request.params.max_tokens}, which counts them"
        )
    tokens = request.prompt_token_ids + request.output_token_ids
    if infos and len(tokens) > (longest := min(info.max_prompt_len for info in infos)):
        raise InvalidRequest(f"prompt: {len(tokens)} tokens; the instances take at most {longest}")
    if infos and max(tokens) >= (size := min(info.vocab_size for info in infos)):
        raise InvalidRequest(f"prompt: token {max(tokens)} is outside the vocabulary [0, {size})")
    if min(tokens) < 0:
        raise InvalidRequest(f"prompt: token {min(tokens)} is negative")
