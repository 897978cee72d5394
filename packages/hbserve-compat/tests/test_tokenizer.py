"""Prompts become the token ids that transformers makes of them, with one BOS."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hbserve.text.prompts import encode_all
from hbserve.text.tokenizer import encode, encode_message, load_tokenizer
from hbserve_rpc import InvalidRequest, SamplingParams

CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
BOS, EOS, A, B = 1, 2, 3, 4


@pytest.fixture
def make(tmp_path):
    """Function that makes a tokenizer of single letters, which puts the special tokens of `template` around a text."""

    def tokenizer(template="<s> $A", chat_template=None):
        letters = [*"abuser[]hi", " "]
        vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS} | {
            letter: A + i for i, letter in enumerate(dict.fromkeys(letters))
        }
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        made.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
        wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        wrapped.chat_template = chat_template
        wrapped.save_pretrained(tmp_path)
        return load_tokenizer(tmp_path)

    return tokenizer


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("<s> $A", "ab", [BOS, A, B]),
        ("<s> $A", "<s>ab", [BOS, A, B]),
        ("<s> $A </s>", "<s>ab", [BOS, A, B, EOS]),
        ("<s> $A", "<s><s>ab", [BOS, BOS, A, B]),  # as it stands
        ("<s> $A", "a<s>b", [BOS, A, BOS, B]),
        ("<s> $A", "<s>", [BOS]),
        ("<s> $A", "", [BOS]),
        ("$A", "<s>ab", [BOS, A, B]),
        ("$A", "<s><s>ab", [BOS, BOS, A, B]),
        ("$A", "ab", [A, B]),
    ],
)
def test_a_text_that_begins_with_bos_gets_no_second_one(make, template, text, expected):
    # Known elsewhere: vLLM #27517, #9519.
    assert encode(make(template), text) == expected


def test_a_chat_template_that_cannot_be_read_is_told_when_it_is_loaded(make, caplog):
    make(chat_template="{% generation %}{{ 1 }}{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}")
    assert not caplog.messages
    make(chat_template="{{ bos_token }}\n{% for x in %}")
    (said,) = caplog.messages
    assert said.endswith(
        "its chat template cannot be read: Expected an expression, got 'end of statement block' (line 2)"
    )


def test_token_ids_stay_as_they_are(make):
    assert encode_all(make(), [[BOS, BOS, A]], [SamplingParams()]) == [[BOS, BOS, A]]


@pytest.mark.parametrize("template", ["<s> $A", "$A", "<s> $A </s>"])
def test_a_message_is_what_the_chat_template_of_transformers_makes_of_it(make, template):
    # Known elsewhere: vLLM #16853, #55197.
    tokenizer = make(template, CHAT)
    message = [{"role": "user", "content": "hi"}]
    theirs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert encode_message(tokenizer, "hi") == theirs
    assert theirs.count(BOS) == 1
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert encode(tokenizer, text)[: len(theirs)] == theirs, "nano-vllm's users apply it to text"


@pytest.mark.parametrize("template", ["{{ raise_exception('a system message is needed') }}", "{% if %}", "{{ 1 / 0 }}"])
def test_a_chat_template_that_refuses_or_is_broken_is_an_error_with_its_words(make, template):
    with pytest.raises(InvalidRequest, match=r"'hi': the model's chat template cannot be applied: .+"):
        encode_message(make(chat_template=template), "hi")


def test_an_error_of_a_chat_template_that_has_no_words_is_named(make, monkeypatch):
    def apply(*_: object, **more: object) -> None:
        raise MemoryError

    tokenizer = make(chat_template=CHAT)
    monkeypatch.setattr(tokenizer, "apply_chat_template", apply)
    with pytest.raises(InvalidRequest, match=r"cannot be applied: MemoryError$"):
        encode_message(tokenizer, "hi")


@pytest.mark.parametrize("chat_template", [CHAT, None])
def test_a_message_that_is_not_unicode_text_is_refused_at_its_place(make, chat_template):
    with pytest.raises(InvalidRequest, match=r"^prompt: character 1 is '\\ud83d', half of a surrogate pair"):
        encode_message(make(chat_template=chat_template), "h\ud83d")


@pytest.mark.parametrize("kept", ["a list", "a file"])
def test_chat_templates_are_found_wherever_models_keep_them(make, tmp_path, kept):
    make()
    if kept == "a file":
        (tmp_path / "chat_template.jinja").write_text(CHAT)
    else:
        path = tmp_path / "tokenizer_config.json"
        templates = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "x"}]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    assert encode_message(load_tokenizer(tmp_path), "hi")[0] == BOS


def test_without_a_chat_template_a_message_is_a_prompt(make):
    assert encode_message(make(), "ab") == [BOS, A, B]


def test_a_tokenizer_without_bos_encodes_any_text(make, tmp_path):
    make()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert encode(tokenizer, "<s>ab") == [BOS, BOS, A, B]
