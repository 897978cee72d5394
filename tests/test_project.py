"""The rules that keep the workspace simple, as far as a test can see them."""

import ast
import re
import subprocess
import sys
import tomllib
import unicodedata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
MEMBERS = sorted(path for path in (ROOT / "packages").iterdir() if (path / "pyproject.toml").exists())
PACKAGES = [path for path in MEMBERS if path.name != "hbserve-testing"]
"""Packages that are published."""
SOURCES = sorted(source for member in MEMBERS for source in (member / "src").rglob("*.py"))
FOLDERS = ["", "docs/", "examples/", "benchmarks/", "packages/*/"]
DOCUMENTS = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}*.md"))
RUNS_A_PROCESS = {f"subprocess.{name}" for name in ("run", "call", "check_call", "check_output")}
MOST_COLUMNS = 120
MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 40


def project(package: Path) -> dict:
    return tomllib.loads((package / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def texts() -> dict[Path, str]:
    """Texts of all source files. One test looks at all files: two thousand tests took longer to begin than to run."""
    return {source: source.read_text() for source in SOURCES}


@pytest.fixture(scope="module")
def trees(texts: dict[Path, str]) -> dict[Path, ast.Module]:
    return {source: ast.parse(text) for source, text in texts.items()}


def test_files_are_short_enough_to_read(texts):
    too_long = {source: n for source, text in texts.items() if (n := len(text.splitlines())) > MOST_FILE_LINES}
    assert too_long == {}, "split them by concept"


def test_functions_are_short_enough_to_read(texts, trees):
    too_long = []
    for source, text in texts.items():
        for node in ast.walk(trees[source]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = [line for line in text.splitlines()[node.lineno - 1 : node.end_lineno] if line.strip()]
                docstring = ast.get_docstring(node, clean=False) or ""
                length = len(body) - len([line for line in docstring.splitlines() if line.strip()])
                if length > MOST_FUNCTION_LINES:
                    too_long.append(f"{source}:{node.lineno} {node.name} has {length} lines")
    assert too_long == []


def test_nothing_is_packed_by_hand_to_seem_short(texts):
    """Kernels may use `fmt: skip`: their arguments are a table, with a group on each line."""
    packed = [each for each, text in texts.items() if each.parent.name != "kernels" and "# fmt: skip" in text]
    assert packed == []


def test_a_module_says_what_it_is_and_does_not_begin_with_a_question_word(trees):
    docstrings = {source: ast.get_docstring(tree) or "" for source, tree in trees.items()}
    assert [source for source, docstring in docstrings.items() if not docstring] == [], "without a docstring"
    question = re.compile(r"(What|Which|How|Whether|Who|Whose|When|Where|Why)\b")
    assert {source: each.splitlines()[0] for source, each in docstrings.items() if question.match(each)} == {}


def test_no_docstring_begins_in_the_middle_of_a_sentence(trees):
    """A docstring of an attribute, too, can be understood without the name before it."""
    middle = re.compile(
        r"(Of|By|As|For|From|With|Without|In|At|On|To|Up|After|Before|Until|Since|While|Where|When|If|So|Not|Also|Else"
        r"|Only|And|But|Its|Their|Those|These|That)\b"
    )
    found = {
        f"{source}:{each.lineno}: {each.value.value.strip().splitlines()[0]}"
        for source, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for each in node.body
        if isinstance(each, ast.Expr)
        and isinstance(each.value, ast.Constant)
        and isinstance(each.value.value, str)
        and middle.match(each.value.value.strip())
    }
    assert found == set()


def test_every_member_builds_with_the_same_backend():
    assert len({str(project(package)["build-system"]) for package in MEMBERS}) == 1


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_siblings_are_required_by_range(package):
    for requirement in project(package)["project"]["dependencies"]:
        if requirement.startswith("hbserve-"):
            assert re.fullmatch(r"hbserve-[a-z]+(\[[a-z]+\])?>=\d+\.\d+,<\d+\.\d+", requirement)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_is_whole(package):
    for name in ["README.md", "CHANGELOG.md", "LICENSE"]:
        assert (package / name).read_text().strip()
    (module,) = (package / "src").iterdir()
    assert (module / "py.typed").exists()
    assert (package / "tests" / "test_readme.py").exists(), "its README's example must run as a test"


def columns(line: str) -> int:
    """Return the width of a line in a terminal, as ruff counts it: Chinese characters take two columns."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_documents_are_no_wider_than_code(document):
    """This includes tables and code in documents: a row that cannot be shorter must become an entry of a list."""
    for number, line in enumerate(document.read_text().splitlines(), 1):
        assert columns(line) <= MOST_COLUMNS, f"{document}:{number}: {columns(line)} columns"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_between_documents_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_what_the_house_rules_point_at_is_there():
    named = re.findall(r"`([\w./-]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    tests = "\n".join(path.read_text() for path in [*ROOT.glob("packages/*/tests/*.py"), *ROOT.glob("tests/*.py")])
    places = [ROOT, *(package / "src" for package in PACKAGES)]
    for name in named:
        if name.startswith("test_"):
            assert f"def {name}(" in tests, name
        elif "/" in name:
            assert any((place / name).exists() for place in places), name


def test_the_layers_that_are_drawn_are_those_that_are_checked():
    drawn = " ".join((ROOT / "docs/architecture.md").read_text().split())
    contracts = project(ROOT)["tool"]["importlinter"]["contracts"]
    inside = [contract for contract in contracts if "containers" in contract]
    assert len(inside) == 4
    for contract in inside:
        assert f"inside {contract['containers'][0]}: {' > '.join(contract['layers'])}" in drawn


CHINESE = sorted(path for path in DOCUMENTS if path.name.endswith(".zh-CN.md"))


@pytest.mark.parametrize("chinese", CHINESE, ids=lambda path: path.name)
def test_a_page_in_chinese_has_what_the_english_one_has(chinese):
    english = chinese.with_name(chinese.name.replace(".zh-CN", ""))
    assert f"[中文]({chinese.name})" in english.read_text()
    assert f"[English]({english.name})" in chinese.read_text()
    assert in_any_language(chinese) == in_any_language(english)


def in_any_language(page: Path) -> dict[str, object]:
    """Return the parts of a page that must be the same in each language, with links as the Chinese page has them."""
    text = page.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    links = re.findall(r"\[([^]]*)\]\(([^)\s]+)\)", prose)
    figures = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*", re.ASCII)
    plain = re.sub(r"`[^`]+`|\]\([^)]*\)", "", prose)
    return {
        "headings": re.findall(r"^#+(?= )", prose, re.M),
        "items of lists": len(re.findall(r"^(?:- |\d\. )", prose, re.M)),
        "code blocks, comments aside": [
            (language, re.sub(r"#.*", "", block).split())
            for language, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
        ],
        "names": {" ".join(name.split()) for name in re.findall(r"`([^`]+)`", prose)},
        "links": sorted(
            target if page in CHINESE else in_chinese(page, target)
            for name, target in links
            if name not in ("中文", "English")
        ),
        "figures": sorted(figures.findall(plain)),
        "figures of each row": [figures.findall(row) for row in plain.splitlines() if row.startswith("|")],
    }


def in_chinese(page: Path, target: str) -> str:
    """Return the target of the same link on the Chinese page: another Chinese page, if there is one."""
    path, hash_, section = target.partition("#")
    translated = f"{path.removesuffix('.md')}.zh-CN.md"
    return (translated if (page.parent / translated).is_file() else path) + hash_ + section


def test_the_site_has_every_page():
    def pages(navigation) -> list[str]:
        if isinstance(navigation, str):
            return [navigation]
        return [page for each in navigation for page in pages(each.values() if isinstance(each, dict) else each)]

    there = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(named) == sorted([*there, "index.md", "zh/index.md"])


def test_nothing_loses_a_cancellation_in_wait_for(texts):
    losing = [source for source, text in texts.items() if "asyncio.wait_for(" in text]
    assert losing == [], "use asyncio.timeout; see docs/rationale.md"


def test_a_home_that_there_is_not_is_told_by_whoever_opens_the_path(texts):
    raising = [source for source, text in texts.items() if ".expanduser()" in text]
    assert raising == [], "it raises without a path: use os.path.expanduser, as shells do"


def test_every_process_of_ours_logs_without_waiting_for_whoever_reads(texts):
    ours = [source for source, text in texts.items() if "src" in source.parts and "logging.basicConfig(" in text]
    assert [source.name for source in ours] == ["stderr_log.py"], "use hbserve_rpc.stderr_log"


def test_tests_of_ctrl_c_work_also_where_pytest_was_started_with_sigint_ignored():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import conftest; "
        "raise SystemExit(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_every_process_that_a_test_waits_for_has_a_time_of_its_own():
    """So a process that hangs fails by itself, with its command and its output."""
    files = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("packages/*/tests/**/*.py"), ROOT / "conftest.py"]
    unbounded = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in RUNS_A_PROCESS
        and not {"timeout", None} & {each.arg for each in node.keywords}
    ]
    assert unbounded == []


def test_every_failure_that_is_known_elsewhere_has_a_test_that_cites_it():
    sources = {
        node.name: "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
        for path in [*ROOT.glob("packages/*/tests/test_*.py"), *ROOT.glob("tests/test_*.py")]
        for text in [path.read_text()]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    entries = known_failures()
    assert len(entries) > 60
    for published, shown_by in entries:
        tests = re.findall(r"`(test_\w+)`", shown_by)
        assert tests, f"{published}: no test"
        for test in tests:
            assert test in sources, f"{published}: there is no test {test}"
        for number in re.findall(r"#\d+", published):
            assert any(number in sources[test] for test in tests), f"{published}: no test cites {number}"


def test_every_failure_that_a_test_cites_is_on_the_page_of_known_failures():
    page = (ROOT / "docs/known-failures.md").read_text()
    known = set(re.findall(r"#\d+", page))
    cited = {
        (path.name, number)
        for path in [*ROOT.glob("packages/*/tests/*.py"), *ROOT.glob("tests/*.py")]
        for number in re.findall(r"[\w,] (#\d+)", path.read_text())
    }
    assert len(cited) > 150
    assert {each for each in cited if each[1] not in known} == set()


def known_failures() -> list[tuple[str, str]]:
    """Return the issues and the tests of each entry of docs/known-failures.md, without the last section, whose entries
    need no tests."""
    _, sections = (ROOT / "docs/known-failures.md").read_text().split("\n## ", 1)  # what is before it are contents
    answered, _ = sections.split("\n## What does not apply")
    entries = []
    for entry in re.findall(r"^- (.*?)(?=^\S|\Z)", answered, re.M | re.S):
        there, seen_in, here, shown_by = (" ".join(part.split()) for part in entry.split("\n  - "))
        assert "#" not in there, f"{there}: its issues belong under `seen in`"
        assert re.match(r"seen in: .*#\d+", seen_in), f"{there}: names no issue"
        assert here.startswith("HBServe: "), there
        assert shown_by.startswith("shown by: "), there
        entries.append((seen_in.removeprefix("seen in: "), shown_by))
    issues = re.findall(r"#\d+", answered)
    assert issues == [each for published, _ in entries for each in re.findall(r"#\d+", published)], "not in an entry"
    return entries
