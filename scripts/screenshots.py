"""Pictures of `hbserve top`, of the dashboard and of a trace, of a deployment that runs, under a load that this script
makes; and the one that `hbserve plan` draws.

    hbserve serve --config FILE          # says both addresses
    UV_PROJECT_ENVIRONMENT=.venv-clients uv run --group clients python scripts/screenshots.py \
        --url http://127.0.0.1:8000 --connect 127.0.0.1:5550
Written to docs/images: top.svg, dashboard-light.png, dashboard-dark.png, dashboard-narrow.png, trace.svg and plan.png;
with `--only top trace plan`, for example, those alone. The dashboard needs a browser.
"""

import argparse
import asyncio
import gzip
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from hbserve.monitoring.top import WatchedRemote
from hbserve.monitoring.top_app import TopApp
from hbserve_scheduler import RemoteScheduler

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
LANES, NUM_LOOKS = 6, 40
PICTURES = ("plan", "top", "trace", "dashboard")
TRACE_US = 400_000
"""That the picture of a trace shows."""
COLORS = {
    "queue": "tab:gray", "prefill": "tab:blue", "chunk": "lightskyblue", "KV": "tab:orange",
    "reserve": "tab:pink", "wait": "moccasin", "decode": "tab:green",
}  # fmt: skip
PAGES = {
    "dashboard-light": ("light", 1280, 1000),
    "dashboard-dark": ("dark", 1280, 1000),
    "dashboard-narrow": ("dark", 390, 1500),
}


async def load(url: str, lane: int) -> None:
    """Requests one after the other, some of them long; now and then a pause."""
    chance = random.Random(lane)
    async with httpx.AsyncClient(timeout=60) as client:
        while True:
            words = " ".join(
                chance.choice(["tell", "me", "of", "rivers", "mountains", "cities", "and", "seas"])
                for _ in range(chance.choice([8, 40, 60]))
            )
            await client.post(
                f"{url}/v1/completions",
                json={"prompt": words, "max_tokens": chance.choice([8, 24, 64]), "ignore_eos": True},
            )
            await asyncio.sleep(chance.choice([0, 0, 0.3]))


async def draw_top(address: str) -> None:
    scheduler = RemoteScheduler(address)
    await scheduler.start()
    try:
        app = TopApp(WatchedRemote(scheduler), interval_s=3600)
        async with app.run_test(size=(150, 42)) as pilot:
            for _ in range(NUM_LOOKS):
                await app.look()
                await asyncio.sleep(0.5)
            await pilot.pause()
            (IMAGES / "top.svg").write_text(app.export_screenshot(title="hbserve top"))
    finally:
        await scheduler.stop()


async def draw_dashboard(url: str) -> None:
    from playwright.async_api import async_playwright

    browser_path = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        pages = []
        for name, (scheme, width, height) in PAGES.items():
            page = await browser.new_page(color_scheme=scheme, viewport={"width": width, "height": height})
            await page.goto(f"{url}/dashboard")
            pages.append((name, page))
        await asyncio.sleep(20)
        for name, page in pages:
            await page.screenshot(path=IMAGES / f"{name}.png")
        await browser.close()


async def draw_trace(url: str) -> None:
    """Some requests of it, as Perfetto shows them: a row for each lane of a process, and arrows from the prompt's
    computation to its KV and on to the tokens."""
    await asyncio.sleep(5)
    async with httpx.AsyncClient(timeout=60) as client:
        events = json.loads(gzip.decompress((await client.get(f"{url}/debug/trace?last_s=60")).content))["traceEvents"]
    names = {each["pid"]: each["args"]["name"] for each in events if each["name"] == "process_name"}
    slices = [each for each in events if each["ph"] == "X"]
    end = max(each["ts"] + each["dur"] for each in slices)
    begin = end - TRACE_US
    shown = [each for each in slices if each["ts"] + each["dur"] > begin]
    rows = {place: row for row, place in enumerate(sorted({(each["pid"], each["tid"]) for each in shown}))}
    figure, axes = _axes(len(rows))
    for each in sorted(shown, key=lambda each: -each["dur"]):
        _draw_slice(axes, rows[each["pid"], each["tid"]], each, begin)
    for number in {each["id"] for each in events if each["ph"] == "s"}:
        ends = [each for each in events if each["ph"] in "sf" and each.get("id") == number]
        if all(each["ts"] > begin for each in ends) and all((each["pid"], each["tid"]) in rows for each in ends):
            start, stop = (((each["ts"] - begin) / 1e3, rows[each["pid"], each["tid"]]) for each in ends)
            axes.annotate("", stop, start, arrowprops={"arrowstyle": "->", "color": "black", "lw": 0.7})
    axes.set_yticks(range(len(rows)), [names[pid] if lane == 0 else "" for pid, lane in rows])
    figure.savefig(IMAGES / "trace.svg", metadata={"Date": None})


def _axes(num_rows: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.6 + 0.3 * num_rows), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, TRACE_US / 1e3)
    axes.set_ylim(num_rows - 0.5, -0.5)
    axes.set_xlabel("ms")
    return figure, axes


def _draw_slice(axes: Any, row: int, event: dict[str, Any], begin: float) -> None:
    """What lies within another one is drawn later, and lower."""
    kind = event["name"].split()[0]
    left, inner = (event["ts"] - begin) / 1e3, kind in ("chunk", "reserve", "wait") or event["name"].endswith("blocks")
    color = COLORS.get(kind, "lightgrey")
    axes.barh(row, event["dur"] / 1e3, 0.4 if inner else 0.8, left=left, color=color, edgecolor="white", linewidth=0.5)
    if event["dur"] > TRACE_US / 12 and kind != "chunk":  # which is within its prefill
        axes.text(max(left, 0) + 1, row, kind, va="center", fontsize=7, clip_on=True)


def draw_plan() -> None:
    load = ["--input-len", "2048", "--output-len", "128", "--rate", "60"]
    goals = ["--ttft-ms", "300", "--tpot-ms", "15"]
    command = [sys.executable, "-m", "hbserve", "plan", *load, *goals, "--plot", IMAGES / "plan.png"]
    subprocess.run(command, check=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--connect", default="127.0.0.1:5550")
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=PICTURES)
    arguments = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    if "plan" in arguments.only:
        draw_plan()
    if arguments.only == ["plan"]:
        return
    lanes = [asyncio.create_task(load(arguments.url, lane)) for lane in range(LANES)]
    try:
        if "top" in arguments.only:
            await draw_top(arguments.connect)
        if "trace" in arguments.only:
            await draw_trace(arguments.url)
        if "dashboard" in arguments.only:
            await draw_dashboard(arguments.url)
    finally:
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
