"""The page in a real browser, as wide as a desk's and a phone's: a chat, keys, problems, long answers, colours."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.models import train, train_chat
from tests.support.web_server import WebServer, running

QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
WIDTHS = {1400: 900, 390: 844}
CONTRAST = """(names) => names.map((name) => {
  const style = getComputedStyle(document.querySelector(name));
  let around = document.querySelector(name);
  while (getComputedStyle(around).backgroundColor === "rgba(0, 0, 0, 0)") around = around.parentElement;
  const light = (color) => {
    const parts = color.match(/\\d+/g).map((part) => part / 255);
    const [r, g, b] = parts.map((x) => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const both = [light(style.color), light(getComputedStyle(around).backgroundColor)].sort((a, b) => a - b);
  return (both[1] + .05) / (both[0] + .05);
})"""
"""The contrast of text against what is behind it, by WCAG 2's formula; it asks for 4.5."""


@pytest.fixture(scope="module")
def base(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("base"), train_steps=5, val_every=0)


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    with running(train_chat(base, tmp_path_factory.mktemp("chat")), request_seconds=3600) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("needs Chromium (apt-get install chromium), or its path in CHROMIUM")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", *QUIET])
        yield found
        found.close()


class Visit:
    """A page that is open, with what it asked the server, and what the browser complained of."""

    def __init__(self, browser: Browser, server: WebServer, width: int, **settings: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": WIDTHS[width]}, **settings)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.problems: list[str] = []
        self.asked: list[Any] = []
        self.page.on("console", lambda it: self.problems.append(it.text) if it.type == "error" else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda it: self.asked.append(it.post_data_json) if it.method == "POST" else None)
        self.page.goto(f"http://127.0.0.1:{server.port}/")

    def set(self, **values: Any) -> None:
        for name, value in values.items():
            self.page.locator(f"#{name}").evaluate("(box, value) => { box.value = value; }", str(value))

    def say(self, text: str) -> str:
        """Type a message, press Enter, and wait for the end of the answer."""
        self.page.get_by_label("message", exact=True).fill(text)
        self.page.keyboard.press("Enter")
        return self.answer()

    def answer(self) -> str:
        """The last answer, once it is whole."""
        expect(self.page.get_by_role("button", name="Send", exact=True)).to_be_visible(timeout=60_000)
        return self.page.locator(".assistant .said").last.inner_text()

    def roles(self) -> list[str]:
        """Who said what is shown, in its order."""
        found: list[str] = self.page.eval_on_selector_all("#talk li", "items => items.map((item) => item.className)")
        return found

    def check_width(self) -> None:
        """Nothing is wider than the window."""
        width = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1]


@pytest.fixture(params=WIDTHS)
def visit(request: pytest.FixtureRequest, browser: Browser, server: WebServer) -> Iterator[Visit]:
    found = Visit(browser, server, request.param, permissions=["clipboard-read", "clipboard-write"])
    yield found
    found.context.close()


def test_a_chat(visit: Visit) -> None:
    """Ask, ask again, copy, edit, regenerate, with a system message, and begin anew."""
    page = visit.page
    expect(page.get_by_role("tab", name="Chat")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_label("message", exact=True)).to_be_focused()
    visit.set(temperature=0)
    first = visit.say("the fox")
    assert first
    visit.say("and then")
    assert visit.roles() == ["user", "assistant"] * 2
    (_, second) = visit.asked
    said = [("user", "the fox"), ("assistant", first), ("user", "and then")]
    assert [(message["role"], message["content"]) for message in second["messages"]] == said
    visit.check_width()

    page.get_by_role("button", name="Copy").nth(1).click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == first

    visit.set(temperature=10)
    page.get_by_role("button", name="Regenerate").click()
    visit.answer()
    assert visit.roles() == ["user", "assistant"] * 2
    assert visit.asked[2]["messages"] == second["messages"] and visit.asked[2]["seed"] == second["seed"] + 1

    page.get_by_role("button", name="Settings").click()
    page.get_by_label("system message").fill("be a fox")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Edit").first.click()
    expect(page.get_by_label("edited message")).to_have_value("the fox")
    page.get_by_label("edited message").fill("the other fox")
    page.get_by_role("button", name="Send again").click()
    visit.answer()
    assert visit.roles() == ["user", "assistant"]
    edited = [{"role": "system", "content": "be a fox"}, {"role": "user", "content": "the other fox"}]
    assert visit.asked[3]["messages"] == edited
    page.get_by_role("button", name="New chat").click()
    assert page.locator("#talk li").inner_text() == "Say something to the model."
    assert visit.problems == []


def test_an_answer_is_stopped_and_kept(visit: Visit, server: WebServer) -> None:
    """The network waits after its first token, so that the answer cannot be over before the key is pressed."""
    page, going_on, steps = visit.page, threading.Event(), iter(range(10**9))
    step = server.engine._batch.step

    def held() -> Any:
        if next(steps):
            going_on.wait()
        return step()

    visit.set(temperature=0)
    with mock.patch.object(server.engine._batch, "step", held):
        page.get_by_label("message", exact=True).fill("the fox")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
        expect(page.locator(".assistant .said")).not_to_have_text("")
        expect(page.get_by_role("button", name="New chat")).to_be_disabled()
        page.keyboard.press("Escape")
        expect(page.locator(".assistant .tools")).to_contain_text("stopped")
        going_on.set()
    kept = visit.answer()
    server.wait_until_idle()
    visit.say("go on")
    assert kept and visit.asked[1]["messages"][1] == {"role": "assistant", "content": kept}
    assert visit.problems == []


def test_the_oldest_turns_give_way(visit: Visit) -> None:
    """What does not fit into the context is left out, and the page says so; a problem loses nothing that was typed."""
    page = visit.page
    visit.set(temperature=0)
    for number in range(5):
        visit.say(f"{number} the fox said no more of it, and then there was a fox")
    expect(page.locator(".left-out")).to_be_visible()
    assert page.get_by_role("alert").inner_text() == ""
    seen = [asked for asked in visit.asked if asked["messages"][-1]["content"].startswith("4")][-1]["messages"]
    assert 1 <= len(seen) < 9 and seen[0]["role"] == "user"
    page.get_by_role("button", name="New chat").click()
    visit.say("hello")
    talk = visit.roles()
    page.get_by_label("message", exact=True).fill("x " * 500)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("there is room for 96; leave out the oldest, or shorten them")
    expect(page.get_by_label("message", exact=True)).to_have_value("x " * 500)
    assert visit.roles() == talk, "nothing was said"
    visit.check_width()


def test_keys(visit: Visit) -> None:
    page = visit.page
    visit.set(temperature=0)
    box = page.get_by_label("message", exact=True)
    box.fill("the fox")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and then")
    assert box.input_value() == "the fox\nand then" and visit.asked == []
    assert box.evaluate("(box) => [box.rows, box.scrollHeight > box.clientHeight]") == [2, False]
    page.keyboard.press("Enter")
    visit.answer()
    expect(box).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("edited message")).to_be_focused()
    page.keyboard.press("Escape")
    expect(box).to_be_focused()
    assert visit.roles() == ["user", "assistant"]
    page.keyboard.press("Enter")  # an empty box
    assert len(visit.asked) == 1
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Completion")).to_be_focused()
    page.get_by_label("prompt").fill("import os")
    page.get_by_role("button", name="Go on").click()
    expect(page.locator("#status")).to_contain_text("ended: ", timeout=60_000)
    assert visit.asked[1]["prompt"] == "import os" and visit.asked[1]["stream"] is True
    assert page.locator("#text").inner_text().startswith("import os")
    visit.check_width()
    page.get_by_role("tab", name="Chat").click()
    assert visit.roles() == ["user", "assistant"], "the chat is still there"
    assert visit.problems == []


def test_long_answers_and_markup_are_text(visit: Visit) -> None:
    """20,000 words and one of 5,000 letters, in a thousand pieces; the end stays in sight, and markup is shown."""
    text = "<b>bold</b><img src=x onerror=alert(1)>" + "x" * 5000 + " word" * 20_000 + " the end"
    pieces = [text[start : start + 100] for start in range(0, len(text), 100)]
    events = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    visit.page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    assert visit.say("at length") == text
    assert visit.page.locator(".said b, .said img").count() == 0
    visit.check_width()
    talk = visit.page.locator("#talk")
    assert talk.evaluate("(box) => box.scrollHeight - box.scrollTop - box.clientHeight") < 2
    expect(visit.page.get_by_label("message", exact=True)).to_be_in_viewport()
    assert visit.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(browser: Browser, server: WebServer, scheme: str) -> None:
    visit = Visit(browser, server, 390, color_scheme=scheme)
    visit.set(temperature=0)
    visit.say("the fox")
    visit.page.get_by_role("button", name="Settings").click()
    names = ["h1", ".user .said", ".assistant .said", ".tools button", ".hint", "#send", "#settings label", "#problem"]
    names += ["#completion-tab", "#message"]
    found = dict(zip(names, visit.page.evaluate(CONTRAST, names), strict=True))
    assert min(found.values()) >= 4.5, found
    background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(251, 251, 253)") == (scheme == "light")
    visit.context.close()


def test_a_model_without_a_template_opens_on_completions(browser: Browser, base: Path) -> None:
    with running(base) as server:
        visit = Visit(browser, server, 390)
        expect(visit.page.get_by_role("tab", name="Completion")).to_have_attribute("aria-selected", "true")
        expect(visit.page.get_by_role("tab", name="Chat")).to_be_disabled()
        expect(visit.page.get_by_label("prompt")).to_be_focused()
        expect(visit.page.get_by_label("system message")).to_be_hidden()
        visit.check_width()
        visit.context.close()
