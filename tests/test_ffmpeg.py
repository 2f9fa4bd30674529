"""ffmpeg: film and speech put together, measured on real media; and what a bad film or a cancelled job must not do."""

import asyncio
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg  # type: ignore[import-untyped]
import pytest

import main
from tests import network
from tests.network import Answers, Server, reply

pytestmark = pytest.mark.anyio

serve = network.serve

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
CANNOT_USE = "Film and speech could not be put together; ffmpeg cannot use one of them."
NO_FILM = "What the model made is not an MP4 film."
BREAKS_OFF = "The film that the model made breaks off."
SPEECH_HZ, FILM_HZ = 440, 1000  # the tones of our speech, and of a film that brings its own sound

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")


def ffmpeg(*arguments: object) -> "subprocess.CompletedProcess[bytes]":
    """Run ffmpeg to its end; the test fails if it does."""
    command = [FFMPEG, "-hide_banner", "-nostdin", "-y", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=True, timeout=60)


# ----------------------------------------------------------------------------------------------------------------
# Media to put together
# ----------------------------------------------------------------------------------------------------------------

RAW = {"pcm": "s16le", "ulaw": "mulaw", "alaw": "alaw"}
ENCODERS = {"pcm": "pcm_s16le", "wav": "pcm_s16le", "ulaw": "pcm_mulaw", "alaw": "pcm_alaw", "opus": "libopus"}


class Studio:
    """Makes small films and speeches, each once for all tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def film(self, seconds: float = 6, fps: str = "25", sound_s: float | None = None, *options: str) -> Path:
        """A film with B-frames; with a tone of its own if it is said how long."""
        path = self.folder / f"film-{seconds}-{fps.replace('/', '_')}-{sound_s}-{'-'.join(options)}.mp4"
        if not path.exists():
            picture = ("-f", "lavfi", "-i", f"testsrc2=s=160x120:r={fps}:d={seconds}")
            sound = ("-f", "lavfi", "-i", f"sine={FILM_HZ}:d={sound_s}", "-c:a", "aac") if sound_s else ()
            encoder = ("-c:v", "libx264", "-preset", "veryfast", "-bf", "2", "-g", "30", "-pix_fmt", "yuv420p")
            ffmpeg(*picture, *sound, *encoder, *options, path)
        return path

    def speech(self, seconds: float = 3, output_format: str = "mp3_44100_64") -> Path:
        """A tone as our storage keeps the speech that ElevenLabs sends in this format."""
        path = self.folder / f"speech-{seconds}-{output_format}"
        if not path.exists():
            codec, rate, *kbits = output_format.split("_")
            encoder = ("-c:a", ENCODERS[codec]) if codec in ENCODERS else ()
            bitrate = ("-b:a", f"{kbits[0]}k") if kbits else ()
            muxer = RAW.get(codec, "ogg" if codec == "opus" else codec)
            tone = ("-f", "lavfi", "-i", f"sine={SPEECH_HZ}:d={seconds}:r={rate}")
            ffmpeg(*tone, "-ac", "1", "-ar", rate, *encoder, *bitrate, "-f", muxer, path)
            path.write_bytes(main.playable(path.read_bytes(), output_format))
        return path


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """Films and speeches."""
    return Studio(tmp_path_factory.mktemp("studio"))


@pytest.fixture
def final(tmp_path: Path) -> Path:
    """Where the talking film goes."""
    return tmp_path / "final.mp4"


@pytest.fixture
async def running(anyio_backend: str) -> AsyncIterator[None]:
    """The service's shared things, as while it runs."""
    async with main.lifespan(main.app):
        yield


# ----------------------------------------------------------------------------------------------------------------
# Media measured
# ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packet:
    """A compressed frame: when it is decoded and shown, in seconds, and a checksum of its bytes."""

    dts: float
    pts: float
    seconds: float
    checksum: str


class Clip:
    """What a media file holds, read without decoding."""

    def __init__(self, path: Path) -> None:
        read = ffmpeg("-i", path, "-map", "0", "-c", "copy", "-f", "framecrc", "-")
        told = read.stderr.decode()
        hours, minutes, seconds = re.findall(r"Duration: (\d+):(\d+):([\d.]+)", told)[0]
        self.seconds = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        inputs = told.partition("Output #0")[0]
        self.streams = re.findall(r"Stream #0:\d.*?: ((?:Video|Audio|Subtitle|Data): \w+)", inputs)
        self.packets: list[list[Packet]] = [[] for _ in self.streams]
        base = {}
        for line in read.stdout.decode().splitlines():
            if tb := re.match(r"#tb (\d+): (\d+)/(\d+)", line):
                base[int(tb[1])] = int(tb[2]) / int(tb[3])
            elif not line.startswith("#"):
                stream, dts, pts, duration, _, checksum = line.replace(" ", "").split(",")[:6]
                unit = base[int(stream)]
                times = (int(value) * unit for value in (dts, pts, duration))
                self.packets[int(stream)].append(Packet(*times, checksum))

    @property
    def ends(self) -> list[float]:
        """When each stream's last frame ends, in seconds."""
        return [max(packet.pts + packet.seconds for packet in packets) for packets in self.packets]

    @property
    def checksums(self) -> list[str]:
        """Checksums of the first stream's packets."""
        return [packet.checksum for packet in self.packets[0]]


