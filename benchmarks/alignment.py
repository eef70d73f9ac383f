"""Whether FLMR's mapping network and MIRe's pooling, trained here, let texts find frames: on photographs, before and after.

The towers are those that packages carry, MiniLM for texts and EfficientNet-Lite0 for pictures, and never saw each other. All
goes through `maxreel train`. Two experiments:

- *known*: the sample corpus's photographs, each in many crops, flips and brightnesses and in several wordings. Held out are
  crops and wordings that were not trained on. The photographs are the same.
- *unseen*: whole photographs are held out, each in one of as many folds as asked for, with others that the packages carry.
  Texts are the classifier's words for each crop; held out, all of a photograph's words are relevant to all of its crops. No
  crop of it was seen in training; some of its words were.

Each photograph counts once: its crops and wordings are alike. Folds are pooled, a photograph having been held out in one.

    python benchmarks/alignment.py [--out FOLDER] [--folds 3]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from cluster.session import session
from operators.frame_tags import FrameTags
from operators.significance import bootstrap, compare
from pipelines.config import load
from pipelines.sample import PICTURES, Asset, locate
from pipelines.train import train

WORDINGS = {
    "cat": ("the face of a tabby cat", "a striped kitten looks at you", "a pet with whiskers", "a house cat up close")
    + ("portrait of a cat", "a furry cat's head"),
    "coffee": ("a cup of coffee and a spoon on a table", "an espresso in a red cup", "a hot drink on a saucer")
    + ("a mug of black coffee", "coffee on a wooden table", "a cup with a spoon beside it"),
    "photographer": ("a man with a camera on a tripod", "a photographer in a dark coat", "somebody filming in a park")
    + ("black and white picture of a cameraman", "a person taking photographs", "a man looks through a camera"),
    "pagoda": ("a Chinese pagoda above a lake", "a palace tower in Beijing", "an Asian temple with tiled roofs")
    + ("old Chinese architecture", "a pavilion on a hill", "the summer palace in China"),
    "flower": (
        "an orange dahlia in bloom",
        "a flower with many petals",
        "a blossom in a garden",
        "close view of a flower",
    )
    + ("a blooming dahlia", "bright petals of a flower"),
    "motorcycle": ("a motorcycle in a garage", "a parked motorbike", "a two-wheeled vehicle in a workshop")
    + ("a bike with an engine", "a motorcycle between tools and shelves", "somebody's motorbike at home"),
    "rocket": (
        "a rocket on its launch pad at dusk",
        "a spacecraft ready to lift off",
        "a launch vehicle beside a tower",
    )
    + ("a rocket ready to launch", "a space rocket in the evening", "a missile on the launch site"),
    "astronaut": ("an astronaut in an orange suit", "a smiling woman of the space agency", "portrait of a spacewoman")
    + ("a woman in a space suit", "an astronaut before a flag", "a female pilot of the shuttle"),
    "galaxies": ("many distant galaxies", "a deep field of stars", "the night sky by a telescope", "galaxies in space")
    + ("faint galaxies on a black sky", "a telescope's picture of the universe"),
    "moon": ("the surface of the moon", "craters on the moon", "a grey lunar landscape", "the moon up close")
    + ("lunar craters", "a plain on the moon"),
    "gravel": ("gravel", "small stones on the ground", "a path of pebbles", "loose grey stones")
    + ("pebbles and grit", "a stony ground"),
    "bricks": ("a wall of bricks", "brickwork of a house", "masonry with mortar", "a brick wall")
    + ("rows of bricks", "an old wall built of bricks"),
    "grass": ("a lawn", "blades of grass", "a green meadow from near", "grass on the ground")
    + ("a field of grass", "turf in a garden"),
}
SAME_SCENE = {"motorcycle left": "motorcycle", "motorcycle right": "motorcycle"}
MORE = {
    name: Asset("skimage", f"data/{file}", "")
    for name, file in (
        ("coins", "coins.png"),
        ("retina", "retina.jpg"),
        ("clock", "clock_motion.png"),
        ("tissue", "ihc.png"),
        ("cell", "cell.png"),
        ("page", "page.png"),
        ("horse", "horse.png"),
        ("text", "text.png"),
    )
}
"""Further pictures of scikit-image, for the classifier's words."""

SIDE = 288
TRAINED_WORDINGS = 4
KNOWN_CROPS, KNOWN_HELD_OUT = 16, 6
UNSEEN_CROPS = 36


def photographs(more: bool) -> dict[str, list[Image.Image]]:
    """Return the pictures of each scene."""
    scenes: dict[str, list[Image.Image]] = {}
    for name, asset in (PICTURES | (MORE if more else {})).items():
        picture = Image.open(locate(asset)).convert("RGB")
        picture.thumbnail((1024, 1024))
        scenes.setdefault(SAME_SCENE.get(name, name), []).append(picture)
    return scenes


