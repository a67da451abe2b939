"""Headless Chromium for the tests of the page: Debian's, nothing downloaded, no network."""

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver


@contextmanager
def chromium() -> Iterator[WebDriver]:
    """A browser with an empty profile; skips the test where Chromium or its driver is not installed."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("Chromium is not installed: Debian's packages are chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    switches = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"]
    switches += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]
    if os.geteuid() == 0:
        switches.append("--no-sandbox")
    for switch in switches:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With both paths given, selenium looks for nothing and downloads nothing.
    window = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    try:
        yield window
    finally:
        window.quit()


def show(window: WebDriver, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
    """Open the page as a file, in a window of that size."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    window.get(page.as_uri())


def complaints(window: WebDriver) -> list[str]:
    """What the browser has written to its console since it was asked last."""
    return [entry["message"] for entry in window.get_log("browser")]  # type: ignore[no-untyped-call]


def colours_of(window: WebDriver, picture: Path) -> int:
    """How many colours a PNG has, as the browser decodes it; leaves the page."""
    window.get("about:blank")
    data = base64.b64encode(picture.read_bytes()).decode()
    script = """
        const done = arguments[1], image = new Image();
        image.onload = () => {
          const canvas = document.createElement("canvas");
          canvas.width = image.width; canvas.height = image.height;
          const context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          done(new Set(new Uint32Array(context.getImageData(0, 0, image.width, image.height).data.buffer)).size);
        };
        image.src = "data:image/png;base64," + arguments[0];
    """
    return int(window.execute_async_script(script, data))
