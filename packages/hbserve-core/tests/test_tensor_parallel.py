"""Several ranks compute what one computes: their parts of the weights, their sums, and the tokens that come out.

Ranks are threads here, so that many models are quick to try; test_ranks.py has them in processes.
"""

import contextlib
import json
import random
import shutil
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hbserve_core import Engine, InstanceConfig, InvalidInstanceConfig, ModelRunner
from hbserve_core.bench.simulated_device import SimulatedDevice
from hbserve_core.engine.sequence import UNREAD, ScheduledChunk, Sequence
from hbserve_core.model.checkpoint.checkpoint import Checkpoint
from hbserve_core.model.loaded_model import LoadedModel
from hbserve_core.model.model_config import configured_model, load_model_config
from hbserve_core.model.rank_group import RankGroup
from hbserve_core.model.shard import Shard, check_divisible
from hbserve_core.ranks.step_message import StepReader, StepWriter
from hbserve_core.ranks.tensor_parallel_runner import TensorParallelRunner
from hbserve_core.ranks.worker_main import follow
from hbserve_core.transfers.launched_steps import LaunchedSteps
from hbserve_rpc import SamplingParams
from hbserve_testing.narrowing import present

BLOCK = 8
LENGTHS = (1, 8, 30, 47, 9, 3, 90)


def config(folder, **changes):
    defaults: dict[str, Any] = {
        "block_size": BLOCK, "num_blocks": 96, "device": "cpu", "max_num_batched_tokens": 64, "chunk_size": 40,
    }  # fmt: skip
    return InstanceConfig(model_path=str(folder), **(defaults | changes))


CASES = [
    *((name, size) for name in ("qwen3", "qwen2", "llama", "llama-biases") for size in (2, 4)),
    ("qwen3-wide-heads", 4),  # one KV head: all ranks have it
    ("qwen2-sharded", 2),
    ("llama-9-heads", 3),
    ("phi3", 2),
    ("qwen3-moe", 2),
    ("opt", 2),  # what norms' biases become is of each rank's own rows
    ("olmo2", 4),  # norms over the heads of all ranks, of which two have the same key head
]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_greedy_tokens_equal_transformers(generate, model_folder, ranks_in_threads, greedy_tokens, prompt, name, size):
    given = config(model_folder(name), tensor_parallel_size=size)
    ranks = ranks_in_threads(lambda group: ModelRunner(given, group), size)
    prompts = {str(i): prompt(length, salt=i) for i, length in enumerate(LENGTHS)}
    found = generate(Engine(given, ranks.runner), prompts, 8)
    assert found == {key: greedy_tokens(name, ids, 8) for key, ids in prompts.items()}
    heads = ranks.own.model_config.num_kv_heads
    assert ranks.runner.pool.shape[4] == max(1, heads // size)


def test_ranks_that_have_whole_experts_give_the_tokens_of_transformers(
    generate, model_folder, ranks_in_threads, greedy_tokens, prompt
):
    given = config(model_folder("qwen3-moe"), tensor_parallel_size=2, expert_parallel=True)
    ranks = ranks_in_threads(lambda group: ModelRunner(given, group), 2)
    prompts = {str(i): prompt(length, salt=i) for i, length in enumerate(LENGTHS[:4])}
    found = generate(Engine(given, ranks.runner), prompts, 8)
    assert found == {key: greedy_tokens("qwen3-moe", ids, 8) for key, ids in prompts.items()}


@pytest.mark.parametrize("are_whole", [False, True])
def test_a_rank_has_its_part_of_each_expert_or_some_of_them_whole(model_folder, are_whole):
    folder = model_folder("qwen3-moe")
    whole = configured_model(folder, config(folder, expert_parallel=are_whole))
    experts = present(Shard(1, 2).config(whole).switches.experts)
    own = present(whole.switches.experts).intermediate_size
    assert experts.intermediate_size == (own if are_whole else own // 2)


def test_experts_that_cannot_be_split_are_named(model_folder):
    folder = model_folder("mixtral")
    with pytest.raises(InvalidInstanceConfig, match=r"num_experts=4 is not a multiple of it, and expert_parallel=true"):
        check_divisible(configured_model(folder, config(folder, expert_parallel=True)), 8)
    with pytest.raises(InvalidInstanceConfig, match=r"intermediate_size=96 of experts is not a multiple of it"):
        check_divisible(configured_model(folder, config(folder)), 5)


def test_the_steps_of_preempted_and_cached_requests_are_followed_too(generate, model_folder, ranks_in_threads, prompt):
    """A pool too small for all, and prompts that begin alike."""
    settings = {"num_blocks": 14, "chunk_size": 16}
    prompts = {str(i): prompt(16) + prompt(5 + i, salt=i) for i in range(5)}
    alone = config(model_folder("llama"), **settings)
    expected = generate(Engine(alone, ModelRunner(alone)), prompts, 20)
    given = config(model_folder("llama"), tensor_parallel_size=2, **settings)
    engine = Engine(given, ranks_in_threads(lambda group: ModelRunner(given, group), 2).runner)
    assert generate(engine, prompts, 20) == expected
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_cached_tokens > 0


def test_seeded_requests_draw_the_same_tokens(generate, model_folder, ranks_in_threads, prompt):
    params = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 5}
    alone = config(model_folder("qwen3"))
    expected = generate(Engine(alone, ModelRunner(alone)), {"r": prompt(20)}, 20, **params)
    given = config(model_folder("qwen3"), tensor_parallel_size=2)
    engine = Engine(given, ranks_in_threads(lambda group: ModelRunner(given, group), 2).runner)
    assert generate(engine, {"r": prompt(20)}, 20, **params) == expected


def test_a_request_without_numbers_ends_on_all_ranks_and_the_others_get_their_tokens(
    broken_model, beside_a_broken_request, ranks_in_threads, greedy_tokens
):
    # Known elsewhere: SGLang #33187, #28829.
    model = broken_model(2)
    given = config(model.folder, tensor_parallel_size=2)
    engine = Engine(given, ranks_in_threads(lambda group: ModelRunner(given, group), 2).runner)
    tokens, errors = beside_a_broken_request(engine, model, 8)
    expected = {name: greedy_tokens(model.whole, ids, 8) for name, ids in model.sound.items()}
    assert tokens == expected | {"broken": model.output}
    assert list(errors) == ["broken"]


def test_dummy_weights_of_an_odd_vocabulary_are_parts_of_the_same(
    generate, model_folder, ranks_in_threads, prompt, tmp_path
):
    """323 tokens for two ranks: the last one has a row that no token has."""
    folder = shutil.copytree(model_folder("llama"), tmp_path / "odd")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 323}))
    settings = {"load_format": "dummy", "dtype": "float32"}
    alone = config(folder, **settings)
    expected = generate(Engine(alone, ModelRunner(alone)), {"r": prompt(20), "last": [322, 321, 161, 162]}, 12)
    given = config(folder, tensor_parallel_size=2, **settings)
    engine = Engine(given, ranks_in_threads(lambda group: ModelRunner(given, group), 2).runner)
    assert generate(engine, {"r": prompt(20), "last": [322, 321, 161, 162]}, 12) == expected


