"""A small corpus, its store, and the commands, for tests of jobs."""

import json

from cluster.store import MODALITIES, VIDEOS, Store, token_table
from pipelines.build_index import build_index
from pipelines.config import load
from pipelines.encode import encode
from pipelines.extract import extract
from pipelines.ingest import ingest
from pipelines.job import open_job
from pipelines.release import open_release
from tests.media_files import make_video


class Corpus:
    """Five videos and a broken one, a store, and the commands. Without a model its words are encoded, which is fast."""

    def __init__(self, folder, model=None):
        self.folder = folder
        self.tokens = token_table("multivector" if model else "lexical")
        self.encoder = ["encode.encoder=lexical"]
        if model:
            self.encoder = ["encode.encoder=multivector", f"encode.multivector.model={model}/late"]
        self.rows = [
            {"video_id": f"v{i}", "uri": f"v{i}.mp4", "title": title, "tags": [["even"], ["odd"]][i % 2]}
            for i, title in enumerate(["red cat", "blue dog", "green moon", "red moon", "blue cat"])
        ] + [{"video_id": "broken", "uri": "broken.mp4", "title": "green dog"}]
        for i in range(5):
            make_video(folder / f"v{i}.mp4", levels=[40 + 40 * i] * 10)
        (folder / "broken.mp4").write_bytes(b"this is not a video")
        self.store = Store.at(str(folder / "store"))

    @property
    def manifest(self):
        path = self.folder / "manifest.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        return str(path)

    def config(self, *assignments):
        return load(
            [],
            [
                "extract.modalities=[frame,metadata]",
                "extract.frames.frames_per_clip=2",
                *self.encoder,
                "max_failure_rate=0.5",
                "retries.wait_seconds=0",
                *assignments,
            ],
            self.store.uri,
        )

    def index(self, *assignments, dry_run=False, remove_gone=False):
        with open_job(self.config(*assignments), "index", dry_run) as job:
            ingest(job, self.manifest, remove_gone, dry_run)
            extract(job, dry_run)
            encode(job, dry_run)
        return job

    def build(self, *assignments, full=False, draft=False):
        """Bring the index up to date and return the job and the manifest of its release."""
        with open_job(self.config(*assignments), "build-index") as job:
            build_index(job, full, draft)
        return job, open_release(self.store, job.summary.release["release_id"]).manifest

    def versions(self):
        return {name: self.store.open(name).version for name in (VIDEOS, MODALITIES, self.tokens)}

    def table(self, name, *columns):
        return self.store.open(name).to_table(columns=list(columns) or None).to_pylist()
