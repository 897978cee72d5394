"""The engine gives the tokens of transformers, whatever is computed beside, and gives every block back."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hbserve_core import Engine, InstanceConfig, ModelRunner
from hbserve_rpc import InvalidRequest, SamplingParams

BLOCK, CHUNK = 16, 32
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK + 5]
MAX_TOKENS = 6


@pytest.fixture
def make_engine(model_folder: Callable[[str], Any]) -> Iterator[Callable[..., Engine]]:
    """Engines that are checked at the end: nothing running, every block free or cached, in one state each."""
    made = []

    def make(name: str = "qwen3", folder: Any = None, **settings: Any) -> Engine:
        defaults = {"block_size": BLOCK, "chunk_size": CHUNK, "num_blocks": 300, "max_num_batched_tokens": 100}
        config = InstanceConfig(model_path=str(folder or model_folder(name)), device="cpu", **(defaults | settings))
        runner = ModelRunner(config)
        # Memory that nobody wrote to may hold anything; nothing of it may reach a token.
        runner.pool.fill_(float("nan"))
        made.append(Engine(config, runner))
        return made[-1]

    yield make
    for engine in made:
        engine.check_integrity()
        stats = engine.stats()
        assert (stats.num_waiting, stats.num_running, stats.num_reserved) == (0, 0, 0)
        assert stats.num_free_blocks == stats.num_blocks


def greedy(max_tokens: int = MAX_TOKENS, **others: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True} | others)


def run(engine: Engine) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Step until nothing is left: tokens, and finish reason or error, of each request."""
    tokens: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    while engine.has_work():
        for output in engine.step():
            if output.token_id is not None:
                assert output.index == len(tokens.setdefault(output.request_id, []))
                tokens[output.request_id].append(output.token_id)
            if output.is_last:
                reasons[output.request_id] = output.finish_reason or str(output.error)
        engine.check_integrity()
    return tokens, reasons


@pytest.mark.parametrize("model_name", ["qwen3", "qwen2-last-layers-window", "mistral-window", "gemma3", "opt"])
def test_every_length_alone_and_all_at_once(make_engine, model_name, prompt, greedy_tokens):
    """Of models that differ for an engine: in what their layers see, which says when blocks are free, and in positions.
    Every family's tokens are those of transformers: see test_tokens_equal_transformers.py."""
    engine = make_engine(model_name)
    expected = {str(length): greedy_tokens(model_name, prompt(length), MAX_TOKENS) for length in LENGTHS}
    for length in LENGTHS:
        engine.add(str(length), prompt(length), greedy())
        assert run(engine)[0] == {str(length): expected[str(length)]}
    for length in LENGTHS:
        engine.add(str(length), prompt(length), greedy())
    tokens, reasons = run(engine)
    assert tokens == expected
    assert set(reasons.values()) == {"length"}


def test_32_at_once_with_prefills_among_decodes(make_engine, prompt, greedy_tokens):
    engine = make_engine(prefix_caching=False)
    expected = {}
    for i in range(32):
        ids = prompt(LENGTHS[i % len(LENGTHS)], salt=i)
        expected[str(i)] = greedy_tokens("qwen3", ids, MAX_TOKENS)
        engine.add(str(i), ids, greedy())
    assert run(engine)[0] == expected


def test_a_cached_prefix_is_used_and_changes_nothing(make_engine, prompt, greedy_tokens):
    engine = make_engine()
    ids = prompt(5 * BLOCK)
    for number, (tail, num_cached) in enumerate([(0, 0), (0, 4 * BLOCK), (7, 5 * BLOCK), (BLOCK, 5 * BLOCK)]):
        before = engine.stats().num_cached_tokens
        engine.add(str(number), ids + prompt(tail, salt=9), greedy())
        assert run(engine)[0][str(number)] == greedy_tokens("qwen3", ids + prompt(tail, salt=9), MAX_TOKENS)
        assert engine.stats().num_cached_tokens - before == num_cached


def test_a_prompt_is_found_by_others_once_its_first_token_is_there(make_engine, prompt):
    engine = make_engine()
    engine.add("first", prompt(70), greedy())
    (output,) = engine.step()
    while output.token_id is None:
        engine.add(f"after {output.num_computed_tokens}", prompt(70), greedy(1))
        output, *_ = engine.step()
        assert engine.stats().num_cached_tokens == 0
    engine.add("last", prompt(70), greedy(1))
    engine.step()
    assert engine.stats().num_cached_tokens == 4 * BLOCK
    while engine.has_work():
        engine.step()


def test_preemption_in_a_small_pool_changes_no_token(make_engine, prompt, greedy_tokens):
    engine = make_engine(num_blocks=12)
    expected = {}
    for i in range(6):
        ids = prompt(20 + i, salt=i)
        expected[str(i)] = greedy_tokens("qwen3", ids, 40)
        engine.add(str(i), ids, greedy(40))
    told: dict[str, int] = {}
    step = engine.step

    def noting():
        outputs = step()
        told.update({output.request_id: output.num_preemptions for output in outputs})
        return outputs

    engine.step = noting
    assert run(engine)[0] == expected
    assert engine.stats().num_preemptions == sum(told.values()) > 0


def test_a_sequence_that_fills_the_pool_alone_ends_with_length(make_engine, prompt):
    engine = make_engine(num_blocks=3)
    engine.add("r", prompt(40), greedy(100))
    tokens, reasons = run(engine)
    assert reasons == {"r": "length"}
    assert len(tokens["r"]) == 3 * BLOCK - 40 + 1


def test_generation_ends_at_the_models_length(make_engine, prompt):
    engine = make_engine(max_model_len=50)
    engine.add("r", prompt(45), greedy(100))
    tokens, reasons = run(engine)
    assert (len(tokens["r"]), reasons) == (5, {"r": "length"})


def test_end_of_sequence_and_stop_tokens_end_a_request_and_are_part_of_it(make_engine, prompt, greedy_tokens):
    expected = greedy_tokens("qwen3", prompt(20), MAX_TOKENS)
    engine = make_engine()
    engine.add("r", prompt(20), greedy(stop_token_ids=[expected[2]]))
    tokens, reasons = run(engine)
    assert (tokens["r"], reasons) == (expected[: expected.index(expected[2]) + 1], {"r": "stop"})


def test_chunked_prefill_off_computes_whole_prompts(make_engine, prompt, greedy_tokens):
    engine = make_engine(chunked_prefill_enabled=False)
    engine.add("r", prompt(90), greedy(max_tokens=1))
    assert engine.step()[0].token_id == greedy_tokens("qwen3", prompt(90), 1)[0]
    with pytest.raises(InvalidRequest, match="max_num_batched_tokens=100"):
        engine.add("long", prompt(101), greedy())


