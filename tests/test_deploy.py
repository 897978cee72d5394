"""deploy/: what Kubernetes' API would refuse, and whether names, ports, probes and commands are those of the code."""

import configparser
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hbserve_commands import parsed

from hbserve_scheduler import DeploymentConfig, convert
from hbserve_scheduler.figures import BOUNDS

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
K8S_VERSION = "1.34"
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


def test_selectors_find_the_pods_that_they_are_for():
    pods = [each["metadata"]["labels"] for one in manifests("k8s/plain") for each in templates(one)]
    for manifest in manifests("k8s/plain"):
        selector = manifest.get("spec", {}).get("selector") or manifest.get("spec", {}).get("podSelector")
        wanted = (selector or {}).get("matchLabels", selector)
        if wanted:
            assert [each for each in pods if wanted.items() <= each.items()], manifest["metadata"]["name"]


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
