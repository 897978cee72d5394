"""Answers follow their grammars: on both runners, beside other requests, whatever becomes of a request on its way.

The model's tokens are bytes, so the oracle can spell out what may come next.
"""

import json
import shutil
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hbserve_core_byte_tokenizer import EOS, VOCAB_SIZE, allowed_by, byte_tokenizer, ids, text_of
from hbserve_core_interpreted import make_runner

from hbserve_core import Engine, InstanceConfig
from hbserve_core import make_runner as make_cuda_runner
from hbserve_core.engine.sequence import UNREAD
from hbserve_core.engine.step import StepResult
from hbserve_core.grammars import compilation, compiler
from hbserve_core.grammars.compiler import GrammarCompiler
from hbserve_rpc import InvalidRequest, SamplingParams
from hbserve_testing.narrowing import present

# The interpreter's numbers warn where they wrap, which is what hashing wants, and where they are none.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{which} encountered:RuntimeWarning") for which in ("overflow", "invalid value")
]
CHOICES = ["red", "green", "grey"]


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """The small Qwen3, with a tokenizer."""
    path = shutil.copytree(model_folder("qwen3"), tmp_path_factory.mktemp("grammars") / "qwen3")
    (path / "tokenizer.json").write_text(byte_tokenizer())
    return path