class Part(RankGroup):
    """A rank by itself, for looking at what it loads."""

    def __init__(self, rank, size):
        self.shard = Shard(rank, size)


def loaded(folder, rank, size, **changes):
    return LoadedModel(config(folder, tensor_parallel_size=size, **changes), Part(rank, size))


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_every_rank_has_a_part_and_knows_which_model_it_is_of(model_folder, load_format):
    folder = model_folder("llama-biases")
    whole = loaded(folder, 0, 1, load_format=load_format)
    parts = [loaded(folder, rank, 2, load_format=load_format) for rank in range(2)]
    assert torch.equal(torch.cat([part.weights.embedding for part in parts]), whole.weights.embedding)
    assert [part.weights.first_token for part in parts] == [0, 160]
    assert [part.fingerprint["model"] for part in parts] == [whole.fingerprint["model"]] * 2
    assert [part.block.block_bytes * 2 for part in parts] == [whole.block.block_bytes] * 2
    # The bias of a sum over ranks is added once.
    assert [layer.output.bias is None for part in parts for layer in part.weights.layers] == [False] * 2 + [True] * 2


def test_ranks_read_no_more_of_the_files_than_their_part(model_folder, monkeypatch):
    counts = []
    read = Checkpoint.read

    def counted(self, part, target):
        counts.append(target.numel())
        return read(self, part, target)

    monkeypatch.setattr(Checkpoint, "read", counted)
    loaded(model_folder("qwen3"), 0, 1)
    whole, counts[:] = sum(counts), []
    loaded(model_folder("qwen3"), 1, 2)
    norms = 2 * (2 * 64 + 2 * 16) + 64
    assert sum(counts) == (whole - norms) // 2 + norms


