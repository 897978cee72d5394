"""docs/openai-server.md lists every field that the OpenAI server knows, by what is done with it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hbserve.server.app import ROUTES
from hbserve.server.endpoints import anthropic_fields, responses_fields
from hbserve.server.fields import request_fields
from hbserve.server.fields.request_fields import ChatBody, CompletionBody
from hbserve.server.http.api_keys import OPEN_PATHS

PAGE = (Path(__file__).resolve().parent.parent / "docs/openai-server.md").read_text()


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert found, title
    return found[1]


def listed(title: str) -> dict[str, str]:
    return dict(re.findall(r"^- `(\w+)`: (.+)$", section(title), re.M))


TRANSLATED: dict[str, Any] = {
    " by /v1/responses": (responses_fields, [responses_fields.ResponsesBody]),
    " by /v1/messages": (anthropic_fields, [anthropic_fields.MessagesBody]),
}
TABLES: dict[str, Any] = {"": (request_fields, [ChatBody, CompletionBody])} | TRANSLATED


def test_the_page_lists_exactly_the_fields_that_are_served():
    both = listed("Fields of both endpoints")
    for kind, path in ((CompletionBody, "/v1/completions"), (ChatBody, "/v1/chat/completions")):
        served = {name for name in kind.__struct_fields__ if name not in kind.not_served}
        own = listed(f"Fields of {path}")
        assert not both.keys() & own.keys()
        assert both.keys() | own.keys() == served
    for title, (_, (kind,)) in TRANSLATED.items():
        served = {name for name in kind.__struct_fields__ if name not in kind.not_served}
        assert listed(f"Fields of{title.removeprefix(' by')}").keys() == served


@pytest.mark.parametrize("title", TABLES)
def test_the_page_lists_exactly_the_values_of_fields_that_are_not_served(title):
    table, kinds = TABLES[title]
    said = {
        name: [json.loads(value) for value in re.findall(r"`([^`]+)`", values)]
        for name, values in listed(f"Refused{title}").items()
    }
    assert said == {name: list(values) for name, values in table.NOT_SERVED.items()}
    assert table.NOT_SERVED.keys() <= {name for kind in kinds for name in kind.__struct_fields__}


@pytest.mark.parametrize("title", TABLES)
def test_the_page_lists_the_fields_that_clients_send_and_that_have_no_effect(title):
    table, kinds = TABLES[title]
    assert listed(f"Ignored{title}") == table.IGNORED
    assert not table.IGNORED.keys() & {name for kind in kinds for name in kind.__struct_fields__}


def test_the_page_lists_every_endpoint():
    paths = set(re.findall(r"`(?:GET |POST )?(/[^`]*)`", section("Endpoints").split("With API keys")[0]))
    assert {path.replace("{id}", "{model:path}") for path in paths} == {route.path for route in ROUTES}


def test_the_page_lists_every_path_that_needs_no_key():
    (said,) = re.findall(r"With API keys, .*?: only\n(.*?) are open", section("Endpoints"), re.S)
    assert set(re.findall(r"`([^`]+)`", said)) == OPEN_PATHS
