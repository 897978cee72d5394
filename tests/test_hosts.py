"""Prefill, decode and scheduler each on a host of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

HOSTS = {"scheduler": "10.77.0.1", "prefill-0": "10.77.0.2", "decode-0": "10.77.0.3"}
START_DEADLINE_S = 180


def write_config(folder: Path, model: Path, backend: str) -> Path:
    instances = [
        {
            "instance_id": name,
            "instance_type": name.split("-")[0],
            "gpu_id": 0,
            "host": HOSTS[name],
            "port": 5600,
            "kv_rank": rank,
        }
        for rank, name in enumerate(["prefill-0", "decode-0"])
    ]
    config = {
        "model": {"path": str(model)},
        "kv_transfer": {"backend": backend, "port": 5700},
        "gpu_instances": instances,
        "engine": {"num_blocks": 64, "num_threads": 1},
        "scheduler": {"host": HOSTS["scheduler"], "port": 5550},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.netns
@pytest.mark.parametrize("backend", ["nccl", "mooncake"])
def test_prefill_decode_and_scheduler_on_three_hosts_answer_together(make_network, backend, small_model, tmp_path):
    if backend == "mooncake":
        pytest.importorskip(
            "mooncake.engine", reason="Mooncake or its system libraries are missing", exc_type=ImportError
        )
    network = make_network(HOSTS)
    config = write_config(tmp_path, small_model("qwen3"), backend)

    def hbserve(host: str, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", network.namespace(host), sys.executable, "-m", "hbserve", *arguments]

    log = (tmp_path / "log").open("w+")
    commands = [
        hbserve("decode-0", "instance", "--config", str(config), "--instance-id", "decode-0"),
        hbserve("scheduler", "scheduler", "--config", str(config)),
        hbserve("prefill-0", "instance", "--config", str(config), "--instance-id", "prefill-0"),
    ]
    processes = [subprocess.Popen(command, stdout=log, stderr=log) for command in commands]
    try:
        generate = hbserve("scheduler", "generate", "w1 w2 w3 " * 20, "--connect", f"{HOSTS['scheduler']}:5550")
        answer = subprocess.run(
            [*generate, "--max-tokens", "8", "--temperature", "0"],
            capture_output=True,
            text=True,
            timeout=START_DEADLINE_S,
        )
        log.seek(0)
        assert answer.returncode == 0, f"{answer.stderr}\n{log.read()}"
        assert "TTFT" in answer.stdout + answer.stderr
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            assert process.wait(timeout=60) == 0
        log.close()