def test_automatic_pools_of_ranks_on_one_host_share_its_memory(model_folder):
    folder = model_folder("qwen3")
    one, two = (loaded(folder, 0, size, num_blocks=None, max_num_seqs=10**6) for size in (1, 2))
    blocks = one.allocate_pool().shape[0], two.allocate_pool().shape[0]
    assert blocks[1] == pytest.approx(blocks[0], rel=0.3)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("llama-9-heads", 2, "tensor_parallel_size=2: num_attention_heads=9 is not a multiple of it; "
         "num_key_value_heads=3 is neither"),
        ("llama-9-heads", 9, "tensor_parallel_size=9: intermediate_size=96 is not a multiple of it"),
        ("llama", 3, "tensor_parallel_size=3: num_attention_heads=4 is not a multiple of it"),
        ("llama", 8, "allowed for .*: 1, 2, 4$"),
        ("llama-9-heads", 4, "allowed for .*: 1, 3$"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_divided_is_refused_with_what_can(model_folder, name, size, message):
    with pytest.raises(InvalidInstanceConfig, match=message):
        check_divisible(load_model_config(model_folder(name)), size)


def test_a_rank_count_below_one_is_refused(model_folder):
    with pytest.raises(InvalidInstanceConfig, match="tensor_parallel_size=0: expected at least 1"):
        config(model_folder("llama"), tensor_parallel_size=0)


# ---- what workers are told -----------------------------------------------------------------------------------------


def sequence(name, token_ids, num_prompt, computed, **params):
    found = Sequence(name, list(token_ids), num_prompt, SamplingParams(**params))
    found.num_computed_tokens = computed
    found.block_table = array("i", range(-(-len(token_ids) // BLOCK)))
    return found


def seen(chunk):
    """All that a runner reads of a chunk."""
    s = chunk.sequence
    new = s.token_ids[chunk.first : chunk.first + chunk.num_new_tokens]
    return (s.request_id, chunk.first, chunk.num_new_tokens, chunk.samples, new, list(s.block_table), s.num_tokens,
            s.num_output_tokens, s.params)  # fmt: skip


def test_a_message_says_all_that_a_runner_reads():
    writer, reader = StepWriter(draws=True), StepReader()
    decoding = sequence("a", [*range(20), UNREAD], 15, 20, temperature=0.5, seed=2**63 - 1, top_k=3)
    chunked = sequence("b", range(100, 150), 50, 16, top_p=0.5)
    batch = [ScheduledChunk(decoding, 1), ScheduledChunk(chunked, 24)]
    first = reader.read(writer.write(batch))
    assert [seen(chunk) for chunk in first] == [seen(chunk) for chunk in batch]
    decoding.token_ids[20:] = [5, UNREAD]
    decoding.num_computed_tokens, chunked.num_computed_tokens = 21, 40
    batch = [ScheduledChunk(decoding, 1), ScheduledChunk(chunked, 10)]
    second = reader.read(writer.write(batch))
    assert [seen(chunk) for chunk in second] == [seen(chunk) for chunk in batch]
    same = [a.sequence is b.sequence for a, b in zip(first, second, strict=True)]
    assert same == [True, True], "a runner looks unread tokens up by their sequence"


def test_blocks_that_are_known_are_not_said_again_and_others_in_their_place_are():
    writer, reader = StepWriter(draws=True), StepReader()
    told = sequence("a", range(40 * BLOCK), 40 * BLOCK, 39 * BLOCK, temperature=0.5)

    def say(*block_ids):
        told.block_table = array("i", block_ids)
        message = writer.write([ScheduledChunk(told, 1)])
        (chunk,) = reader.read(message)
        assert list(chunk.sequence.block_table) == list(block_ids)
        return len(message)

    whole, again, grown = say(*range(40)), say(*range(40)), say(*range(41))
    assert again + 40 * 4 <= whole
    assert grown == again + 4
    # Preempted, it has fewer, or others, and may have begun anew between two steps.
    assert say(*range(100, 141)) > grown
    say(*range(100, 120))
    assert say(*range(100, 120)) == again


def test_decodes_that_go_on_are_said_by_their_new_blocks_and_whatever_else_as_a_whole():
    writer, reader, draws = StepWriter(draws=True), StepReader(), random.Random(0)
    running = [sequence(str(name), [*range(9 + name), UNREAD], 5, 9 + name, top_k=name + 1) for name in range(8)]
    changes, sizes = ["begin"], list[int]()
    for number in range(80):
        chosen = running[number % 8]
        chunks = [ScheduledChunk(each, 1) for each in running]
        match changes[-1]:
            case "order":
                draws.shuffle(chunks)
            case "fewer":
                del chunks[number % 8]
            case "read":  # somebody has waited for the step before
                chosen.token_ids[-1] = 7
            case "other blocks":
                chosen.block_table = array("i", draws.sample(range(1000), len(chosen.block_table)))
            case "once more":  # preempted, it has lost the last three
                chosen.num_computed_tokens -= 3
                chunks[number % 8] = ScheduledChunk(chosen, 4)
        message = writer.write(chunks)
        sizes.append(len(message))
        for found, chunk in zip(reader.read(message), chunks, strict=True):
            assert seen(found) == seen(chunk)
            assert found.samples
        for each in running:
            each.num_computed_tokens = len(each.token_ids)
            each.token_ids[-1:] = [draws.randrange(100), UNREAD]
            each.block_table.extend([draws.randrange(1000)] * (len(each.token_ids) > len(each.block_table) * BLOCK))
        changes.append(draws.choice(["none"] * 8 + ["order", "fewer", "read", "other blocks", "once more"]))
    same = [number for number in range(1, 80) if changes[number - 1 : number + 1] == ["none", "none"]]
    assert len(same) > 10
    assert all(sizes[number] < sizes[0] / 4 for number in same)


def test_an_id_that_comes_again_is_another_sequence():
    writer, reader = StepWriter(draws=True), StepReader()
    (before,) = reader.read(writer.write([ScheduledChunk(sequence("r", range(5), 5, 0, temperature=0.5), 5)]))
    batch = [ScheduledChunk(sequence("r", range(9), 9, 0, temperature=0.9), 9)]
    (after,) = reader.read(writer.write(batch))
    assert seen(after) == seen(batch[0])
    assert after.sequence is not before.sequence


def test_choices_are_told_apart_and_those_of_a_prompt_are_made_again():
    writer, reader = StepWriter(draws=True), StepReader()
    parent = sequence("r", range(9), 9, 0, temperature=0.5, seed=7, n=3)
    (told,) = reader.read(writer.write([ScheduledChunk(parent, 9)]))
    assert [choice.params for choice in told.sequence.choices] == [choice.params for choice in parent.choices]
    batch = []
    for choice in parent.choices:
        choice.token_ids, choice.num_computed_tokens = [*range(9), 20 + choice.choice], 9
        batch.append(ScheduledChunk(choice, 1))
    for _ in range(2):  # their parameters are told, and then known
        read = reader.read(writer.write(batch))
        assert [seen(chunk) for chunk in read] == [seen(chunk) for chunk in batch]


def test_followers_that_are_told_every_token_do_not_draw():
    draws = random.Random(0).random()
    batch = [ScheduledChunk(sequence("r", range(5), 5, 0, temperature=draws), 5)]
    (chunk,) = StepReader().read(StepWriter(draws=False).write(batch))
    assert chunk.sequence.params.temperature == 0


class MarkingDevice(SimulatedDevice):
    """Marks the end of each step by a word, as CUDA's runner does by an event."""

    computed: Any

    def __init__(self, name):
        no_model: Any = None
        super().__init__(no_model, 8, lambda work: 0.0)
        self.name = name

    def launch(self, batch):
        pending = super().launch(batch)
        self.computed = f"{self.name}, step {len(self.steps)}"
        return pending


def test_what_rank_0_calls_a_step_is_that_step_on_another_rank():
    messages, steps = list[bytes](), LaunchedSteps()
    workers: Any = SimpleNamespace(
        transfer_addresses=(), send=messages.append, naming_the_lost_rank=contextlib.nullcontext
    )
    runner, told = TensorParallelRunner(MarkingDevice("rank 0"), workers), list[Any]()
    for number in range(3):
        runner.launch([ScheduledChunk(sequence(str(number), range(5), 5, 0), 5)])
        told.append(runner.computed)
    assert [each.computed for each in told] == ["rank 0, step 1", "rank 0, step 2", "rank 0, step 3"]
    follow(MarkingDevice("rank 1"), messages, steps.add)
    assert [steps.event(each.number) for each in told] == ["rank 1, step 1", "rank 1, step 2", "rank 1, step 3"]