def complaints(path: Path) -> str:
    """What ffmpeg has to say when it decodes a whole file."""
    return ffmpeg("-v", "warning", "-i", path, "-f", "null", "-").stderr.decode()


def heard(path: Path) -> "array[int]":
    """The sound of a file: 8,000 samples a second."""
    return array("h", ffmpeg("-v", "error", "-i", path, "-ac", "1", "-ar", 8000, "-f", "s16le", "-").stdout)


def sound_starts_s(sound: "array[int]") -> float:
    """Seconds of silence at the beginning."""
    return next((i for i, sample in enumerate(sound) if abs(sample) > 800), len(sound)) / 8000


def sound_ends_s(sound: "array[int]") -> float:
    """Seconds until the last sound."""
    return (len(sound) - next((i for i, sample in enumerate(reversed(sound)) if abs(sample) > 800), len(sound))) / 8000


def loudness(sound: "array[int]", hz: float) -> float:
    """How loud a tone is, by Goertzel's algorithm."""
    factor, last, before = 2 * math.cos(2 * math.pi * hz / 8000), 0.0, 0.0
    for sample in sound:
        last, before = sample + factor * last - before, last
    return math.sqrt(max(0.0, last**2 + before**2 - factor * last * before)) / max(1, len(sound))


def box_names(path: Path) -> list[str]:
    """The names of an MP4 file's outermost boxes, in order."""
    data, names, at = path.read_bytes(), [], 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        names.append(name.decode("latin-1"))
        at += size or len(data)
    return names


# ----------------------------------------------------------------------------------------------------------------
# The arguments
# ----------------------------------------------------------------------------------------------------------------


def arguments_for(fit: main.Fit, demuxer: str = "mp3") -> list[str]:
    """The arguments for plain paths."""
    return main.mux_arguments(Path("/f/video"), Path("/f/speech"), demuxer, fit, Path("/f/final"))


def input_options(arguments: list[str], name: str) -> dict[str, str]:
    """The options with a value that stand before an input."""
    before = arguments[: arguments.index(f"file:/f/{name}") - 1]
    start = max((i + 2 for i, argument in enumerate(before) if argument == "-i"), default=0)
    return dict(pairwise(before[start:]))


@pytest.mark.parametrize("fit", ["shortest", "video", "speech"])
async def test_only_files_are_opened_and_no_format_is_guessed(fit: main.Fit) -> None:
    """Both inputs have their demuxer forced and may open nothing but files; all paths are marked as files."""
    arguments = arguments_for(fit, "ogg")

    for name, demuxer in (("video", "mov"), ("speech", "ogg")):
        assert input_options(arguments, name)["-f"] == demuxer
        assert input_options(arguments, name)["-protocol_whitelist"] == "file"
    assert arguments.count("-i") == 2
    assert arguments[-1] == "file:/f/final"
    assert "-nostdin" in arguments


@pytest.mark.parametrize("fit", ["shortest", "video", "speech"])
async def test_picture_and_speech_are_mapped_and_nothing_else(fit: main.Fit) -> None:
    """The film's own picture is copied, our speech becomes AAC half a second in."""
    arguments = arguments_for(fit)
    text = " ".join(arguments)

    assert [arguments[i + 1] for i, argument in enumerate(arguments) if argument == "-map"] == ["0:V:0", "1:a:0"]
    assert "-c:v copy" in text
    assert "-c:a aac" in text
    assert "adelay=500:all=1" in text
    assert "-shortest" in arguments
    assert "-movflags +faststart" in text


@pytest.mark.parametrize(
    ("fit", "loops", "pads"),
    [
        pytest.param("shortest", False, False, id="shortest"),
        pytest.param("video", False, True, id="video"),
        pytest.param("speech", True, False, id="speech"),
    ],
)
async def test_a_fit_is_two_switches(fit: main.Fit, loops: bool, pads: bool) -> None:
    """The film is repeated, or the speech goes on as silence, or neither."""
    arguments = arguments_for(fit)

    assert input_options(arguments, "video").get("-stream_loop") == ("-1" if loops else None)
    assert "-stream_loop" not in input_options(arguments, "speech")
    assert ("apad" in " ".join(arguments)) is pads


# ----------------------------------------------------------------------------------------------------------------
# A talking film, measured
# ----------------------------------------------------------------------------------------------------------------

