"""Names of backends: what there is, what is missing, and what cures it."""

import asyncio
import builtins
import subprocess
import sys

import pytest

import hbserve_kv
from hbserve_kv import BackendUnavailable, KVTransferBase, KVTransferConfig, bench
from hbserve_kv.transports.registry import find_custom, make_transports


def test_an_unknown_backend_lists_those_that_there_are():
    with pytest.raises(BackendUnavailable, match=r"'nixl': there are \['auto', 'ipc', 'mooncake', 'nccl'\], or"):
        make_transports(KVTransferConfig(backend="nixl"), 0)


@pytest.mark.parametrize("name", ["nowhere:Class", "json:Missing"])
def test_a_custom_backend_that_cannot_be_imported_is_named(name):
    with pytest.raises(BackendUnavailable, match=name):
        find_custom(name)


def test_a_custom_backend_is_found_in_the_current_folder_and_nothing_else_there_is_taken_for_a_library(
    tmp_path, monkeypatch
):
    (tmp_path / "backend_of_this_folder.py").write_text("from hbserve_kv import KVTransferBase as Mine")
    (tmp_path / "json.py").write_text("raise SystemExit('json of the current folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [each for each in sys.path if each])
    assert find_custom("backend_of_this_folder:Mine") is KVTransferBase
    assert sys.path[-1] == str(tmp_path)
    code = "from hbserve_kv.transports.registry import find_custom; find_custom('backend_of_this_folder:Mine')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_entry_point_whose_module_is_missing_is_named(tmp_path, monkeypatch):
    about = tmp_path / "users_own-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: users-own\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[hbserve_kv.backends]\nusers-own = nowhere_at_all:Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailable, match=r"kv_transfer\.backend='users-own': No module named 'nowhere_at_all'"):
        find_custom("users-own")


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


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--backend", "nixl"], 1, "kv_transfer.backend='nixl': there are"),
        (["--rounds", "0"], 2, "argument --rounds: 0: expected 1 or more"),
        (["--block-bytes", "0"], 2, "argument --block-bytes: 0: expected 1 or more"),
        (["--layers", "7"], 2, "--layers=7: expected so many that --block-bytes is divisible by twice of them"),
    ],
)
def test_what_the_measurement_of_a_backend_cannot_do_is_one_line(arguments, status, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--sizes", "1", *arguments])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == status
    assert text in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
async def test_what_a_receiver_waits_for_is_not_that_the_transfer_was_opened(device, monkeypatch):
    async with bench.sender(bench.Settings("ipc", device, num_blocks=8, block_bytes=1 << 16)) as there:
        await there.hand_over([1], [1])
        open_send = there.manager.open_send

        async def open_slowly(*arguments):
            await asyncio.sleep(0.5)
            return await open_send(*arguments)

        monkeypatch.setattr(there.manager, "open_send", open_slowly)
        for transfer in (there.transfer, there.hand_over):
            found = await transfer([3, 1, 5], [0, 7, 2])
            assert found.num_bytes == 3 << 16
            assert 0 < found.moving_s < found.behind_s < found.time_s - 0.25


def test_the_measurement_of_a_backend_says_that_it_needs_torch():
    code = "import sys; sys.modules['torch'] = None; from hbserve_kv import bench; sys.argv = ['bench']; bench.main()"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    told = "python -m hbserve_kv.bench moves tensors, and needs torch: pip install 'hbserve-kv[torch]'\n"
    assert (done.returncode, done.stderr) == (1, told)
