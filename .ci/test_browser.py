"""The try-it page in a real browser: sandbox, service and page on three origins, as in real life."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, Request, Route, expect

from tests.sandbox import Sandbox, Service

JOB_MS = 30_000  # a job on the sandbox takes 1 to 3 s
FAILURES_SHOWN = "#job[data-state=failed] #failure:visible"
OpenPage = Callable[..., Page]
StartService = Callable[..., Service]


def wait_for(page: Page, state: str) -> None:
    """Wait until the job is `rest`, `working`, `done` or `failed`."""
    page.wait_for_selector(f"#job[data-state={state}]", timeout=JOB_MS)


def make_video(page: Page, **fields: str) -> None:
    """Fill in fields by their id and start the job."""
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.click("#start")


def failure(page: Page, *, key: bool = True, **fields: str) -> str:
    """Run a job that fails; what the page then says. Without a key it fails at once also where it could be repeated."""
    page.set_checked("#keep", key)
    make_video(page, **fields)
    return page.locator(FAILURES_SHOWN).inner_text(timeout=JOB_MS)


def videos_bought(sandbox: Sandbox) -> int:
    """Predictions made."""
    return len(sandbox.predictions)


def slow_video(sandbox: Sandbox, seconds: float = 1.5) -> None:
    """Let the next videos take long enough for something to happen meanwhile."""
    sandbox.video_seconds = seconds


def making_video(page: Page) -> None:
    """Wait until the video is being made."""
    expect(page.locator("#stages li[data-state=started]")).to_contain_text("Video the picture", timeout=JOB_MS)


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


SEEN_AND_HEARD = """(({ videoWidth, webkitAudioDecodedByteCount, muted }) =>
    [videoWidth, webkitAudioDecodedByteCount, muted])(document.getElementById("video"))"""


def plays(page: Page, *, sound: bool = True) -> None:
    """Make sure that the video moves on, has a picture, and that its sound is decoded."""
    page.wait_for_function("document.getElementById('video').currentTime > 0.8", timeout=10_000)
    picture, heard, muted = page.evaluate(SEEN_AND_HEARD)
    assert picture > 0
    assert (heard > 0) is sound
    assert not muted


# ---- A job from beginning to end


def test_a_job_runs_to_a_video_that_plays_with_sound(page: Page, sandbox: Sandbox) -> None:
    """One click, six steps with their times, then the video plays by itself and the three addresses can be copied."""
    make_video(page)
    wait_for(page, "done")
    plays(page)
    assert page.locator("#stages li[data-state=done]").count() == 6
    assert all(text.endswith(" s") for text in page.locator("#stages time").all_inner_texts())
    shown = [page.input_value(f"#{name}") for name in ("audio_url", "video_url", "final_url")]
    assert [page.request.get(url).status for url in shown] == [200, 200, 200]
    assert len(sandbox.calls("create")) == 1


def test_the_bar_shows_the_percentage_of_the_video(page: Page, sandbox: Sandbox) -> None:
    """While the video is made, the bar has the percentage that the model's log tells."""
    sandbox.reads_to_finish, sandbox.video_seconds = 8, 1.5
    make_video(page)
    page.wait_for_function(
        "(bar => bar && bar.value > 0 && bar.value < 100)(document.querySelector('progress'))", timeout=JOB_MS
    )
    expect(page.locator("#stages li[data-state=started] small")).to_contain_text("processing")
    wait_for(page, "done")
    assert page.locator("progress").count() == 0


def test_without_a_text_the_video_is_silent(page: Page, sandbox: Sandbox) -> None:
    """An empty text asks for the video alone: no voice is bought, one step is shown."""
    page.fill("#text", "")
    expect(page.locator("#start")).to_have_text("Make a video without speech")
    make_video(page)
    wait_for(page, "done")
    plays(page, sound=False)
    assert page.locator("#stages li").count() == 1
    assert sandbox.calls("speech") == []


def test_settings_reach_the_model_and_empty_ones_are_left_out(page: Page, sandbox: Sandbox) -> None:
    """A filled-in field is sent as it is; an empty one leaves the choice to the service."""
    with page.expect_request("**/jobs_prompt_tts") as sent:
        make_video(page, seconds="10", resolution="512p")
    wait_for(page, "done")
    job = json.loads(sent.value.post_data or "")
    assert (job["seconds"], job["resolution"], job["fit"]) == (10, "512p", "shortest")
    assert "model" not in job
    assert sandbox.calls("create")[0].body.count(b"512p") == 1


def test_a_browser_without_streams_gets_plain_json(open_page: OpenPage) -> None:
    """The page then asks for JSON: no steps, the same video."""
    page = open_page(script="delete Response.prototype.body")
    with page.expect_request("**/jobs_prompt_tts") as sent:
        make_video(page)
    wait_for(page, "done")
    assert sent.value.headers["accept"] == "application/json"
    plays(page)


def test_a_picture_can_be_chosen_and_pasted(page: Page, sandbox: Sandbox, tmp_path: Path) -> None:
    """Both go to the sandbox, which gives the address that the job then uses."""
    pet = Path(__file__).parent.parent / "tests" / "sandbox" / "pet.jpg"
    page.set_input_files("#file", pet)
    expect(page.locator("#picture-hint")).to_have_text("Uploaded.")
    chosen = page.input_value("#image_url")
    page.evaluate(PASTE, list(pet.read_bytes()))
    page.wait_for_function("before => document.getElementById('image_url').value !== before", arg=chosen)
    assert chosen.startswith(f"{sandbox.url}/pictures/")
    make_video(page)
    wait_for(page, "done")
    assert page.input_value("#image_url").encode() in sandbox.calls("create")[0].body


PASTE = """bytes => {
    const clipboardData = new DataTransfer();
    clipboardData.items.add(new File([new Uint8Array(bytes)], "pet.jpg", { type: "image/jpeg" }));
    document.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
}"""


def test_a_file_that_is_no_picture_is_refused_in_words(page: Page, tmp_path: Path) -> None:
    """The address in the field stays as it was."""
    before = page.input_value("#image_url")
    (tmp_path / "note.png").write_text("not a picture")
    page.set_input_files("#file", tmp_path / "note.png")
    expect(page.locator("#picture-hint")).to_contain_text("could not be uploaded")
    assert page.input_value("#image_url") == before


def test_models_and_voices_are_chosen_from_lists_or_typed(page: Page, sandbox: Sandbox) -> None:
    """What the sandbox has is offered; a name that it does not offer can be typed, and goes out as it is."""
    offered = "id => [...document.getElementById(id).options].map(option => option.value)"
    assert set(page.evaluate(offered, "models")) == set(sandbox.replicate.models)
    assert sandbox.voice_id in page.evaluate(offered, "voices")
    page.fill("#model", "wan-video/wan-2.5-i2v")
    expect(page.locator("#model-hint")).to_contain_text("speaks")
    with page.expect_request("**/jobs_prompt_tts") as sent:
        said = failure(page, model="typed/by-hand")
    assert json.loads(sent.value.post_data or "")["model"] == "typed/by-hand"
    assert "Model: " in said


# ---- One video, whatever happens on the way


def test_a_reload_goes_on_with_the_job(page: Page, sandbox: Sandbox) -> None:
    """The new page sends the same job with the same key, shows the steps so far, and one video is paid for."""
    slow_video(sandbox)
    with page.expect_request("**/jobs_prompt_tts") as first:
        make_video(page, text="Before and after.", seconds="10")
    making_video(page)
    with page.expect_request("**/jobs_prompt_tts") as second:
        page.reload()
    making_video(page)
    expect(page.locator("#stages li[data-state=done]")).to_have_count(2)
    assert page.input_value("#text") == "Before and after."
    wait_for(page, "done")
    assert (first.value.post_data, sent_key(first.value)) == (second.value.post_data, sent_key(second.value))
    assert (len(sandbox.calls("speech")), videos_bought(sandbox)) == (1, 1)
    page.reload()
    wait_for(page, "rest")


def sent_key(request: Request) -> str:
    """The key of a job, which must have one."""
    return request.headers["idempotency-key"]


