"""The try-it page in a real browser; the service has another origin, as in production."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, Request, Route, expect

from tests.sandbox import Sandbox, Service
from tests.sandbox.media import VIDEO_FORMATS

JOB_MS = 30_000  # a job on the sandbox takes 1 to 3 s
FAILURE = "#job[data-state=failed] #failure:visible"
OpenPage = Callable[..., Page]
StartService = Callable[..., Service]


def wait_for(page: Page, state: str) -> None:
    """Wait until the job is `rest`, `working`, `done` or `failed`."""
    page.wait_for_selector(f"#job[data-state={state}]", timeout=JOB_MS)


def make_video(page: Page, **fields: str) -> None:
    """Fill in fields by their id and start the job."""
    fill_in(page, **fields)
    page.click("#start")


def fill_in(page: Page, **fields: str) -> None:
    """Fill in fields by their id, also those under "More"."""
    page.evaluate("document.getElementById('more').open = true")
    for name, value in fields.items():
        page.fill(f"#{name}", value)


def keep_going(page: Page, *, on: bool) -> None:
    """Choose whether the job has a key."""
    page.evaluate("document.getElementById('more').open = true")
    page.set_checked("#keep", on)


def failure(page: Page, *, key: bool = True, **fields: str) -> str:
    """Run a job that fails, and return what the page says; without a key nothing is retried."""
    keep_going(page, on=key)
    make_video(page, **fields)
    return page.locator(FAILURE).inner_text(timeout=JOB_MS)


def videos_paid_for(sandbox: Sandbox) -> int:
    """How many predictions there are."""
    return len(sandbox.predictions)


def slow_down_videos(sandbox: Sandbox, seconds: float = 1.5) -> None:
    """Let videos take long enough for something to happen meanwhile."""
    sandbox.video_seconds = seconds


def wait_until_video_starts(page: Page) -> None:
    """Wait until the video is being made."""
    expect(page.locator("#stages li[data-state=started]")).to_contain_text(
        "Animating the picture", timeout=JOB_MS
    )


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than its window."""
    return int(
        page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    )


PLAYBACK = """(({ videoWidth, webkitAudioDecodedByteCount, muted }) =>
    [videoWidth, webkitAudioDecodedByteCount, muted])(document.getElementById("video"))"""


def assert_plays(page: Page, *, sound: bool = True) -> None:
    """Assert that the video plays, with a picture and, unless it is silent, with sound."""
    page.wait_for_function("document.getElementById('video').currentTime > 0.8", timeout=10_000)
    width, audio_bytes, muted = page.evaluate(PLAYBACK)
    assert width > 0
    assert (audio_bytes > 0) is sound
    assert not muted


# ---- A job from beginning to end


def test_a_job_runs_to_a_video_that_plays_with_sound(page: Page, sandbox: Sandbox) -> None:
    """After one click there are six stages with their times; then the video plays, with its three URLs."""
    make_video(page)
    wait_for(page, "done")
    assert_plays(page)
    assert page.locator("#stages li[data-state=done]").count() == 6
    assert all(text.endswith(" s") for text in page.locator("#stages time").all_inner_texts())
    urls = [page.input_value(f"#{name}") for name in ("audio_url", "video_url", "final_url")]
    assert [page.request.get(url).status for url in urls] == [200, 200, 200]
    assert len(sandbox.calls("create")) == 1


FRAME = """async () => {
    const video = document.getElementById("video");
    video.pause();
    await new Promise((resolve) => { video.onseeked = resolve; video.currentTime = 0.5; });
    const canvas = new OffscreenCanvas(8, 6);
    canvas.getContext("2d").drawImage(video, 0, 0, 8, 6);
    return [...canvas.getContext("2d").getImageData(0, 0, 8, 6).data];
}"""


@pytest.mark.parametrize("video_format", [name for name in VIDEO_FORMATS if name != "h264"])
def test_whatever_a_model_hands_over_is_seen(page: Page, video_format: str) -> None:
    """It is converted, which is a stage of its own, and a decoded frame shows the same cat as usual."""
    page.evaluate("document.getElementById('video').crossOrigin = 'anonymous'")  # to look at it
    make_video(page, resolution="512p")
    wait_for(page, "done")
    assert_plays(page)
    usual = page.evaluate(FRAME)

    make_video(page, model=f"sandbox/{video_format}", resolution="240p", seconds="2")
    page.wait_for_selector(
        "#stages li[data-state=done] >> text=Converting the video", timeout=JOB_MS
    )
    wait_for(page, "done")
    assert_plays(page)
    assert page.locator("#stages li[data-state=done]").count() == 7
    difference = [abs(a - b) for a, b in zip(page.evaluate(FRAME), usual, strict=True)]
    assert sum(difference) / len(difference) < 12


def test_the_bar_shows_the_percentage_of_the_video(page: Page, sandbox: Sandbox) -> None:
    """While the video is made, the bar shows the percentage in the model's log."""
    sandbox.polls_to_finish, sandbox.video_seconds = 8, 1.5
    make_video(page)
    page.wait_for_function(
        "(bar => bar && bar.value > 0 && bar.value < 100)(document.querySelector('progress'))",
        timeout=JOB_MS,
    )
    expect(page.locator("#stages li[data-state=started] small")).to_contain_text("processing")
    wait_for(page, "done")
    assert page.locator("progress").count() == 0


def test_without_a_text_the_video_is_silent(page: Page, sandbox: Sandbox) -> None:
    """With an empty text there is no speech to pay for, and only one stage is shown."""
    page.fill("#text", "")
    expect(page.locator("#start")).to_have_text("Make a silent video")
    make_video(page)
    wait_for(page, "done")
    assert_plays(page, sound=False)
    assert page.locator("#stages li").count() == 1
    assert sandbox.calls("speech") == []


def test_settings_reach_the_model_and_empty_ones_are_left_out(page: Page, sandbox: Sandbox) -> None:
    """A filled-in field is sent as it is; an empty one is left to the service."""
    with page.expect_request("**/jobs_prompt_tts") as sent:
        make_video(page, seconds="10", resolution="512p")
    wait_for(page, "done")
    job = json.loads(sent.value.post_data or "")
    assert (job["seconds"], job["resolution"], job["fit"]) == (10, "512p", "speech")
    assert "model" not in job
    assert sandbox.calls("create")[0].body.count(b"512p") == 1


def test_a_browser_without_streams_gets_plain_json(open_page: OpenPage) -> None:
    """The page then asks for JSON: it shows no stages, but the same video."""
    page = open_page(script="delete Response.prototype.body")
    with page.expect_request("**/jobs_prompt_tts") as sent:
        make_video(page)
    wait_for(page, "done")
    assert sent.value.headers["accept"] == "application/json"
    assert_plays(page)


def test_a_picture_can_be_chosen_and_pasted(page: Page, sandbox: Sandbox) -> None:
    """Both are uploaded to the sandbox, and the job uses the URL that it returns."""
    pet = Path(__file__).parent.parent / "tests" / "sandbox" / "pet.jpg"
    page.set_input_files("#file", pet)
    expect(page.locator("#picture-hint")).to_have_text("Uploaded.")
    chosen = page.input_value("#image_url")
    page.evaluate(PASTE, list(pet.read_bytes()))
    page.wait_for_function(
        "before => document.getElementById('image_url').value !== before", arg=chosen
    )
    assert chosen.startswith(f"{sandbox.url}/pictures/")
    make_video(page)
    wait_for(page, "done")
    assert page.input_value("#image_url").encode() in sandbox.calls("create")[0].body


PASTE = """bytes => {
    const clipboardData = new DataTransfer();
    clipboardData.items.add(new File([new Uint8Array(bytes)], "pet.jpg", { type: "image/jpeg" }));
    document.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
}"""


def test_a_file_that_is_not_a_picture_is_rejected(page: Page, tmp_path: Path) -> None:
    """The page says so, and the address in the field stays as it was."""
    before = page.input_value("#image_url")
    (tmp_path / "note.png").write_text("not a picture")
    page.set_input_files("#file", tmp_path / "note.png")
    expect(page.locator("#picture-hint")).to_contain_text("could not be uploaded")
    assert page.input_value("#image_url") == before


def test_models_and_voices_are_chosen_from_lists_or_typed(page: Page, sandbox: Sandbox) -> None:
    """The lists have what the sandbox has; any other name can be typed, and is sent as it is."""
    offered = "id => [...document.getElementById(id).options].map(option => option.value)"
    assert set(page.evaluate(offered, "models")) == set(sandbox.replicate.models)
    assert sandbox.voice_id in page.evaluate(offered, "voices")
    fill_in(page, model="wan-video/wan-2.5-i2v")
    expect(page.locator("#model-hint")).to_contain_text("lips move")
    with page.expect_request("**/jobs_prompt_tts") as sent:
        message = failure(page, model="typed/by-hand")
    assert json.loads(sent.value.post_data or "")["model"] == "typed/by-hand"
    assert "Model: " in message


# ---- One video per job, whatever happens


def test_a_reload_continues_the_job(page: Page, sandbox: Sandbox) -> None:
    """The new page sends the same job and key, shows the stages so far, and one video is paid for."""
    slow_down_videos(sandbox)
    with page.expect_request("**/jobs_prompt_tts") as first:
        make_video(page, text="Before and after.", seconds="10")
    wait_until_video_starts(page)
    with page.expect_request("**/jobs_prompt_tts") as second:
        page.reload()
    wait_until_video_starts(page)
    expect(page.locator("#stages li[data-state=done]")).to_have_count(2)
    assert page.input_value("#text") == "Before and after."
    wait_for(page, "done")
    assert (first.value.post_data, sent_key(first.value)) == (
        second.value.post_data,
        sent_key(second.value),
    )
    assert (len(sandbox.calls("speech")), videos_paid_for(sandbox)) == (1, 1)
    page.reload()
    wait_for(page, "rest")


def sent_key(request: Request) -> str:
    """The idempotency key of a request, which must have one."""
    return request.headers["idempotency-key"]


@pytest.mark.parametrize(
    "has_response", [True, False], ids=["a proxy's error page", "no connection"]
)
def test_a_lost_connection_is_retried(page: Page, sandbox: Sandbox, has_response: bool) -> None:
    """The page says why and when it retries, and then has the video."""

    def fail(route: Route) -> None:
        """Respond with an error page, or not at all."""
        route.fulfill(status=502, body="<h1>Bad gateway</h1>") if has_response else route.abort(
            "connectionfailed"
        )

    page.route("**/jobs_prompt_tts", fail, times=1)
    make_video(page)
    expect(page.locator("#status")).to_contain_text("Trying again in 1 s")
    expect(page.locator("#aside")).to_contain_text(
        "502" if has_response else "The connection failed"
    )
    wait_for(page, "done")
    assert videos_paid_for(sandbox) == 1


def test_a_restarted_service_continues_the_job(
    page: Page, sandbox: Sandbox, start_service: StartService
) -> None:
    """Killed while the video is made: the page retries until a new process responds; done stages stay done."""
    service = start_service()
    slow_down_videos(sandbox)
    make_video(page, service=service.url)
    wait_until_video_starts(page)
    service.stop(signal.SIGKILL)
    expect(page.locator("#status")).to_contain_text("Trying again in")
    service.start()
    wait_for(page, "done")
    expect(page.locator("#stages li[data-state=done]")).to_have_count(6)
    assert (len(sandbox.calls("speech")), videos_paid_for(sandbox)) == (1, 1)


def test_a_closed_tab_finds_its_video(page: Page, sandbox: Sandbox) -> None:
    """A tab opened after it was closed goes on with the job by itself, and one video is paid for."""
    slow_down_videos(sandbox)
    make_video(page, text="Before and after.")
    wait_until_video_starts(page)
    page.close()
    later = page.context.new_page()
    later.goto(sandbox.url)
    wait_for(later, "done")
    assert later.input_value("#text") == "Before and after."
    assert videos_paid_for(sandbox) == 1


def test_another_tab_does_not_lose_a_job(page: Page, sandbox: Sandbox) -> None:
    """A job that another tab has finished meanwhile does not remove the one that this tab keeps."""
    slow_down_videos(sandbox)
    make_video(page)
    wait_until_video_starts(page)
    kept = page.evaluate("localStorage.order.replace(/[0-9a-f]{8}-/, 'ffffffff-')")
    page.evaluate("kept => localStorage.setItem('order', kept)", kept)
    wait_for(page, "done")
    assert page.evaluate("localStorage.order") == kept


def test_a_copied_tab_waits_for_the_same_video(page: Page, sandbox: Sandbox) -> None:
    """Both tabs show the one video."""
    slow_down_videos(sandbox)
    make_video(page)
    wait_until_video_starts(page)
    with page.expect_popup() as opened:
        page.evaluate("open(location.href)")
    for tab in (page, opened.value):
        wait_for(tab, "done")
    assert page.input_value("#final_url") == opened.value.input_value("#final_url")
    assert videos_paid_for(sandbox) == 1


def test_stop_waiting_does_not_stop_the_job(page: Page, sandbox: Sandbox) -> None:
    """The page says that the job continues and is paid for; the start button then gets its video."""
    slow_down_videos(sandbox)
    make_video(page)
    wait_until_video_starts(page)
    expect(page.locator("#cancel")).to_have_text("Stop waiting")
    expect(page.locator("#aside")).to_contain_text(
        "the video is still made and charged. Reload to pick it up again."
    )
    page.click("#cancel")
    expect(page.locator("#status")).to_have_text("No longer waiting")
    expect(page.locator("#failure")).to_contain_text("Charged so far: the speech")
    page.reload()
    expect(page.locator("#start")).to_have_text("Continue this video")
    page.click("#start")
    wait_for(page, "done")
    assert videos_paid_for(sandbox) == 1
    assert [prediction.status for prediction in sandbox.predictions.values()] == ["succeeded"]


def test_another_job_has_another_key(page: Page, sandbox: Sandbox) -> None:
    """A changed form makes a new video, and so does the same form once its video is ready."""
    slow_down_videos(sandbox)
    make_video(page)
    wait_until_video_starts(page)
    page.click("#cancel")
    page.fill("#text", "Something else.")
    expect(page.locator("#start")).to_have_text("Make the video")
    make_video(page)
    wait_for(page, "done")
    with page.expect_request("**/jobs_prompt_tts"):
        make_video(page)
    wait_for(page, "done")
    assert videos_paid_for(sandbox) == 3


def test_after_a_final_error_the_same_form_is_a_new_job(page: Page, sandbox: Sandbox) -> None:
    """The old key would replay the error, which disappears when the new job starts."""
    sandbox.outcome("failed", error="flagged")
    failure(page)
    expect(page.locator("#start")).to_have_text("Make the video")
    slow_down_videos(sandbox, 0.5)
    make_video(page)
    wait_until_video_starts(page)
    expect(page.locator("#failure")).to_be_hidden()
    wait_for(page, "done")
    assert videos_paid_for(sandbox) == 2


def test_an_error_that_is_not_retryable_uses_up_the_key(page: Page, sandbox: Sandbox) -> None:
    """Whatever its status is: the next attempt has another key."""
    sandbox.fault("create", "status", status=401)
    with page.expect_request("**/jobs_prompt_tts") as first:
        make_video(page)
    wait_for(page, "failed")
    expect(page.locator("#start")).to_have_text("Make the video")
    with page.expect_request("**/jobs_prompt_tts") as second:
        make_video(page)
    wait_for(page, "done")
    assert sent_key(first.value) != sent_key(second.value)


def test_without_a_key_cancel_stops_the_job_at_the_provider(page: Page, sandbox: Sandbox) -> None:
    """The prediction is canceled, the page says what was paid for and is ready for the next job."""
    sandbox.outcome("never")
    keep_going(page, on=False)
    with page.expect_request("**/jobs_prompt_tts") as sent:
        make_video(page)
    wait_until_video_starts(page)
    expect(page.locator("#aside")).to_contain_text("no video is made")
    page.click("#cancel")
    expect(page.locator("#status")).to_have_text("Cancelled")
    expect(page.locator("#failure")).to_contain_text(
        "Charged so far: the speech and the part of the video"
    )
    expect(page.locator("#start")).to_be_enabled()
    page.wait_for_timeout(1000)
    assert [prediction.status for prediction in sandbox.predictions.values()] == ["canceled"]
    assert "idempotency-key" not in sent.value.headers


def test_leaving_a_job_without_a_key_needs_a_confirmation(page: Page, sandbox: Sandbox) -> None:
    """Leaving cancels the job: the browser asks first, and the next page says once what was paid for."""
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.type), dialog.accept()))
    sandbox.outcome("never")
    keep_going(page, on=False)
    make_video(page)
    wait_until_video_starts(page)
    page.reload()
    expect(page.locator("#failure")).to_contain_text("Charged so far: the speech")
    assert dialogs == ["beforeunload"]
    page.reload()
    expect(page.locator("#failure")).to_be_hidden()


# ---- Stages and texts that a short job on the sandbox does not have


def sse(name: str, **data: object) -> str:
    """One event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def respond(page: Page, *events: str) -> None:
    """Let the next job be answered with these events."""
    page.route(
        "**/jobs_prompt_tts",
        lambda route: route.fulfill(
            status=200, content_type="text/event-stream", body="".join(events)
        ),
        times=1,
    )


@pytest.mark.parametrize(
    ("ahead", "text"),
    [
        (3, "waiting in line, 3 jobs ahead"),
        (1, "waiting in line, 1 job ahead"),
        (0, "next in line"),
        (None, "waiting in line"),
    ],
)
def test_a_job_in_line_says_how_many_are_ahead(page: Page, ahead: int | None, text: str) -> None:
    """A provider that is busy takes the jobs one after the other."""
    respond(
        page,
        sse("stage", stage="speech", state="progress", seconds=1, status="queued", ahead=ahead),
    )
    failure(page, key=False)
    expect(page.locator("#stages li").first).to_contain_text(f"ElevenLabs · {text}")


def test_a_conversion_is_shown_when_there_is_one(page: Page) -> None:
    """It has its place between the download and the mux."""
    respond(page, sse("stage", stage="convert", state="done", seconds=3.5))
    failure(page, key=False)
    titles = page.locator("#stages li span:first-child").all_inner_texts()
    assert [title.split()[0] for title in titles] == [
        *("Making", "Storing", "Animating", "Downloading"),
        *("Converting", "Combining", "Storing"),
    ]


def test_words_that_do_not_fit_are_announced_before_anything_is_charged(page: Page) -> None:
    """The page estimates their length, and one click lets the video end with them."""
    page.fill("#text", "Walk! " * 50)
    expect(page.locator("#fit-hint")).to_be_empty()
    page.select_option("#fit", "shortest")
    expect(page.locator("#fit-hint")).to_contain_text(
        "about 20 s to say, the video has time for 5.5 s"
    )
    page.locator("#fit-hint button").click()
    assert page.input_value("#fit") == "speech"
    expect(page.locator("#fit-hint")).to_be_empty()


@pytest.mark.parametrize(
    ("fit", "warning"),
    [
        (
            "shortest",
            "The speech takes 9.0 s. The video ends earlier: about 3.5 s of speech will be cut.",
        ),
        (
            "video",
            "The speech takes 9.0 s. The video ends earlier: about 3.5 s of speech will be cut.",
        ),
        ("speech", ""),
    ],
)
def test_a_speech_that_will_be_cut_is_announced_when_it_is_made(
    page: Page, sandbox: Sandbox, fit: str, warning: str
) -> None:
    """Its length is known before the video is made; while the page tries again, the text stays."""
    respond(page, sse("stage", stage="speech", state="done", seconds=1, audio_seconds=9.0))
    slow_down_videos(sandbox, 60)
    page.select_option("#fit", fit)
    make_video(page)
    expect(page.locator("#status")).to_contain_text("Trying again")
    expect(page.locator("#cut")).to_have_text(warning)


def test_a_speech_that_was_cut_is_announced_and_all_of_it_offered(
    page: Page, sandbox: Sandbox
) -> None:
    """The button only changes the form: another video is charged."""
    urls = dict.fromkeys(("audio_url", "video_url", "final_url"), sandbox.image_url)
    respond(page, sse("result", **urls, audio_seconds=9.0, final_seconds=6.0, cut_seconds=3.5))
    page.select_option("#fit", "shortest")
    make_video(page)
    wait_for(page, "done")
    expect(page.locator("#cut")).to_contain_text("3.5 s of the speech were cut")
    page.locator("#cut button").click()
    assert page.input_value("#fit") == "speech"
    expect(page.locator("#start")).to_be_focused()
    assert sandbox.calls("speech") == []


def test_a_picture_that_is_not_there_is_reported(page: Page, sandbox: Sandbox) -> None:
    """At the field and in place of the picture, until there is one."""
    page.fill("#image_url", f"{sandbox.url}/pictures/gone.jpg")
    page.locator("#image_url").blur()
    expect(page.locator("#image_url-error")).to_have_text("There is no picture at this address.")
    expect(page.locator("#no-picture")).to_be_visible()
    page.fill("#image_url", sandbox.image_url)
    page.locator("#image_url").blur()
    expect(page.locator("#image_url-error")).to_have_count(0)
    expect(page.locator("#no-picture")).to_be_hidden()


def test_the_final_video_can_be_downloaded(page: Page, sandbox: Sandbox) -> None:
    """It is saved under a name of its own, although the storage has another origin than a front end."""
    sandbox.video_seconds = 0.5
    make_video(page)
    wait_for(page, "done")
    with page.expect_download() as download:
        page.get_by_label("Download: The final video").click()
    assert download.value.suggested_filename == "talking-pet.mp4"
    assert download.value.path().read_bytes()[4:8] == b"ftyp"


def test_an_invalid_field_under_more_is_shown(page: Page) -> None:
    """The less usual fields are folded away, but not with an error in them."""
    expect(page.locator("#seconds")).to_be_hidden()
    fill_in(page, service="")
    page.evaluate("document.getElementById('more').open = false")
    page.click("#start")
    expect(page.locator("#service")).to_be_focused()


def test_a_field_under_more_that_is_refused_is_shown(page: Page) -> None:
    """Only the service knows that it is invalid."""
    fill_in(page, seconds="soon")
    page.evaluate("document.getElementById('more').open = false")
    page.click("#start")
    expect(page.locator("#seconds-error")).to_be_visible(timeout=JOB_MS)


def test_cookies_are_sent_where_asked(page: Page, service: Service) -> None:
    """With `credentials: "include"` a proxy's cookie reaches another origin; without it, it does not."""
    page.context.add_cookies([{"name": "session", "value": "mine", "url": service.url}])
    cookies: list[str | None] = []

    def answer(route: Route) -> None:
        """Note the cookie, and refuse."""
        cookies.append(route.request.all_headers().get("cookie"))
        headers = {
            "access-control-allow-origin": page.url.rstrip("/"),
            "access-control-allow-credentials": "true",
        }
        route.fulfill(status=403, body="No", headers=headers)

    page.route("**/jobs_prompt_only", answer)
    for credentials in ("include", "same-origin"):
        page.evaluate(CALL_CLIENT, [service.url, credentials])
    assert cookies == ["session=mine", None]


CALL_CLIENT = """async ([service, credentials]) => {
    const { makeVideo } = await import("/client.js");
    await makeVideo({ image_url: "x", prompt: "y" }, { service, credentials }).catch(() => {});
}"""


# ---- Errors, read from another origin


def test_a_configuration_error_names_the_variable(page: Page, start_service: StartService) -> None:
    """The service lacks a provider's API key: the page says which, and that nothing was paid for."""
    message = failure(page, service=start_service(ELEVEN_API_KEY="").url)
    assert "The service is not set up" in message
    assert "ELEVEN_API_KEY" in message


def test_a_validation_error_marks_the_field(page: Page, sandbox: Sandbox) -> None:
    """Every error is listed, and its field is marked."""
    message = failure(page, voice_id="../me", seconds="soon")
    assert "Something in the form is not valid" in message
    assert "Voice: " in message
    assert "Seconds: " in message
    assert [field.get_attribute("id") for field in page.locator("[aria-invalid]").all()] == [
        "voice_id",
        "seconds",
    ]
    expect(page.locator("#seconds-error")).to_be_visible()
    page.locator("#failure a", has_text="Voice").click()
    expect(page.locator("#voice_id")).to_be_focused()
    assert sandbox.calls("speech") == []
    make_video(page, voice_id=sandbox.voice_id, seconds="")
    wait_for(page, "done")
    assert page.locator("[aria-invalid]").count() == 0


def test_a_field_that_a_provider_rejects_is_marked(page: Page, sandbox: Sandbox) -> None:
    """Only ElevenLabs knows that the voice is missing; the mark goes when the field is changed."""
    message = failure(page, voice_id="NobodysVoice00000001")
    assert "Voice: " in message
    expect(page.locator("#voice_id-error")).to_contain_text("was not found")
    page.fill("#voice_id", sandbox.voice_id)
    assert page.locator("[aria-invalid], .hint.bad:visible").count() == 0


def test_a_provider_error_names_it_and_keeps_the_speech(page: Page, sandbox: Sandbox) -> None:
    """The page shows the model's own message, the stage that failed, and the speech that was paid for."""
    sandbox.outcome("failed", error="The picture was flagged as sensitive")
    message = failure(page)
    assert "Replicate rejected this job" in message
    assert "flagged as sensitive" in message
    assert "Animating the picture" in page.locator("li[data-state=failed]").inner_text()
    expect(page.locator("label[for=audio_url]")).to_contain_text("still usable")
    assert page.request.get(page.input_value("#audio_url")).ok


def test_a_provider_that_is_down_gives_other_advice(page: Page, sandbox: Sandbox) -> None:
    """The advice is to wait, or to ask the operator, and not to change the input."""
    sandbox.fault("speech", "status", times=None, status=503)
    message = failure(page, key=False)
    assert "ElevenLabs failed" in message
    assert "Try again in a few minutes" in message
    sandbox.reset()
    sandbox.fault("speech", "status", times=None, status=401)
    assert "Trying again will not help" in failure(page)


def test_a_resource_error_keeps_what_was_made(page: Page, sandbox: Sandbox) -> None:
    """ffmpeg cannot use the video, but speech and video can still be downloaded."""
    sandbox.video(b"this is no video")
    message = failure(page)
    assert "A file could not be stored, downloaded or used" in message
    assert page.locator("#links li").count() == 2


def test_an_internal_error_gives_the_request_id(
    page: Page, sandbox: Sandbox, start_service: StartService
) -> None:
    """The service stops during a job without a key: the id is in its log, too."""
    service = start_service(graceful_s=1)
    sandbox.outcome("never")
    keep_going(page, on=False)
    make_video(page, service=service.url)
    wait_until_video_starts(page)
    service.stop()
    message = page.locator(FAILURE).inner_text(timeout=JOB_MS)
    assert "The service could not finish the job" in message
    assert page.locator("#failure code").inner_text() in service.log


def test_the_page_says_that_the_service_does_not_respond(page: Page) -> None:
    """This error has the category "network", and not one of the service's."""
    assert "No valid response from the service" in failure(
        page, key=False, service="http://127.0.0.1:9"
    )


def test_the_page_shows_the_status_of_a_proxys_error(page: Page, service: Service) -> None:
    """The response did not come from the service; its words are passed on."""
    page.route(
        "**/jobs_prompt_tts", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>")
    )
    message = failure(page, key=False)
    assert "status 502" in message
    assert "Bad gateway" in message


def test_the_page_says_that_the_stream_broke_off(page: Page) -> None:
    """A stream without a result or an error at its end is not a success."""
    half = 'event: stage\ndata: {"stage": "speech", "state": "started", "seconds": 0}\n\n'
    page.route(
        "**/jobs_prompt_tts",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=half),
    )
    message = failure(page, key=False)
    assert "ended before the video was ready" in message
    assert "Charged so far: the speech, if it was made in time." in message


def test_another_origin_may_send_and_read_the_request_id(
    page: Page, service: Service, sandbox: Sandbox
) -> None:
    """A front end can set a request's id, and read it and the stages' times from the response's headers."""
    request_id, timing = page.evaluate(FETCH_HEADERS, [service.url, sandbox.image_url])
    assert request_id == "from-the-page"
    assert timing.startswith("video;dur=")


FETCH_HEADERS = """async ([service, image_url]) => {
    const headers = { "Content-Type": "application/json", "X-Request-ID": "from-the-page" };
    const body = JSON.stringify({ image_url, prompt: "It nods" });
    const response = await fetch(`${service}/jobs_prompt_only`, { method: "POST", headers, body });
    return [response.headers.get("X-Request-ID"), response.headers.get("Server-Timing")];
}"""


# ---- Accessibility and small screens


def test_the_page_fits_a_phone(open_page: OpenPage, sandbox: Sandbox) -> None:
    """At 360 px nothing overflows in any state of the page."""
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    sandbox.polls_to_finish, sandbox.video_seconds = 8, 1.0
    widths = {"rest": overflow(page)}
    make_video(page)
    page.wait_for_selector("progress", timeout=JOB_MS)
    widths["working"] = overflow(page)
    page.reload()
    page.wait_for_selector("progress", timeout=JOB_MS)
    widths["reloaded"] = overflow(page)
    wait_for(page, "done")
    widths["done"] = overflow(page)
    sandbox.outcome("failed", error="x" * 250)
    failure(page)
    widths["failed"] = overflow(page)
    failure(page, voice_id="NobodysVoice00000001")
    widths["failed in a field"] = overflow(page)
    make_video(page, voice_id=sandbox.voice_id)
    page.click("#cancel")
    widths["left"] = overflow(page)
    assert widths == dict.fromkeys(widths, 0)


def test_the_main_button_needs_no_scrolling(page: Page) -> None:
    """On a laptop's screen."""
    expect(page.locator("#start")).to_be_in_viewport(ratio=1)


def test_the_step_at_work_is_in_view_on_a_phone(open_page: OpenPage, sandbox: Sandbox) -> None:
    """The form is above it, and out of sight; its progress bar is in view, too."""
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    slow_down_videos(sandbox, 2)
    make_video(page)
    expect(page.locator("#stages li[data-state=started] progress")).to_be_in_viewport(
        ratio=1, timeout=JOB_MS
    )


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's script, which finds violations of WCAG."""
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "axe-core@4"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


VIOLATIONS = """() => axe.run(document, { resultTypes: ["violations"] })
    .then(({ violations }) => violations.map(({ id, nodes }) => [id, nodes.map(({ html }) => html)]))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_has_no_violation_of_accessibility(
    open_page: OpenPage, sandbox: Sandbox, axe: str, scheme: str
) -> None:
    """At rest, with "More" open, working, done, failing, and with an invalid field."""
    page = open_page(color_scheme=scheme, reduced_motion="reduce")
    page.evaluate(axe)
    found = {"rest": page.evaluate(VIOLATIONS)}
    fill_in(page)
    found["more"] = page.evaluate(VIOLATIONS)
    slow_down_videos(sandbox, 3)
    make_video(page)
    page.wait_for_selector("progress", timeout=JOB_MS)
    found["working"] = page.evaluate(VIOLATIONS)
    assert page.get_attribute("#job", "data-state") == "working"
    wait_for(page, "done")
    found["done"] = page.evaluate(VIOLATIONS)
    sandbox.outcome("failed", error="flagged")
    failure(page)
    found["failing"] = page.evaluate(VIOLATIONS)
    failure(page, voice_id="../me")
    found["invalid"] = page.evaluate(VIOLATIONS)
    assert found == dict.fromkeys(found, [])


def test_the_keyboard_alone_is_enough(open_page: OpenPage, sandbox: Sandbox) -> None:
    """A job and the copy of its URL need no mouse, and the focus is always visible."""
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    focused = "document.activeElement.id"
    reached = []
    while "start" not in reached:
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focused))
        assert len(reached) < 20
        assert page.evaluate("document.activeElement.matches(':focus-visible')")
    assert reached[:4] == ["image_url", "file", "prompt", "text"]
    page.keyboard.press("Enter")
    wait_for(page, "done")
    assert page.evaluate(focused) == "video"
    page.focus("#final_url")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.input_value("#final_url")


def test_cancelling_by_keyboard_returns_the_focus(page: Page, sandbox: Sandbox) -> None:
    """The cancel button has the focus while a job runs, and then the start button."""
    sandbox.outcome("never")
    page.focus("#start")
    page.keyboard.press("Enter")
    expect(page.locator("#cancel")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#start")).to_be_focused()


def test_every_field_has_a_name(page: Page) -> None:
    """A screen reader can name each field and button."""
    nameless = "[...document.querySelectorAll('input, textarea, select, button, video, img')]"
    nameless += ".filter(e => !(e.labels?.length || e.ariaLabel || e.alt || e.textContent.trim())).map(e => e.outerHTML)"
    assert page.evaluate(nameless) == []


def test_reduced_motion_is_respected(open_page: OpenPage) -> None:
    """Nothing is animated, and the video does not start by itself."""
    page = open_page(reduced_motion="reduce")
    make_video(page)
    assert page.evaluate("document.getAnimations().length") == 0
    wait_for(page, "done")
    page.wait_for_timeout(300)
    assert page.evaluate("document.getElementById('video').paused")
