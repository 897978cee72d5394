"""The README's example runs as it stands, with the model path replaced."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.warm

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_example_of_the_readme_runs(small_model, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    script = tmp_path / "example.py"
    # Without `if __name__ == "__main__"`, as users write it.
    script.write_text(block.replace("~/huggingface/Qwen3-0.6B/", str(small_model("qwen3"))))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout
