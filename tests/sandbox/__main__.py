"""`python -m tests.sandbox`: run one job without a key, then serve a page to try more."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from . import media
from .providers import Sandbox
from .service import Service, ServiceError

INTRODUCTION = (
    "The sandbox plays ElevenLabs, Replicate and Supabase on this machine: "
    "no key, no cost, nothing leaves it.\n"
    "Not imitated: a real voice (espeak-ng's if installed, else one tone a letter), "
    "a mouth that moves (the picture nods\n"
    "and tilts), prices and plans, webhooks, files that expire by themselves.\n"
    "Pictures on this machine work here and nowhere else: "
    "elsewhere they must be on the public internet.\n"
)
TEXT = "Hello! I am Rex. I can talk now, and I have a lot to say!"
PROMPT = "The dog looks into the camera and talks"
VIDEO_FILE = Path("talking-pet.mp4")
VIDEO_SECONDS = 2.5
SPEECH_DELAY_S = 2.0  # with --eleven-slots, so that there is something to wait for
JOB_TIMEOUT_S = 660.0
LOG_POLL_S = 0.1  # how often the service's log is checked for new lines
PERMANENT = 10_000  # as often as a sandbox is asked before it ends
ERASE_TO_END = "\x1b[K" if sys.stdout.isatty() else ""  # of the line; empty if not on a terminal


def reject_uploads_of(sandbox: Sandbox, kind: str) -> None:
    """Let the bucket take every kind of file that the service uploads but this one."""
    kinds = ["application/json", "audio/mpeg", "video/mp4"]
    sandbox.buckets["pets"].allowed_mime_types = [one for one in kinds if one != kind]


def mp4_without_video() -> bytes:
    """A complete MP4 file in which there is nothing to play."""
    boxes = {b"ftyp": b"isom\0\0\0\0isom", b"moov": b"", b"mdat": bytes(1000)}
    return b"".join(
        (8 + len(data)).to_bytes(4, "big") + name + data for name, data in boxes.items()
    )


# How each stage can fail for good, as `--fail` names it.
FAILURES: dict[str, Callable[[Sandbox], None]] = {
    "speech": lambda sandbox: sandbox.fault("speech", "status", None, status=401),
    "audio_upload": lambda sandbox: reject_uploads_of(sandbox, "audio/mpeg"),
    "video": lambda sandbox: sandbox.outcome("failed", "The picture was flagged", PERMANENT),
    "download": lambda sandbox: sandbox.video("noise"),
    "mux": lambda sandbox: sandbox.video(mp4_without_video()),
    "final_upload": lambda sandbox: reject_uploads_of(sandbox, "video/mp4"),
}


class JobFailed(Exception):
    """The service returned an error, or its event stream broke off."""


def main() -> int:
    """Run the command; the exit code is 0 if the job made a video."""
    options = parse_options()
    print(INTRODUCTION)
    with ExitStack() as stack:
        providers = Sandbox(
            options.port,
            video_seconds=options.slow,
            tones=False,
            speech_slots=options.eleven_slots,
            speech_delay_s=SPEECH_DELAY_S if options.eleven_slots else 0.0,
        )
        sandbox = stack.enter_context(providers)
        if options.creates_per_minute:
            sandbox.limits(options.creates_per_minute)
        if options.fail:
            FAILURES[options.fail](sandbox)
        service = stack.enter_context(Service(sandbox.environment(), options.service_port))
        sandbox.service_url = service.url
        print(f"providers  {sandbox.url}")
        print(f"service    {service.url}  (uvicorn main:app, unchanged)")

        if options.verbose:
            stack.enter_context(log_printed(service))
        else:
            print(
                f"its log    {service.log_file.name}  (as long as this runs; --verbose prints it)"
            )

        succeeded = run_job(service, job_of(sandbox, options))
        if not options.once:
            stay_up(sandbox, service)
        return 0 if succeeded else 1


@contextmanager
def log_printed(service: Service) -> Iterator[None]:
    """Print the service's log line by line as it is written."""
    ended = threading.Event()
    file = Path(service.log_file.name)
    thread = threading.Thread(target=print_log, args=(file, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def print_log(file: Path, ended: threading.Event) -> None:
    """Print the lines of a growing file until `ended` is set and the last line is printed."""
    with file.open(encoding="utf-8", errors="replace") as log:
        line = ""
        while True:
            was_ended = ended.is_set()
            line += log.readline()
            if line.endswith("\n"):
                print(f"  log  {line.rstrip()}{ERASE_TO_END}", flush=True)
                line = ""
            elif was_ended:
                return
            else:
                ended.wait(LOG_POLL_S)


def stay_up(sandbox: Sandbox, service: Service) -> None:
    """Print the addresses of the page and the documentation, and wait for Ctrl-C."""
    page, docs = f"{sandbox.url}/", f"{service.url}/docs"
    with suppress(KeyboardInterrupt):
        print(f"\nopen {page} to try more, {docs} to read on; Ctrl-C ends")
        print("(/docs loads its script from a CDN; nothing else needs the internet)")
        sys.stdout.flush()
        threading.Event().wait()


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sandbox",
        description="Let a pet talk without a key.",
    )
    parser.add_argument("--once", action="store_true", help="end after the job")
    parser.add_argument("--text", default=TEXT, help="what the pet says")
    parser.add_argument("--image", help="a picture: a file or a URL")
    parser.add_argument("--model", help="a Replicate model, as owner/name")
    parser.add_argument(
        "--slow",
        type=seconds,
        default=VIDEO_SECONDS,
        metavar="SECONDS",
        help=f"how long a video takes (default: {VIDEO_SECONDS:g})",
    )
    parser.add_argument("--fail", choices=FAILURES, help="the stage in which every job fails")
    parser.add_argument(
        "--eleven-slots",
        type=positive,
        metavar="N",
        help="speeches that ElevenLabs makes at once; more are refused with 429",
    )
    parser.add_argument(
        "--creates-per-minute",
        type=positive,
        metavar="N",
        help="videos that Replicate begins in a minute; more are refused with 429",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="print the service's log as it comes",
    )
    parser.add_argument(
        "--port",
        type=port,
        default=0,
        help="of the providers and the page (default: a free one)",
    )
    parser.add_argument(
        "--service-port",
        type=port,
        default=0,
        help="of the service (default: a free one)",
    )
    return parser.parse_args()


def port(text: str) -> int:
    """Parse a port number; argparse reports the ValueError as an invalid port."""
    if not 0 <= int(text) <= 65_535:
        raise ValueError(text)
    return int(text)


def positive(text: str) -> int:
    """Parse a whole number from 1 on; argparse reports the ValueError as an invalid one."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def seconds(text: str) -> float:
    """Parse a time in seconds; argparse reports the ValueError as an invalid one."""
    if not 0 <= float(text) <= JOB_TIMEOUT_S:
        raise ValueError(text)
    return float(text)


def job_of(sandbox: Sandbox, options: argparse.Namespace) -> dict[str, Any]:
    """Build the job to post."""
    job = {
        "image_url": picture_url(sandbox, options.image),
        "prompt": PROMPT,
        "text": options.text,
        "voice_id": sandbox.voice_id,
        "fit": "speech",
    }
    if options.model:
        job["model"] = options.model
    return job


def picture_url(sandbox: Sandbox, image: str | None) -> str:
    """The URL of the picture; a local file replaces the sandbox's own picture."""
    if image is None:
        return sandbox.image_url
    if image.startswith(("http://", "https://")):
        return image
    sandbox.picture_file = Path(image).resolve(strict=True)
    return sandbox.image_url


def run_job(service: Service, job: dict[str, Any]) -> bool:
    """Run one job, show its progress and save its video; return False if it failed."""
    print(f"picture    {job['image_url']}")
    print(f"text       {job['text']}\n")
    print("POST /jobs_prompt_tts", flush=True)
    started = time.monotonic()
    with httpx.Client(base_url=service.url, timeout=JOB_TIMEOUT_S, trust_env=False) as client:
        try:
            result = post_job(client, job)
        except (JobFailed, httpx.HTTPError) as exc:
            print(f"\nThe job failed: {exc}")
            return False
        print(f"  {'in all':<14}{time.monotonic() - started:6.2f} s\n")
        print(f"{json.dumps(result, indent=2)}\n")
        save_video(client, result["final_url"])
    return True


def post_job(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """Post the job, show each stage, and return the result. Raises JobFailed if there is none."""
    headers = {"Accept": "text/event-stream"}
    with client.stream("POST", "/jobs_prompt_tts", json=job, headers=headers) as response:
        content_type = response.headers.get("content-type", "")
        if content_type.partition(";")[0] != "text/event-stream":
            raise JobFailed(response.read().decode())

        for name, data in events(response.iter_lines()):
            if name == "result":
                return data
            if name == "error":
                raise JobFailed(json.dumps(data, indent=2))
            show_stage(data)
    raise JobFailed("the event stream ended without a result")


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the data of each event of a stream."""
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def show_stage(stage: dict[str, Any]) -> None:
    """Print a line for a finished stage; on a terminal, also for one in progress."""
    name = stage["stage"].replace("_", " ")
    line = f"  {name:<14}{stage['seconds']:6.2f} s"
    if stage["state"] == "done":
        print(line + ERASE_TO_END, flush=True)
    elif ERASE_TO_END:
        percent = ""
        if stage.get("percent") is not None:
            percent = f"{stage['percent']} %"
        status = stage.get("status") or ""
        if stage.get("ahead") is not None:
            status += f", {stage['ahead']} ahead"
        print(f"{line}  {status} {percent}{ERASE_TO_END}", end="\r", flush=True)


def save_video(client: httpx.Client, url: str) -> None:
    """Save the final video in the current folder, and print what it is."""
    content = client.get(url).raise_for_status().content
    VIDEO_FILE.write_bytes(content)
    video = media.probe(VIDEO_FILE)
    length = f"{video.seconds:.1f} s"
    size = f"{video.width}x{video.height}"
    megabytes = len(content) / 1e6
    print(
        f"saved ./{VIDEO_FILE}: {length}, {size}, {video.video} + {video.audio}, {megabytes:.1f} MB"
    )


def end_on_sigterm(*_: object) -> None:
    """End as Ctrl-C does, so that the service's process ends too."""
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_on_sigterm)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ServiceError, OSError) as exc:
        sys.exit(str(exc))
