"""Commands that are written down are commands that HBServe takes, with options that there are."""

import subprocess
from pathlib import Path

import pytest
from hbserve_commands import commands_of, parsed

ROOT = Path(__file__).resolve().parent.parent
TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
DOCUMENTS = [name for name in TRACKED.splitlines() if "CHANGELOG" not in name]
COMMANDS = [(name, command) for name in DOCUMENTS for command in commands_of(ROOT / name)]


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[f"{name}:{' '.join(of)}" for name, of in COMMANDS])
def test_a_command_of_a_document_is_one_that_there_is(document, command):
    parsed(command)


def test_a_command_that_there_is_not_would_be_noticed():
    assert parsed(["serve", "--port", "7"])["port"] == 7
    for wrong in (["sevre"], ["serve", "--prot", "7"], ["bench", "enigne"], ["generate", "--max-tokens", "many"]):
        with pytest.raises(BaseException, match=r"[Nn]o such|valid integer"):
            parsed(wrong)
    assert len(COMMANDS) > 30