@pytest.fixture(scope="module", autouse=True)
def trials(folder):
    """One process for all tests: to start one takes as long as some of them."""
    shared = compiler.Trials(folder / "tokenizer.json", VOCAB_SIZE, [EOS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "Trials", lambda *_: shared)
        yield


class OverlappingRunner:
    """The torch runner, as if it computed on a device: steps may be launched before the tokens of the one before are
    read, which are UNREAD then."""

    overlaps = True

    def __init__(self, runner):
        self._runner = runner
        self._pending = lambda: StepResult([])
        self._sequences = []

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def launch(self, batch):
        tokens = dict(zip(self._sequences, self._pending().tokens, strict=True))
        unread = [each.sequence for each in batch if each.sequence.token_ids[-1] == UNREAD]
        for sequence in unread:
            sequence.token_ids[-1] = tokens[sequence]
        self._pending = self._runner.launch(batch)
        self._sequences = [each.sequence for each in batch]
        for sequence in unread:
            sequence.token_ids[-1] = UNREAD
        return self._pending


@pytest.fixture(params=["in turn", "overlapping"])
def either_runner(request, folder):
    runner = make_runner(folder, "torch")
    return OverlappingRunner(runner) if request.param == "overlapping" else runner


@pytest.fixture
def chosen(reference_model) -> Callable[..., list[int]]:
    """Greedy tokens of transformers' model among what leads to one of some texts, and then an end."""

    def generate(prompt: list[int], texts: list[str] = CHOICES) -> list[int]:
        found: list[int] = []
        answers = [[*ids(text), EOS] for text in texts]
        while not found or found[-1] != EOS:
            allowed = sorted({each[len(found)] for each in answers if each[: len(found)] == found})
            with torch.inference_mode():
                logits = reference_model("qwen3")(torch.tensor([prompt + found])).logits[0, -1]
            found.append(allowed[int(logits[allowed].argmax())])
        return found

    return generate


def add(engine, name, prompt, params, output=(), **more):
    engine.add(name, prompt, params, output, matcher=engine.grammars.matcher(params, output), **more)


def run_out(engine):
    """Tokens and how each request ended."""
    tokens, ends = dict[str, list[int]](), {}
    while engine.has_work():
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.is_last:
                ends[output.request_id] = output.finish_reason or str(output.error)
        engine.check_integrity()
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert engine._num_matchers == 0
    return tokens, ends


def constrained(max_tokens=20, temperature=0.0, **more) -> SamplingParams:
    more = {"structured_outputs": {"choice": CHOICES}} | more
    return SamplingParams(temperature, max_tokens, **more)


def test_answers_are_the_models_own_among_those_that_are_allowed_beside_others(
    either_runner, chosen, greedy_tokens, prompt
):
    # Known elsewhere: vLLM #29379.
    engine = Engine(either_runner.config, either_runner)
    add(engine, "free", prompt(9), SamplingParams(0, 6, ignore_eos=True))
    # The second is a prompt of several chunks, beside which the others are decoded.
    for name, length in [("short", 5), ("long", 50)]:
        add(engine, name, prompt(length, salt=length), constrained(logprobs=1))
    tokens, ends = run_out(engine)
    assert tokens["free"] == greedy_tokens("qwen3", prompt(9), 6)
    assert tokens["short"] == chosen(prompt(5, salt=5))
    assert tokens["long"] == chosen(prompt(50, salt=50))
    assert ends == {"free": "length", "short": "stop", "long": "stop"}


@pytest.mark.usefixtures("one_kernel_at_a_time", "fewer_programs")
def test_ranks_that_overlap_follow_rank_0_which_alone_knows_the_grammar(
    folder, ranks_in_threads, chosen, greedy_tokens, prompt
):
    pytest.importorskip("triton", reason="torch has Triton on Linux only")
    ranks = ranks_in_threads(lambda group: make_runner(folder, "cuda kernels", group=group, tensor_parallel_size=2), 2)
    engine = Engine(ranks.own.config, ranks.runner)
    # The kernels are interpreted: a few tokens of one row, beside one of another request.
    add(engine, "a", prompt(5), constrained(), ids("gre"))
    add(engine, "free", prompt(4), SamplingParams(0, 2, ignore_eos=True))
    several = constrained(temperature=5.0, seed=2, n=3, structured_outputs={"regex": "[a-z]"})
    add(engine, "several", prompt(5), several)
    tokens, _ = run_out(engine)
    assert tokens["a"] == chosen(prompt(5) + ids("gre"), ["en", "y"])
    *first, end_0, end_1, end_2 = tokens["several"]
    assert all(text.islower() for text in text_of(first)), "each rank knows the token that rank 0 has drawn"
    assert (end_0, end_1, end_2) == (EOS, EOS, EOS)
    assert tokens["free"] == greedy_tokens("qwen3", prompt(4), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_on_a_cuda_device_answers_are_the_models_own_among_those_that_are_allowed_too(
    folder, chosen, greedy_tokens, prompt, graphs
):
    config = InstanceConfig(
        model_path=str(folder), device="cuda", block_size=8, num_blocks=96, max_num_seqs=5, max_num_batched_tokens=40,
        chunk_size=16, cuda_graph_enabled=graphs, cuda_graph_max_seq_len=64,
    )  # fmt: skip
    engine = Engine(config, make_cuda_runner(config))
    add(engine, "free", prompt(9), SamplingParams(0, 6, ignore_eos=True))
    for length in (5, 50):
        add(engine, str(length), prompt(length, salt=length), constrained(logprobs=1))
    tokens, _ = run_out(engine)
    assert tokens["free"] == greedy_tokens("qwen3", prompt(9), 6)
    assert {name: tokens[name] for name in ("5", "50")} == {str(n): chosen(prompt(n, salt=n)) for n in (5, 50)}


def test_every_token_that_ends_a_sequence_may_come_where_the_grammar_is_complete_and_none_before(folder):
    # Known elsewhere: vLLM #42403.
    grammars = GrammarCompiler(str(folder), VOCAB_SIZE, [EOS, 1, 0, VOCAB_SIZE])
    assert allowed_by(grammars.matcher(constrained())) == sorted(ids("rg"))
    assert allowed_by(grammars.matcher(constrained(), ids("red"))) == [0, 1, EOS]
    may_go_on = grammars.matcher(constrained(structured_outputs={"regex": "a*"}))
    assert allowed_by(may_go_on) == sorted([0, 1, EOS, *ids("a")])


@pytest.fixture
def engine(folder):
    runner = make_runner(folder, "torch")
    return Engine(runner.config, runner)


def test_a_seed_draws_the_same_answer_from_any_place_in_it_on(engine, prompt):
    """As after another attempt on another instance."""
    params = constrained(temperature=5.0, seed=3, structured_outputs={"regex": "([a-d]{3} ){4}"})
    add(engine, "whole", prompt(7), params)
    whole = run_out(engine)[0]["whole"]
    assert len(whole) == 17
    for length in (1, 5, 16):
        add(engine, str(length), prompt(7), params, whole[:length])
    tokens, ends = run_out(engine)
    assert set(ends.values()) == {"stop"}
    assert {name: whole[: int(name)] + rest for name, rest in tokens.items()} == dict.fromkeys(tokens, whole)


def test_a_request_that_was_handed_over_goes_on_behind_its_first_token(engine, chosen, prompt):
    params = constrained()
    engine.reserve("a", prompt(7), params, matcher=engine.grammars.matcher(params))
    (granted,) = engine.poll_reservations()
    # Its keys and values come from elsewhere; here from another request.
    add(engine, "b", prompt(7), params, prefill_only=True)
    (output,) = engine.step()
    engine._runner.pool[granted.block_ids] = engine._runner.pool[output.block_table]
    engine.activate("a", output.token_id)
    engine.release("b")
    assert [output.token_id, *run_out(engine)[0]["a"]] == chosen(prompt(7))


def by_choice(engine):
    """Tokens of requests by id and choice."""
    tokens: dict[Any, list[int]] = {}
    while engine.has_work():
        for output in engine.step():
            tokens.setdefault((output.request_id, output.choice), []).extend(output.token_ids)
        engine.check_integrity()
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert engine._num_matchers == 0
    return tokens


def of_each_alone(engine, params, prompt):
    """What as many requests as there are choices get, by choice."""
    for number in range(params.n):
        add(engine, str(number), prompt, params.of_choice(number))
    return {int(name): tokens for (name, _), tokens in by_choice(engine).items()}


def several(**more):
    closing = dict.fromkeys(ids('}]"'), 6.0)
    return constrained(200, 2.0, seed=5, n=3, structured_outputs={"json": SCHEMA}, logit_bias=closing, **more)


@pytest.mark.parametrize("length", [5, 9, 50])
def test_each_of_several_choices_follows_the_grammar_by_itself(either_runner, prompt, length):
    """Their first tokens have one mask. One of the lengths is a prompt of several chunks."""
    engine, params = Engine(either_runner.config, either_runner), several()
    expected = of_each_alone(engine, params, prompt(length))
    add(engine, "all", prompt(length), params)
    add(engine, "free", prompt(9), SamplingParams(0, 6, ignore_eos=True))
    tokens = by_choice(engine)
    assert len(tokens.pop(("free", 0))) == 6
    assert {choice: found for (_, choice), found in tokens.items()} == expected
    texts = [text_of(each) for each in expected.values()]
    assert all(isinstance(json.loads(text)["ok"], bool) for text in texts)
    assert len(set(texts)) == 3, "they are different places in the grammar"


def test_several_choices_that_were_handed_over_go_on_behind_their_own_first_tokens(engine, prompt):
    params = several(min_tokens=3)
    params.structured_outputs = constrained(
        structured_outputs={"regex": "a[a-d]{9}|b[e-h]{19}|c[i-l]{5}"}
    ).structured_outputs
    expected = of_each_alone(engine, params, prompt(7))
    assert len({tokens[0] for tokens in expected.values()}) > 1
    engine.reserve("a", prompt(7), params, matcher=engine.grammars.matcher(params))
    (granted,) = engine.poll_reservations()
    add(engine, "b", prompt(7), params, prefill_only=True)
    outputs = engine.step()
    engine._runner.pool[granted.block_ids] = engine._runner.pool[outputs[0].block_table]
    first = [output.token_id for output in outputs]
    engine.release("b")
    # One of them has ended: its client has found out.
    engine.activate("a", first[0], None, first[2])
    tokens = by_choice(engine)
    assert {choice: [first[choice], *found] for (_, choice), found in tokens.items()} == {
        choice: expected[choice] for choice in (0, 2)
    }


def test_a_choice_whose_mask_is_late_delays_none_of_the_others(engine, prompt, monkeypatch):
    params, gate = several(), threading.Event()
    expected = of_each_alone(engine, params, prompt(9))
    add(engine, "all", prompt(9), params)
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for output in engine.step():
        tokens[output.choice] += output.token_ids
    assert [len(each) for each in tokens.values()] == [1, 1, 1]
    late = engine._sequences["all"].choices[1].matcher
    assert late.is_ready(60)
    take = late._take
    monkeypatch.setattr(late, "_take", lambda token: (gate.wait(60), take(token)))
    while len(tokens[0]) < len(expected[0]) or len(tokens[2]) < len(expected[2]):
        for output in engine.step():
            tokens[output.choice] += output.token_ids
    assert len(tokens[1]) == 2
    gate.set()
    for (_, choice), rest in by_choice(engine).items():
        tokens[choice] += rest
    assert tokens == expected


def test_preempted_requests_go_on_where_they_were(folder, prompt):
    params = constrained(40, temperature=3.0, seed=9, structured_outputs={"regex": "[a-z]{30}"})
    found = []
    for num_blocks in (96, 9):
        runner = make_runner(folder, "torch", num_blocks=num_blocks)
        engine = Engine(runner.config, runner)
        for salt in range(3):
            add(engine, str(salt), prompt(9, salt=salt), params)
        found.append(run_out(engine))
        assert (engine.stats().num_preemptions > 0) == (num_blocks == 9)
    assert found[0] == found[1]
    assert all(len(tokens) == 31 for tokens in found[0][0].values())


def test_who_is_late_delays_nobody_and_gets_the_same_tokens(either_runner, chosen, greedy_tokens, prompt, monkeypatch):
    engine = Engine(either_runner.config, either_runner)
    add(engine, "late", prompt(5), constrained(logprobs=0))
    add(engine, "free", prompt(9), SamplingParams(0, 6, ignore_eos=True))
    gate = threading.Event()
    tokens: dict[str, list[int]] = {"late": [], "free": []}
    late = present(engine._sequences["late"].matcher)
    take = late._take
    monkeypatch.setattr(late, "_take", lambda token: (gate.wait(60), take(token)))
    while len(tokens["free"]) < 6:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            assert len(output.all_logprobs) == len(output.token_ids) * (output.request_id == "late")
            assert len(tokens["late"]) <= 1
        engine.check_integrity()
    gate.set()
    rest, ends = run_out(engine)
    assert tokens["free"] == greedy_tokens("qwen3", prompt(9), 6)
    assert tokens["late"] + rest["late"] == chosen(prompt(5))
    assert ends["late"] == "stop"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, (1, "stop")),
        ({"min_tokens": 4}, (5, "stop")),
        ({"ignore_eos": True}, (9, "stop")),
        ({"min_tokens": 20}, (9, "stop")),
        ({"ignore_eos": True, "max_tokens": 5}, (5, "length")),
    ],
)
def test_an_answer_that_may_not_end_yet_goes_on_as_long_as_its_grammar_does(engine, prompt, more, expected):
    """Without them it would end at once: that is what the bias is for."""
    # Known elsewhere: vLLM #53665.
    params = constrained(structured_outputs={"regex": "a{0,8}"}, logit_bias={EOS: 100.0}, **more)
    add(engine, "a", prompt(5), params)
    tokens, ends = run_out(engine)
    assert (len(tokens["a"]), ends["a"]) == expected
    assert text_of(tokens["a"]) == "a" * (expected[0] - (expected[1] == "stop"))


