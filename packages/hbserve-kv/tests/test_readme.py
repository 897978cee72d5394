"""The README's example runs as it stands: two processes move blocks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.warm

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_example_of_the_readme_moves_blocks_between_two_processes(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    script = tmp_path / "example.py"
    script.write_text(block)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # Each line is one write; which comes first, and where the line ends fall between them, is up to the two processes.
    assert "sent: Outcome.COMPLETED" in done.stdout
    received = "received b'first token: 42' [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]: Outcome.COMPLETED"
    assert received in done.stdout
    assert len(block.splitlines()) < 40
