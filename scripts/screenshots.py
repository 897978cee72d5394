"""Pictures of `hbserve top` and of the dashboard, of a deployment that runs, under a load that this script makes.

    hbserve serve --config FILE          # says both addresses
    UV_PROJECT_ENVIRONMENT=.venv-clients uv run --group clients python scripts/screenshots.py \
        --url http://127.0.0.1:8000 --connect 127.0.0.1:5550
Written to docs/images: top.svg, dashboard-light.png, dashboard-dark.png and dashboard-narrow.png.
"""

import argparse
import asyncio
import random
import shutil
from pathlib import Path

import httpx
from playwright.async_api import async_playwright

from hbserve.top import WatchedRemote
from hbserve.top_app import TopApp
from hbserve_scheduler import RemoteScheduler

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
LANES, NUM_LOOKS = 6, 40
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


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--connect", required=True)
    arguments = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    lanes = [asyncio.create_task(load(arguments.url, lane)) for lane in range(LANES)]
    try:
        await draw_top(arguments.connect)
        await draw_dashboard(arguments.url)
    finally:
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