def test_the_fewest_tokens_of_an_answer_count_those_that_it_already_has(engine):
    params = constrained(structured_outputs={"regex": "a*"}, min_tokens=2)
    assert allowed_by(present(engine.grammars.matcher(params, ids("a")))) == ids("a")
    assert allowed_by(present(engine.grammars.matcher(params, ids("aa")))) == sorted([EOS, *ids("a")])


def test_a_mask_that_was_late_once_is_not_waited_for_again_but_the_next_one_is(engine, monkeypatch):
    matcher, gate = present(engine.grammars.matcher(constrained())), threading.Event()
    take = matcher._take
    monkeypatch.setattr(matcher, "_take", lambda token: (gate.wait(20), take(token)))
    first, second = ids("re")
    matcher.advance(first)
    assert not matcher.is_ready()
    assert not matcher.is_ready(60), "it has waited"
    gate.set()
    while not matcher.is_ready():
        pass
    gate.clear()
    matcher.advance(second)
    threading.Timer(0.01, gate.set).start()
    assert matcher.is_ready(60)
    assert allowed_by(matcher) == ids("d")


def test_an_answer_that_is_cut_short_says_so(engine, prompt):
    add(engine, "a", prompt(5), constrained(max_tokens=2))
    assert run_out(engine)[1] == {"a": "length"}


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "at": {"type": "array", "items": {"enum": [1, 22]}, "maxItems": 3}},
    "required": ["ok", "at"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        ({"json": SCHEMA}, lambda text: isinstance(json.loads(text)["ok"], bool)),
        ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
        ({"regex": r"\d{2}-[xy]"}, lambda text: text[2] == "-" and text[3] in "xy" and text[:2].isdecimal()),
        ({"choice": ["ä\"\n", "日本\x7f"]}, lambda text: text in ("ä\"\n", "日本\x7f")),
        ({"choice": [""]}, lambda text: text == ""),
        ({"grammar": 'start: "<" /[ab]/ ">"'}, lambda text: text in ("<a>", "<b>")),
        ({"grammar": 'root ::= "a" [x-z] "b"'}, lambda text: text in ("axb", "ayb", "azb")),
    ],
    ids=["json", "json object", "regex", "choice", "nothing", "lark", "gbnf"],
)  # fmt: skip
def test_each_kind_of_grammar_is_followed(engine, prompt, given, fits):
    closing = dict.fromkeys(ids('}]"'), 6.0)
    for seed in range(3):
        add(
            engine, str(seed), prompt(5), constrained(400, 1.0, seed=seed, structured_outputs=given, logit_bias=closing)
        )
    tokens, ends = run_out(engine)
    assert set(ends.values()) == {"stop"}
    assert all(fits(text_of(each)) for each in tokens.values())