@pytest.mark.parametrize("answered", [True, False], ids=["a proxy's error page", "no connection"])
def test_a_lost_connection_is_made_again(page: Page, sandbox: Sandbox, answered: bool) -> None:
    """The page says why and when it asks again, and then has the video."""

    def spoil(route: Route) -> None:
        route.fulfill(status=502, body="<h1>Bad gateway</h1>") if answered else route.abort("connectionfailed")

    page.route("**/jobs_prompt_tts", spoil, times=1)
    make_video(page)
    expect(page.locator("#status")).to_contain_text("Asking again in 1 s")
    expect(page.locator("#aside")).to_contain_text("502" if answered else "The connection failed")
    wait_for(page, "done")
    assert videos_bought(sandbox) == 1


def test_a_service_that_dies_and_comes_back_goes_on(page: Page, sandbox: Sandbox, start_service: StartService) -> None:
    """Killed while the video is made: the page asks until a new process answers, and the steps of before stay done."""
    service = start_service()
    slow_video(sandbox)
    make_video(page, service=service.url)
    making_video(page)
    service.stop(signal.SIGKILL)
    expect(page.locator("#status")).to_contain_text("Asking again")
    service.start()
    wait_for(page, "done")
    expect(page.locator("#stages li[data-state=done]")).to_have_count(6)
    assert (len(sandbox.calls("speech")), videos_bought(sandbox)) == (1, 1)


def test_a_copied_tab_waits_for_the_same_video(page: Page, sandbox: Sandbox) -> None:
    """A browser copies what a tab keeps; both tabs show the one video."""
    slow_video(sandbox)
    make_video(page)
    making_video(page)
    with page.expect_popup() as opened:  # unlike a link, this copies the tab's session
        page.evaluate("open(location.href)")
    for tab in (page, opened.value):
        wait_for(tab, "done")
    assert page.input_value("#final_url") == opened.value.input_value("#final_url")
    assert videos_bought(sandbox) == 1


def test_to_stop_waiting_stops_nothing_else(page: Page, sandbox: Sandbox) -> None:
    """The page says before and after that the job goes on and is paid for; the button then gets the video."""
    slow_video(sandbox)
    make_video(page)
    making_video(page)
    expect(page.locator("#cancel")).to_have_text("Stop waiting")
    expect(page.locator("#aside")).to_contain_text("it is paid for")
    page.click("#cancel")
    expect(page.locator("#status")).to_have_text("Not waiting any more")
    expect(page.locator("#failure")).to_contain_text("Paid for: the speech")
    page.reload()
    expect(page.locator("#start")).to_have_text("Go on with this video")
    page.click("#start")
    wait_for(page, "done")
    assert videos_bought(sandbox) == 1
    assert [prediction.status for prediction in sandbox.predictions.values()] == ["succeeded"]


def test_another_job_gets_another_key(page: Page, sandbox: Sandbox) -> None:
    """A changed form is a new video, and so is the same form once its video is there."""
    slow_video(sandbox)
    make_video(page)
    making_video(page)
    page.click("#cancel")
    page.fill("#text", "Something else.")
    expect(page.locator("#start")).to_have_text("Make the video")
    make_video(page)
    wait_for(page, "done")
    with page.expect_request("**/jobs_prompt_tts"):
        make_video(page)
    wait_for(page, "done")
    assert videos_bought(sandbox) == 3


def test_after_a_refusal_the_same_form_is_a_new_try(page: Page, sandbox: Sandbox) -> None:
    """The old key would give the old refusal; the old error is gone as soon as the new job starts."""
    sandbox.outcome("failed", error="flagged")
    failure(page)
    expect(page.locator("#start")).to_have_text("Make the video")
    slow_video(sandbox, 0.5)
    make_video(page)
    making_video(page)
    expect(page.locator("#failure")).to_be_hidden()
    wait_for(page, "done")
    assert videos_bought(sandbox) == 2


