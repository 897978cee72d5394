"""deploy/: what Kubernetes' API would refuse, and whether names, ports, probes and commands are those of the code."""

import configparser
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hbserve_commands import parsed

from hbserve.server.app import ROUTES
from hbserve_scheduler import DeploymentConfig, convert
from hbserve_scheduler.figures import BOUNDS

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
K8S_VERSION = "1.34"
START_DEADLINE_S = 180
HEALTH_PATHS = {"/health", "/ready", "/metrics"}
"""Of hbserve_rpc.health_port."""
OF_OTHERS = {
    "monitoring.coreos.com/v1": "PodMonitor",
    "keda.sh/v1alpha1": "ScaledObject",
    "disaggregatedset.x-k8s.io/v1": "DisaggregatedSet",
    "ray.io/v1": "RayJob",
}
"""Kinds whose schemas are not Kubernetes' own: only the pods in them are checked."""


def manifests(folder: str) -> list[dict[str, Any]]:
    files = sorted((DEPLOY / folder).glob("*.yaml"))
    return [each for file in files for each in yaml.safe_load_all(file.read_text())]


ALL = [each for folder in ("k8s/plain", "k8s/keda", "k8s/disaggregatedset", "kuberay") for each in manifests(folder)]


def find(kind: str, name: str, folder: str = "k8s/plain") -> dict[str, Any]:
    (found,) = [each for each in manifests(folder) if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def templates(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod template, however deep."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}):
            yield value
        for each in value.values():
            yield from templates(each)
    elif isinstance(value, list):
        for each in value:
            yield from templates(each)


def container(template: dict[str, Any]) -> dict[str, Any]:
    (found,) = template["spec"]["containers"]
    return dict(found)


def config(name: str = "hbserve", folder: str = "k8s/plain") -> DeploymentConfig:
    return convert(yaml.safe_load(find("ConfigMap", name, folder)["data"]["deployment.yaml"]))


def ports(template: dict[str, Any]) -> dict[str, int]:
    return {each["name"]: each["containerPort"] for each in container(template)["ports"]}


@pytest.mark.parametrize("manifest", ALL, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_a_manifest_is_what_the_api_takes(manifest):
    if manifest["apiVersion"] in OF_OTHERS:
        assert OF_OTHERS[manifest["apiVersion"]] == manifest["kind"]
    else:
        kubernetes_validate.validate(manifest, K8S_VERSION, strict=True)
    for template in templates(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"} | template.get("metadata", {})}
        kubernetes_validate.validate(pod | {"spec": template["spec"]}, K8S_VERSION, strict=True)


def test_a_field_that_there_is_not_would_be_noticed():
    wrong = find("Service", "hbserve")
    wrong["spec"]["portz"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, K8S_VERSION, strict=True)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_instances_ports_and_probes_are_those_of_its_command_and_of_the_file(role):
    template = find("StatefulSet", f"hbserve-{role}")["spec"]["template"]
    command, file = parsed(container(template)["args"]), config()
    service = find("Service", f"hbserve-{role}")["spec"]
    assert command["instance_type"] == role
    assert ports(template) == {
        "rpc": command["port"], "kv": file.kv_transfer.port, "health": file.engine_settings().health_port
    }  # fmt: skip
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert service["ports"] == [{"name": "rpc", "port": command["port"], "targetPort": "rpc"}]
    discovered = {each.discover for each in file.gpu_instances if each.instance_type == role}
    assert discovered == {f"dns:hbserve-{role}:{command['port']}"}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container(template)[probe]["httpGet"]
        assert (asked["port"], asked["path"] in HEALTH_PATHS) == ("health", True)


def test_the_servers_ports_and_probes_are_those_of_the_file_and_of_its_routes():
    template, file = find("Deployment", "hbserve")["spec"]["template"], config()
    assert ports(template) == {"http": file.server.port, "rpc": file.scheduler.port}
    service = find("Service", "hbserve")["spec"]["ports"]
    assert {each["name"]: each["port"] for each in service} == ports(template)
    paths = {route.path for route in ROUTES}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container(template)[probe]["httpGet"]["path"] in paths
    assert template["spec"]["terminationGracePeriodSeconds"] > file.server.drain_timeout_s
    assert parsed(container(template)["args"])["config"] == Path("/etc/hbserve/deployment.yaml")


def test_selectors_find_the_pods_that_they_are_for():
    pods = [each["metadata"]["labels"] for one in manifests("k8s/plain") for each in templates(one)]
    for manifest in manifests("k8s/plain"):
        selector = manifest.get("spec", {}).get("selector") or manifest.get("spec", {}).get("podSelector")
        wanted = (selector or {}).get("matchLabels", selector)
        if wanted:
            assert [each for each in pods if wanted.items() <= each.items()], manifest["metadata"]["name"]


def test_a_pod_is_drained_for_less_time_than_it_is_given():
    for role in ("prefill", "decode"):
        spec = find("StatefulSet", f"hbserve-{role}")["spec"]["template"]
        *_, script = container(spec)["lifecycle"]["preStop"]["exec"]["command"]
        command = parsed(shlex.split(script)[1:])
        assert command["within_s"] < spec["spec"]["terminationGracePeriodSeconds"]
        host, port = command["connect"].split(":")
        service = find("Service", host)["spec"]["ports"]
        assert int(port) in {each["port"] for each in service if each["name"] == "rpc"}


def test_the_pods_of_the_disaggregated_set_are_those_of_the_stateful_sets():
    roles = find("DisaggregatedSet", "hbserve", "k8s/disaggregatedset")["spec"]["roles"]
    assert [each["name"] for each in roles] == ["prefill", "decode"]
    for role in roles:
        plain = find("StatefulSet", f"hbserve-{role['name']}")["spec"]
        assert role["spec"]["leaderWorkerTemplate"]["workerTemplate"] == plain["template"]
        assert role["spec"]["replicas"] == plain["replicas"]
        service = f"hbserve-{role['name']}"
        assert find("Service", service, "k8s/disaggregatedset") == find("Service", service)


def test_what_is_scaled_is_there_by_metrics_that_there_are():
    for scaled in manifests("k8s/keda"):
        target = scaled["spec"]["scaleTargetRef"]
        replicas = find(target["kind"], target["name"])["spec"]["replicas"]
        assert scaled["spec"]["minReplicaCount"] <= replicas <= scaled["spec"]["maxReplicaCount"]
        (query,) = [each["metadata"]["query"] for each in scaled["spec"]["triggers"]]
        (metric,) = re.findall(r"hbserve:(\w+)_bucket", query)
        assert metric in BOUNDS


def test_ray_is_given_a_file_and_a_command_that_there_are():
    job = find("RayJob", "hbserve", "kuberay")["spec"]
    command = parsed(shlex.split(job["entrypoint"])[1:])
    assert (command["ray"], command["host"]) == ("auto", "0.0.0.0")
    assert config("hbserve-ray", "kuberay").engine_settings().device == "cuda"


def test_the_containers_of_compose_run_commands_that_there_are():
    compose = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())
    file = convert(yaml.safe_load((DEPLOY / "docker/deployment.yaml").read_text()))
    assert parsed(compose["services"]["server"]["command"])["config"] == Path("/etc/hbserve/deployment.yaml")
    assert compose["services"]["server"]["ports"] == [f"127.0.0.1:{file.server.port}:{file.server.port}"]
    for role in ("prefill", "decode"):
        (script,) = compose["services"][role]["command"]
        command = parsed(shlex.split(script.replace("$$(hostname -i)", "10.0.0.1"))[2:])
        assert command["instance_type"] == role
        assert f"dns:{role}:{command['port']}" in {each.discover for each in file.gpu_instances}
        assert f":{file.engine_settings().health_port}/health" in compose["services"][role]["healthcheck"]["test"][1]
    dockerfile = (DEPLOY / "docker/Dockerfile").read_text()
    found = dict(re.findall(r"^(ENTRYPOINT|CMD) (.*)$", dockerfile, re.MULTILINE))
    entry, arguments = (yaml.safe_load(found[word]) for word in ("ENTRYPOINT", "CMD"))
    assert entry == ["hbserve"]
    assert parsed(arguments)["host"] == "0.0.0.0"


@pytest.mark.parametrize("unit", sorted((DEPLOY / "systemd").iterdir()), ids=lambda path: path.name)
def test_a_unit_runs_a_command_that_there_is(unit):
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.read_string(unit.read_text())
    program, *arguments = found["Service"]["ExecStart"].split()
    if program.endswith("/hbserve-scheduler"):
        assert arguments == ["--config", "/etc/hbserve/deployment.yaml"]
    else:
        assert parsed(arguments)["config"] == Path("/etc/hbserve/deployment.yaml")
    if "ExecStartPre" in found["Service"]:
        assert parsed(found["Service"]["ExecStartPre"].split()[1:])


@pytest.mark.warm
def test_the_commands_of_the_pods_serve_as_plain_processes(small_model, tmp_path, free_ports):
    """As in a pod, but for the addresses: the name of each headless service is this host's."""
    prefill, decode, http, rpc = free_ports(4)
    text = find("ConfigMap", "hbserve")["data"]["deployment.yaml"]
    for before, after in {
        "/models/model": str(small_model("qwen3")), "0.0.0.0": "127.0.0.1", "5550": str(rpc), "8000": str(http),
        "5700": "0", "5680": "0", "hbserve-prefill:5600": f"localhost:{prefill}",
        "hbserve-decode:5600": f"localhost:{decode}",
    }.items():  # fmt: skip
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "deployment.yaml").write_text(text)

    def start(manifest: dict[str, Any], name: str, port: int) -> "subprocess.Popen[str]":
        (template,) = templates(manifest)
        known = {"$(POD_NAME)": name, "$(POD_IP)": "127.0.0.1", "/etc/hbserve": str(tmp_path), "5600": str(port)}
        arguments = [
            re.sub("|".join(map(re.escape, known)), lambda at: known[at[0]], each)
            for each in container(template)["args"]
        ]
        return subprocess.Popen([sys.executable, "-m", "hbserve", *arguments], stderr=subprocess.PIPE, text=True)

    processes = [
        start(find("StatefulSet", "hbserve-prefill"), "hbserve-prefill-0", prefill),
        start(find("StatefulSet", "hbserve-decode"), "hbserve-decode-0", decode),
        start(find("Deployment", "hbserve"), "hbserve-0", 0),
    ]
    try:
        wait_until_ready(f"http://127.0.0.1:{http}/health", processes)
        body = b'{"prompt": "hello", "max_tokens": 4, "ignore_eos": true}'
        request = urllib.request.Request(f"http://127.0.0.1:{http}/v1/completions", body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert b'"completion_tokens":4' in answer.read().replace(b" ", b"")
    finally:
        for process in processes:
            process.terminate()
        said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said


def wait_until_ready(url: str, processes: "list[subprocess.Popen[str]]") -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except OSError:
            assert time.monotonic() < deadline
            assert [process.poll() for process in processes] == [None] * len(processes)
            time.sleep(0.1)
