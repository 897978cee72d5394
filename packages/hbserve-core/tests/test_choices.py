"""Several answers to one prompt are those of as many requests, and the prompt is computed once for all of them."""

from typing import Any

import pytest
from hbserve_core_interpreted import WITHOUT_KERNELS

from hbserve_core import Engine, InstanceConfig, ModelRunner
from hbserve_rpc import SamplingParams

# The interpreter's numbers warn where they wrap, which is what hashing wants, and where they are none.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{which} encountered:RuntimeWarning") for which in ("overflow", "invalid value")
]
BLOCK = 8
ASKED = {
    "greedy": SamplingParams(0, 4, ignore_eos=True, n=3),
    "drawn": SamplingParams(3.0, 4, ignore_eos=True, seed=7, n=4),
    "penalized, with logprobs": SamplingParams(
        2.0, 5, ignore_eos=True, seed=2**63 - 2, n=3, logprobs=2, repetition_penalty=3, presence_penalty=1.5
    ),
    "of one token": SamplingParams(2.5, 1, seed=1, n=2, logprobs=0),
}


def run(engine, requests):
    """Outputs with tokens of requests (prompt, parameters) that are computed together, by request and choice."""
    for name, (prompt, params) in enumerate(requests):
        engine.add(str(name), prompt, params)
    found: list[list[list[int]]] = [[[] for _ in range(params.n)] for _, params in requests]
    while engine.has_work():
        for output in engine.step():
            if output.token_ids:
                found[int(output.request_id)][output.choice].append(output)
        engine.check_integrity()
    assert engine.blocks.num_free == engine.blocks.num_blocks
    return found


def tokens(outputs):
    return [output.token_id for output in outputs]


@WITHOUT_KERNELS
def test_each_choice_is_the_request_with_the_next_seed(either_runner, prompt):
    prompts = [prompt(length, salt=length) for length in (1, BLOCK, 2 * BLOCK + 5, BLOCK - 1)]
    engine = Engine(either_runner.config, either_runner)
    together = run(engine, list(zip(prompts, ASKED.values(), strict=True)))
    for given, asked, choices in zip(prompts, ASKED.values(), together, strict=True):
        alone = run(engine, [(given, asked.of_choice(number)) for number in range(asked.n)])
        for outputs, (expected,) in zip(choices, alone, strict=True):
            assert tokens(outputs) == tokens(expected)
            assert [output.index for output in outputs] == list(range(len(expected)))
            assert [output.finish_reason for output in outputs] == [output.finish_reason for output in expected]
            for output, other in zip(outputs, expected, strict=True):
                assert (output.logprobs is None) == (asked.logprobs is None)
                for token, logprob in (output.logprobs or {}).items():
                    assert logprob == pytest.approx(other.logprobs[token], abs=1e-4)
        assert (len({tuple(tokens(outputs)) for outputs in choices}) == 1) == (asked.temperature == 0 or asked.n == 2)


@pytest.mark.parametrize("either_runner", ["cuda kernels"], indirect=True)
def test_kernels_draw_each_choice_by_its_own_seed(either_runner, prompt):
    """In a step of decodes, as which a prompt of one token is computed, beside a request that is not special."""
    engine = Engine(either_runner.config, either_runner)
    asked = SamplingParams(3.0, 2, ignore_eos=True, seed=7, n=3, logprobs=1)
    beside = SamplingParams(0, 1, ignore_eos=True)
    choices, _ = run(engine, [(prompt(1), asked), (prompt(1, salt=2), beside)])
    alone = run(engine, [(prompt(1), asked.of_choice(number)) for number in range(asked.n)])
    assert [tokens(outputs) for outputs in choices] == [tokens(expected) for (expected,) in alone]
    assert all(output.token_id in output.logprobs for outputs in choices for output in outputs)
    assert len({outputs[0].token_id for outputs in choices}) > 1


@WITHOUT_KERNELS
def test_choices_without_a_seed_are_not_the_same(either_runner, prompt):
    engine = Engine(either_runner.config, either_runner)
    answers = [run(engine, [(prompt(5), SamplingParams(5.0, 6, ignore_eos=True, n=2))])[0] for _ in range(2)]
    assert len({tuple(tokens(outputs)) for choices in answers for outputs in choices}) == 4


@WITHOUT_KERNELS
def test_the_prompt_s_logprobs_are_computed_and_told_once(either_runner, prompt):
    engine, given = Engine(either_runner.config, either_runner), prompt(20)
    (choices,) = run(engine, [(given, SamplingParams(2.0, 3, ignore_eos=True, n=3, prompt_logprobs=1))])
    assert [[len(output.prompt_logprobs) for output in outputs] for outputs in choices] == [
        [19, 0, 0],
        [0] * 3,
        [0] * 3,
    ]