FILMS = [
    pytest.param(6, "25", None, id="B-frames"),
    pytest.param(6.006, "30000/1001", None, id="30000/1001"),
    pytest.param(6, "16", None, id="16 fps"),
    pytest.param(6, "24", 8, id="longer sound of its own"),
]


@pytest.mark.parametrize(("film_s", "fps", "sound_s"), FILMS)
@pytest.mark.parametrize(
    ("speech_s", "fit", "seconds"),
    [
        pytest.param(9, "shortest", 6.0, id="9 s shortest"),
        pytest.param(9, "video", 6.0, id="9 s video"),
        pytest.param(9, "speech", 9.5, id="9 s speech"),
        pytest.param(3, "shortest", 3.5, id="3 s shortest"),
        pytest.param(3, "video", 6.0, id="3 s video"),
        pytest.param(3, "speech", 3.5, id="3 s speech"),
    ],
)
async def test_fits(
    film_s: float,
    fps: str,
    sound_s: float | None,
    speech_s: float,
    fit: main.Fit,
    seconds: float,
    studio: Studio,
    final: Path,
) -> None:
    """The clip, its picture and its sound all end where `fit` says."""
    await main.mux_video_audio(studio.film(film_s, fps, sound_s), studio.speech(speech_s), final, fit)

    clip = Clip(final)
    assert clip.seconds == pytest.approx(seconds, abs=0.1)
    assert clip.ends == pytest.approx([seconds, seconds], abs=0.1)
    assert clip.streams == ["Video: h264", "Audio: aac"]


async def test_a_fit_holds_every_time(studio: Studio, tmp_path: Path, running: None) -> None:
    """ffmpeg's threads may run in any order: the clip's length does not depend on it."""
    film, speech = studio.film(6, "16"), studio.speech(9)
    finals = [tmp_path / f"{n}.mp4" for n in range(10)]

    await asyncio.gather(*(main.mux_video_audio(film, speech, final, "speech") for final in finals))

    assert [Clip(final).seconds for final in finals] == pytest.approx([9.5] * len(finals), abs=0.1)


@pytest.mark.parametrize(("film_s", "fps", "sound_s"), FILMS)
async def test_the_picture_is_copied_bit_by_bit(
    film_s: float, fps: str, sound_s: float | None, studio: Studio, final: Path
) -> None:
    """Every packet of the film is in the clip, in its order, at its time."""
    film = studio.film(film_s, fps, sound_s)

    await main.mux_video_audio(film, studio.speech(9), final)

    source, clip = Clip(film), Clip(final)
    assert clip.checksums == source.checksums
    assert [packet.pts for packet in clip.packets[0]] == pytest.approx([packet.pts for packet in source.packets[0]])


@pytest.mark.parametrize(("film_s", "fps", "sound_s"), FILMS)
async def test_a_repeated_film_runs_steadily(
    film_s: float, fps: str, sound_s: float | None, studio: Studio, final: Path
) -> None:
    """Where the film begins again, no picture is dropped, doubled or late, and nothing complains."""
    film = studio.film(film_s, fps, sound_s)

    await main.mux_video_audio(film, studio.speech(9), final, "speech")

    source, clip = Clip(film), Clip(final)
    again = source.checksums * 2
    shown = sorted(packet.pts for packet in clip.packets[0])
    assert clip.checksums == again[: len(clip.checksums)]
    assert len(clip.checksums) > len(source.checksums)
    assert [late - early for early, late in pairwise(shown)] == pytest.approx(
        [source.packets[0][0].seconds] * (len(shown) - 1), abs=0.001
    )
    assert all(early.dts < late.dts for early, late in pairwise(clip.packets[0]))
    assert complaints(final) == ""


async def test_a_film_of_one_picture_repeats(studio: Studio, final: Path) -> None:
    """The shortest film there is lasts as long as the speech."""
    await main.mux_video_audio(studio.film(0.04), studio.speech(3), final, "speech")

    assert Clip(final).ends == pytest.approx([3.5, 3.5], abs=0.1)


@pytest.mark.parametrize("fit", ["shortest", "video", "speech"])
async def test_the_speech_starts_half_a_second_in(fit: main.Fit, studio: Studio, final: Path) -> None:
    """Silence first, then the whole speech, then silence if the film is longer."""
    await main.mux_video_audio(studio.film(), studio.speech(3), final, fit)

    sound = heard(final)
    assert sound_starts_s(sound) == pytest.approx(0.5, abs=0.06)
    assert sound_ends_s(sound) == pytest.approx(3.5, abs=0.06)


async def test_a_films_own_sound_is_not_heard(studio: Studio, final: Path) -> None:
    """Of the two tones only the speech's is in the clip."""
    film = studio.film(6, "24", 8)
    assert loudness(heard(film), FILM_HZ) > 1000

    await main.mux_video_audio(film, studio.speech(9), final)

    sound = heard(final)
    assert loudness(sound, SPEECH_HZ) > 1000
    assert loudness(sound, FILM_HZ) < 10


