"""Makes image queries of a corpus: a frame of each video, cropped and compressed again, whose answer is that video.

    python -m benchmarks.image_queries STORE OUT [--crop 0.7] [--quality 40] [--frames]
    maxreel evaluate --store STORE --queries OUT/queries.jsonl --qrels OUT/qrels.txt --out OUT/evaluation

The frame is read from the video's file at a random moment, which is rarely one that was indexed; with ``--frames`` it is
one of the frames that the store keeps. A random part of it (``--crop`` of each side) is kept, made half as large and saved
as a JPEG of ``--quality``.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image

from cluster.store import MODALITIES, VIDEOS, Store
from operators import schema
from operators.encoders import open_picture


def frame_at(path: str, seconds: float) -> Image.Image:
    """Return the first frame at or after a moment."""
    with av.open(path) as container:
        container.seek(int(seconds * 1_000_000))
        last = None
        for frame in container.decode(video=0):
            last = frame
            if frame.time is not None and frame.time >= seconds:
                break
        if last is None:
            raise ValueError(f"{path} has no frame at {seconds:.1f} s")
        return last.to_image()


def spoil(picture: Image.Image, crop: float, quality: int, rng: np.random.Generator) -> bytes:
    """Return a random part of a picture at half its size, as a poor JPEG."""
    width, height = (round(crop * side) for side in picture.size)
    left, top = (rng.integers(0, whole - part + 1) for whole, part in zip(picture.size, (width, height), strict=True))
    part = picture.crop((left, top, left + width, top + height))
    small = part.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    small.convert("RGB").save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("out", type=Path)
    parser.add_argument("--crop", type=float, default=0.7)
    parser.add_argument("--quality", type=int, default=40)
    parser.add_argument("--frames", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    store, rng = Store.at(arguments.store), np.random.default_rng(arguments.seed)
    columns = ["video_id", "frames"] if arguments.frames else ["video_id", "start_seconds", "stop_seconds"]
    rows = store.open(MODALITIES).to_table(columns=columns, filter=f"modality = '{schema.FRAME}'").to_pylist()
    uris = {row["video_id"]: row["uri"] for row in store.rows(VIDEOS, ["video_id", "uri"]).to_pylist()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    queries, qrels = [], []
    for row in sorted(rows, key=lambda row: row["video_id"]):
        if arguments.frames and not row["frames"]:
            continue
        if arguments.frames:
            picture = open_picture(row["frames"][rng.integers(len(row["frames"]))]["jpeg"])
        else:
            picture = frame_at(uris[row["video_id"]], rng.uniform(row["start_seconds"], row["stop_seconds"]))
        name = f"i{len(queries)}"
        (arguments.out / f"{name}.jpg").write_bytes(spoil(picture, arguments.crop, arguments.quality, rng))
        queries.append(json.dumps({"id": name, "image": f"{name}.jpg", "target_modality": schema.FRAME}) + "\n")
        qrels.append(f"{name} 0 {row['video_id']} 1\n")
    (arguments.out / "queries.jsonl").write_text("".join(queries))
    (arguments.out / "qrels.txt").write_text("".join(qrels))
    print(f"{len(queries)} image queries in {arguments.out}")


if __name__ == "__main__":
    main()
