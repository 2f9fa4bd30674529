"""`python -m tests.sandbox`: one speech job on the sandbox, without a key, and then a page to try more."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from . import media
from .providers import Sandbox
from .service import Service, ServiceError

INTRODUCTION = """\
The sandbox plays ElevenLabs, Replicate and Supabase on this machine: no key, no cost, nothing leaves it.
Not imitated: a real voice (espeak-ng's if installed, else one tone a letter), a mouth that moves (the picture nods
and tilts), prices and plans, webhooks, files that expire by themselves.
"""
TEXT = "Hello! I am Rex. I can talk now, and I have a lot to say!"
PROMPT = "The dog looks into the camera and talks"
VIDEO_FILE = Path("talking-pet.mp4")
VIDEO_SECONDS = 2.5
JOB_TIMEOUT_S = 660.0
FOLLOW_S = 0.1  # between two looks at the service's log
ERASE_TO_END = "\x1b[K" if sys.stdout.isatty() else ""  # of the line; empty where nobody watches


class JobFailed(Exception):
    """The service answered with an error, or not to the end."""


def main() -> int:
    """Run the command; the exit code is 0 if the job gave a video."""
    options = parse_options()
    print(INTRODUCTION)
    with Sandbox(options.port, video_seconds=VIDEO_SECONDS, tones=False) as sandbox:
        with Service(sandbox.environment(), options.service_port) as service, ExitStack() as beside:
            sandbox.service_url = service.url
            print(f"providers  {sandbox.url}")
            print(f"service    {service.url}  (uvicorn main:app, unchanged)")
            if options.verbose:
                beside.enter_context(log_shown(service))
            else:
                print(f"its log    {service.log_file.name}  (as long as this runs; --verbose prints it)")
            succeeded = run_job(service, job_of(sandbox, options))
            if not options.once:
                stay_up(sandbox, service)
            return 0 if succeeded else 1


@contextmanager
def log_shown(service: Service) -> Iterator[None]:
    """Print what the service logs, line by line as it comes."""
    ended = threading.Event()
    thread = threading.Thread(target=print_log, args=(Path(service.log_file.name), ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def print_log(file: Path, ended: threading.Event) -> None:
    """Print the lines of a file that grows, until told that it has ended."""
    with file.open(encoding="utf-8", errors="replace") as log:
        line = ""
        while True:
            was_last = ended.is_set()
            line += log.readline()
            if line.endswith("\n"):
                print(f"  log  {line.rstrip()}{ERASE_TO_END}", flush=True)
                line = ""
            elif was_last:
                return
            else:
                ended.wait(FOLLOW_S)


def stay_up(sandbox: Sandbox, service: Service) -> None:
    """Say where the page is, and wait for Ctrl-C."""
    with suppress(KeyboardInterrupt):
        print(f"\nopen {sandbox.url}/ to try more, {service.url}/docs to read on; Ctrl-C ends", flush=True)
        threading.Event().wait()


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.sandbox", description="Let a pet talk without a key.")
    parser.add_argument("--once", action="store_true", help="end after the job")
    parser.add_argument("--text", default=TEXT, help="what the pet says")
    parser.add_argument("--image", help="a picture: a file or a URL")
    parser.add_argument("--model", help="a Replicate model, as owner/name")
    parser.add_argument("--verbose", action="store_true", help="print the service's log as it comes")
    parser.add_argument("--port", type=port, default=0, help="of the providers and the page (default: a free one)")
    parser.add_argument("--service-port", type=port, default=0, help="of the service (default: a free one)")
    return parser.parse_args()


def port(text: str) -> int:
    """A port's number. ValueError if there is no such port, which is told as an invalid one."""
    if not 0 <= int(text) <= 65_535:
        raise ValueError(text)
    return int(text)


def job_of(sandbox: Sandbox, options: argparse.Namespace) -> dict[str, Any]:
    """The body to post."""
    job = {"image_url": picture_url(sandbox, options.image), "prompt": PROMPT, "text": options.text}
    chosen = {"model": options.model} if options.model else {}
    return {**job, "voice_id": sandbox.voice_id, "fit": "speech", **chosen}


def run_job(service: Service, job: dict[str, Any]) -> bool:
    """Run one job, tell of it as it happens, and save its video; False if it failed."""
    print(f"picture    {job['image_url']}\ntext       {job['text']}\n\nPOST /jobs_prompt_tts", flush=True)
    started = time.monotonic()
    with httpx.Client(base_url=service.url, timeout=JOB_TIMEOUT_S, trust_env=False) as client:
        try:
            result = answer_of(client, job)
        except (JobFailed, httpx.HTTPError) as exc:
            print(f"\nThe job failed: {exc}")
            return False
        print(f"  {'in all':<14}{time.monotonic() - started:6.2f} s\n\n{json.dumps(result, indent=2)}\n")
        save_video(client, result["final_url"])
    return True


def picture_url(sandbox: Sandbox, image: str | None) -> str:
    """The URL of the picture to use; a local file takes the place of the sandbox's own picture."""
    if image is None or image.startswith(("http://", "https://")):
        return image or sandbox.image_url
    sandbox.picture_file = Path(image).resolve(strict=True)
    return sandbox.image_url


def answer_of(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """The job's result, each stage shown while it lasts; JobFailed if there is none."""
    headers = {"Accept": "text/event-stream"}
    with client.stream("POST", "/jobs_prompt_tts", json=job, headers=headers) as answer:
        if answer.headers.get("content-type", "").partition(";")[0] != "text/event-stream":
            raise JobFailed(answer.read().decode())
        for name, data in events(answer.iter_lines()):
            if name == "result":
                return data
            if name == "error":
                raise JobFailed(json.dumps(data, indent=2))
            show_stage(data)
    raise JobFailed("the event stream ended without a result")


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and data of each event of a stream."""
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def show_stage(stage: dict[str, Any]) -> None:
    """One line a stage; on a terminal the line is there while the stage lasts, with the video's progress."""
    line = f"  {stage['stage'].replace('_', ' '):<14}{stage['seconds']:6.2f} s"
    if stage["state"] == "done":
        print(line + ERASE_TO_END, flush=True)
    elif ERASE_TO_END:
        percent = f"{stage['percent']} %" if stage.get("percent") is not None else ""
        print(f"{line}  {stage.get('status') or ''} {percent}{ERASE_TO_END}", end="\r", flush=True)


def save_video(client: httpx.Client, url: str) -> None:
    """Save the video beside the caller, and say where."""
    VIDEO_FILE.write_bytes(client.get(url).raise_for_status().content)
    video = media.probe(VIDEO_FILE)
    size = f"{VIDEO_FILE.stat().st_size / 1e6:.1f} MB"
    print(
        f"saved ./{VIDEO_FILE}: {video.seconds:.1f} s, {video.width}x{video.height}, {video.video} + {video.audio}, {size}"
    )


def end_on_sigterm(*_: object) -> None:
    """Leave the way Ctrl-C does, so that the service's process ends too."""
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_on_sigterm)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ServiceError, OSError) as exc:
        sys.exit(str(exc))
