"""Files, classes and members of classes that a document names exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOUND = (path for folder in ["", "docs/", "benchmarks/", "packages/*/"] for path in ROOT.glob(f"{folder}*.md"))
DOCUMENTS = sorted(path for path in FOUND if path.name != "CHANGELOG.md")
"""Markdown files, except changelogs, which describe the past."""
SOURCES = {path.as_posix().rpartition("/src/")[2]: path for path in ROOT.glob("packages/*/src/**/*.py")}
"""Source files, by paths such as hbserve_kv/manager.py."""
PYTHON_FILE = re.compile(r"`((?:[\w-]+/)*\w+\.py)(?:`| )")
MEMBER = re.compile(r"\b([A-Z]\w+)\.([a-z_]\w*)")


@pytest.fixture(scope="module")
def classes() -> dict[str, set[str]]:
    """Names of the members of each class of the packages, including those of its bases."""
    own: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for path in SOURCES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                own.setdefault(node.name, set()).update(members(node))
                bases.setdefault(node.name, set()).update(ast.unparse(base).split("[")[0] for base in node.bases)

    def inherited(name: str) -> set[str]:
        return own.get(name, set()).union(*(inherited(base) for base in bases.get(name, ())))

    return {name: inherited(name) for name in own}


def members(node: ast.ClassDef) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            yield each.name
        elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            yield each.id
        elif isinstance(each, ast.Attribute) and ast.unparse(each.value) == "self":
            yield each.attr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_that_a_document_names_is_there(document):
    """A file is named relative to its package, or to a folder of it that the document is about."""
    folders = ["", "tests/**/", "packages/*/tests/**/", "benchmarks/", "examples/", "scripts/", ".ci/"]
    others = [path for folder in folders for path in ROOT.glob(f"{folder}*.py")]
    there = [path.as_posix() for path in [*SOURCES.values(), *others]]
    named = set(PYTHON_FILE.findall(document.read_text())) - {"utils.py"}  # which CONTRIBUTING.md says there is not
    assert [name for name in sorted(named) if not any(path.endswith(f"/{name}") for path in there)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_member_that_a_document_names_is_of_its_class(document, classes):
    named = {(name, member) for name, member in MEMBER.findall(document.read_text()) if name in classes}
    assert [f"{name}.{member}" for name, member in sorted(named) if member not in classes[name]] == []


def test_every_benchmark_is_in_their_list():
    scripts = sorted(path.name for path in ROOT.glob("benchmarks/*.py"))
    listed = sorted(PYTHON_FILE.findall((ROOT / "benchmarks/README.md").read_text()))
    assert listed == scripts
