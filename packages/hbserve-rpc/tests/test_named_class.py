"""Classes that a configuration names: where they are looked for."""

import sys

import pytest

from hbserve_rpc.named_class import find_class

GROUP = "hbserve_rpc.test_named_class"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, which Python does not look into by itself."""
    (tmp_path / "users_own.py").write_text("class Mine: ...")
    (tmp_path / "json.py").write_text("raise SystemExit('json of the current folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    monkeypatch.delitem(sys.modules, "users_own", raising=False)
    return tmp_path


def test_a_module_of_the_current_folder_is_found_behind_all_libraries(folder):
    assert find_class(GROUP, "users_own:Mine").__name__ == "Mine"
    assert sys.path[-1] == str(folder)
    assert find_class(GROUP, "json:JSONDecoder").__module__ == "json.decoder"


def test_an_entry_point_is_found_by_its_name(folder):
    about = folder / "users_own-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: users-own\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\nmine = users_own:Mine\nbroken = nowhere_at_all:Mine\n")
    sys.path.append(str(folder))
    assert find_class(GROUP, "mine").__name__ == "Mine"
    with pytest.raises(ImportError, match="nowhere_at_all"):
        find_class(GROUP, "broken")


@pytest.mark.parametrize(("name", "error"), [("nowhere_at_all:X", ImportError), ("users_own:Yours", AttributeError)])
def test_what_is_not_there_is_an_error(folder, name, error):
    with pytest.raises(error):
        find_class(GROUP, name)
