"""The figures beside the progress bar: they are measured, or absent."""

import itertools

from hbserve.llm import _Rates


def rates_at(times_s) -> _Rates:
    rates, clock = _Rates(), iter(itertools.chain(times_s))
    rates._clock = clock.__next__
    rates._last_s = 0.0
    return rates


def test_prompts_that_others_compute_have_no_rate():
    # Known elsewhere: vLLM #12908.
    rates = rates_at([0.5, 1.0])
    assert rates.after(-10) == {"Decode": "20tok/s"}
    assert set(rates.after(-10)) == {"Decode"}


def test_steps_have_the_rate_of_their_kind():
    rates = rates_at([0.5, 1.0, 2.0])
    rates.after(100)
    rates.after(-10)
    assert rates.after(300) == {"Prefill": "300tok/s", "Decode": "20tok/s"}


def test_news_that_comes_in_bursts_is_measured_over_a_while():
    """The events of a DisaggregatedLLM wait in a queue: the time between two reads does not say how fast they came."""
    rates = rates_at([0.01 + 0.04 * (i // 4) + 1e-6 * (i % 4) for i in range(400)])
    shown = {int(rates.after(-1)["Decode"].removesuffix("tok/s")) for _ in range(400)}
    assert max(shown) <= 150, "100 tokens a second"
