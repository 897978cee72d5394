"""Every Python block of the README runs as it stands, with the model path replaced."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.warm

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "openai" not in block]
"""The block with OpenAI's client, which runs in tests/clients, where that is installed."""
DOCUMENTED_PATH = "~/huggingface/Qwen3-0.6B/"


async def run_block(block: str, names: dict[str, object]) -> None:
    """Run code that may use `await` at its top level, as in a notebook."""
    code = compile(block, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if (coroutine := eval(code, names)) is not None:
        await coroutine


@pytest.mark.parametrize("number", range(len(BLOCKS)))
async def test_a_python_block_of_the_readme_runs(number, small_model, capsys):
    names: dict[str, object] = {}
    earlier = "\n".join(BLOCKS[:number]).splitlines()
    await run_block("\n".join(line for line in earlier if line.startswith(("from ", "import "))), names)
    block = BLOCKS[number].replace(DOCUMENTED_PATH, str(small_model("qwen3")))
    if "PdDisaggConfig(" not in block and "(config)" in block:
        definition = BLOCKS[0].split("llm = ")[0].replace(DOCUMENTED_PATH, str(small_model("qwen3")))
        await run_block(definition, names)
    await run_block(block, names)
    for results in ("results", "outputs"):
        for result in names.get(results, []):  # type: ignore[attr-defined]
            assert isinstance(result["text"], str)
            assert result["token_ids"]
    if exit_ := getattr(names.get("llm"), "exit", None):
        exit_()