@pytest.mark.parametrize("fit", ["shortest", "video", "speech"])
async def test_the_clip_plays_before_it_is_loaded(fit: main.Fit, studio: Studio, final: Path) -> None:
    """The index stands before the media, and a whole decode has nothing to complain of."""
    await main.mux_video_audio(studio.film(), studio.speech(3), final, fit)

    names = box_names(final)
    assert names[0] == "ftyp"
    assert names.index("moov") < names.index("mdat")
    assert complaints(final) == ""


@pytest.mark.parametrize(
    "output_format",
    [
        *("mp3_22050_32", "mp3_44100_192", "opus_48000_32", "opus_48000_192", "pcm_8000", "pcm_44100"),
        *("wav_8000", "wav_48000", "ulaw_8000", "alaw_8000"),
    ],
)
async def test_every_kind_of_speech_is_understood(
    output_format: str, studio: Studio, final: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speech in any format that ElevenLabs sends is heard in the clip at its time."""
    monkeypatch.setenv("TTS_OUTPUT_FORMAT", output_format)
    main.get_settings.cache_clear()

    await main.mux_video_audio(studio.film(), studio.speech(1, output_format), final)

    sound = heard(final)
    assert Clip(final).seconds == pytest.approx(1.5, abs=0.1)
    assert sound_starts_s(sound) == pytest.approx(0.5, abs=0.06)
    assert loudness(sound, SPEECH_HZ) > 500


@pytest.mark.parametrize(
    ("around", "seconds"),
    [
        pytest.param(lambda speech: speech[:-100], 3.5, id="last frame cut"),
        pytest.param(lambda speech: speech + b"TAG" + bytes(125), 3.5, id="tag at its end"),
        pytest.param(lambda speech: speech + bytes(64), 3.5, id="zeros at its end"),
        pytest.param(lambda speech: speech + speech, 6.0, id="two pieces"),
    ],
)
async def test_speech_with_something_beside_it_is_heard(
    around: Callable[[bytes], bytes], seconds: float, studio: Studio, final: Path, tmp_path: Path
) -> None:
    """Speech that every player plays does not cost the film that was paid for."""
    speech = tmp_path / "speech"
    speech.write_bytes(around(studio.speech(3).read_bytes()))

    await main.mux_video_audio(studio.film(), speech, final)

    assert Clip(final).seconds == pytest.approx(seconds, abs=0.1)


@pytest.mark.parametrize("name", ["-y", "concat:a|b", 'a\'b "c" $(d) %03d', "späße\n"])
async def test_the_names_of_files_do_not_matter(name: str, studio: Studio, tmp_path: Path) -> None:
    """No path is read as an option, an address, a pattern or a command."""
    folder = tmp_path / name
    folder.mkdir()
    film = folder / name
    film.write_bytes(studio.film().read_bytes())

    await main.mux_video_audio(film, studio.speech(3), folder / f"{name}.final")

    assert Clip(folder / f"{name}.final").seconds == pytest.approx(3.5, abs=0.1)


# ----------------------------------------------------------------------------------------------------------------
# Media that cannot be used
# ----------------------------------------------------------------------------------------------------------------


def children() -> set[int]:
    """The ffmpeg processes that this one has started and not yet reaped."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(rest.split()[1]) == os.getpid() and name.startswith("ffmpeg"):
            found.add(int(stat.parent.name))
    return found


@pytest.fixture
def _no_child_left() -> Iterator[None]:
    """Fail a test that leaves an ffmpeg behind, running or not reaped."""
    yield
    if sys.platform == "linux":
        assert children() == set()


no_child_left = pytest.mark.usefixtures("_no_child_left")


def noise(size: int) -> bytes:
    """Bytes without meaning, the same each time."""
    state, words = 1, array("I")
    for _ in range(size // 4):
        state = state * 1_664_525 + 1_013_904_223 & 0xFFFFFFFF
        words.append(state ^ state >> 16)
    return words.tobytes()


def playlist(url: str) -> bytes:
    """An HLS playlist."""
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{url}\n#EXT-X-ENDLIST\n".encode()


BAD_BYTES = [
    pytest.param(b"", BREAKS_OFF, id="empty"),
    pytest.param(b"<html><body><h1>404 Not Found</h1></body></html>", NO_FILM, id="HTML"),
    pytest.param(b'{"error": "not found"}', NO_FILM, id="JSON"),
    pytest.param(noise(50_000), NO_FILM, id="noise"),
    pytest.param(bytes(50_000), NO_FILM, id="zeros"),
    pytest.param(b"\0\0\0\x20ftypisom" + noise(50_000), BREAKS_OFF, id="noise that begins like a film"),
    pytest.param(b"\0\0\0\x08ftyp\0\0\0\0mdat" + noise(50_000), CANNOT_USE, id="noise in a box"),
    pytest.param(playlist("file:///etc/passwd"), NO_FILM, id="HLS of a file"),
    pytest.param(playlist("/etc/passwd"), NO_FILM, id="HLS of a path"),
    pytest.param(b"ffconcat version 1.0\nfile /etc/passwd\n", NO_FILM, id="ffconcat of a path"),
    pytest.param(b"ffconcat version 1.0\nfile 'file:///etc/passwd'\n", NO_FILM, id="ffconcat of a file"),
]


async def refusal(film: Path, speech: Path, final: Path, fit: main.Fit = "shortest") -> str:
    """What is said of media that cannot be used: a failed resource, and nothing of this machine in the clip."""
    with pytest.raises(main.ResourceFailed) as failed:
        await main.mux_video_audio(film, speech, final, fit)
    assert not final.exists() or b"root:" not in final.read_bytes()
    return failed.value.detail


@no_child_left
@pytest.mark.parametrize(("content", "reason"), BAD_BYTES)
async def test_a_film_that_is_none_is_refused(
    content: bytes, reason: str, studio: Studio, final: Path, tmp_path: Path
) -> None:
    """Whatever came in place of a film, nothing of it or of this machine becomes one."""
    film = tmp_path / "film.mp4"
    film.write_bytes(content)

    assert await refusal(film, studio.speech(3), final) == reason


@no_child_left
@pytest.mark.parametrize("content", [pytest.param(row.values[0], id=row.id) for row in BAD_BYTES])
async def test_speech_that_is_none_is_refused(content: bytes, studio: Studio, final: Path, tmp_path: Path) -> None:
    """The same for what came in place of speech."""
    speech = tmp_path / "speech"
    speech.write_bytes(content)

    assert await refusal(studio.film(), speech, final) == CANNOT_USE


@no_child_left
@pytest.mark.parametrize("fit", ["shortest", "speech"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("#EXTM3U\n#EXTINF:5,\n{url}/a.ts\n#EXT-X-ENDLIST\n", id="HLS"),
        pytest.param("ffconcat version 1.0\nfile {url}/a.mp4\n", id="ffconcat"),
    ],
)
async def test_ffmpeg_reads_no_playlist(
    text: str, fit: main.Fit, serve: Callable[[Answers], Server], studio: Studio, final: Path, tmp_path: Path
) -> None:
    """A playlist in place of film or speech would make ffmpeg connect to others, had it a choice."""
    server = serve({"/a.mp4": reply(200, studio.film().read_bytes()), "/a.ts": reply(200)})
    media = tmp_path / "media.mp4"
    media.write_text(text.format(url=server.url))

    for film, speech in ((media, studio.speech(3)), (studio.film(), media)):
        with pytest.raises(main.ResourceFailed, match=CANNOT_USE):
            await main.run_ffmpeg(main.mux_arguments(film, speech, "mp3", fit, final), 10)

    assert server.was_silent()


@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXTINF:5,\n{path}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {path}\n"]
)
async def test_ffmpeg_reads_no_other_file(text: str, studio: Studio, final: Path, tmp_path: Path) -> None:
    """A playlist of files of this machine, even of media beside it, is no film."""
    (tmp_path / "secret.mp4").write_bytes(studio.film().read_bytes())
    media = tmp_path / "media.mp4"
    media.write_text(text.format(path="secret.mp4"))

    with pytest.raises(main.ResourceFailed, match=CANNOT_USE):
        await main.run_ffmpeg(main.mux_arguments(media, studio.speech(3), "mp3", "shortest", final), 10)


@no_child_left
@pytest.mark.parametrize("fit", ["shortest", "speech"])
@pytest.mark.parametrize(
    ("options", "share"),
    [
        pytest.param((), 0.5, id="index at the end, half"),
        pytest.param(("-movflags", "+faststart"), 0.5, id="index first, half"),
        pytest.param(("-movflags", "+faststart"), 0.9999, id="index first, nearly whole"),
        pytest.param(("-movflags", "+faststart"), 0.01, id="index cut"),
    ],
)
async def test_a_film_that_breaks_off_is_refused(
    options: tuple[str, ...], share: float, fit: main.Fit, studio: Studio, final: Path, tmp_path: Path
) -> None:
    """Half a film is not passed on as a short one."""
    whole = studio.film(6, "25", None, *options).read_bytes()
    film = tmp_path / "film.mp4"
    film.write_bytes(whole[: int(len(whole) * share)])

    assert await refusal(film, studio.speech(9), final, fit) == BREAKS_OFF


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("-movflags", "+faststart"), id="index first"),
        pytest.param(("-movflags", "+frag_keyframe+empty_moov"), id="fragments"),
        pytest.param(("-brand", "qt  "), id="QuickTime"),
    ],
)
async def test_a_whole_film_is_taken(options: tuple[str, ...], studio: Studio, final: Path) -> None:
    """However an MP4 file is laid out."""
    await main.mux_video_audio(studio.film(6, "25", None, *options), studio.speech(3), final)

    assert Clip(final).seconds == pytest.approx(3.5, abs=0.1)


