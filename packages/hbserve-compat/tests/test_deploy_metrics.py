"""The files of deploy/ for Prometheus and Grafana: they ask for metrics that exist, and fit each other."""

import json
import re
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from hbserve_fake_scheduler import FakeServer
from prometheus_client.parser import text_string_to_metric_families

from hbserve.text.tokenizer import load_tokenizer

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/hbserve.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())
OF_A_METRIC = r"(?:hbserve:|vllm:|http_)[a-z0-9_]+"
OF_LABELS = {
    *("cause", "prefill", "decode", "error", "instance_id", "role", "local_prefill_tokens"),
    *("lost", "starting", "ready", "suspect", "draining", "failed"),
}
"""Other words that the page has in code: labels, some of their values, and a setting."""
LABELS_OF_PROMETHEUS = {"job", "instance"}


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (each["expr"] for each in panel.get("targets", []))
    for variable in DASHBOARD["templating"]["list"]:
        yield variable["query"]
    for group in RULES["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.fixture
async def labels(small_model: Callable[[str], Path]) -> dict[str, set[str]]:
    """The labels of each sample of /metrics."""
    server = FakeServer(load_tokenizer(small_model("qwen3")))
    figures = server.scheduler.figures
    link = figures.link("p0", "d0")
    link.is_up = True
    figures.failed_attempts["x"] = figures.delayed["queue"] = figures.ended["stop"] = 1
    await server.client.get("/x")
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families((await server.client.get("/metrics")).text):
        for sample in family.samples:
            found[sample.name] = set(sample.labels)
    return found


@pytest.mark.parametrize("page", ["monitoring.md", "monitoring.zh-CN.md"])
async def test_the_page_names_every_metric_and_no_others(labels, page):
    text = (DEPLOY.parent / "docs" / page).read_text()
    _, section = text.split("\n## `/metrics`\n")
    section = section.partition("\n## ")[0]
    there = {re.sub("_(bucket|sum|count|created)$", "", name) for name in labels if name.startswith("hbserve:")}
    named = set(re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)*)(?:\{\w+\})?`", section)) - OF_LABELS
    assert {f"hbserve:{name}" for name in named} == there


async def test_every_metric_that_is_asked_for_is_there_with_its_labels(labels):
    asked = set()
    for expression in expressions():
        for name, of in re.findall(rf"({OF_A_METRIC})(?:\{{([^}}]*)\}})?", expression):
            asked.add(name)
            assert name in labels, f"{name} in {expression}"
            chosen = set(re.findall(r"(\w+)=", of)) - LABELS_OF_PROMETHEUS
            assert chosen <= labels[name], f"{name} has no {chosen - labels[name]}: {expression}"
        known = LABELS_OF_PROMETHEUS.union(*(labels[name] for name in re.findall(OF_A_METRIC, expression)))
        for by in re.findall(r"by \(([^)]*)\)", expression):
            assert set(re.split(r",\s*", by)) <= known, expression
    assert len(asked) > 30


def test_expressions_are_whole_and_panels_beside_each_other():
    for expression in expressions():
        for both in ("()", "{}", "[]"):
            assert expression.count(both[0]) == expression.count(both[1]), expression
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = [one[at] + one[size] <= other[at] or other[at] + other[size] <= one[at] for at, size in ("xw", "yh")]
        assert any(apart), (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_alerts_say_what_is_wrong_with_labels_that_their_expression_keeps():
    alerts = [rule for group in RULES["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        said = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        by = re.findall(r"by \(([^)]*)\)", rule["expr"])
        if by:  # else all labels are kept
            assert said <= set(re.split(r",\s*", by[0])), rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_compose_file_mounts_what_is_there():
    compose: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yml").read_text())
    mounted = [volume.split(":")[0] for each in compose["services"].values() for volume in each["volumes"]]
    assert all((DEPLOY / path).exists() for path in mounted)
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert all((DEPLOY / "prometheus" / path).exists() for path in scraped["rule_files"])
    assert [job["job_name"] for job in scraped["scrape_configs"]] == ["hbserve"]
