"""Calls to the stand-ins as a provider's client would send them, for the sandbox's own tests."""

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


def speak(call: Call, voice_id: str = "SandboxVoiceRex00001", **how: Any) -> httpx.Response:
    """Ask for speech; a good request unless told otherwise."""
    good = {"headers": ELEVEN, "json": {"text": "Hello!", "model_id": "eleven_multilingual_v2"}}
    return call("POST", f"/v1/text-to-speech/{voice_id}", **{**good, **how})


def good_input(sandbox: Sandbox, **more: Any) -> dict[str, Any]:
    """What the default model is sent."""
    picture = {"first_frame_image": sandbox.image_url}
    return {"prompt": "talk", **picture, "duration": 6, "resolution": "512p", **more}


def create(sandbox: Sandbox, call: Call, **more: Any) -> dict[str, Any]:
    """A prediction of the default model, as answered."""
    answer = call("POST", HAILUO, headers=BEARER, json={"input": good_input(sandbox, **more)})
    assert answer.status_code == 201
    return answer.json()


def read(call: Call, prediction: dict[str, Any], times: int = 1) -> dict[str, Any]:
    """The prediction after so many more reads."""
    for _ in range(times):
        prediction = call("GET", f"/v1/predictions/{prediction['id']}", headers=BEARER).json()
    return prediction


def upload(call: Call, path: str = "pets/a.bin", content: Any = b"bytes", **headers: str) -> httpx.Response:
    """Upload with the service key; keyword arguments are further headers, `_` for `-`."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return call("POST", f"/storage/v1/object/{path}", headers={**STORAGE, **more}, content=content)


def truth(answer: httpx.Response) -> tuple[int, str, str]:
    """HTTP status, and what the body says: status and message."""
    return answer.status_code, answer.json()["statusCode"], answer.json()["message"]


def loudness(samples: bytes) -> float:
    """The mean size of S16LE samples."""
    values = memoryview(samples[: len(samples) // 2 * 2]).cast("h")
    return sum(map(abs, values)) / len(values)
