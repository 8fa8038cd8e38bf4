"""The rating page in a real browser: two raters, keys and taps, and a server that is killed between their votes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from curation.rating import votes
from curation.rating.database import NAME
from tests.chromium import PATIENCE_S
from tests.rating.conftest import COLOURS, write_image

ROOT = Path(__file__).parents[2]
KEYS = {"left": "ArrowLeft", "right": "ArrowRight", "unsure": "ArrowDown"}
PATTERN = ("left", "right", "unsure", "left", "left", "right")
VIOLATION = "Content Security Policy"


class Server:
    """`python -m jobs.rate` on a study of its own, in a process that can be killed and started again."""

    def __init__(self, study: Path) -> None:
        self.study, self.port = study, 0
        self.start()

    def start(self) -> None:
        options = ["--port", str(self.port), "--goal", "1000", "--question", "Which colour?"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jobs.rate", str(self.study), *options],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("for raters: "):
                self.url = line.split()[-1]
                self.port = int(self.url.rstrip("/").rsplit(":", 1)[1])
                return
        raise AssertionError(f"the server ended with code {self._process.wait()}")

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def answers(self) -> dict[str, list[str]]:
        """Standing answers by rater, in order."""
        found: dict[str, list[str]] = {}
        for row in votes.read(self.study / NAME)[1]:
            if row.undone_at is None:
                found.setdefault(row.rater_name, []).append(row.answer)
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    study = tmp_path_factory.mktemp("rated") / "study"
    for model, colour in COLOURS.items():
        for place in range(8):
            write_image(study / model / f"{place}.png", colour, side=64)
        (study / model / "0.txt").write_text("<b onclick=alert(1)>a caption</b>")
    started = Server(study)
    yield started
    started.kill()


def enter(context: BrowserContext, server: Server, name: str, complaints: list[str] | None = None) -> Page:
    """A page on which this rater sees a pair."""
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE_S)
    if complaints is not None:
        page.on("console", lambda told: complaints.append(told.text) if told.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server.url)
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Enter")
    page.locator("#pair").wait_for()
    return page


def settled(page: Page, count: int) -> None:
    """Waits until the page says that so many votes are the rater's, and shows the next pair."""
    expect(page.locator("#yours")).to_contain_text(f"{count} vote", timeout=1000 * PATIENCE_S)
    expect(page.locator("body.busy")).to_have_count(0, timeout=1000 * PATIENCE_S)


def test_two_raters_vote_through_kills_of_the_server_and_no_vote_is_lost_or_doubled(
    browser: Browser, server: Server
) -> None:
    complaints: list[str] = []
    contexts = [browser.new_context(), browser.new_context()]
    pages = {
        name: enter(context, server, name, complaints) for name, context in zip(("Ann", "Bob"), contexts, strict=True)
    }
    cast: dict[str, list[str]] = {name: [] for name in pages}
    for turn in range(9):
        for name, page in pages.items():
            answer = PATTERN[(turn + len(name) * (name == "Bob")) % len(PATTERN)]
            if turn == 2 and name == "Ann":
                server.kill()  # before the vote: it is made without a server, and waits
            page.keyboard.press(KEYS[answer])
            cast[name].append(answer)
            if turn == 5 and name == "Bob":
                server.kill()  # at once after it: whether it has arrived nobody knows
                page.goto("about:blank")  # and the page forgets, but for what it has laid down
                server.start()
                page.goto(server.url)
            if turn == 2 and name == "Bob":
                for waiting in pages.values():
                    expect(waiting.locator("#said")).to_contain_text("No connection. Your vote is kept")
                server.start()
        for page in pages.values():
            settled(page, turn + 1)
    assert server.answers() == cast
    rows = votes.read(server.study / NAME)[1]
    assert len({(row.rater, row.matchup) for row in rows}) == len(rows) == 18
    assert not [told for told in complaints if VIOLATION in told], complaints
    for context in contexts:
        context.close()


def test_a_vote_whose_answer_is_lost_on_the_way_counts_once(browser: Browser, server: Server) -> None:
    context = browser.new_context()
    page = enter(context, server, "Hal")
    lost = 0

    def lose_first_two(route: Route) -> None:
        nonlocal lost
        if lost < 2:
            lost += 1
            route.fetch()  # the server has it
            route.abort()
        else:
            route.continue_()

    page.route("**/api/vote", lose_first_two)
    page.keyboard.press("ArrowRight")
    settled(page, 1)
    page.keyboard.press("ArrowLeft")
    settled(page, 2)
    assert lost == 2 and server.answers()["Hal"] == ["right", "left"]
    context.close()


