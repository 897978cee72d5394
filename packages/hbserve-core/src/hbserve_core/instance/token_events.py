"""Events of a request's tokens, as the steps of an engine bring these."""

from collections.abc import AsyncIterator
from collections.abc import Sequence as Ids

from hbserve_core.engine.step import StepOutput
from hbserve_core.instance.handover import Inbox
from hbserve_rpc.messages import TokenEvent


async def token_events(inbox: Inbox, num_choices: int) -> AsyncIterator[TokenEvent]:
    """Events until each of so many choices has ended; several steps' tokens in one if the client is slow.

    Raises LogitsNotFinite or InvalidRequest, as `StepOutput.raise_error`, of the first choice to which that happens.
    """
    while num_choices:
        output: StepOutput = await inbox.next()
        outputs = {output.choice: [output]}
        while not (output.is_last or inbox.empty()):
            output = await inbox.next()
            outputs.setdefault(output.choice, []).append(output)
        for each in outputs.values():
            event = event_of(each)
            if event.token_ids or event.finish_reason:
                yield event
        output.raise_error()
        num_choices -= output.is_last


def event_of(outputs: Ids[StepOutput]) -> TokenEvent:
    """Of one choice."""
    first, last = outputs[0], outputs[-1]
    return TokenEvent(
        first.index,
        [token for each in outputs for token in each.token_ids],
        last.finish_reason,
        [logprobs for each in outputs for logprobs in each.all_logprobs],
        next((each.prompt_logprobs for each in outputs if each.prompt_logprobs), []),
        first.choice,
        last.num_preemptions,
    )
