"""Deployments that strangers could reach: said, or refused, unless they have keys or are meant to be so."""

import pytest

from hbserve_rpc import KeysError, make_keys
from hbserve_rpc.keys import save_keys
from hbserve_scheduler import ConfigError, convert, security
from hbserve_scheduler.security import deployment_keys, require_keys

LOCAL = {"instance_type": "hybrid", "instance_id": "h", "host": "::1"}
FAR = LOCAL | {"host": "10.0.0.5"}


@pytest.mark.parametrize(
    ("content", "launched", "named"),
    [
        ({}, False, ""),
        ({"scheduler": {"host": "localhost"}}, False, ""),
        ({"scheduler": {"host": "127.8.9.1"}}, False, ""),
        ({"scheduler": {"host": "0.0.0.0"}}, False, "scheduler.host='0.0.0.0'"),
        ({"scheduler": {"host": "::"}}, True, "scheduler.host='::'"),
        ({"scheduler": {"host": "node-1"}}, True, "scheduler.host='node-1'"),
        ({"gpu_instances": [FAR]}, False, r"gpu_instances\[0\].host='10.0.0.5'"),
        ({"gpu_instances": [FAR]}, True, ""),  # they have keys of their own then
        ({"kv_transfer": {"ip": "10.0.0.5"}}, False, "kv_transfer.ip='10.0.0.5'"),
        ({"scheduler": {"host": "0.0.0.0"}, "security": {"allow_insecure": True}}, False, ""),
        ({"scheduler": {"host": "0.0.0.0"}, "security": {"keys": "folder"}}, False, ""),
    ],
)
def test_an_address_that_strangers_reach_is_named_and_from_version_0_2_on_refused(
    caplog, monkeypatch, content, launched, named
):
    config = convert({"gpu_instances": [LOCAL]} | content)
    monkeypatch.setattr(security, "version", lambda name: "0.1.7")
    require_keys(config, launched=launched)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(named)
    for version in ("0.2.0", "1.0"):
        monkeypatch.setattr(security, "version", lambda name, version=version: version)
        if named:
            with pytest.raises(ConfigError, match=f"^{named}: without keys .* `hbserve keys FOLDER` makes keys"):
                require_keys(config, launched=launched)
        else:
            require_keys(config, launched=launched)


def test_keys_of_a_deployment_are_those_of_the_folder_that_it_names(tmp_path):
    keys = make_keys()
    save_keys(keys, tmp_path)
    with_keys = convert({"gpu_instances": [LOCAL], "security": {"keys": str(tmp_path)}})
    assert deployment_keys(with_keys, "scheduler") == keys["scheduler"]
    assert deployment_keys(convert({"gpu_instances": [LOCAL]}), "scheduler") is None
    (tmp_path / "scheduler.key").unlink()
    with pytest.raises(KeysError, match=r"scheduler.key: there is no such file"):
        deployment_keys(with_keys, "scheduler")
