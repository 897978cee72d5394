"""The ends of answers: they are the same for LLM, in one process or several, and for DisaggregatedLLM."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from hbserve import LLM, SamplingParams
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.warm

PROMPT = "hello"
SIZES: dict[str, Any] = {"max_model_len": 64, "num_blocks": 50}
LONG = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@dataclass(frozen=True)
class Case:
    folder: object
    tokens: list[int]
    """The model's greedy answer to the prompt."""
    symbols: list[str]


@pytest.fixture
def case(small_model, tmp_path):
    """A model whose answer's second token is special, and is the tokenizer's end token; config.json has another one."""
    folder = shutil.copytree(small_model("llama"), tmp_path / "model")
    llm = LLM(folder, **SIZES)
    (answer,) = llm.generate(PROMPT, LONG, use_tqdm=False)
    llm.exit()
    tokenizer = load_tokenizer(folder)
    symbols = tokenizer.convert_ids_to_tokens(answer["token_ids"])
    assert symbols[1].isascii()
    assert symbols[1] != symbols[0]
    tokenizer.add_special_tokens({"eos_token": symbols[1]})
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2
    return Case(folder, answer["token_ids"], symbols)


CASES: dict[str, tuple[Callable[[Case], dict[str, Any]], int, int]] = {
    "the tokenizer's end token": (lambda case: {"ignore_eos": False}, 2, 2),
    "a stop string that is a special token": (lambda case: {"stop": [case.symbols[1]]}, 1, 2),
    "a stop string that belongs to the text": (
        lambda case: {"stop": [case.symbols[1]], "include_stop_str_in_output": True},
        2,
        2,
    ),
    "a special token's id": (lambda case: {"stop_token_ids": [case.tokens[1]]}, 2, 2),
    "an id before the end token": (lambda case: {"stop_token_ids": [case.tokens[0]], "ignore_eos": False}, 1, 1),
    "a stop string before the end token": (lambda case: {"stop": ["never", "\ufffd"], "ignore_eos": False}, 0, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_a_text_ends_where_it_does_in_one_process(case, name):
    changes, num_shown, num_tokens = CASES[name]
    llm = LLM(case.folder, **SIZES)
    (answer,) = llm.generate(PROMPT, SamplingParams(0, 10, **({"ignore_eos": True} | changes(case))), use_tqdm=False)
    llm.exit()
    assert answer["token_ids"] == case.tokens[:num_tokens]
    assert answer["text"] == llm.tokenizer.decode(case.tokens[:num_shown])


def reason_of(params):
    """Return the stop reason that belongs to the parameters of one of CASES."""
    return next(iter([*params.stop[-1:], *params.stop_token_ids]), None)


async def test_a_text_ends_where_it_does_in_several_processes(case):
    params = [SamplingParams(0, 10, **({"ignore_eos": True} | changes(case))) for changes, _, _ in CASES.values()]
    async with DisaggregatedLLM(PdDisaggConfig(case.folder, **SIZES)) as llm:
        answers = await llm.generate([PROMPT] * len(params), params)
        decode = llm.tokenizer.decode
        assert [answer["stop_reason"] for answer in answers] == [reason_of(each) for each in params]
        for answer, (_, num_shown, num_tokens) in zip(answers, CASES.values(), strict=True):
            assert answer["token_ids"] == case.tokens[:num_tokens]
            assert answer["text"] == decode(case.tokens[:num_shown], skip_special_tokens=True)
            assert answer["finish_reason"] == "stop"
