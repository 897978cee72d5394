"""`hbserve keys`, and the keys of what one process starts."""

import pytest
import zmq

from hbserve.commands.keys import Rotation, write_keys
from hbserve.pd_disagg import PdDisaggConfig
from hbserve.processes.launcher import instance_settings, launch_keys
from hbserve_rpc import KeysError, load_keys
from hbserve_rpc.keys import PARTIES


def public_keys(folder) -> dict:
    return load_keys(folder, "client").public_keys


def test_keys_are_made_once_and_changed_in_three_steps(tmp_path, capsys):
    folder = tmp_path / "keys"
    write_keys(folder, None)
    said = capsys.readouterr()
    assert said.out.split() == [str(folder / f"{party}.key") for party in PARTIES]
    assert f"`security: {{keys: {folder}}}` in the deployment's file" in said.err
    first = public_keys(folder)
    with pytest.raises(KeysError, match="has keys of client, scheduler, instance already"):
        write_keys(folder, None)
    for step, count in ((Rotation.ADD, 2), (Rotation.SWITCH, 2), (Rotation.DROP, 1)):
        write_keys(folder, step)
        assert [len(each) for each in public_keys(folder).values()] == [count] * 3
    assert not set(public_keys(folder)["client"]) & set(first["client"])
    with pytest.raises(KeysError, match="there are no new keys"):
        write_keys(folder, Rotation.SWITCH)
    with pytest.raises(KeysError, match=r"`hbserve keys .*nowhere` makes it"):
        write_keys(tmp_path / "nowhere", Rotation.ADD)


def test_what_one_process_starts_has_keys_that_nobody_else_has(tmp_path, monkeypatch):
    config = PdDisaggConfig("/model").to_deployment()
    one, other = launch_keys(config), launch_keys(config)
    assert one["instance"].public_keys == one["scheduler"].public_keys != other["instance"].public_keys
    instance = config.gpu_instances[0]
    settings = instance_settings(config, instance, tmp_path, log_level="INFO", keys=one["instance"])
    assert settings["keys"]["secret_key"] == one["instance"].secret_key
    write_keys(tmp_path, None)
    keyed = PdDisaggConfig("/model", keys=str(tmp_path)).to_deployment()
    assert launch_keys(keyed)["instance"] == load_keys(tmp_path, "instance")
    monkeypatch.setattr(zmq, "has", lambda what: False)
    assert launch_keys(config) == {}, "nobody has asked for keys"
    with pytest.raises(KeysError, match="keys need CURVE"):
        launch_keys(keyed)
