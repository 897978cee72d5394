"""The README's example, as it stands."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_example_of_the_readme_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={"TMPDIR": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(a|b) (length|stop) \[[\d, ]+\]\n(a|b) (length|stop) \[[\d, ]+\]\n", done.stdout), done.stdout
