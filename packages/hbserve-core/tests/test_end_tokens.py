"""Every file that names an end-of-sequence token is heeded; the tokenizer's own is the one that transformers finds."""

import json
from typing import Any

import pytest

from hbserve_core.errors import BrokenTokenizer, UnsupportedModel
from hbserve_core.model.end_tokens import end_token_ids


def write_tokenizer(folder, model="BPE"):
    """Ids 0 to 2 are <unk>, <s> and </s>, 3 and 4 are a and b; <|im_end|> is added as 5. </s> is its end."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", "a", "b"]
    if model == "Unigram":
        kind: Any = models.Unigram([(token, -float(i)) for i, token in enumerate(tokens)], unk_id=0)
    else:
        kind = models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(kind), eos_token="</s>", bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(folder)


def change(folder, **changes):
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


ADDED = {"2": {"content": "</s>", "special": True}, "5": {"content": "<|im_end|>", "special": True}}
CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "a name": ({"eos_token": "<|im_end|>"}, None),
    "an object": ({"eos_token": {"content": "<|im_end|>", "__type": "AddedToken", "lstrip": False}}, None),
    "none": ({"eos_token": None}, None),
    "absent": ({"eos_token": ...}, None),
    "of the vocabulary, not added": ({"eos_token": "b"}, None),
    "in the older file": ({"eos_token": ...}, "<|im_end|>"),
    "in both, the older file is heeded": ({}, "<|im_end|>"),
    "in both, the older file is not heeded": ({"added_tokens_decoder": ADDED}, "<|im_end|>"),
    "in the older file only, which is not heeded": ({"eos_token": ..., "added_tokens_decoder": ADDED}, "<|im_end|>"),
    "a length without end": ({"model_max_length": float("inf")}, None),
}


@pytest.mark.parametrize("model", ["BPE", "Unigram"])
@pytest.mark.parametrize("case", CASES)
def test_the_end_token_of_a_tokenizer_is_the_one_that_transformers_finds(tmp_path, case, model):
    # Known elsewhere: Qwen3 #927, vLLM #1136.
    from transformers import PreTrainedTokenizerFast

    changes, older = CASES[case]
    write_tokenizer(tmp_path, model)
    change(tmp_path, **changes)
    if older is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": older}))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path).eos_token_id
    assert end_token_ids(tmp_path, {}, {}, 320) == (() if theirs is None else (theirs,))


def test_ids_of_all_three_files_count_once_each(tmp_path):
    write_tokenizer(tmp_path)
    assert end_token_ids(tmp_path, {"eos_token_id": 4}, {"eos_token_id": [3, 4]}, 320) == (3, 4, 2)
    assert end_token_ids(tmp_path, {"eos_token_id": [2]}, {}, 320) == (2,)


def test_a_folder_without_a_tokenizer_has_the_ids_of_its_configuration(tmp_path):
    assert end_token_ids(tmp_path, {"eos_token_id": 7}, {}, 320) == (7,)
    assert end_token_ids(tmp_path, {"eos_token_id": None}, {}, 320) == ()


@pytest.mark.parametrize("value", ["2", 2.5, True, [2, None], {"id": 2}])
def test_an_id_that_is_no_integer_is_refused_by_name(tmp_path, value):
    with pytest.raises(UnsupportedModel, match=r"eos_token_id=.*expected an integer or a list of them"):
        end_token_ids(tmp_path, {"eos_token_id": value}, {}, 320)


def test_a_tokenizer_file_that_is_not_json_is_named(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BrokenTokenizer, match=r"tokenizer\.json"):
        end_token_ids(tmp_path, {}, {}, 320)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", '{"model": {"vocab": {"</s>": "2"}}}'),
        ("tokenizer.json", '{"model": {"vocab": 2}}'),
        ("tokenizer_config.json", '{"eos_token": "b", "added_tokens_decoder": {"x": {"content": "b"}}}'),
        ("tokenizer_config.json", "[" * 100_000),
    ],
)
def test_a_tokenizer_file_with_something_else_in_it_is_named(tmp_path, file, content):
    write_tokenizer(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(BrokenTokenizer, match=f"its tokenizer cannot be read: {file}"):
        end_token_ids(tmp_path, {}, {}, 320)
