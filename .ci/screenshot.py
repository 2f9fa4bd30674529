"""`python .ci/screenshot.py`: take the README's picture of the try-it page, tests/sandbox/page.png."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
from conftest import launch
from playwright.sync_api import Page, ViewportSize, sync_playwright

from tests.sandbox import Sandbox, Service

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "tests" / "sandbox" / "page.png"
SIZE: ViewportSize = {"width": 1180, "height": 860}
MOMENT_S = 0.8  # of the video


def finish_a_job(page: Page, url: str) -> None:
    """Run one job on the page, and pause its video at a good moment."""
    page.goto(url)
    page.click("#start")
    page.wait_for_selector("#job[data-state=done]", timeout=60_000)
    page.wait_for_function(f"video.currentTime > {MOMENT_S}")
    page.evaluate(f"video.pause(), video.currentTime = {MOMENT_S}, scrollTo(0, 0)")
    page.wait_for_function("!video.seeking")
    page.mouse.move(0, 0)


def shrink(raw: Path, picture: Path) -> None:
    """Write a PNG of 256 colours: it has a third of the bytes and looks the same."""
    filters = "split[a][b];[a]palettegen=stats_mode=full[p];[b][p]paletteuse=dither=bayer:bayer_scale=4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", str(raw), "-vf", filters, str(picture)]
    subprocess.run(command, check=True, timeout=60)


def main() -> None:
    """Run one job on the sandbox in a browser, and take a picture of the page."""
    raw = PICTURE.with_suffix(".raw.png")
    with (
        Sandbox(video_seconds=1.5) as sandbox,
        Service(sandbox.environment()) as service,
        sync_playwright() as playwright,
    ):
        sandbox.service_url = service.url
        browser = launch(playwright)
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        finish_a_job(page, sandbox.url)
        page.screenshot(path=raw, full_page=True)
        browser.close()
    shrink(raw, PICTURE)
    raw.unlink()
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