async def test_a_film_with_a_box_of_unusual_length_is_taken(studio: Studio, final: Path, tmp_path: Path) -> None:
    """A length in 64 bits, and one that means `to the end of the file`, are as good as any."""
    whole = studio.film(6, "25", None, "-movflags", "+faststart").read_bytes()
    film = tmp_path / "film.mp4"
    film.write_bytes(whole + struct.pack(">I4sQ", 1, b"free", 20) + b"long" + struct.pack(">I4s", 0, b"free") + b"rest")

    await main.mux_video_audio(film, studio.speech(3), final)

    assert Clip(final).seconds == pytest.approx(3.5, abs=0.1)


@no_child_left
async def test_a_film_whose_long_box_breaks_off_is_refused(studio: Studio, final: Path, tmp_path: Path) -> None:
    """A length in 64 bits is looked at like any other."""
    film = tmp_path / "film.mp4"
    film.write_bytes(studio.film().read_bytes() + struct.pack(">I4sQ", 1, b"free", 1000) + b"less")

    assert await refusal(film, studio.speech(3), final) == BREAKS_OFF


@no_child_left
async def test_a_film_of_many_boxes_holds_nobody_up(studio: Studio, final: Path, tmp_path: Path) -> None:
    """A file made to be slow to look through is not looked through in the event loop."""
    film = tmp_path / "film.mp4"
    film.write_bytes(struct.pack(">I4s", 8, b"ftyp") + struct.pack(">I4s", 8, b"free") * 4_000_000)
    mux = asyncio.create_task(main.mux_video_audio(film, studio.speech(3), final))
    longest, last = 0.0, time.monotonic()

    while not mux.done():
        await asyncio.sleep(0.001)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()

    with pytest.raises(main.ResourceFailed, match=BREAKS_OFF):
        await mux
    assert longest < 1