def test_the_page_works_by_keyboard_alone_and_tells_a_screen_reader_what_happens(
    browser: Browser, server: Server
) -> None:
    context = browser.new_context()
    page = enter(context, server, "Cyd")
    for name in ("Left image is better", "Right image is better", "Undo", "Not sure"):
        assert page.get_by_role("button", name=name, exact=True).count() == 1
    assert page.get_by_role("heading", level=1).inner_text() == "Which colour?"
    focused = []
    while "unsure" not in focused and len(focused) < 9:
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.id"))
    assert focused[-3:] == ["left", "right", "unsure"]  # `undo` is disabled: there is nothing to undo yet
    page.keyboard.press("Enter")
    settled(page, 1)
    assert page.locator("[role=status]").inner_text() == "Saved: not sure."
    shown = page.locator("#left-frame img").get_attribute("src")
    page.keyboard.press("ArrowRight")
    settled(page, 2)
    page.keyboard.press("Backspace")
    settled(page, 1)
    assert page.locator("#left-frame img").get_attribute("src") == shown
    page.keyboard.press("ArrowLeft")
    settled(page, 2)
    assert server.answers()["Cyd"] == ["unsure", "left"]
    context.close()


def test_the_next_pairs_images_are_there_before_the_vote(browser: Browser, server: Server) -> None:
    context = browser.new_context()
    page = enter(context, server, "Dee")
    # Asked from here: the page's policy forbids the evaluation that playwright's own waiting would do in it.
    loaded = "performance.getEntriesByType('resource').filter(e => e.name.includes('/image/')).length"
    ends = time.monotonic() + PATIENCE_S
    while page.evaluate(loaded) < 6 and time.monotonic() < ends:
        page.wait_for_timeout(100)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/image/" in request.url else None)
    page.keyboard.press("ArrowLeft")
    settled(page, 1)
    now = [page.locator(f"#{side}-frame img").get_attribute("src") or "" for side in ("left", "right")]
    assert all(now) and not [url for url in asked if any(url.endswith(path) for path in now)]
    context.close()


def test_on_a_phone_all_is_on_the_screen_and_taps_vote(browser: Browser, server: Server) -> None:
    context = browser.new_context(viewport={"width": 375, "height": 667}, has_touch=True, is_mobile=True)
    page = enter(context, server, "Eve")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    for name in ("#left", "#right", "#unsure", "#undo"):
        box = page.locator(name).bounding_box()
        assert box is not None and box["y"] + box["height"] <= 667 and min(box["width"], box["height"]) >= 44
    page.get_by_role("button", name="Upper image is better").tap()
    settled(page, 1)
    expect(page.locator("#said")).to_have_text("Saved: upper image.")
    assert server.answers()["Eve"] == ["left"]
    context.close()


def test_dark_is_dark_and_hostile_captions_are_text(browser: Browser, server: Server) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page = enter(context, server, f"Finn {scheme}")
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert grounds == ["rgb(247, 246, 243)", "rgb(18, 20, 25)"]
    context = browser.new_context()
    page = enter(context, server, "Gus")
    told: set[str] = set()
    for count in range(1, 25):
        told |= {page.locator(f"#{side}-caption").inner_text() for side in ("left", "right")}
        if "<b onclick=alert(1)>a caption</b>" in told:
            break
        page.keyboard.press("ArrowLeft")
        settled(page, count)
    assert "<b onclick=alert(1)>a caption</b>" in told and page.locator("#pair b").count() == 0
    context.close()


def test_the_results_page_shows_and_needs_no_script(browser: Browser, server: Server) -> None:
    complaints: list[str] = []
    context = browser.new_context()
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(f"{server.url}results", timeout=1000 * PATIENCE_S)
    assert page.locator(".pairs section").count() == 3 and page.locator("svg circle").count() == 6
    assert page.locator("script").count() == 0 and not complaints
    context.close()


def test_a_gate_opens_by_a_link_whose_token_is_gone_from_the_address(browser: Browser, folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.rate", str(folder), "--port", "0", "--with-token"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    links: list[str] = []
    try:
        while len(links) < 2:
            line = process.stdout.readline()
            assert line, "the server ended"
            links += [line.split()[-1]] if line.startswith("for ") else []
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE_S)
        bare, token = links[0].split("#")
        page.goto(bare)
        page.get_by_label("Token").fill("wrong")
        page.get_by_role("button", name="Open").click()
        expect(page.locator("#said")).to_contain_text("not the token")
        page.goto("about:blank")
        page.goto(links[0])
        page.locator("#who").wait_for()
        assert token not in page.url and token not in page.evaluate("document.cookie")
        context.close()
    finally:
        process.kill()
        process.wait()
