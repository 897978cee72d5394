"""deploy/: Kubernetes' API accepts the manifests, and their names, ports, probes and commands are those of the code."""

import configparser
import json
import re
import shlex
import subprocess
import sys
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
"""Paths that hbserve_rpc.health_port answers."""
COMPONENT = "app.kubernetes.io/component"
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
    """Yield every pod template of a manifest, however deep it is."""
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


def test_the_job_of_the_alerts_has_what_the_server_says_and_not_what_instances_say_of_themselves():
    """The names are the same: sums would count them twice, and an instance that the server cannot reach would seem to
    be up."""
    scraped = {}
    for each in [one for one in manifests("k8s/plain") if one["kind"] == "PodMonitor"]:
        selector = each["spec"]["selector"]
        (wanted,) = selector.get("matchExpressions", [{"values": [selector["matchLabels"].get(COMPONENT)]}])
        (endpoint,) = each["spec"]["podMetricsEndpoints"]
        scraped[f"namespace/{each['metadata']['name']}"] = (wanted["values"], endpoint["port"])
    assert scraped == {
        "namespace/hbserve": (["server"], "http"), "namespace/hbserve-instances": (["prefill", "decode"], "health")
    }  # fmt: skip
    (down,) = re.findall(r'up\{job=~"(.*?)"\}', (DEPLOY / "prometheus/rules.yml").read_text())
    assert [bool(re.fullmatch(down, job)) for job in ("hbserve", *scraped)] == [True, True, False]


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
        (trigger,) = [each["metadata"] for each in scaled["spec"]["triggers"]]
        (metric,) = re.findall(r"hbserve:(\w+)_bucket", trigger["query"])
        assert metric in BOUNDS
        # Never NaN, of which KEDA before 2.20 makes a number; and no figures are no reason to end instances.
        assert trigger["query"].endswith(f" > 0 or sum(rate(hbserve:{metric}_count[2m])) * 0")
        assert trigger["ignoreNullValues"] == "false"


RAY_FIELDS = {
    "job": {"entrypoint", "shutdownAfterJobFinishes", "rayClusterSpec"},
    "cluster": {"enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"},
    "head": {"rayStartParams", "template"},
    "workers": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}
"""Fields of KubeRay's API v1 that we use, as its types have them."""


def test_ray_is_given_a_file_and_a_command_that_there_are():
    job = find("RayJob", "hbserve", "kuberay")["spec"]
    cluster = job["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    parts = {"job": job, "cluster": cluster, "head": cluster["headGroupSpec"], "workers": workers}
    assert {name: set(part) for name, part in parts.items()} == RAY_FIELDS
    head = container(cluster["headGroupSpec"]["template"])
    assert "readinessProbe" not in head, "the job, which has the server, is submitted when the head is ready"
    starts = [*cluster["headGroupSpec"]["rayStartParams"].values(), *workers["rayStartParams"].values()]
    assert all(isinstance(value, str) for value in starts), "KubeRay takes strings there"
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
    for volume in compose["services"]["server"]["volumes"]:  # else Docker has it belong to root
        name, path, *_ = volume.split(":")
        assert name not in compose["volumes"] or f"install -d -o hbserve -g hbserve {path}\n" in dockerfile
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
    if "hbserve-scheduler" not in program:  # what instances keep is elsewhere than in a home that is read-only
        assert (found["Service"]["ProtectHome"], found["Service"]["CacheDirectory"]) == ("read-only", "hbserve")
        kept = dict(re.findall("^Environment=(\\w+)=/var/cache/(.*)$", unit.read_text(), re.MULTILINE))
        assert kept == {"XDG_CACHE_HOME": "hbserve", "TRITON_CACHE_DIR": "hbserve/triton"}
    if "ExecStartPre" in found["Service"]:
        assert parsed(found["Service"]["ExecStartPre"].split()[1:])


WITHOUT_CAPABILITIES = """
import ctypes, runpy
libc = ctypes.CDLL(None, use_errno=True)
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc.prctl(38, 1, 0, 0, 0)  # no new privileges
for capability in range(64):
    libc.prctl(24, capability, 0, 0, 0)  # out of the bounding set, as far as there is one of this number
assert libc.capset(header, none) == 0
assert {line.split()[1] for line in open("/proc/self/status") if line.startswith("Cap")} == {"0" * 16}
runpy.run_module("hbserve", None, "__main__", alter_sys=True)
"""
"""Program that drops capabilities as securityContext does, and then runs `hbserve`. The user stays, because the
packages and the model may be its files. The program does it itself, because a command in between, such as `setpriv`,
would start it cold, in four times the processor time."""


class Pods:
    """Hosts on which the commands of pods run: each in a network namespace, with the ports and names of the manifests,
    and without any capability. If there are no namespaces, all run on this host, at other ports."""

    def __init__(self) -> None:
        self.hosts = {"server": "10.77.1.1", "prefill": "10.77.1.2", "decode": "10.77.1.3"}
        self.before: dict[str, list[str]] = {host: [] for host in self.hosts}
        """Words before a command, by host."""
        self.changes: dict[str, str] = {}
        """Replacements in the configuration file."""
        self.ports = {"prefill": 5600, "decode": 5600, "http": 8000}

    def use(self, network: Any) -> None:
        names = "".join(f"{address} hbserve-{host}\n" for host, address in self.hosts.items() if host != "server")
        for host in self.hosts:
            network.resolve_names(host, f"127.0.0.1 localhost\n{names}", "hosts")
            self.before[host] = ["ip", "netns", "exec", network.namespace(host)]

    def use_this_host(self, free_ports: list[int]) -> None:
        self.hosts = dict.fromkeys(self.hosts, "127.0.0.1")
        *found, rpc = free_ports
        self.ports = dict(zip(self.ports, found, strict=True))
        others = {"0.0.0.0": "127.0.0.1", "5550": str(rpc), "8000": str(self.ports["http"]), "5700": "0", "5680": "0"}
        names = {f"hbserve-{role}:5600": f"localhost:{self.ports[role]}" for role in ("prefill", "decode")}
        self.changes = others | names

    def start(self, host: str, *command: str) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*self.before[host], sys.executable, *command], stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )


