"""One real, paid job with the owner's keys: `python -m pytest tests/test_live.py --live`, `.env` filled in.

It is how an owner checks keys and bucket after set-up. Costs a few characters at ElevenLabs and one video at Replicate.
LIVE_VOICE_ID names one of the owner's ElevenLabs voices. The picture is the sandbox's pet, put into the bucket as pet.jpg.
"""

import os
from pathlib import Path

import httpx
import pytest

import main

pytestmark = [pytest.mark.anyio, pytest.mark.live]

PET = Path(__file__).parent / "sandbox" / "pet.jpg"


@pytest.fixture(autouse=True)
def owners_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner's own variables and `.env`, which other tests keep out."""
    for name in main.Settings.model_fields:
        if not os.environ.get(name.upper()):
            monkeypatch.delenv(name.upper(), raising=False)
    main.get_settings.cache_clear()


async def test_a_pet_talks(client: httpx.AsyncClient) -> None:
    """A whole job: three URLs, and the last one is a video that can be fetched."""
    assert os.environ.get("LIVE_VOICE_ID"), "set LIVE_VOICE_ID to one of your ElevenLabs voices"
    body = {
        "image_url": await main.supabase_upload("pet.jpg", PET.read_bytes(), "image/jpeg"),
        "prompt": "The cat looks into the camera and talks",
        "text": "I am alive.",
        "voice_id": os.environ["LIVE_VOICE_ID"],
        "resolution": "512p",
    }
    answer = await client.post("/jobs_prompt_tts", json=body, timeout=None)
    assert answer.status_code == 200, answer.text
    final = await client.post("/debug/head", json={"url": answer.json()["final_url"]})
    assert final.json()["content_type"] == "video/mp4"
    assert final.json()["bytes"] > 10_000
