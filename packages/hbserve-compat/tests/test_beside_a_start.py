"""Errors that only a tokenizer can find: they are told in one line while instances start, and no instance is left."""

import os
import shutil

import pytest
from typer.testing import CliRunner

from hbserve.__main__ import app
from hbserve_testing.processes import children_of


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Check that none of the processes that a command has started is left."""
    before = children_of(os.getpid())
    yield
    assert children_of(os.getpid()) == before


def refused(*command: str) -> list[str]:
    """Run a command that must be refused, and return the lines of its stderr."""
    found = CliRunner().invoke(app, [*command, "--log-level", "ERROR"])
    assert found.exit_code == 2, found.stderr
    return found.stderr.splitlines()


def test_a_prompt_of_no_tokens_is_refused_while_instances_start(config):
    assert refused("generate", "", "--config", str(config())) == ["error: prompt: expected at least one token"]


TEMPLATES = ["{{ messages[", "{{ raise_exception('no such role') if messages[0].role == 'system' }}"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_refuses_what_is_asked_is_told_while_instances_start(
    config, small_model, tmp_path, template
):
    model = shutil.copytree(small_model("qwen3"), tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    path = str(config(model={"path": str(model)}))
    for command in (["generate", "Hello", "Two"], ["chat"]):
        *_, line = refused(*command, "--system", "Be brief.", "--config", path)
        assert line.startswith("error: ")
        assert "the model's chat template cannot be applied: " in line
