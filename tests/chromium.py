"""A real browser for tests of pages: Debian's Chromium, led by Playwright."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

PATIENCE_S = 45
"""For a browser or server to start on a machine with other work."""


def find_chromium() -> str:
    """The browser, as Debian has it; installed if it is not there and we may."""
    if found := shutil.which("chromium"):
        return found
    if not shutil.which("apt-get") or os.geteuid() != 0:
        pytest.skip("no Chromium, and not root on Debian to install it: apt-get install chromium")
    command = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("no Chromium: `apt-get install chromium` took more than 300 s")
    found = shutil.which("chromium")
    if found is None:
        pytest.skip(f"no Chromium, and `apt-get install chromium` failed: {done.stderr.strip()[-200:]}")
    return found


def started() -> Iterator[Browser]:
    """A browser, for as long as it is asked for."""
    executable = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox"], timeout=1000 * PATIENCE_S
        )
        yield browser
        browser.close()
