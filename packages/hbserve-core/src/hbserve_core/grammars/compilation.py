"""Compilation of grammars and reading of tokenizers with llguidance, within its limits.

The limits keep the cost of most grammars small, but not of all of them: the schema {"multipleOf": 99999989} compiles
for minutes. So a grammar that was not seen before is first tried in another process: see trials.py.
"""

import json
from collections.abc import Sequence as Ids
from pathlib import Path
from typing import Any

from hbserve_rpc import InvalidRequest, StructuredOutputsParams
from hbserve_rpc.plain_values import one_line

_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 100_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n\r\t]{0,32}"}
"""Options for schemas: a model may lay out JSON as it likes, but not write white space for ever."""
_SHOWN = 300


def read_tokenizer(path: Path, vocab_size: int, eos_token_ids: Ids[int]) -> Any:
    """Read llguidance's tokenizer from a tokenizer.json. Raises OSError or ValueError."""
    from llguidance import LLTokenizer

    text = path.read_text(encoding="utf-8").strip()
    if not text.startswith("{"):
        raise ValueError("it is not a JSON object")  # llguidance would take it for a name to download
    if not eos_token_ids:
        raise ValueError("the model has no token that ends a sequence")
    eos = list(eos_token_ids)
    try:
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=eos)
    except ValueError:  # the tokenizer may have more tokens than the model
        return LLTokenizer(text, eos_token=eos)


def compile_grammar(tokenizer: Any, wanted: StructuredOutputsParams) -> Any:
    """Make a new matcher of llguidance, at the beginning of the grammar. Raises InvalidRequest, which says why, if the
    grammar is invalid."""
    from llguidance import LLMatcher, LLParserLimits

    kind = wanted.kind
    try:
        compiled = LLMatcher(tokenizer, _source(wanted), log_level=0, limits=LLParserLimits(**_LIMITS))
    except ValueError as error:
        raise InvalidRequest(f"structured_outputs.{kind}: {shortened(str(error))}") from None
    if compiled.is_error():
        raise InvalidRequest(f"structured_outputs.{kind}: {shortened(compiled.get_error())}")
    return compiled


def shortened(error: str) -> str:
    """Bring an error of llguidance into one line, shortened in the middle, where it may quote a whole grammar between
    its kind and its reason."""
    return one_line(error.removesuffix("<non-verbose/>").strip(), _SHOWN)


def _source(wanted: StructuredOutputsParams) -> str:
    """Return the grammar in the form that llguidance compiles. Raises ValueError."""
    from llguidance import LLMatcher, grammar_from

    if wanted.json is not None:
        return LLMatcher.grammar_from_json_schema(str(wanted.json), _JSON_OPTIONS)
    if wanted.json_object:
        return LLMatcher.grammar_from_json_schema({"type": "object"}, _JSON_OPTIONS)
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.grammar is not None:
        return grammar_from("grammar", wanted.grammar)
    assert wanted.choice is not None, "one of them is given"
    choices = " | ".join(json.dumps(each, ensure_ascii=False) for each in wanted.choice)
    return LLMatcher.grammar_from_lark("start: " + choices.replace("\x7f", "\\u007f"))  # JSON need not escape DEL
