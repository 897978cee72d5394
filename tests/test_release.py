"""Releases: .ci/release.py changes links and URLs, and refuses a version that the changelog does not name."""

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOME = "https://example.org/us/hbserve"


@pytest.fixture(scope="module")
def release() -> Any:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci/release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_relative_links_of_a_readme_lead_to_the_repository_and_others_stay(release):
    text = "[a](../../README.md) [b](CHANGELOG.md#unreleased) [c](https://pypi.org/x) [d](#here)"
    assert release.absolute_links(text, "packages/hbserve-kv", HOME) == (
        f"[a]({HOME}/blob/main/README.md) [b]({HOME}/blob/main/packages/hbserve-kv/CHANGELOG.md#unreleased) "
        "[c](https://pypi.org/x) [d](#here)"
    )
    with pytest.raises(ValueError, match=r"there is no nowhere\.md"):
        release.absolute_links("[a](nowhere.md)", "packages/hbserve-kv", HOME)


def test_a_released_package_says_where_the_project_is(release, tmp_path):
    copy = release.prepare("hbserve-compat", HOME, tmp_path)
    project = tomllib.loads((copy / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Changelog"] == f"{HOME}/blob/main/packages/hbserve-compat/CHANGELOG.md"
    assert f"]({HOME}/blob/main/README.md)" in (copy / "README.md").read_text()
    assert (copy / "src/hbserve/py.typed").exists()


def test_a_version_is_released_when_the_first_section_of_its_changelog_is_its_own(release):
    assert not release.released("# Changelog\n\n## Unreleased\n\n- x\n", "0.1.0")
    assert not release.released("# Changelog\n\n## 0.2.0 (2026-12-01)\n\n## 0.1.0\n", "0.1.0")
    assert release.released("# Changelog\n\n## 0.1.0 (2026-12-01)\n\n- x\n", "0.1.0")


def test_every_published_distribution_is_released_and_says_on_which_pythons_it_was_tried(release):
    named = {}
    for path in ROOT.glob("packages/*/pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        if "Private :: Do Not Upload" not in project["classifiers"]:
            named[project["name"]] = {
                each[len("Programming Language :: Python :: ") :] for each in project["classifiers"]
            }
    assert named.keys() == set(release.DISTRIBUTIONS)
    versions = {name: {each for each in found if each.startswith("3.")} for name, found in named.items()}
    assert all(found == set(release.TESTED) for found in versions.values())


def test_the_extra_of_the_demo_model_brings_nothing_that_is_compiled():
    project = tomllib.loads((ROOT / "packages/hbserve-compat/pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["demo"] == ["gguf>=0.17", "accelerate>=1.1"]
