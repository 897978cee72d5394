"""Install each wheel alone in an empty environment, and prove that its declared closure is what it needs.

For each distribution: build from the sdist, install with its dependencies, then check that exactly the siblings of its
closure are importable, that the wheel ships py.typed and a licence and nothing of anybody else, and that the package's
README example runs there (for hbserve-kv: two processes that move blocks).

hbserve-kv is tried without torch first: it must be small, and move KV between two processes, by ipc and by Mooncake.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
MODULE = {
    "hbserve-rpc": "hbserve_rpc",
    "hbserve-kv": "hbserve_kv",
    "hbserve-scheduler": "hbserve_scheduler",
    "hbserve-core": "hbserve_core",
    "hbserve-compat": "hbserve",
}
CLOSURE = {
    "hbserve-rpc": {"hbserve-rpc"},
    "hbserve-kv": {"hbserve-kv", "hbserve-rpc"},
    "hbserve-scheduler": {"hbserve-scheduler", "hbserve-rpc"},
    "hbserve-core": {"hbserve-core", "hbserve-kv", "hbserve-rpc"},
    "hbserve-compat": set(MODULE),
}
WITHOUT_TORCH = {"hbserve-rpc", "hbserve-kv", "hbserve-scheduler"}
MOST_MB = {"hbserve-kv": 10}
"""Of all that `pip install` brings."""
OWN_MEMORY = ROOT / "examples" / "kv_own_memory.py"
# What a package's tests need beyond the package; hbserve-core makes its test models with transformers.
TEST_TOOLS = ["pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist", "hypothesis"]
EXTRA_TEST_TOOLS = {"hbserve-core": ["transformers>=5.0"]}


def run(*command: str | Path, cwd: Path | None = None) -> str:
    # These environments have pytest and none of its plugins, which CI's options are for.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    if done.returncode != 0:
        sys.exit(f"failed ({done.returncode}): {' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check_contents(wheel: Path, module: str) -> None:
    names = ZipFile(wheel).namelist()
    own = (f"{module}/", f"{wheel.name.split('-')[0]}-")
    strangers = [name for name in names if not name.startswith(own)]
    assert not strangers, f"{wheel.name} ships files of somebody else: {strangers}"
    assert f"{module}/py.typed" in names, f"{wheel.name} lacks py.typed"
    assert any(name.endswith("/LICENSE") for name in names), f"{wheel.name} lacks its licence"


def check_alone(distribution: str, dist: Path, scratch: Path) -> None:
    module = MODULE[distribution]
    (wheel,) = dist.glob(f"{distribution.replace('-', '_')}-*.whl")
    check_contents(wheel, module)

    venv = scratch / distribution
    python = venv / "bin" / "python"
    run("uv", "venv", "-q", venv)
    run("uv", "pip", "install", "-q", "--python", python, "--find-links", dist, wheel)
    run("uv", "pip", "check", "-q", "--python", python)
    probe = (
        f"import importlib.util as u, {module}; "
        f"print(*(d for d, m in {MODULE!r}.items() if u.find_spec(m)), 'torch' if u.find_spec('torch') else '')"
    )
    found = set(run(python, "-I", "-c", probe, cwd=scratch).split())
    expected = CLOSURE[distribution] | (set() if distribution in WITHOUT_TORCH else {"torch"})
    assert found == expected, f"{distribution}: expected {sorted(expected)}, found {sorted(found)}"
    num_bytes = sum(path.stat().st_size for path in venv.glob("lib/*/site-packages/**/*") if path.is_file())
    most = MOST_MB.get(distribution)
    assert most is None or num_bytes <= most * 1e6, f"{distribution}: {num_bytes / 1e6:.1f} MB, of at most {most}"
    if distribution == "hbserve-kv":
        move_kv_without_torch(python, wheel, dist, scratch)

    tools = [*TEST_TOOLS, ROOT / "packages" / "hbserve-testing", *EXTRA_TEST_TOOLS.get(distribution, [])]
    run("uv", "pip", "install", "-q", "--python", python, *tools)
    tests = ROOT / "packages" / distribution / "tests" / "test_readme.py"
    settings = ["-q", "-n", "0", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    report = run(python, "-m", "pytest", *settings, tests, cwd=scratch)
    print(f"{distribution}: alone with {', '.join(sorted(found))}; README example: {report.strip().splitlines()[-1]}")


def move_kv_without_torch(python: Path, wheel: Path, dist: Path, scratch: Path) -> None:
    """By ipc and by Mooncake; and then with torch, which stays installed, by nccl."""
    run(python, "-I", OWN_MEMORY, "ipc", cwd=scratch)
    install = ("uv", "pip", "install", "-q", "--python", python, "--find-links", dist)
    run(*install, f"{wheel}[mooncake-cpu]")
    run(python, "-I", OWN_MEMORY, "mooncake", cwd=scratch)
    run(*install, f"{wheel}[torch]")
    run(python, "-I", OWN_MEMORY, "nccl", cwd=scratch)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        dist = scratch / "dist"
        run("uv", "build", "-q", "--all-packages", "--no-sources", "-o", dist, cwd=ROOT)
        for distribution in MODULE:
            check_alone(distribution, dist, scratch)


if __name__ == "__main__":
    main()
