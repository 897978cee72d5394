"""A model folder without a tokenizer serves token ids; one whose tokenizer is broken is refused at start."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hbserve
import hbserve.pd_disagg
from hbserve import LLM, SamplingParams
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.text.tokenizer import load_tokenizer
from hbserve_core import BrokenTokenizer
from hbserve_rpc import InvalidRequest

pytestmark = pytest.mark.warm

GREEDY = SamplingParams(0, 5, True)
NO_TOKENIZER = r"is text, but the model folder has no tokenizer, none of tokenizer\.json, .*; expected token ids"


@pytest.fixture
def copied(small_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(small_model("qwen3"), tmp_path / "model")


@pytest.fixture
def bare(copied: Path) -> Path:
    """Folder of the same model, without its tokenizer."""
    for file in copied.glob("tokenizer*"):
        file.unlink()
    return copied


@pytest.mark.parametrize("kind", [LLM, hbserve.pd_disagg.LLM])
def test_a_model_without_a_tokenizer_serves_token_ids_and_refuses_text(small_model, bare, kind):
    with LLM(small_model("qwen3"), num_blocks=20) as whole:
        want = [each["token_ids"] for each in whole.generate([[5, 6, 7], [8]], GREEDY, use_tqdm=False)]
    with kind(bare, num_blocks=20) as llm:
        assert llm.tokenizer is None
        outputs = llm.generate([[5, 6, 7], [8]], GREEDY, use_tqdm=False)
        assert outputs == [{"text": "", "token_ids": ids} for ids in want]
        with pytest.raises(InvalidRequest, match=rf"^prompts\[1\]: prompt: {NO_TOKENIZER}"):
            llm.generate([[5], "text"], GREEDY, use_tqdm=False)
        with pytest.raises(InvalidRequest, match=rf"^stop: {NO_TOKENIZER}"):
            llm.generate([[5]], SamplingParams(stop=["END"]), use_tqdm=False)
        with pytest.raises(InvalidRequest, match=NO_TOKENIZER):
            llm.add_request("text", GREEDY)
        assert llm.is_finished()
        ended = SamplingParams(0, 5, True, stop_token_ids=want[0][1:2])
        assert llm.generate([[5, 6, 7]], ended, use_tqdm=False)[0]["token_ids"] == want[0][:2]


async def test_a_disaggregated_llm_without_a_tokenizer_does_so_too(bare, until_empty):
    async with DisaggregatedLLM(PdDisaggConfig(bare, num_blocks=20)) as llm:
        assert llm.tokenizer is None
        (result,) = await llm.generate([[5, 6, 7]], GREEDY)
        assert (result["text"], len(result["token_ids"]), result["finish_reason"]) == ("", 5, "length")
        deltas = [delta async for delta in llm.stream([5, 6, 7], GREEDY)]
        assert {delta["text"] for delta in deltas} == {""}
        assert [token for delta in deltas for token in delta["token_ids"]] == result["token_ids"]
        for call in (lambda: llm.generate(["text"], GREEDY), lambda: anext(llm.stream("text", GREEDY))):
            with pytest.raises(InvalidRequest, match=NO_TOKENIZER):
                await call()
        await until_empty(llm)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def only_settings(file: Path) -> None:
    """Leave only tokenizer_config.json, of which transformers silently makes an empty tokenizer."""
    file.unlink()
    file.with_name("tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


BROKEN: dict[str, Callable[[Path], Any]] = {
    "an empty file": lambda file: file.write_text(""),
    "null": lambda file: file.write_text("null"),
    "a file that is cut off": cut_off,
    "no text": lambda file: file.write_bytes(bytes(range(256))),
    "a pointer of Git LFS": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\nsize 7\n"),
    "a folder": a_folder,
    "a broken configuration": lambda file: file.with_name("tokenizer_config.json").write_text("{"),
    "another kind of configuration": lambda file: file.with_name("tokenizer_config.json").write_text("[]"),
    "a configuration without a vocabulary": only_settings,
    "a length that is none": lambda file: file.with_name("tokenizer_config.json").write_text(
        '{"model_max_length": "9"}'
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tokenizer_is_an_error_in_words_and_not_taken_for_none(copied, case):
    BROKEN[case](copied / "tokenizer.json")
    with pytest.raises(BrokenTokenizer, match=r"its tokenizer (cannot be read|has no vocabulary)") as caught:
        LLM(copied, num_blocks=20)
    assert str(caught.value).startswith(f"{copied}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(BrokenTokenizer):
        load_tokenizer(copied)


@pytest.mark.parametrize("case", BROKEN)
async def test_a_disaggregated_llm_with_a_broken_tokenizer_has_the_same_error_and_leaves_nothing(copied, case):
    BROKEN[case](copied / "tokenizer.json")
    llm = DisaggregatedLLM(PdDisaggConfig(copied, num_blocks=20))
    with pytest.raises(BrokenTokenizer, match=r"its tokenizer (cannot be read|has no vocabulary)"):
        await llm.start()
    assert llm._instances is None
