"""Take the pictures in `docs/` from a real quickstart: the report, and the monitor's pages, in the system's chromium.

    python -m bench.screenshots

Runs in a temporary directory, so that no path of this machine is in a picture.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parents[1] / "docs"
DEVICE_PYTHON = Path(__file__).parents[1] / ".venv-device" / "bin" / "python"
CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
SETTLE_MS = 2500


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="fieldvit-") as directory:
        command = [sys.executable, "-u", "-m", "host.cli", "quickstart", "--keep-running", "--runs", directory]
        command += ["--device-python", str(DEVICE_PYTHON)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        try:
            page_url = _wait_for_page(process)
            _shoot(page_url, Path(directory) / "quickstart" / "report.html")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
    return 0


def _wait_for_page(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")
        if found := re.search(r"the page is (http://\S+)", line):
            return found.group(1).rstrip("/")
    raise SystemExit(f"the quickstart ended with exit code {process.wait()} before its page was up")


def _shoot(page_url: str, report: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        wide = browser.new_page(viewport={"width": 1180, "height": 900})
        _picture(wide, report.as_uri(), "report", full=True)
        _picture(wide, f"{page_url}/device/quickstart/board-1", "monitor", full=True)
        _picture(wide, page_url, "fleet", full=False)
        phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        _picture(phone, f"{page_url}/device/quickstart/board-1", "monitor-phone", full=False)
        browser.close()


def _picture(page: Page, url: str, name: str, *, full: bool) -> None:
    page.goto(url)
    page.wait_for_timeout(SETTLE_MS)
    page.screenshot(path=DOCS / f"{name}.png", full_page=full)


if __name__ == "__main__":
    sys.exit(main())
