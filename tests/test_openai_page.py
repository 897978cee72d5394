"""docs/openai-server.md has every field that the OpenAI server knows, under what is done with it."""

import json
import re
from pathlib import Path

from hbserve.server.app import ROUTES
from hbserve.server.request_fields import IGNORED, NOT_SERVED, SERVED_BY_ENDPOINT, ChatBody, CompletionBody

PAGE = (Path(__file__).resolve().parent.parent / "docs/openai-server.md").read_text()


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert found, title
    return found[1]


def listed(title: str) -> dict[str, str]:
    return dict(re.findall(r"^- `(\w+)`: (.+)$", section(title), re.M))


def test_the_page_lists_exactly_the_fields_that_are_served():
    both = listed("Fields of both endpoints")
    for kind, path in ((CompletionBody, "/v1/completions"), (ChatBody, "/v1/chat/completions")):
        served = {name for name in kind.__struct_fields__ if name not in NOT_SERVED}
        served |= {name for name, endpoint in SERVED_BY_ENDPOINT.items() if endpoint == path}
        own = listed(f"Fields of {path}")
        assert not both.keys() & own.keys()
        assert both.keys() | own.keys() == served


def test_the_page_lists_exactly_the_values_of_fields_that_are_not_served():
    said = {
        name: [json.loads(value) for value in re.findall(r"`([^`]+)`", values)]
        for name, values in listed("Refused").items()
    }
    assert said == {name: list(values) for name, values in NOT_SERVED.items()}
    known = {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__}
    assert NOT_SERVED.keys() <= known


def test_the_page_lists_the_fields_that_clients_send_and_that_have_no_effect():
    assert listed("Ignored") == IGNORED
    assert not IGNORED.keys() & {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__}


def test_the_page_lists_every_endpoint():
    paths = set(re.findall(r"`(?:GET |POST )?(/[^`]*)`", section("Endpoints").split("With API keys")[0]))
    assert {path.replace("{id}", "{model:path}") for path in paths} == {route.path for route in ROUTES}