@no_child_left
async def test_a_film_without_a_picture_is_refused(studio: Studio, final: Path, tmp_path: Path) -> None:
    """Sound alone is no film."""
    film = tmp_path / "film.mp4"
    ffmpeg("-f", "lavfi", "-i", "sine=1000:d=1", "-c:a", "aac", film)

    assert await refusal(film, studio.speech(3), final) == CANNOT_USE


@no_child_left
async def test_a_film_with_a_cover_only_is_refused(studio: Studio, final: Path, tmp_path: Path) -> None:
    """A cover picture attached to sound is no film."""
    cover, film = tmp_path / "cover.jpg", tmp_path / "film.mp4"
    ffmpeg("-f", "lavfi", "-i", "color=red:s=64x64", "-frames:v", 1, cover)
    sound = ("-f", "lavfi", "-i", "sine=1000:d=1", "-c:a", "aac")
    ffmpeg("-i", cover, *sound, "-map", 0, "-map", 1, "-c:v", "copy", "-disposition:v:0", "attached_pic", film)

    assert await refusal(film, studio.speech(3), final) == CANNOT_USE


@no_child_left
async def test_a_film_without_sound_is_no_speech(studio: Studio, final: Path) -> None:
    """A film in place of speech is refused, too."""
    assert await refusal(studio.film(), studio.film(), final) == CANNOT_USE


@no_child_left
async def test_another_container_is_refused(studio: Studio, final: Path, tmp_path: Path) -> None:
    """Only MP4 and MOV are read as films, whatever ffmpeg could read."""
    film = tmp_path / "film.mp4"
    ffmpeg("-i", studio.film(), "-c", "copy", "-f", "matroska", film)

    assert await refusal(film, studio.speech(3), final) == NO_FILM


@no_child_left
async def test_a_heavy_film_does_not_fill_the_disk(studio: Studio, final: Path, tmp_path: Path) -> None:
    """A fifth of a second of 10 MB repeats until the clip has 100 MB, not until the speech has ended."""
    film = tmp_path / "film.mp4"
    noise = "nullsrc=s=1280x720:r=25:d=0.2,noise=alls=100:allf=t"
    ffmpeg("-f", "lavfi", "-i", noise, "-c:v", "libx264", "-preset", "ultrafast", "-qp", 0, "-pix_fmt", "yuv420p", film)
    assert film.stat().st_size > 2_500_000

    assert await refusal(film, studio.speech(9), final, "speech") == "The talking film is larger than 100 MB."
    assert final.stat().st_size < 130_000_000


