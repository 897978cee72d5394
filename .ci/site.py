"""Build the site of the documentation, strictly: a link that leads nowhere is an error.

    .ci/site.py --home https://HOST/OWNER/REPOSITORY     writes .site/html

Pages are those of docs/, and its start pages the two READMEs, so nothing is written twice. What they link to outside of
docs/ is in the repository, whose URL `--home` is. Built by Zensical, and by mkdocs-material, which reads the same file.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / ".site"
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)\s#]+)((?:#[^)\s]*)?)\)")
STARTS = {"README.md": "index.md", "README.zh-CN.md": "zh/index.md"}
"""Pages that are elsewhere in the repository, and where they are in the site."""


def place_of(path: Path) -> str | None:
    """Where a file of the repository is in the site; None: it is not there."""
    if path.is_relative_to("docs"):
        return path.relative_to("docs").as_posix()
    return STARTS.get(path.as_posix())


def page(source: Path, home: str) -> str:
    """A page of the site, with links that lead to other pages or to the repository. `source`: from the root."""
    own = Path(place_of(source) or "")

    def lead(found: re.Match[str]) -> str:
        target = (ROOT / source.parent / found[1]).resolve().relative_to(ROOT)
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{source}: there is no {found[1]}")
        there = place_of(target)
        if there is None:
            return f"]({home}/blob/main/{target.as_posix()}{found[2]})"
        return f"]({'../' * (len(own.parts) - 1)}{there}{found[2]})"

    return nested_by_four(LINK.sub(lead, (ROOT / source).read_text(encoding="utf-8")))


def nested_by_four(text: str) -> str:
    """Double the indentation of all lines outside of code blocks: lists are nested by two spaces in the repository, and
    Python-Markdown, which both tools use, takes those for one flat list."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if part.startswith("```") else re.sub(r"^ +", r"\g<0>\g<0>", part, flags=re.MULTILINE) for part in parts
    )


def write_pages(home: str) -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    sources = [*(each for each in (ROOT / "docs").rglob("*") if each.is_file()), *(ROOT / name for name in STARTS)]
    for source in (each.relative_to(ROOT) for each in sources):
        target = SITE / "docs" / (place_of(source) or "")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            target.write_text(page(source, home), encoding="utf-8")
        else:  # a picture
            shutil.copyfile(ROOT / source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--home", required=True, help="the repository's URL")
    home = parser.parse_args().home.rstrip("/")
    write_pages(home)
    for tool in ("mkdocs", "zensical"):  # what the last one has made stays
        done = subprocess.run([tool, "build", "--strict", "--clean"], cwd=ROOT, capture_output=True, text=True)
        print(f"{tool}: {'built' if done.returncode == 0 else 'failed'}")
        if done.returncode:
            sys.exit(done.stdout + done.stderr)


if __name__ == "__main__":
    main()
