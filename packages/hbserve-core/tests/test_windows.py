"""Where all layers have a window, blocks behind it go back, are not sent, and nothing in them reaches a token."""

import pytest
from hbserve_core_interpreted import BLOCK, InterpretedRunner

from hbserve_core import BlockManager, Engine, InstanceConfig, ModelRunner
from hbserve_rpc import SamplingParams

MODEL, WINDOW = "mistral-window", 21
MOST_SEEN = -(-(WINDOW - 1) // BLOCK) + 1
"""Blocks of the tokens that one sees, and of itself."""


def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def torch_runner(folder, **settings):
    given = {"block_size": BLOCK, "num_blocks": 40, "chunk_size": 16, "max_num_batched_tokens": 40} | settings
    return ModelRunner(InstanceConfig(model_path=str(folder), device="cpu", **given))


@pytest.fixture
def make_engine(model_folder):
    made = []

    def make(name=MODEL, **settings):
        made.append(Engine((runner := torch_runner(model_folder(name), **settings)).config, runner))
        return made[-1]

    yield make
    for engine in made:
        engine.check_integrity()
        assert engine.blocks.num_free == engine.blocks.num_blocks


def run(engine):
    """Tokens by request, and the most blocks that were held after a step. What nobody holds is made unusable."""
    tokens: dict[str, list[int]] = {}
    most = 0
    while engine.has_work():
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        engine.check_integrity()
        most = max(most, engine.blocks.num_blocks - engine.blocks.num_free)
        engine._runner.pool[list(engine.blocks._empty)] = float("nan")
    return tokens, most


def test_a_sequence_holds_no_more_blocks_than_it_sees_and_reads_no_others(make_engine, prompt, greedy_tokens):
    engine = make_engine(prefix_caching=False)
    engine.add("long", prompt(3), greedy(60))
    assert run(engine) == ({"long": greedy_tokens(MODEL, prompt(3), 60)}, MOST_SEEN)
    prompts = {str(length): prompt(length, salt=length) for length in (1, 20, 50, 77)}
    for name, ids in prompts.items():
        engine.add(name, ids, greedy(9))
    tokens, _ = run(engine)
    assert tokens == {name: greedy_tokens(MODEL, ids, 9) for name, ids in prompts.items()}


@pytest.mark.parametrize("name", ["qwen2-last-layers-window", "gemma2"])
def test_where_one_layer_sees_all_a_sequence_keeps_its_blocks(make_engine, prompt, name):
    engine = make_engine(name, prefix_caching=False)
    engine.add("r", prompt(3), greedy(60))
    _, most = run(engine)
    assert most == -(-62 // BLOCK)


def test_sequences_that_see_little_are_preempted_less_and_get_the_same_tokens(make_engine, prompt, greedy_tokens):
    """Each needs 10 blocks for all of its tokens: four of them would have to give way to each other."""
    engine = make_engine(num_blocks=24, prefix_caching=False)
    for i in range(4):
        engine.add(str(i), prompt(10, salt=i), greedy(70))
    tokens, _ = run(engine)
    assert tokens == {str(i): greedy_tokens(MODEL, prompt(10, salt=i), 70) for i in range(4)}
    assert engine.stats().num_preemptions == 0


def test_preempted_sequences_are_computed_again_behind_their_window_too(make_engine, prompt, greedy_tokens):
    engine = make_engine(num_blocks=10, max_num_seqs=4)
    for i in range(4):
        engine.add(str(i), prompt(9 + i, salt=i), greedy(50))
    tokens, _ = run(engine)
    assert tokens == {str(i): greedy_tokens(MODEL, prompt(9 + i, salt=i), 50) for i in range(4)}
    assert engine.stats().num_preemptions > 0


def test_a_sequence_ends_where_it_could_not_be_computed_again(make_engine, prompt):
    engine = make_engine(num_blocks=6)
    engine.add("r", prompt(10), greedy(400))
    tokens, _ = run(engine)
    assert len(tokens["r"]) == 6 * BLOCK - 10 + 1


def test_of_a_cached_prefix_its_end_is_enough(make_engine, prompt, greedy_tokens):
    ids, longer = prompt(64), prompt(64) + prompt(9, salt=1)
    engine = make_engine(num_blocks=10)
    engine.add("first", ids, greedy(1))
    engine.add("other", prompt(55, salt=2), greedy(1))  # of the first one's blocks it takes those that were free first
    run(engine)
    digests: list[bytes] = []
    engine.blocks.extend_digests(digests, ids, 64)
    assert digests[0] not in engine.blocks._block_of
    engine.add("second", longer, greedy(6))
    assert run(engine)[0] == {"second": greedy_tokens(MODEL, longer, 6)}
    assert engine.stats().num_cached_tokens == 64


def test_a_gap_within_the_window_ends_a_prefix():
    blocks = BlockManager(8, 4, window=6)  # it ends in the second block before
    names: list[bytes] = []
    blocks.extend_digests(names, [*range(24)], 24)
    held = blocks.allocate(6)
    for place in (0, 1, 3, 4):
        blocks.cache([held[place]], [names[place]])
    assert blocks.find_prefix(names) == [-1, -1, -1, held[3], held[4]]
    assert blocks.find_prefix(names[:4]) == held[:2], "the fourth without the third is not enough"
    assert blocks.find_part(names, 4) == [-1] * 4 + [held[4]]
    assert blocks.find_part(names, 0) == held[:2], "what is behind a gap would take the gap's place"
    assert blocks.num_free_besides([-1, *held]) == blocks.num_free == 2


@pytest.mark.parametrize("n", [1, 3])
def test_a_reservation_asks_for_the_blocks_that_its_tokens_see(make_engine, prompt, greedy_tokens, n):
    """Of several choices each but the first computes the last block again, and sees what is in front of that."""
    prefill, decode = make_engine(), make_engine(num_blocks=12)
    for number, (length, num_granted) in enumerate([(70, 4), (70, 1), (64, 0), (8, 0), (12, 1)]):
        ids, name = prompt(length), str(number)
        params = greedy(6)
        params.n = n
        decode.reserve(name, ids, params)
        (reservation,) = decode.poll_reservations()
        assert len(reservation.block_ids) == num_granted or number > 1
        assert decode.stats().num_reserved_blocks <= 4
        prefill.add(name, ids, params, prefill_only=True)
        outputs = []
        while prefill.has_work():
            outputs += [each for each in prefill.step() if each.token_id is not None]
        table = outputs[-1].block_table
        source = table[len(table) - len(reservation.block_ids) :]
        decode._runner.pool[reservation.block_ids] = prefill._runner.pool[source]
        prefill.release(name)
        decode.activate(name, *[each.token_id for each in outputs])
        tokens, _ = run(decode)
        expected = greedy_tokens(MODEL, ids, 6)
        assert sorted([expected[0], *tokens[name]]) == sorted([expected[0], *expected[1:] * n])


@pytest.mark.usefixtures("language_is_interpreted", "fewer_programs")
def test_kernels_read_no_block_behind_the_window(model_folder, prompt, greedy_tokens):
    settings = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "chunk_size": 27}
    runner = InterpretedRunner(model_folder(MODEL), True, False, **settings)
    engine = Engine(runner.config, runner)
    engine.add("r", prompt(35), greedy(3))
    tokens = []
    while engine.has_work():
        for output in engine.step():
            tokens += output.token_ids
        runner.pool[[*engine.blocks._empty, *engine.blocks._cached]] = float("nan")
    assert tokens == greedy_tokens(MODEL, prompt(35), 3)
    assert engine.blocks.num_cached, "what was given back was full"