def test_without_a_key_cancel_stops_the_job_at_the_provider(page: Page, sandbox: Sandbox) -> None:
    """The prediction is cancelled, the page says what was paid for and is ready for the next job."""
    sandbox.outcome("never")
    page.uncheck("#keep")
    with page.expect_request("**/jobs_prompt_tts") as sent:
        make_video(page)
    making_video(page)
    expect(page.locator("#aside")).to_contain_text("ends the job")
    page.click("#cancel")
    expect(page.locator("#status")).to_have_text("Cancelled")
    expect(page.locator("#failure")).to_contain_text("Paid for: the speech and the part of the video")
    expect(page.locator("#start")).to_be_enabled()
    page.wait_for_timeout(1000)
    assert [prediction.status for prediction in sandbox.predictions.values()] == ["canceled"]
    assert "idempotency-key" not in sent.value.headers


def test_who_leaves_a_job_without_a_key_is_asked_and_told(page: Page, sandbox: Sandbox) -> None:
    """Leaving cancels: the browser asks first; the next page says what was paid for, once."""
    asked: list[str] = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    sandbox.outcome("never")
    page.uncheck("#keep")
    make_video(page)
    making_video(page)
    page.reload()
    expect(page.locator("#failure")).to_contain_text("Paid for: the speech")
    assert asked == ["beforeunload"]
    page.reload()
    expect(page.locator("#failure")).to_be_hidden()


# ---- Errors, read from another origin


def test_a_configuration_error_names_the_variable(page: Page, start_service: StartService) -> None:
    """A service without a key says which one, and that nothing was bought."""
    said = failure(page, service=start_service(ELEVEN_API_KEY="").url)
    assert "The service is not set up" in said
    assert "ELEVEN_API_KEY" in said


def test_a_validation_error_marks_the_field(page: Page, sandbox: Sandbox) -> None:
    """Every fault is listed, and its field is marked."""
    said = failure(page, voice_id="../me", seconds="soon")
    assert "Something in the form cannot be used" in said
    assert "Voice: " in said
    assert "Seconds: " in said
    assert [field.get_attribute("id") for field in page.locator("[aria-invalid]").all()] == ["voice_id", "seconds"]
    expect(page.locator("#seconds-fault")).to_be_visible()
    page.locator("#failure a", has_text="Voice").click()
    expect(page.locator("#voice_id")).to_be_focused()
    assert sandbox.calls("speech") == []
    make_video(page, voice_id=sandbox.voice_id, seconds="")
    wait_for(page, "done")
    assert page.locator("[aria-invalid]").count() == 0


def test_a_field_that_a_provider_refuses_is_marked(page: Page, sandbox: Sandbox) -> None:
    """A voice that only ElevenLabs knows to be missing; the mark goes as soon as the field is changed."""
    said = failure(page, voice_id="NobodysVoice00000001")
    assert "Voice: " in said
    expect(page.locator("#voice_id-fault")).to_contain_text("was not found")
    page.fill("#voice_id", sandbox.voice_id)
    assert page.locator("[aria-invalid], .hint.bad:visible").count() == 0


def test_a_provider_error_says_whose_and_keeps_the_speech(page: Page, sandbox: Sandbox) -> None:
    """A video that failed: the model's own words, the step that failed, and the speech that was paid for."""
    sandbox.outcome("failed", error="The picture was flagged as sensitive")
    said = failure(page)
    assert "Replicate did not accept this job" in said
    assert "flagged as sensitive" in said
    assert "Video the picture" in page.locator("li[data-state=failed]").inner_text()
    expect(page.locator("label[for=audio_url]")).to_contain_text("still usable")
    assert page.request.get(page.input_value("#audio_url")).ok


def test_a_provider_that_is_down_is_told_from_a_refusal(page: Page, sandbox: Sandbox) -> None:
    """What to do is another thing: wait, or have the account looked at; not change the input."""
    sandbox.fault("speech", "status", times=None, status=503)
    said = failure(page, key=False)
    assert "ElevenLabs did not do its part" in said
    assert "Try again in a few minutes" in said
    sandbox.reset()
    sandbox.fault("speech", "status", times=None, status=401)
    assert "Trying again will not help" in failure(page)


