"""Names of backends: what there is, what is missing, and what cures it."""

import builtins

import pytest

import hbserve_kv
from hbserve_kv import BackendUnavailable, KVTransferConfig
from hbserve_kv.transports.registry import find_custom, make_transports


def test_an_unknown_backend_lists_those_that_there_are():
    with pytest.raises(BackendUnavailable, match=r"'nixl': there are \['auto', 'ipc', 'mooncake', 'nccl'\], or"):
        make_transports(KVTransferConfig(backend="nixl"), 0)


@pytest.mark.parametrize("name", ["nowhere:Class", "json:Missing"])
def test_a_custom_backend_that_cannot_be_imported_is_named(name):
    with pytest.raises(BackendUnavailable, match=name):
        find_custom(name)


def test_a_class_that_is_no_backend_is_refused():
    with pytest.raises(BackendUnavailable, match="expected a subclass of KVTransferBase"):
        find_custom("json:JSONDecoder")


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (ModuleNotFoundError("No module named 'mooncake'"), r"pip install 'hbserve-kv\[mooncake-cpu\]'"),
        (ImportError("libibverbs.so.1: cannot open"), "apt-get install libibverbs1 libnuma1 libcurl4"),
    ],
)
def test_a_missing_mooncake_says_what_cures_it(monkeypatch, error, cure):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "mooncake.engine":
            raise error
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendUnavailable, match=cure):
        make_transports(KVTransferConfig(backend="mooncake"), 0)


def test_mooncakes_own_file_is_read_and_what_is_not_used_is_named(tmp_path, monkeypatch, caplog):
    from hbserve_kv.transports.mooncake.setup import MooncakeConfig, load_config

    path = tmp_path / "mooncake.json"
    monkeypatch.setenv("MOONCAKE_CONFIG_PATH", str(path))
    path.write_text('{"local_hostname": "10.0.0.1", "protocol": "rdma", "master_server_address": "x"}')
    assert load_config() == MooncakeConfig(local_hostname="10.0.0.1", protocol="rdma")
    assert "master_server_address" in caplog.text
    path.write_text('{"protocol": 3}')
    with pytest.raises(BackendUnavailable, match=str(path)):
        load_config()
    path.unlink()
    with pytest.raises(BackendUnavailable, match=str(path)):
        load_config()


def test_every_exported_name_is_there():
    assert all(hasattr(hbserve_kv, name) for name in hbserve_kv.__all__)
