"""What the package promises by name is there, and what is behind a name says so."""

import subprocess
import sys

import hbserve_core


def test_all_is_sorted_without_repetition_and_every_name_is_there():
    assert hbserve_core.__all__ == sorted(set(hbserve_core.__all__))
    for name in hbserve_core.__all__:
        assert getattr(hbserve_core, name).__doc__ or issubclass(getattr(hbserve_core, name), Exception), name


def test_every_public_name_of_the_package_is_promised():
    public = {
        name for name, value in vars(hbserve_core).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("hbserve_core.")
    }  # fmt: skip
    assert public == set(hbserve_core.__all__)


def test_every_error_is_one_of_the_package_and_of_a_kind_that_python_knows():
    errors = [getattr(hbserve_core, name) for name in hbserve_core.__all__]
    for error in errors:
        if isinstance(error, type) and issubclass(error, Exception) and error is not hbserve_core.HBServeCoreError:
            assert issubclass(error, hbserve_core.HBServeCoreError)
            assert error.__mro__[2] in (FileNotFoundError, ValueError, MemoryError, RuntimeError), error


def test_no_library_that_only_tests_or_clients_need_is_imported():
    code = "import sys, hbserve_core; print(*({'transformers', 'hbserve', 'hbserve_scheduler'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == []
