"""The report in a real browser: it asks the network for nothing, fits a phone, and shows nothing unsafe unasked."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser

from curation.report.page import Wanted, report
from tests.chromium import PATIENCE_S
from tests.report.conftest import Row

PHONE = {"width": 390, "height": 844}
FILTER = "image => getComputedStyle(image).filter"


def test_a_veiled_picture_is_blurred_until_it_is_clicked_and_nothing_is_fetched(
    browser: Browser, write_run, tmp_path: Path
) -> None:
    rows = [Row(f"<b>caption</b> {place}", {"punsafe": place / 10}, score=1.0) for place in range(10)]
    file = tmp_path / "report.html"
    file.write_text(report([str(write_run("run", [rows], keep=10))], Wanted()))
    page = browser.new_page(viewport=PHONE)  # type: ignore[arg-type]
    page.set_default_timeout(1000 * PATIENCE_S)
    complaints, asked = [], []
    page.on("console", lambda told: complaints.append(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(file.as_uri())
    veil = page.locator(".veil").first
    picture = veil.locator("img")
    veil.scroll_into_view_if_needed()
    assert "blur" in picture.evaluate(FILTER)
    veil.click()
    assert picture.evaluate(FILTER) == "none"
    veil.click()
    assert "blur" in picture.evaluate(FILTER)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert complaints == [] and asked == [file.as_uri()]
    page.close()
