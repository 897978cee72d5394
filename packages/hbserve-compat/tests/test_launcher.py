"""What a launcher tells each instance: its share of the host, and its own addresses."""

import os
from pathlib import Path
from typing import Any

import pytest

from hbserve.launcher import instance_settings
from hbserve_scheduler import convert


def settings(instances: list[dict[str, Any]], **sections: Any) -> list[dict[str, Any]]:
    """Of each instance; `instances` need only what differs from one prefill and then decode instances."""
    entries = [
        {"instance_id": f"i{rank}", "instance_type": "decode" if rank else "prefill", "kv_rank": rank} | each
        for rank, each in enumerate(instances)
    ]
    config = convert({"gpu_instances": entries, **sections})
    return [instance_settings(config, each, Path("/model"), log_level="INFO") for each in config.gpu_instances]


@pytest.mark.parametrize(("num_cores", "num_threads"), [(1, 1), (2, 1), (7, 3), (64, 32)])
def test_instances_of_one_host_share_its_cores_and_others_do_not_count(monkeypatch, num_cores, num_threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)))
    here, also_here, elsewhere = settings([{}, {}, {"host": "10.0.0.2"}])
    assert here["num_threads"] == also_here["num_threads"] == num_threads
    assert elsewhere["num_threads"] == num_cores


def test_a_number_of_threads_that_is_configured_is_taken_as_it_is():
    assert [each["num_threads"] for each in settings([{}, {}], engine={"num_threads": 5})] == [5, 5]


def test_each_instance_has_a_kv_port_of_its_own_on_its_own_host_unless_kv_ip_says_otherwise():
    # Known elsewhere: vLLM #27083, dynamo #2706.
    instances = [{"host": "10.0.0.1"}, {"host": "10.0.0.2"}]
    own = [each["kv_transfer"] for each in settings(instances, kv_transfer={"port": 7000})]
    assert [(each["host"], each["port"]) for each in own] == [("10.0.0.1", 7000), ("10.0.0.2", 7001)]
    given = [each["kv_transfer"] for each in settings(instances, kv_transfer={"ip": "10.1.0.1"})]
    assert [(each["host"], each["port"]) for each in given] == [("10.1.0.1", 0), ("10.1.0.1", 0)]