def test_white_space_in_json_comes_to_an_end(engine, prompt):
    # Known elsewhere: vLLM #4093, #13260, #38696.
    space = dict.fromkeys(ids(" \n\t"), 100.0)
    schema = {"properties": {"a": {"const": 1}}, "required": ["a"], "type": "object", "additionalProperties": False}
    add(engine, "a", prompt(5), constrained(400, structured_outputs={"json": schema}, logit_bias=space))
    tokens, ends = run_out(engine)
    assert ends == {"a": "stop"}
    assert json.loads(text_of(tokens["a"])) == {"a": 1}
    assert len(tokens["a"]) > 40


def chain(count: int, link: Callable[[str], object]) -> dict[str, object]:
    """References one behind the other, nearly as many as a schema has room for."""
    names = [f"_{number:x}" for number in range(count)]
    made = {name: link(f"#/{other}") for name, other in pairwise(names)}
    return made | {names[-1]: {"type": "null"}, "$ref": "#/_0"}


LARK_CHAIN = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4500)) + 'r4500: "a"'
HOSTILE = {
    "not served": ({"json": {"not": {"type": "string"}}}, r'structured_outputs.json: Unimplemented keys: \["not"\]'),
    "unsatisfiable": ({"json": {"$ref": "#"}}, "output token 0 cannot be chosen: none that the model has can follow"),
    "no such rule": ({"grammar": "start: other"}, "structured_outputs.grammar: .*unknown name"),
    "bad regex": ({"regex": "(a"}, "structured_outputs.regex: .*unclosed group"),
    "look-around": ({"regex": "(?=a)b"}, "structured_outputs.regex: "),
    "deep regex": ({"regex": "(" * 5000 + "a" + ")" * 5000}, "structured_outputs.regex: .*invalid regex"),
    "deep lark": ({"grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, "grammar: .*too deeply nested"),
    "exploding allOf": (
        {"json": {"allOf": [{"anyOf": [{"type": "object", "properties": {f"p{i}_{j}": {"type": "string"}}}
                                       for j in range(8)]} for i in range(8)]}},
        "structured_outputs.json: schema too large",
    ),
    "many rows": ({"json": {"enum": [f"c{i} {i * 7919 % 1000003}" for i in range(3500)]}}, ""),
    "chain of references": ({"json": chain(2300, lambda name: {"$ref": name})}, "json: Schema intersection stack"),
    "chain of arrays": ({"json": chain(1700, lambda name: {"items": {"$ref": name}})}, ""),
    "chain of rules": ({"grammar": LARK_CHAIN}, ""),
    "huge counts": ({"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}}, ""),
    "states": ({"regex": ".*a.{18}"}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_in_short_words_or_followed_and_harms_nobody(engine, prompt, name):
    # Known elsewhere: vLLM #17313, #43920.
    given, error = HOSTILE[name]
    params = constrained(5, structured_outputs=given)
    if error:
        with pytest.raises(InvalidRequest, match=error) as caught:
            engine.grammars.matcher(params)
        assert len(str(caught.value)) < 500
    else:
        add(engine, "a", prompt(5), params)
    engine.add("b", prompt(5), SamplingParams(0, 3, ignore_eos=True))
    assert run_out(engine)[1]["b"] == "length"


def test_a_request_whose_masks_become_too_expensive_ends_with_an_error_and_the_others_go_on(
    engine, prompt, monkeypatch
):
    monkeypatch.setitem(compilation._LIMITS, "step_lexer_fuel", 200)
    params = constrained(
        400, temperature=9.0, seed=1, structured_outputs={"regex": "[a-d]{3}(.*a.{9}|.*b.{8}|.*c.{7})z"}
    )
    add(engine, "a", prompt(5), params)
    add(engine, "b", prompt(5), SamplingParams(0, 30, ignore_eos=True))
    tokens, ends = run_out(engine)
    assert 2 < len(tokens["a"]) < 400
    assert ends["a"].startswith(f"structured_outputs: output token {len(tokens['a'])} cannot be chosen: ")
    assert ends["b"] == "length"


def test_the_last_grammars_are_kept_and_no_others(folder, monkeypatch):
    grammars = GrammarCompiler(str(folder), VOCAB_SIZE, [EOS])
    compiled = []

    def counted(tokenizer, wanted):
        compiled.append(wanted.regex)
        return compilation.compile_grammar(tokenizer, wanted)

    monkeypatch.setattr(compiler, "compile_grammar", counted)
    for text in ["a", "b", "a", *(f"c{i}" for i in range(compiler._MOST_KEPT - 1)), "a", "b"]:
        grammars.matcher(constrained(structured_outputs={"regex": text}))
    assert (compiled.count("a"), compiled.count("b")) == (1, 2)


@pytest.mark.parametrize("content", [None, "no JSON", "{}", '["a"]'])
def test_a_model_without_a_tokenizer_that_can_be_read_says_so_to_those_who_need_it(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    grammars = GrammarCompiler(str(tmp_path), VOCAB_SIZE, [EOS])
    grammars.load()
    with pytest.raises(InvalidRequest, match=r"^structured_outputs: .*tokenizer\.json cannot be used for them"):
        grammars.matcher(constrained())
    assert grammars.matcher(SamplingParams()) is None


def test_a_tokenizer_with_more_tokens_than_the_model_is_as_good(folder):
    matcher = GrammarCompiler(str(folder), 200, [EOS]).matcher(constrained())
    assert allowed_by(matcher) == sorted(ids("rg"))


def test_the_tokenizer_is_read_once_whether_it_can_be_or_not(folder, monkeypatch):
    read: list[int] = []

    def counted(path, vocab_size, ends):
        read.append(vocab_size)
        if vocab_size == 1:
            raise ValueError("no")
        return compilation.read_tokenizer(path, vocab_size, ends)

    monkeypatch.setattr(compiler, "read_tokenizer", counted)
    for vocab_size in (VOCAB_SIZE, 1):
        grammars = GrammarCompiler(str(folder), vocab_size, [EOS])
        for _ in range(2):
            grammars.load()
    assert read == [VOCAB_SIZE, 1]


def test_a_token_that_its_grammar_does_not_allow_ends_a_request(engine):
    matcher = present(engine.grammars.matcher(constrained()))
    matcher.advance(ids("x")[0])
    assert matcher.is_ready(60)
    assert matcher.error.startswith("structured_outputs: output token 1 cannot be chosen: ")


def test_output_that_does_not_follow_its_grammar_is_refused(engine):
    with pytest.raises(InvalidRequest, match=r"^output_token_ids: do not follow structured_outputs"):
        engine.grammars.matcher(constrained(), ids("x"))


@pytest.mark.parametrize("enter", ["add", "reserve"])
def test_no_request_runs_without_its_grammar(engine, prompt, enter):
    with pytest.raises(InvalidRequest, match=r"structured_outputs: need a matcher, which Engine\.grammars makes"):
        getattr(engine, enter)("a", prompt(5), constrained())
    assert not engine.has_work()
