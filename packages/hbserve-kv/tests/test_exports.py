"""What the package promises by name is there, and torch comes only with what needs it."""

import subprocess
import sys

import pytest

import hbserve_kv


def test_all_is_sorted_without_repetition_and_every_name_is_there():
    assert hbserve_kv.__all__ == sorted(set(hbserve_kv.__all__)) == dir(hbserve_kv)
    for name in hbserve_kv.__all__:
        assert getattr(hbserve_kv, name).__module__.startswith("hbserve_kv."), name


def test_a_name_that_is_not_there_is_told_like_any_other_modules():
    with pytest.raises(ImportError, match="cannot import name 'KVTransferManger' from 'hbserve_kv'"):
        from hbserve_kv import KVTransferManger  # noqa: F401


def test_who_only_configures_transfers_does_not_import_torch():
    code = "import sys; from hbserve_kv import KVTransferConfig; KVTransferConfig(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