@pytest.fixture
def pods(request: pytest.FixtureRequest, free_ports: Any) -> Pods:
    found = Pods()
    try:
        found.use(request.getfixturevalue("make_network")(found.hosts))
    except pytest.skip.Exception:
        found.use_this_host(free_ports(4))
    return found


ASK = """
import sys, time, urllib.request
def ask(path, body=None):
    request = urllib.request.Request(sys.argv[1] + path, body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60).read()
deadline = time.monotonic() + float(sys.argv[2])
while True:
    try:
        ask("/health")
        break
    except OSError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.1)
print(ask("/v1/completions", b'{"prompt": "hello", "max_tokens": 4, "ignore_eos": true}').decode())
"""


@pytest.mark.warm
def test_the_commands_of_the_pods_serve_as_plain_processes(small_model, tmp_path, pods):
    text = find("ConfigMap", "hbserve")["data"]["deployment.yaml"]
    for before, after in {"/models/model": str(small_model("qwen3")), **pods.changes}.items():
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "deployment.yaml").write_text(text)

    def start(kind: str, host: str) -> "subprocess.Popen[str]":
        name = "hbserve" if host == "server" else f"hbserve-{host}"
        (template,) = templates(find(kind, name))
        assert container(template)["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        known = {"$(POD_NAME)": f"{name}-0", "$(POD_IP)": pods.hosts[host], "/etc/hbserve": str(tmp_path)}
        known |= {"5600": str(pods.ports[host])} if host in pods.ports else {}
        arguments = [
            re.sub("|".join(map(re.escape, known)), lambda at: known[at[0]], each)
            for each in container(template)["args"]
        ]
        program = ["-c", WITHOUT_CAPABILITIES] if pods.before[host] else ["-m", "hbserve"]
        return pods.start(host, *program, *arguments)

    processes = [
        start("StatefulSet", "prefill"), start("StatefulSet", "decode"), start("Deployment", "server"),
    ]  # fmt: skip
    try:
        url = f"http://{pods.hosts['server']}:{pods.ports['http']}"
        asking = pods.start("decode", "-c", ASK, url, str(START_DEADLINE_S))
        answer, why = asking.communicate(timeout=2 * START_DEADLINE_S)
        assert asking.returncode == 0, why
        assert json.loads(answer)["usage"]["completion_tokens"] == 4
    finally:
        for process in processes:
            process.terminate()
        said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert "hbserve: starting without instances of its own\n" in said[-1]
