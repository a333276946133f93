"""A real headless Chromium (Debian's) and a whole installation with tokens for it to look at."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.api.live import Live, free_ports, living, simulated

ADMIN, READ = "admin-token-of-this-test", "read-token-of-this-test"
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
WIDTHS = (390, 1440)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """Two models, one of them with two replicas; nobody gets in without a token."""
    one, two = free_ports(2)
    replicas = simulated(two, replicas=2, endpoints={"base_url": "http://127.0.0.1:{port}/v1"}, port_range=[two, min(two + 20, 65535)])
    replicas["args"] = ["-m", "recovery.simulator", "--port", "{port}", "--load-s", "0.5"]
    tokens = {"FMCP_SECURE_MODE": "true", "FMCP_BEARER_TOKEN": ADMIN, "RECOVERY_READ_TOKENS": READ}
    with living({"vllm": simulated(one, restart_delay=3), "twins": replicas}, **tokens) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; without it the run fails in CI, and these tests are left out at home."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is missing: apt-get install chromium")
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found, args=FLAGS.split())
        yield made
        made.close()


@pytest.fixture
def errors() -> list[str]:
    """What the page complained about."""
    return []


NewPage = Callable[..., Page]


@pytest.fixture
def new_page(browser: Browser, live: Live, errors: list[str], tmp_path: Path) -> Iterator[NewPage]:
    """Opens pages, each as a visitor who has never been here."""
    contexts = []

    def make(width: int = 1440, dark: bool = False) -> Page:
        context = browser.new_context(base_url=live.url, viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()

        def heard(message: ConsoleMessage) -> None:
            if message.type == "error" and "401" not in message.text:  # asked before the login, on purpose
                errors.append(message.text)

        page.on("console", heard)
        page.on("pageerror", lambda error: errors.append(str(error)))
        return page

    yield make
    for context in contexts:
        context.close()
