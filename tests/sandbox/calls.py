"""Requests to the stand-ins as a provider's client would send them, for the sandbox's own tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

from tests.sandbox import Sandbox, elevenlabs, providers, replicate, supabase

ELEVEN = {"xi-api-key": elevenlabs.KEY}
BEARER = {"authorization": f"Bearer {replicate.TOKEN}"}
SERVICE_KEY = supabase.KEYS["service"]
STORAGE = {"authorization": f"Bearer {SERVICE_KEY}", "apikey": SERVICE_KEY}
HAILUO = "/v1/models/minimax/hailuo-02/predictions"
PET = providers.PET_FILE.read_bytes()

Call = Callable[..., httpx.Response]


def speak(call: Call, voice_id: str = "SandboxVoiceRex00001", **options: Any) -> httpx.Response:
    """Ask for speech with a valid request; `options` replace parts of it."""
    request = {
        "headers": ELEVEN,
        "json": {"text": "Hello!", "model_id": "eleven_multilingual_v2"},
    }
    request.update(options)
    return call("POST", f"/v1/text-to-speech/{voice_id}", **request)


def valid_input(sandbox: Sandbox, **changes: Any) -> dict[str, Any]:
    """A valid input for the default model, with changes."""
    values = {
        "prompt": "talk",
        "first_frame_image": sandbox.image_url,
        "duration": 6,
        "resolution": "512p",
    }
    return {**values, **changes}


def post_prediction(sandbox: Sandbox, call: Call, **options: Any) -> httpx.Response:
    """Send a create with a valid input for the default model; `options` replace parts of it."""
    request = {"headers": BEARER, "json": {"input": valid_input(sandbox)}}
    request.update(options)
    return call("POST", HAILUO, **request)


def create(sandbox: Sandbox, call: Call, **changes: Any) -> dict[str, Any]:
    """Create a prediction of the default model, and return it."""
    body = {"input": valid_input(sandbox, **changes)}
    response = post_prediction(sandbox, call, json=body)
    assert response.status_code == 201
    prediction: dict[str, Any] = response.json()
    return prediction


def poll(call: Call, prediction: dict[str, Any], times: int = 1) -> dict[str, Any]:
    """Poll a prediction this many times, and return its last state."""
    path = f"/v1/predictions/{prediction['id']}"
    for _ in range(times):
        prediction = call("GET", path, headers=BEARER).json()
    return prediction


def upload(
    call: Call, path: str = "pets/a.bin", content: Any = b"bytes", **headers: str
) -> httpx.Response:
    """Upload with the service key; keyword arguments are further headers, with `_` for `-`."""
    all_headers = dict(STORAGE)
    for name, value in headers.items():
        all_headers[name.replace("_", "-")] = value
    return call("POST", f"/storage/v1/object/{path}", headers=all_headers, content=content)


def storage_error(response: httpx.Response) -> tuple[int, str, str]:
    """The HTTP status of a refusal, and the real status and message in its body."""
    body = response.json()
    return response.status_code, body["statusCode"], body["message"]


def loudness(samples: bytes) -> float:
    """The mean absolute value of S16LE samples."""
    even_length = len(samples) // 2 * 2
    values = memoryview(samples[:even_length]).cast("h")
    return sum(map(abs, values)) / len(values)