def test_a_huge_frame_does_not_fill_the_memory(studio: Studio, final: Path, tmp_path: Path) -> None:
    """A film of 16384 x 8192 pixels costs ffmpeg hardly more memory than a usual one, whether it can be used or not."""
    film = tmp_path / "film.mp4"
    encoder = ("-c:v", "libx264", "-preset", "ultrafast", "-tune", "zerolatency", "-pix_fmt", "gray")
    ffmpeg("-f", "lavfi", "-i", "color=s=16384x8192:r=1", "-frames:v", 1, *encoder, film)
    program = (
        "import asyncio, contextlib, pathlib, resource, sys, main\n"
        "with contextlib.suppress(main.ResourceFailed):\n"
        "    asyncio.run(main.mux_video_audio(*map(pathlib.Path, sys.argv[1:])))\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", program, str(film), str(studio.speech(3)), str(final)]

    told = subprocess.run(command, capture_output=True, check=True, timeout=60, cwd=Path(main.__file__).parent)

    assert int(told.stdout) * (1 if sys.platform == "darwin" else 1024) < 150_000_000


# ----------------------------------------------------------------------------------------------------------------
# The process
# ----------------------------------------------------------------------------------------------------------------

ENDLESS = ["-v", "error", "-f", "lavfi", "-i", "testsrc2", "-f", "null", "-"]


async def started() -> int:
    """The id of the one ffmpeg that is running, once there is one."""
    deadline = time.monotonic() + 5
    while not (found := children()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)
    assert len(found) == 1
    return found.pop()


@needs_proc
@no_child_left
async def test_the_time_limit_kills() -> None:
    """An ffmpeg that does not end is ended, reaped, and told as a failed resource."""
    began = time.monotonic()

    with pytest.raises(main.ResourceFailed) as failed:
        await asyncio.wait_for(main.run_ffmpeg(ENDLESS, 0.2), 5)

    assert failed.value.detail == "The film could not be put together within 0.2 s."
    assert time.monotonic() - began < 2


def test_a_minute_is_the_limit() -> None:
    """What is not put together in a minute never will be."""
    assert main.FFMPEG_TIMEOUT_S == 60


