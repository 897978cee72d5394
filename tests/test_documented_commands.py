"""Commands in documents are commands that HBServe accepts, with existing options, and pieces of configuration files are
valid."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hbserve_commands import commands_of, parsed

from hbserve_scheduler import convert

ROOT = Path(__file__).resolve().parent.parent
TRACKED = subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True, timeout=60)
DOCUMENTS = [name for name in TRACKED.splitlines() if "CHANGELOG" not in name]
PAIR = [
    {"instance_id": "prefill-0", "instance_type": "prefill", "kv_rank": 0},
    {"instance_id": "decode-0", "instance_type": "decode", "kv_rank": 1},
]
BLOCKS = [
    (name, block)
    for name in DOCUMENTS
    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)
]
COMMANDS = [(name, command) for name in DOCUMENTS for command in commands_of(ROOT / name)]


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[f"{name}:{' '.join(of)}" for name, of in COMMANDS])
def test_a_command_of_a_document_is_one_that_there_is(document, command):
    parsed(command)


def test_a_command_may_go_on_in_quotes_on_the_next_line(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("```bash\nhbserve generate 'one\ntwo' --max-tokens 4  # isn't it\nhbserve stats\n```\n")
    assert [each[0] for each in commands_of(document)] == ["generate", "stats"]
    assert [each.split() for each in next(commands_of(document))][1] == ["one", "two"]


@pytest.mark.parametrize(("document", "block"), BLOCKS, ids=[f"{name}:{block.split()[0]}" for name, block in BLOCKS])
def test_a_section_of_the_file_in_a_document_is_one_that_is_read(document, block):
    content = yaml.safe_load(block)
    assert convert({"gpu_instances": PAIR} | content) != convert({"gpu_instances": PAIR}), document


def test_a_command_that_there_is_not_would_be_noticed():
    assert parsed(["serve", "--port", "7"])["port"] == 7
    for wrong in (["sevre"], ["serve", "--prot", "7"], ["bench", "enigne"], ["generate", "--max-tokens", "many"]):
        with pytest.raises(BaseException, match=r"[Nn]o such|valid integer"):
            parsed(wrong)
    assert len(COMMANDS) > 30