@WITHOUT_KERNELS
@pytest.mark.parametrize("caching", [False, True])
def test_the_prompt_is_computed_once_and_its_full_blocks_are_shared(either_runner, prompt, caching):
    """Of 21 tokens 16 are in full blocks: 2 of these, and one of its own for each choice."""
    engine = Engine(either_runner.config, either_runner)
    engine.blocks._prefix_caching = caching
    engine.add("r", prompt(2 * BLOCK + 5), SamplingParams(0, 3, ignore_eos=True, n=4))
    while engine.stats().num_running < 4:
        assert engine.step()
    stats = engine.stats()
    assert stats.num_prefill_tokens == 2 * BLOCK + 5
    assert stats.num_blocks - stats.num_free_blocks == 2 + 4
    while engine.has_work():
        engine.step()
    assert engine.stats().num_prefill_tokens == 2 * BLOCK + 5 + 3 * 5, "and what is in the last block, three times"
    engine.check_integrity()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


@WITHOUT_KERNELS
def test_choices_beyond_the_largest_batch_wait_and_lose_nothing(either_runner, prompt):
    asked = SamplingParams(3.0, 5, ignore_eos=True, seed=4, n=either_runner.config.max_num_seqs + 3)
    engine = Engine(either_runner.config, either_runner)
    (choices,) = run(engine, [(prompt(13), asked)])
    alone = run(engine, [(prompt(13), asked.of_choice(number)) for number in range(asked.n)])
    assert [tokens(outputs) for outputs in choices] == [tokens(expected) for (expected,) in alone]


@WITHOUT_KERNELS
def test_a_choice_that_ends_at_its_first_token_leaves_the_others_alone(either_runner, prompt):
    engine = Engine(either_runner.config, either_runner)
    asked = SamplingParams(3.0, 4, ignore_eos=True, seed=11, n=4)
    (before,) = run(engine, [(prompt(9), asked)])
    asked.stop_token_ids = tokens(before[2])[:1]
    (choices,) = run(engine, [(prompt(9), asked)])
    assert [output.finish_reason for output in choices[2]] == ["stop"]
    assert tokens(choices[0]) == tokens(before[0])
    # All of them: nothing is forked.
    asked.stop_token_ids = [tokens(outputs)[0] for outputs in before]
    (choices,) = run(engine, [(prompt(9), asked)])
    assert [[output.finish_reason for output in outputs] for outputs in choices] == [["stop"]] * 4


@WITHOUT_KERNELS
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_one_choice_is_ended_before_and_after_the_fork_and_the_others_go_on(either_runner, prompt, num_steps):
    engine = Engine(either_runner.config, either_runner)
    asked = SamplingParams(3.0, 6, ignore_eos=True, seed=11, n=3)
    (expected,) = run(engine, [(prompt(12), asked)])
    engine.add("0", prompt(12), asked)
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for _ in range(num_steps):
        for output in engine.step():
            found[output.choice] += output.token_ids
    engine.release_choice("0", 0)
    engine.release_choice("0", 9)
    engine.release_choice("nobody", 0)
    engine.check_integrity()
    num_told = len(found[0])
    while engine.has_work():
        for output in engine.step():
            found[output.choice] += output.token_ids
        engine.check_integrity()
    assert len(found[0]) == num_told, "nothing more of a choice that has ended"
    assert [found[1], found[2]] == [tokens(expected[1]), tokens(expected[2])]
    engine.add("0", prompt(3), SamplingParams(max_tokens=1))  # the id is free
    engine.release("0")
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_choices_of_a_prompt_that_fills_the_pool_end_also_where_some_had_to_wait(model_folder, prompt):
    settings: dict[str, Any] = {"block_size": BLOCK, "num_blocks": 4, "max_num_seqs": 2, "device": "cpu"}
    engine = Engine(config := InstanceConfig(model_path=str(model_folder("qwen3")), **settings), ModelRunner(config))
    engine.add("r", prompt(4 * BLOCK), SamplingParams(0, 9, ignore_eos=True, n=5))
    ended: dict[int, str | None] = {}
    while engine.has_work():
        ended |= {output.choice: output.finish_reason for output in engine.step() if output.is_last}
        assert not engine.stalled, "somebody waits for room that there never is"
        engine.check_integrity()
    assert ended == dict.fromkeys(range(5), "length")
