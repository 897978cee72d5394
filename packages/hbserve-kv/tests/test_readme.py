"""The README's example runs as it stands: two processes move blocks."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_example_of_the_readme_moves_blocks_between_two_processes(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    script = tmp_path / "example.py"
    script.write_text(block)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # The two processes print at once, so their words may be mixed.
    assert done.stdout.count("Outcome.COMPLETED") == 2
    assert "b'first token: 42' [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]" in done.stdout
    assert len(block.splitlines()) < 40