def versions(
    pictures: Sequence[Image.Image], count: int, rng: np.random.Generator, least: float = 0.5
) -> Iterator[Image.Image]:
    """Yield crops of ``least`` of the sides or more, some of them mirrored, of other brightness and contrast."""
    for number in range(count):
        picture = pictures[number % len(pictures)]
        share = rng.uniform(least, 1.0)
        width, height = share * picture.width, share * picture.height
        left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
        crop = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        crop = ImageOps.mirror(crop) if rng.random() < 0.5 else crop
        crop = ImageEnhance.Brightness(crop).enhance(rng.uniform(0.7, 1.3))
        yield ImageEnhance.Contrast(crop).enhance(rng.uniform(0.7, 1.3))


def write_known(folder: Path, crops: int = KNOWN_CROPS, held_out: int = KNOWN_HELD_OUT, seed: int = 0) -> Path:
    """Write crops and the examples of every crop with every wording of its side; return the examples' file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(seed), []
    for scene, pictures in photographs(more=False).items():
        for number, crop in enumerate(versions(pictures, crops + held_out, rng)):
            file = f"{scene}-{number}.jpg"
            crop.save(folder / file, quality=90)
            tested = number >= crops
            wordings = WORDINGS[scene][TRAINED_WORDINGS:] if tested else WORDINGS[scene][:TRAINED_WORDINGS]
            lines += [{"image": file, "passage": text, "group": scene, "held_out": tested} for text in wordings]
    return _written(folder / "known.jsonl", lines)


def write_unseen(folder: Path, folds: int, seed: int = 0) -> list[Path]:
    """Write crops with the classifier's words for each; return a file of examples for each fold held out."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, words = np.random.default_rng(seed), {}
    tags = FrameTags(top_k=3, min_probability=0.05)
    for scene, pictures in photographs(more=True).items():
        words[scene] = {}
        for number, crop in enumerate(versions(pictures, UNSEEN_CROPS, rng, least=0.3)):
            file = folder / f"{scene}-{number}.jpg"
            crop.save(file, quality=90)
            if seen := ", ".join(name for name, _ in tags.tag([file.read_bytes()])[0]):
                words[scene][file.name] = seen
    return [_write_fold(folder / f"unseen-{fold}.jsonl", words, fold, folds) for fold in range(folds)]


def _write_fold(file: Path, words: dict[str, dict[str, str]], fold: int, folds: int) -> Path:
    lines = []
    for place, (scene, of_crop) in enumerate(words.items()):
        held_out = place % folds == fold
        for crop, seen in of_crop.items():
            texts = dict.fromkeys(of_crop.values()) if held_out else [seen]
            lines += [{"image": crop, "passage": text, "group": scene, "held_out": held_out} for text in texts]
    return _written(file, lines)


def _written(file: Path, lines: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def show(name: str, results: Sequence[dict[str, Any]]) -> None:
    """Print each measure over the photographs held out in any of the results."""
    for direction in results[0]["measures"]:
        found = [result["measures"][direction] for result in results]
        chance = np.average([one["chance"] for one in found], weights=[one["groups"] for one in found])
        for measure in found[0]["measures"]:
            pairs = [pair for one in found for pair in one["measures"][measure]["by_group"].values()]
            before, after = np.array(pairs).T
            change = compare(after, before)
            cells = [
                f"{name:12s} {direction:13s} {measure:8s} {sum(one['queries'] for one in found):5d} {len(pairs):3d}",
                f"{chance:.3f}" if measure == "R@1" else "     ",
                *(f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in map(_interval, (before, after))),
                f"{change.difference:+.3f} ({change.low:+.3f} to {change.high:+.3f}) p {change.p:.2g}",
            ]
            print("  ".join(cells), flush=True)


def _interval(values: Any) -> tuple[float, float, float]:
    return (float(values.mean()), *bootstrap(values))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path)
    options.add_argument("--folds", type=int, default=3)
    options.add_argument("--systems", nargs="+", default=["flmr", "mire"])
    options.add_argument("--set", action="append", default=[], dest="assignments")
    chosen = options.parse_args()
    out = chosen.out or Path(tempfile.mkdtemp())
    known, unseen = write_known(out / "known"), write_unseen(out / "unseen", chosen.folds)
    print("system, experiment, direction, measure, queries, photographs, chance, before, after, difference (95 %)")
    small = ["train.num_tokens=4", "train.num_heads=2"]  # MiniLM's tokens are 384 wide; the papers' numbers suit 128
    settings = ["train.epochs=12", "train.learning_rate=1e-3", "train.max_held_out=100000", *small, *chosen.assignments]
    config = load([], settings)
    with session(None, 2, 500_000_000, 600):
        for system in chosen.systems:
            show(f"{system} known", [train(config, system, out / f"{system}-known", known)])
            folds = [train(config, system, out / f"{system}-unseen-{i}", file) for i, file in enumerate(unseen)]
            show(f"{system} unseen", folds)


if __name__ == "__main__":
    main()