REFUSED = {
    "empty": ([], {}, "at least one token"),
    "outside the vocabulary": ([5, 320], {}, r"token 320 is outside the vocabulary \[0, 320\)"),
    "negative": ([-1], {}, r"prompt\[0\]=-1: expected a token id"),
    "longer than the model": ([5] * 512, {}, "512 tokens leave no room for another; max_model_len is 512"),
    "larger than the pool": ([5] * 100, {"num_blocks": 4}, "100 tokens need 7 blocks, the pool has 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_prompt_that_can_never_run_is_refused_at_once(make_engine, case):
    ids, settings, message = REFUSED[case]
    engine = make_engine(**settings)
    with pytest.raises(InvalidRequest, match=message):
        engine.add("r", ids, greedy())
    with pytest.raises(InvalidRequest, match=message):
        engine.reserve("r", ids, greedy())


def test_bad_parameters_set_after_construction_are_refused(make_engine, prompt):
    engine, params = make_engine(), greedy()
    params.top_p = 2
    with pytest.raises(InvalidRequest, match="top_p=2"):
        engine.add("r", prompt(3), params)


@pytest.mark.parametrize(
    "ids", [[True, 5], [5.0], ["5"], torch.tensor([5.0]), 5, None, "55", b"55", {5}, [10**5000], [[5]]]
)
def test_what_is_no_token_id_is_refused_in_a_short_message_and_leaves_nothing(make_engine, ids):
    engine = make_engine()
    with pytest.raises(InvalidRequest, match="token id") as caught:
        engine.add("r", ids, greedy())
    assert len(str(caught.value)) < 300
    assert not engine.has_work()
    engine.check_integrity()


@pytest.mark.parametrize("ids", [torch.tensor([5, 6]), (5, 6), range(5, 7), list(torch.tensor([5, 6])), iter([5, 6])])
def test_ids_in_whatever_sequence_are_taken_and_what_changes_later_changes_nothing(make_engine, ids, greedy_tokens):
    # Known elsewhere: verl #772, vLLM #2881.
    engine, params = make_engine(), greedy(max_tokens=3)
    engine.add("r", ids, params)
    params.max_tokens = 10**6
    tokens = []
    while engine.has_work():
        tokens += [output.token_id for output in engine.step()]
    assert tokens == greedy_tokens("qwen3", [5, 6], 3)


def test_an_id_in_use_is_refused(make_engine, prompt):
    engine = make_engine()
    engine.add("r", prompt(3), greedy())
    with pytest.raises(InvalidRequest, match="'r' is in use"):
        engine.add("r", prompt(3), greedy())
    engine.release("r")


def test_a_request_goes_on_from_tokens_of_an_earlier_attempt(make_engine, prompt, greedy_tokens):
    expected = greedy_tokens("qwen3", prompt(20), MAX_TOKENS)
    engine = make_engine()
    engine.add("r", prompt(20), greedy(), output=expected[:2])
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert [(output.index, output.token_id) for output in outputs] == list(enumerate(expected))[2:]


def test_a_prefill_only_request_holds_its_blocks_until_released(make_engine, prompt, greedy_tokens):
    engine = make_engine()
    engine.add("r", prompt(70), greedy(), prefill_only=True)
    progress = []
    while engine.has_work():
        progress += engine.step()
    assert [output.num_computed_tokens for output in progress] == [32, 64, 70]
    assert progress[-1].token_id == greedy_tokens("qwen3", prompt(70), 1)[0]
    engine.hold("r")
    stats = engine.stats()
    assert stats.num_free_blocks == 300 - 5, "an end of the request does not take blocks from a transfer"
    assert (stats.num_reserved_blocks, stats.num_cached_blocks) == (5, 0)
    engine.release("r")
    assert (engine.stats().num_reserved_blocks, engine.stats().num_cached_blocks) == (0, 4)
    assert stats.iteration_tokens.total == 32 + 32 + 6
    counted = dict(zip(stats.iteration_tokens.bounds, stats.iteration_tokens.counts, strict=False))
    assert {bound: count for bound, count in counted.items() if count} == {8: 1, 32: 2}


def test_a_cached_prefix_is_reported_before_the_rest_is_computed(make_engine, prompt):
    engine = make_engine()
    engine.add("first", prompt(70), greedy(1))
    run(engine)
    reported = []
    engine.on_early_output = lambda output: reported.append((output, engine.stats().num_prefill_tokens))
    engine.add("r", prompt(70), greedy(), prefill_only=True)
    outputs = engine.step()
    ((early, prefilled),) = reported
    assert (early.num_computed_tokens, early.num_cached_tokens, prefilled) == (64, 64, 70)
    assert early.block_table == outputs[0].block_table
    assert outputs[0].num_cached_tokens == 64
    engine.release("r")


def test_a_launched_chunk_is_reported_with_its_event_before_anything_is_read(make_engine, prompt, monkeypatch):
    engine, reported, launched = make_engine(), [], list[Any]()
    runner = engine._runner
    launch = runner.launch

    def launch_with_event(batch):
        read = launch(batch)
        launched.append(f"step {len(launched) + 1}")
        runner.computed = launched[-1]

        def reading():
            launched.append("read")
            return read()

        return reading

    monkeypatch.setattr(runner, "launch", launch_with_event)
    engine.on_early_output = lambda output: reported.append((output, list(launched)))
    engine.add("r", prompt(70), greedy(), prefill_only=True)
    outputs = engine.step() + engine.step() + engine.step()
    early = [output for output, _ in reported]
    assert [output.ready for output in early] == ["step 1", "step 3", "step 5"]
    assert [launched[-1] for _, launched in reported] == ["step 1", "step 3", "step 5"], "not read yet"
    assert [output.num_computed_tokens for output in early] == [32, 64, 70]
    assert [output.token_id for output in early] == [None] * 3
    assert [output.block_table for output in early] == [output.block_table for output in outputs]
    assert [output.ready for output in outputs] == [None] * 3
    engine.release("r")
    engine.add("generates", prompt(70), greedy(1))
    run(engine)
    assert len(reported) == 3, "its blocks are sent to nobody"


def test_an_aborted_prefill_is_computed_no_further_and_keeps_its_blocks_until_released(make_engine, prompt):
    engine = make_engine()
    engine.add("r", prompt(70), greedy(), prefill_only=True)
    engine.step()
    engine.hold("r")
    assert not engine.has_work()
    assert engine.stats().num_free_blocks == 300 - 5
    engine.release("r")


def test_the_index_of_an_output_without_token_is_that_of_the_next(make_engine, prompt):
    engine = make_engine()
    engine.add("r", prompt(40), greedy(1))
    assert [(output.index, output.token_id is None) for output in engine.step()] == [(0, True)]
    assert [(output.index, output.token_id is None) for output in engine.step()] == [(0, False)]


def test_an_attempt_that_already_has_all_its_tokens_is_refused(make_engine, prompt):
    with pytest.raises(InvalidRequest, match="output_token_ids: 2 tokens already reach max_tokens=2"):
        make_engine().add("r", prompt(3), greedy(2), output=[5, 6])


def test_reserved_blocks_go_on_with_the_kv_that_others_brought(make_engine, prompt, greedy_tokens):
    """Prefill in one engine, decode in another; the test is the transfer."""
    prefill, decode = make_engine(), make_engine()
    for number, (ids, num_cached) in enumerate([(prompt(70), 0), (prompt(70), 64), (prompt(64), 64)]):
        request_id = str(number)
        decode.reserve(request_id, ids, greedy())
        (reservation,) = decode.poll_reservations()
        assert reservation.num_cached_tokens == num_cached
        prefill.add(request_id, ids, greedy(), prefill_only=True)
        outputs = []
        while prefill.has_work():
            outputs += prefill.step()
        source = outputs[-1].block_table[num_cached // BLOCK :]
        decode._runner.pool[reservation.block_ids] = prefill._runner.pool[source]
        prefill.release(request_id)
        decode.activate(request_id, outputs[-1].token_id)
        rest = []
        while decode.has_work():
            rest += [output.token_id for output in decode.step()]
        assert [outputs[-1].token_id, *rest] == greedy_tokens("qwen3", ids, MAX_TOKENS)


def test_reservations_wait_for_room_in_order(make_engine, prompt):
    engine = make_engine(num_blocks=10)
    for name, length in [("a", 70), ("b", 140), ("c", 10)]:
        engine.reserve(name, prompt(length, salt=length), greedy())
    assert [each.request_id for each in engine.poll_reservations()] == ["a"]
    engine.release("a")
    assert [each.request_id for each in engine.poll_reservations()] == ["b"]
    engine.release("c")
    engine.release("b")
    assert engine.poll_reservations() == []


def test_quarantined_blocks_are_used_by_nobody_until_released(make_engine, prompt):
    # Known elsewhere: vLLM #32255, SGLang #24527, #27372, #32564, #35049, #37077, #38961, Mooncake #4247.
    engine = make_engine(num_blocks=10)
    engine.reserve("a", prompt(70), greedy())
    engine.poll_reservations()
    engine.quarantine("a", 5)
    assert engine.stats().num_quarantined_blocks == 5
    engine.reserve("b", prompt(90), greedy())
    assert engine.poll_reservations() == []
    engine.release("a")
    assert [each.request_id for each in engine.poll_reservations()] == ["b"]
    engine.release("b")


# ---- logits that are no numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_output", [0, 1, 3])
@pytest.mark.parametrize("temperature", [0, 1e-38])
def test_a_request_without_numbers_ends_with_an_error_and_the_others_get_their_tokens(
    make_engine, broken_model, greedy_tokens, num_output, temperature
):
    # Known elsewhere: SGLang #33187, #28829.
    model = broken_model(num_output)
    engine = make_engine(folder=model.folder)
    for name, ids in [*model.sound.items(), ("broken", model.prompt)]:
        engine.add(name, ids, greedy(8, temperature=temperature))
    tokens, reasons = run(engine)
    assert tokens.pop("broken", []) == model.output
    assert f"not finite at output token {num_output}: its weights are broken" in reasons.pop("broken")
    assert tokens == {name: greedy_tokens(model.whole, ids, 8) for name, ids in model.sound.items()}
    assert set(reasons.values()) == {"length"}
    engine.add("broken", model.sound["7"], greedy(2))
    assert run(engine)[1] == {"broken": "length"}, "the id is free, and so is what it held"


def test_a_prefill_without_numbers_keeps_its_blocks_until_released_as_any_other(make_engine, broken_model):
    model = broken_model(0)
    engine = make_engine(folder=model.folder)
    engine.add("r", [*model.sound["33"], *model.prompt], greedy(8), prefill_only=True)
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert [(output.num_computed_tokens, output.is_last) for output in outputs] == [(32, False), (53, True)]
    assert (outputs[-1].token_id, outputs[-1].index, outputs[-1].finish_reason) == (None, 0, None)
    engine.hold("r")
    assert engine.stats().num_free_blocks == 300 - 4, "these blocks may be on their way to somebody"
    engine.release("r")


def test_blocks_of_a_request_without_numbers_are_found_by_nobody_even_before_it_fails(
    make_engine, broken_model, greedy_tokens
):
    """In a chunk with a NaN, keys and values of tokens before it may be spoiled too: what is masked is multiplied."""
    # Known elsewhere: SGLang #33187, #28829.
    model = broken_model(0)
    engine = make_engine(folder=model.folder, max_num_batched_tokens=64)
    begin = model.sound["33"][: BLOCK + 1]
    engine.add("broken", [*begin, model.prompt[-1], *model.sound["33"]], greedy(8))
    assert [output.num_computed_tokens for output in engine.step()] == [CHUNK]
    engine.add("sound", begin, greedy(8))
    tokens, reasons = run(engine)
    assert tokens == {"sound": greedy_tokens(model.whole, begin, 8)}
    assert "not finite at output token 0" in reasons["broken"]
    engine.add("again", begin, greedy(8))
    assert run(engine)[0] == {"again": tokens["sound"]}
    assert engine.stats().num_cached_tokens == BLOCK, "those of the sound one are found"


def test_a_preempted_request_without_numbers_ends_too(make_engine, broken_model, greedy_tokens):
    model = broken_model(3)
    engine = make_engine(folder=model.folder, num_blocks=4, block_size=8, chunk_size=8)
    for i in range(3):
        engine.add(f"sound {i}", model.sound["7"], greedy(8))
    engine.add("broken", model.prompt, greedy(8))
    tokens, reasons = run(engine)
    assert engine.stats().num_preemptions > 0
    assert tokens.pop("broken") == model.output
    assert "not finite at output token 3" in reasons["broken"]
    assert list(tokens.values()) == [greedy_tokens(model.whole, model.sound["7"], 8)] * 3