def test_a_resource_error_keeps_what_was_made(page: Page, sandbox: Sandbox) -> None:
    """A video that ffmpeg cannot use: speech and video are still there to take."""
    sandbox.video(b"this is no video")
    said = failure(page)
    assert "A file could not be stored, fetched or used" in said
    assert page.locator("#links li").count() == 2


def test_an_internal_error_gives_the_request_number(page: Page, sandbox: Sandbox, start_service: StartService) -> None:
    """A service that ends under a job without a key: a number to quote, which its log has too."""
    service = start_service(graceful_s=1)
    sandbox.outcome("never")
    page.uncheck("#keep")
    make_video(page, service=service.url)
    making_video(page)
    service.stop()
    said = page.locator(FAILURES_SHOWN).inner_text(timeout=JOB_MS)
    assert "The service could not finish the job" in said
    assert page.locator("#failure code").inner_text() in service.log


def test_a_service_that_does_not_answer_is_said_so(page: Page) -> None:
    """The one case without a category."""
    assert "There is no proper answer" in failure(page, key=False, service="http://127.0.0.1:9")


def test_a_proxys_error_page_is_said_so(page: Page, service: Service) -> None:
    """An answer that is not the service's is told with its status."""
    page.route("**/jobs_prompt_tts", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    assert "status 502" in failure(page, key=False)


def test_a_stream_that_breaks_off_is_said_so(page: Page) -> None:
    """Without a result or an error at its end, a stream is no success."""
    half = 'event: stage\ndata: {"stage": "speech", "state": "started", "seconds": 0}\n\n'
    page.route(
        "**/jobs_prompt_tts", lambda route: route.fulfill(status=200, content_type="text/event-stream", body=half)
    )
    said = failure(page, key=False)
    assert "ended before the video was there" in said
    assert "Paid for: the speech, if it was made in time." in said


def test_another_origin_may_send_and_read_the_request_id(page: Page, service: Service, sandbox: Sandbox) -> None:
    """A front end can name a request itself, and reads the id and the stages' times from the answer's headers."""
    told = page.evaluate(ASK, [service.url, sandbox.image_url])
    assert told[0] == "from-the-page"
    assert told[1].startswith("video;dur=")


ASK = """async ([service, image_url]) => {
    const headers = { "Content-Type": "application/json", "X-Request-ID": "from-the-page" };
    const body = JSON.stringify({ image_url, prompt: "It nods" });
    const answer = await fetch(`${service}/jobs_prompt_only`, { method: "POST", headers, body });
    return [answer.headers.get("X-Request-ID"), answer.headers.get("Server-Timing")];
}"""


# ---- Everybody's page


def test_the_page_fits_a_phone(open_page: OpenPage, sandbox: Sandbox) -> None:
    """At 360 px nothing sticks out: at rest, working, after a reload, done, failed in a field and left."""
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    sandbox.reads_to_finish, sandbox.video_seconds = 8, 1.0
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


def test_the_keyboard_alone_is_enough(open_page: OpenPage, sandbox: Sandbox) -> None:
    """From the first Tab to the copied address, and cancelling, without a mouse; focus is always somewhere visible."""
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


def test_cancelling_by_keyboard_gives_the_focus_back(page: Page, sandbox: Sandbox) -> None:
    """The cancel button has the focus while a job runs; after it, the start button."""
    sandbox.outcome("never")
    page.focus("#start")
    page.keyboard.press("Enter")
    expect(page.locator("#cancel")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#start")).to_be_focused()


def test_every_field_has_a_name(page: Page) -> None:
    """A screen reader can say what each field and button is."""
    nameless = "[...document.querySelectorAll('input, textarea, select, button, video, img')]"
    nameless += (
        ".filter(e => !(e.labels?.length || e.ariaLabel || e.alt || e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert page.evaluate(nameless) == []


def test_calm_for_those_who_ask_for_it(open_page: OpenPage) -> None:
    """With reduced motion nothing is animated, and the video waits for its viewer."""
    page = open_page(reduced_motion="reduce")
    make_video(page)
    assert page.evaluate("document.getAnimations().length") == 0
    wait_for(page, "done")
    page.wait_for_timeout(300)
    assert page.evaluate("document.getElementById('video').paused")
