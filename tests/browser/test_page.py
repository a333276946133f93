"""The status page as a person uses it: log in, watch a kill -9 heal, press buttons, be refused."""

import os
import re
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.api.live import PATIENCE_S, Live
from tests.browser.conftest import ADMIN, READ, WIDTHS, NewPage
from tests.helpers import wait_until

pytestmark = pytest.mark.browser
MS = PATIENCE_S * 1000


def log_in(page: Page, token: str, path: str = "/") -> None:
    """Open a page and log in with the keyboard."""
    page.goto(path)
    page.get_by_label("Token").fill(token)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1, name="Log in")).to_have_count(0)


def test_a_wrong_token_is_refused_and_a_good_one_shows_the_fleet(new_page: NewPage, live: Live, errors: list[str]):
    page = new_page()
    page.goto("/")
    page.get_by_label("Token").fill("wrong-token")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_have_text("This token is not known")
    assert "vllm" not in page.inner_text("main")

    log_in(page, ADMIN)

    expect(page.get_by_role("listitem")).to_have_count(2)
    expect(page.get_by_role("listitem").filter(has_text="twins")).to_contain_text("2/2 ready")
    expect(page.locator("#link")).to_have_text("live")
    expect(page.locator(".tile").first).to_contain_text("3/3")
    assert page.evaluate("document.cookie") == "", "no script can read the session"
    assert ADMIN not in page.evaluate("JSON.stringify({...localStorage, ...sessionStorage})")
    assert errors == []


def test_a_kill_heals_before_ones_eyes_and_restart_works(new_page: NewPage, live: Live, errors: list[str]):
    page = new_page()
    log_in(page, ADMIN)
    page.get_by_role("listitem").filter(has_text="vllm").click()
    expect(page).to_have_url(re.compile("/models/vllm$"))
    badge = page.locator(".title .badge")
    expect(badge).to_have_text("healthy")

    live.server("vllm-0").kill()

    expect(badge).to_have_text("restarting", timeout=MS)
    expect(page.locator(".notice")).to_contain_text("next start")
    expect(badge).to_have_text("healthy", timeout=MS)
    expect(page.get_by_label("Timeline, newest first")).to_contain_text("killed by signal 9")
    expect(page.get_by_label("Log", exact=True).last).to_contain_text("APIServer")

    page.get_by_role("button", name="Restart").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    assert live.model("vllm")["restart_count"] == 1
    page.get_by_role("button", name="Restart").click()
    page.get_by_role("dialog").get_by_role("button", name="Restart").click()
    expect(page.locator(".toast")).to_contain_text("LLM model 'vllm' restarted successfully", timeout=MS)
    assert live.model("vllm")["restart_count"] == 2

    page.get_by_role("button", name="Check").click()
    expect(page.locator(".toast").last).to_contain_text("vllm is healthy", timeout=MS)
    page.get_by_role("button", name="Reset budget").click()
    expect(page.locator(".facts")).to_contain_text("3 of 3 left", timeout=MS)
    assert errors == []


def test_stop_and_start_are_shown_as_they_happen(new_page: NewPage, live: Live, errors: list[str]):
    page = new_page()
    log_in(page, ADMIN, "/models/twins")
    badge = page.locator(".title .badge")
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("dialog").get_by_role("button", name="Stop").click()
    expect(badge).to_have_text("stopped", timeout=MS)
    page.get_by_role("button", name="Start", exact=True).click()
    expect(badge).to_have_text("healthy", timeout=MS)
    expect(page.locator(".instance")).to_have_count(2)
    wait_until(lambda: live.model("twins")["ready"], 2, within_s=PATIENCE_S)
    assert errors == []


def test_a_role_that_may_only_look_sees_all_has_no_buttons_and_log_out_ends_it(new_page: NewPage, live: Live):
    """
    What the front door did for the model is part of it. (Few log-ins in this file: ten a minute are let in.)
    """
    door = f"http://127.0.0.1:{live.environment['RECOVERY_FRONT_PORT']}/v1/completions"
    for _ in range(3):
        asked = {"model": "vllm", "prompt": "a b c", "max_tokens": 4, "stream": True}
        assert httpx.post(door, json=asked, timeout=PATIENCE_S).status_code == 200
    page = new_page()
    log_in(page, READ, "/models/vllm")
    for text in ("3 requests", "First token there", "Between tokens"):
        expect(page.locator(".facts")).to_contain_text(text, timeout=MS)
    expect(page.get_by_text("Your role may look only.")).to_be_visible()
    expect(page.get_by_role("button", name="Restart")).to_have_count(0)
    refused = page.evaluate(
        "fetch('/api/llm/models/vllm/restart', {method: 'POST', headers: {'X-Recovery-Page': '1'}}).then((r) => r.status)"
    )
    assert refused == 403

    page.get_by_role("button", name="Log out").click()

    expect(page.get_by_label("Token")).to_be_visible()
    assert page.evaluate("fetch('/api/llm/models').then((r) => r.status)") == 401


def test_everything_can_be_reached_by_keyboard(new_page: NewPage):
    page = new_page()
    log_in(page, ADMIN)
    expect(page.get_by_role("listitem")).to_have_count(2)

    page.keyboard.press("Tab")
    for _ in range(12):
        if page.evaluate("document.activeElement.dataset.focus === 'vllm'"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")

    expect(page).to_have_url(re.compile("/models/vllm$"))
    page.locator("button[data-command=stop]").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert page.evaluate("document.activeElement.dataset.command") == "stop", "the focus comes back"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_every_text_can_be_read(new_page: NewPage, live: Live, width: int, dark: bool, tmp_path: Path, errors: list[str]):
    page = new_page(width, dark)
    log_in(page, ADMIN)
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    for name, path, sign in (("fleet", "/", "[role=listitem]"), ("model", "/models/vllm", ".timeline li")):
        page.goto(path)
        expect(page.locator(sign).first).to_be_visible()
        if name == "model":
            expect(page.locator(".log span").first).to_be_attached()
        page.screenshot(path=shots / f"{name}-{width}-{'dark' if dark else 'light'}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off at the side"
        for selector in (".badge", ".dim", "h1", ".cell .name", "button"):
            for ratio in page.locator(selector).evaluate_all(CONTRAST):
                assert ratio >= 4.5, (selector, ratio)
    assert errors == []


CONTRAST = """(elements) => elements.filter((e) => e.offsetParent && e.textContent.trim()).map((e) => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; })
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let behind = e, back = [0, 0, 0, 0];
  while (behind && back.length > 3 && back[3] === 0) {
    back = rgb(getComputedStyle(behind).backgroundColor);
    behind = behind.parentElement;
  }
  const [a, b] = [light(rgb(getComputedStyle(e).color)), light(back)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
})"""
