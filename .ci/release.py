"""Build the five distributions as they are published, look at them, and publish them if that is asked for.

    .ci/release.py --home https://HOST/OWNER/REPOSITORY             build, check, try; `uv publish --dry-run`
    .ci/release.py --home https://HOST/OWNER/REPOSITORY --publish   and publish; a token is in UV_PUBLISH_TOKEN

The repository does not know where it is hosted: `--home` does. Package indexes show a README without its repository, so
its links, which are relative here, lead there; so do the project's URLs. What changes is a copy.

Tried on every Python from 3.11 to 3.14 that is on this machine: wheels without torch are installed with what they need
and run, the others are compiled. Whole installations with torch are `make isolate` (3.11) and `make lowest` (3.13).
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = ("hbserve-rpc", "hbserve-kv", "hbserve-scheduler", "hbserve-core", "hbserve-compat")
TESTED = ("3.11", "3.12", "3.13")
"""What classifiers say. A Python joins them when it was tried."""
PYTHONS = (*TESTED, "3.14")
WITHOUT_TORCH = {"hbserve-rpc": "hbserve_rpc", "hbserve-scheduler": "hbserve_scheduler"}
RELATIVE_LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)\s]+)\)")


def absolute_links(text: str, folder: str, home: str) -> str:
    """A README whose links lead to the repository. `folder` is where it is, from the repository's root."""

    def lead_there(found: re.Match[str]) -> str:
        path, mark, anchor = found[1].partition("#")
        target = (ROOT / folder / path).resolve().relative_to(ROOT)
        if not (ROOT / target).exists():
            raise ValueError(f"{folder}/README.md: there is no {found[1]}")
        return f"]({home}/blob/main/{target.as_posix()}{mark}{anchor})"

    return RELATIVE_LINK.sub(lead_there, text)


def urls(distribution: str, home: str) -> str:
    """The table of pyproject.toml that says where the project is."""
    changelog = f"{home}/blob/main/packages/{distribution}/CHANGELOG.md"
    entries = {"Homepage": home, "Documentation": f"{home}/tree/main/docs", "Changelog": changelog}
    entries["Issues"] = f"{home}/issues"
    return "\n[project.urls]\n" + "".join(f'{name} = "{url}"\n' for name, url in entries.items())


def released(changelog: str, version: str) -> bool:
    """Whether a changelog has a section of this version, which is its first."""
    headings = re.findall(r"^## (.+)$", changelog, re.MULTILINE)
    return bool(headings) and headings[0].split()[0] == version


def prepare(distribution: str, home: str, scratch: Path) -> Path:
    """A copy of a package, as it is published."""
    copy = scratch / distribution
    for name in run("git", "ls-files", f"packages/{distribution}", cwd=ROOT).splitlines():
        target = copy / Path(name).relative_to(f"packages/{distribution}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    readme = copy / "README.md"
    readme.write_text(absolute_links(readme.read_text(), f"packages/{distribution}", home))
    with (copy / "pyproject.toml").open("a") as file:
        file.write(urls(distribution, home))
    return copy


def check_metadata(wheel: Path, home: str) -> None:
    with ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert metadata["License-Expression"] == "MIT", wheel.name
    assert metadata["Description-Content-Type"] == "text/markdown", wheel.name
    assert f"Homepage, {home}" in metadata.get_all("Project-URL", []), wheel.name
    of_python = {each for each in metadata.get_all("Classifier", []) if each.startswith("Programming Language")}
    assert of_python >= {f"Programming Language :: Python :: {each}" for each in TESTED}, wheel.name
    assert not RELATIVE_LINK.search(metadata.get_payload()), f"{wheel.name}: a link that an index cannot follow"


def try_on(version: str, dist: Path, scratch: Path) -> str:
    """What was tried there, in words."""
    python = find_python(version)
    if python is None:
        return f"Python {version}: not on this machine"
    wheels = sorted(dist.glob("*.whl"))
    for wheel in wheels:
        unpacked = scratch / version / wheel.stem
        with ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        run(python, "-m", "compileall", "-q", unpacked)
    environment = scratch / f"environment-{version}"
    run("uv", "venv", "-q", "--python", python, environment)
    own = [each for each in wheels if each.name.split("-")[0] in WITHOUT_TORCH.values()]
    run("uv", "pip", "install", "-q", "--python", environment / "bin/python", "--find-links", dist, *own)
    run(environment / "bin/hbserve-scheduler", "--help", cwd=scratch)
    return f"Python {version}: {', '.join(WITHOUT_TORCH)} run; all {len(wheels)} compile"


def find_python(version: str) -> str | None:
    """One that uv finds, or one of pyenv's. None is downloaded."""
    done = subprocess.run(["uv", "python", "find", "--no-python-downloads", version], capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout.strip()
    return next(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")), None)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(each) for each in command], cwd=cwd, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        sys.exit(f"failed ({done.returncode}): {' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--home", required=True, help="the repository's URL")
    parser.add_argument("--publish", action="store_true", help="upload what was built")
    given = parser.parse_args()
    home = given.home.rstrip("/")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        dist = scratch / "dist"
        for distribution in DISTRIBUTIONS:
            copy = prepare(distribution, home, scratch)
            version = tomllib.loads((copy / "pyproject.toml").read_text())["project"]["version"]
            is_released = released((copy / "CHANGELOG.md").read_text(), version)
            if given.publish and not is_released:
                sys.exit(f"{distribution}: the first section of CHANGELOG.md is not of {version}: give it its name")
            run("uv", "build", "-q", copy, "-o", dist)
            print(f"{distribution} {version}{'' if is_released else ': not released yet'}")
        for wheel in sorted(dist.glob("*.whl")):
            check_metadata(wheel, home)
        for python in PYTHONS:
            print(try_on(python, dist, scratch))
        files = sorted(path for path in dist.iterdir() if path.suffix in (".whl", ".gz"))
        run("uv", "publish", *([] if given.publish else ["--dry-run", "--token", "none"]), *files)
        print(f"{len(files)} files {'were published' if given.publish else 'would be published'}")


if __name__ == "__main__":
    main()
