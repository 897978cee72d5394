"""The dashboard, in a headless browser: its figures, light and dark, narrow and wide."""

import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hbserve_fake_scheduler import FakeServer

from hbserve.server.http.http_server import HttpServer
from hbserve.text.tokenizer import load_tokenizer
from hbserve_rpc.records import AttemptRecord, RequestRecord

playwright = pytest.importorskip("playwright.async_api", reason="needs the dependency group clients")
BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs apt-get install chromium-headless-shell")
DEADLINE_MS = 60_000
WIDTHS = [360, 1440]


@pytest.fixture
async def server(small_model) -> AsyncIterator[FakeServer]:
    server = FakeServer(load_tokenizer(small_model("qwen3")), port=0, api_key="k")
    http = HttpServer(server.service.settings, server.app)
    await http.start()
    server.url = http.url
    yield server
    await http.stop()


def end_one(server: FakeServer, name: str) -> None:
    """Record the end of a request whose KV was slow."""
    attempt = AttemptRecord(0.1, "p0", "d0", 0.2, 0.5, 2.0, computed=[(0.5, 16)], pushed=[(0.4, 1)], decoding_s=2.0)
    figures = server.scheduler.figures
    figures.add(RequestRecord(name, 100.0, 16, 9, 0, 4096, 1.5, [attempt], 2.5, "length", 0.5, 2.0))
    figures.output_tokens += 9
    link = figures.link("p0", "d0")
    link.is_up, link.num_bytes, link.time_s = True, link.num_bytes + 10**9, link.time_s + 0.5
    link.active += 2
    link.end("completed")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_dashboard_shows_instances_links_latencies_and_requests(server, scheme):
    expect = playwright.expect
    end_one(server, "first")
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = await browser.new_page(color_scheme=scheme)
        page.set_default_timeout(DEADLINE_MS)
        wrong: list[str] = []
        asked: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(f"{server.url}/dashboard")
        await expect(page.locator("#problem")).to_contain_text("no API key", timeout=DEADLINE_MS)
        await page.fill("#key", "k")
        await page.dispatch_event("#key", "change")
        await expect(page.locator("#problem")).to_be_empty(timeout=DEADLINE_MS)
        await expect(page.locator("#instances")).to_contain_text("h0")
        await expect(page.locator(".request .name")).to_have_text(["first"])
        await expect(page.locator(".request .end").first).to_contain_text("waited 1500 ms for its KV from p0 to d0")
        assert await page.locator(".request [data-part=kv]").count() == 1
        end_one(server, "<b>second</b>")
        await expect(page.locator(".request .name").first).to_have_text("<b>second</b>", timeout=DEADLINE_MS)
        await expect(page.locator("#links")).to_contain_text("up 2 GB/s, 2 moving")
        await expect(page.locator("#pipes path.up.moving")).to_have_count(1)
        await expect(page.locator("#counts")).to_contain_text("2 completed")
        await expect(page.locator("#counts")).to_contain_text("2 held up by transfer")
        for width in WIDTHS:
            await page.set_viewport_size({"width": width, "height": 900})
            wider = await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wider <= 0, f"at {width} pixels it is to be scrolled sideways"
        assert await contrast(page) >= 4.5
        assert all(url.startswith(server.url) or url == "data:," for url in asked), "it needs nobody else"
        await browser.close()
    assert wrong == []


async def contrast(page: Any) -> float:
    """Return the contrast of text on cards, as WCAG defines it. Both colours are opaque."""
    colours = await page.evaluate(
        '["color", "backgroundColor"].map((name) => getComputedStyle(document.querySelector("section"))[name])'
    )
    luminances = []
    for colour in colours:
        channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [each / 12.92 if each <= 0.03928 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)
