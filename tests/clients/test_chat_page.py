"""The chat page, in a headless browser, in front of a model that writes what it is told."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hbserve_fake_scheduler import TOOL_TEMPLATE, FakeServer

from hbserve.server.http.http_server import HttpServer
from hbserve.text.tokenizer import load_tokenizer

playwright = pytest.importorskip("playwright.async_api", reason="needs the dependency group clients")
BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs apt-get install chromium-headless-shell")
DEADLINE_MS = 60_000


@pytest.fixture
async def page() -> AsyncIterator[Any]:
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = await browser.new_page()
        page.set_default_timeout(DEADLINE_MS)
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        yield page
        await browser.close()
    assert wrong == []


@pytest.fixture
async def server(small_model) -> AsyncIterator[FakeServer]:
    server = FakeServer(load_tokenizer(small_model("qwen3")), chat_template=TOOL_TEMPLATE, port=0, api_key="k")
    http = HttpServer(server.service.settings, server.app)
    await http.start()
    server.url = http.url
    yield server
    await http.stop()


async def ask(page: Any, text: str, line: str) -> Any:
    """Send a message, and return the line that must follow."""
    await page.fill("#prompt", text)
    await page.press("#prompt", "Enter")
    found = page.locator(line).last
    await found.wait_for()
    return found


async def until_idle(page: Any) -> None:
    await playwright.expect(page.locator("#send")).to_have_text("Send", timeout=DEADLINE_MS)


async def test_the_page_asks_with_a_key_shows_answers_as_text_keeps_the_conversation_and_stops(page, server):
    expect = playwright.expect
    await page.goto(server.url)
    await expect(page.locator("#model")).to_contain_text("no API key")
    await page.fill("#key", "k")
    await page.dispatch_event("#key", "change")
    await expect(page.locator("#model")).to_have_text("small")

    server.answers("<think>hm", "</think><b>bo", "ld</b>")
    answer = await ask(page, "hi", ".assistant")
    await expect(answer).to_have_text("<b>bold</b>")
    await expect(page.locator(".reasoning")).to_have_text("hm")
    await expect(page.locator("#figures")).to_contain_text("p0 sent")
    await until_idle(page)

    server.answers("more")
    await ask(page, "and?", ".assistant:has-text('more')")
    assert server.prompt == "<user>[hi]<assistant>[<b>bold</b>]<user>[and?]"
    await until_idle(page)

    server.answers("a")
    server.scheduler.steps.append(asyncio.Event())  # never ends by itself
    await ask(page, "long", ".assistant:has-text('a')")
    await page.click("#send")
    async with asyncio.timeout(DEADLINE_MS / 1000):
        while server.scheduler.running:
            await asyncio.sleep(0.01)
    await until_idle(page)

    server.scheduler.most_running = 0
    await expect(await ask(page, "busy", ".error")).to_have_text("so many requests are waiting")
    await page.click("#clear")
    await expect(page.locator("#log")).to_be_empty()
