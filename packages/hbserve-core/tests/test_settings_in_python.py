"""Configurations that are made in Python take what a file may have, and nothing else."""

from typing import Any

import msgspec
import pytest

from hbserve_core import InstanceConfig, InvalidInstanceConfig
from hbserve_kv import KVTransferConfig
from hbserve_kv.config import KVTransferBackend

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"timeout_s": 0}, "timeout_s=0: expected at least 0.1"),
        ({"timeout_s": NAN}, "timeout_s=nan: expected at least 0.1"),
        ({"timeout_s": INFINITY}, "timeout_s=inf: expected 0.1 to "),
        ({"timeout_s": True}, "timeout_s=True: expected `float`, got `bool`"),
        ({"timeout_s": "30"}, "timeout_s='30': expected `float`, got `str`"),
        ({"expiry_s": -1}, "expiry_s=-1: expected at least 0"),
        ({"expiry_s": NAN}, "expiry_s=nan: expected at least 0"),
        ({"buffer_size": 1.5}, "buffer_size=1.5: expected `int`, got `float`"),
        ({"buffer_size": True}, "buffer_size=True: expected `int`, got `bool`"),
        ({"port": 65536}, "port=65536: expected 0 to 65535"),
        ({"checksum": "no"}, "checksum='no': expected `bool`, got `str`"),
        ({"backend": None}, "backend=None: expected `str`, got `null`"),
    ],
)
def test_kv_transfers_are_configured_in_python_as_in_a_file(given, message):
    with pytest.raises(ValueError, match=message):
        KVTransferConfig(**given)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(given, KVTransferConfig)


def test_a_backend_may_be_one_of_the_enumeration():
    assert KVTransferConfig(backend=KVTransferBackend.IPC, timeout_s=5).backend == "ipc"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_blocks": True}, "num_blocks=True: expected `int . null`, got `bool`"),
        ({"block_size": 16.0}, "block_size=16.0: expected `int`, got `float`"),
        ({"prefix_caching": "no"}, "prefix_caching='no': expected `bool`, got `str`"),
        ({"gpu_memory_utilization": NAN}, "gpu_memory_utilization=nan: expected 0.01 to 1"),
        ({"role": "other"}, "role='other': expected one of prefill, decode, hybrid"),
        ({"max_model_len": "8"}, "max_model_len='8': expected"),
        ({"kv_transfer": {"backend": "ipc"}}, "kv_transfer=.* expected `KVTransferConfig`, got `dict`"),
    ],
)
def test_an_instance_is_configured_in_python_as_in_a_file(given, message):
    wrong: dict[str, Any] = {"model_path": "x"} | given
    with pytest.raises(InvalidInstanceConfig, match=message):
        InstanceConfig(**wrong)