@needs_proc
@no_child_left
async def test_the_time_limit_holds_for_a_mux(
    studio: Studio, final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mux runs under the limit: here, speech that never comes to its end."""
    speech = tmp_path / "speech"
    os.mkfifo(speech)
    monkeypatch.setattr(main, "FFMPEG_TIMEOUT_S", 0.2)

    with pytest.raises(main.ResourceFailed, match=r"could not be put together within 0\.2 s\."):
        await asyncio.wait_for(main.mux_video_audio(studio.film(), speech, final), 5)


@needs_proc
@no_child_left
async def test_a_cancelled_call_kills() -> None:
    """A job that is cancelled leaves no ffmpeg behind, and stays cancelled."""
    task = asyncio.create_task(main.run_ffmpeg(ENDLESS, 60))
    await started()

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


@needs_proc
@no_child_left
async def test_a_call_can_be_cancelled_at_any_moment() -> None:
    """Also while the process is being started."""
    for ticks in range(25):
        task = asyncio.create_task(main.run_ffmpeg(ENDLESS, 60))
        for _ in range(ticks):
            await asyncio.sleep(0)
        if ticks > 12:
            await asyncio.sleep(0.0005 * (ticks - 12))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert children() == set()


@needs_proc
@no_child_left
async def test_an_ffmpeg_killed_from_outside_is_a_failed_resource() -> None:
    """The system may kill it for want of memory."""
    task = asyncio.create_task(main.run_ffmpeg(ENDLESS, 60))

    os.kill(await started(), signal.SIGKILL)

    with pytest.raises(main.ResourceFailed, match=CANNOT_USE):
        await task


@pytest.fixture
def _open_stdin() -> Iterator[None]:
    """A standard input that one could read from, as in a terminal."""
    kept, (reading, writing) = os.dup(0), os.pipe()
    os.dup2(reading, 0)
    yield
    os.dup2(kept, 0)
    for descriptor in (kept, reading, writing):
        os.close(descriptor)


@needs_proc
@no_child_left
@pytest.mark.usefixtures("_open_stdin")
async def test_the_process_shares_nothing_with_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key reaches ffmpeg, it reads no input, and Ctrl-C in a terminal, which lets jobs finish, does not end it."""
    monkeypatch.setenv("ELEVEN_API_KEY", "eleven-key")
    task = asyncio.create_task(main.run_ffmpeg(ENDLESS, 60))
    pid = await started()
    while "lavfi" not in Path(f"/proc/{pid}/cmdline").read_text():
        await asyncio.sleep(0.001)  # until exec

    environment, session = Path(f"/proc/{pid}/environ").read_bytes(), os.getsid(pid)
    stdin = os.readlink(f"/proc/{pid}/fd/0")
    task.cancel()
    await asyncio.wait([task])

    assert b"eleven-key" not in environment
    assert b"=" not in environment
    assert session == pid
    assert stdin == "/dev/null"


@no_child_left
async def test_what_went_wrong_stands_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The caller is told that it failed, whoever runs the service why."""
    with pytest.raises(main.ResourceFailed, match=CANNOT_USE):
        await main.run_ffmpeg(["-v", "error", "-i", "file:/nowhere.mp4", "-f", "null", "-"], 10)

    assert re.search(r"ffmpeg ended with \d+: .*No such file or directory.*/nowhere\.mp4", caplog.text)


@needs_proc
@no_child_left
async def test_a_flood_of_words_is_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    """However much ffmpeg writes to stderr, only its end stays in memory and goes to the log."""
    flood = ["-v", "error", "-f", "lavfi", "-i", "color=s=1024x1024:r=1000", "-f", "rawvideo", "pipe:2"]
    tracemalloc.start()
    try:
        task = asyncio.create_task(main.run_ffmpeg(flood, 10))
        pid = await started()
        while written_bytes(pid) < 50_000_000:
            await asyncio.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(main.ResourceFailed, match=CANNOT_USE):
            await task
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 10_000_000
    assert len(caplog.text) < 5_000


def written_bytes(pid: int) -> int:
    """How much a process has written so far."""
    counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(counts["wchar"])


@needs_proc
@no_child_left
async def test_no_more_run_at_once_than_there_are_cores(
    studio: Studio, final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five muxes on two cores two run, and the next begins when one of them has ended."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    silent = tmp_path / "speech"  # as long as nobody writes into it
    os.mkfifo(silent)

    async with main.lifespan(main.app):
        muxes = [asyncio.create_task(main.mux_video_audio(studio.film(), silent, final)) for _ in range(5)]
        first = await two_children()
        killed = min(first)
        os.kill(killed, signal.SIGKILL)
        second = await two_children(without=killed)
        for mux in muxes:
            mux.cancel()
        await asyncio.gather(*muxes, return_exceptions=True)

    assert len(first) == len(second) == 2
    assert len(first & second) == 1


async def two_children(without: int = 0) -> set[int]:
    """The ffmpeg processes that run a while after there are two, of which `without` is none."""
    deadline = time.monotonic() + 10
    while len(children() - {without}) < 2:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.2)
    return children() - {without}


@needs_proc
@no_child_left
async def test_a_cancelled_mux_gives_its_place_back(
    studio: Studio, final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that ran nor one that waited keeps a core from those who come later."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    silent = tmp_path / "speech"
    os.mkfifo(silent)

    async with main.lifespan(main.app):
        muxes = [asyncio.create_task(main.mux_video_audio(studio.film(), silent, final)) for _ in range(3)]
        await started()
        for mux in muxes:
            mux.cancel()
        await asyncio.wait(muxes)
        await asyncio.wait_for(main.mux_video_audio(studio.film(), studio.speech(3), final), 10)

    assert Clip(final).seconds == pytest.approx(3.5, abs=0.1)


# ----------------------------------------------------------------------------------------------------------------
# No ffmpeg
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_path() -> Iterator[None]:
    """ffmpeg is looked for anew, and once more after the test."""
    main.ffmpeg_path.cache_clear()
    yield
    main.ffmpeg_path.cache_clear()


@pytest.fixture
def no_ffmpeg(fresh_path: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine on which ffmpeg is not where it is said to be."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    return "/nowhere/ffmpeg"


async def test_a_missing_ffmpeg_stops_the_start(no_ffmpeg: str) -> None:
    """The service says so when it starts, not when the first film has been paid for."""
    with pytest.raises(RuntimeError, match=no_ffmpeg):
        async with main.lifespan(main.app):
            pass


async def test_a_missing_ffmpeg_is_said_by_a_mux_too(no_ffmpeg: str, studio: Studio, final: Path) -> None:
    """Where no start has checked it, the call itself names what is missing."""
    with pytest.raises(RuntimeError, match=no_ffmpeg):
        await main.mux_video_audio(studio.film(), studio.speech(3), final)


def test_another_ffmpeg_can_be_named(fresh_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """IMAGEIO_FFMPEG_EXE is taken if it is there."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", FFMPEG)

    assert main.ffmpeg_path() == FFMPEG


async def test_another_ffmpeg_is_found_where_commands_are(
    fresh_path: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bare name is looked for in PATH once, and runs although ffmpeg itself gets no environment."""
    (tmp_path / "our-ffmpeg").symlink_to(FFMPEG)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "our-ffmpeg")

    assert main.ffmpeg_path() == str(tmp_path / "our-ffmpeg")
    await main.run_ffmpeg(["-v", "error", "-version"], 10)
