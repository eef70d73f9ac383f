"""Train: what is small in CLaMR, FLMR and MIRe learns from examples, on one CPU or many GPUs, and ``encode`` loads it.

What frozen towers give is computed once (`pipelines.train_features`); then Ray Train runs the loop (`pipelines.train_loop`)
on each worker. All of it lies in one folder: ``features/``, ``checkpoints/``, ``settings.json``, and at the end ``head/``
and ``metrics.json``. A run that was killed goes on from its last checkpoint; the store is only read, so no lease is held.

Held-out pairs are measured before and after. Those of one video or photograph are alike, so each group counts once: its
queries' mean is one value of the mean, of its bootstrap interval and of the paired test.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cluster.session import Pool, check_schedule, cluster_resources, session
from cluster.store import MODALITIES, Store
from operators import weights
from operators.clamr_checkpoint import HEAD_FILE, find_checkpoint
from operators.errors import ConfigError, ModelError
from operators.significance import bootstrap, compare
from pipelines.config import ClamrConfig, Config, TowersConfig
from pipelines.job import open_store
from pipelines.progress import Progress
from pipelines.train_examples import Examples, System, read_examples
from pipelines.train_features import Kind, Towers, make_features
from pipelines.train_loop import Schedule, train_on_worker
from pipelines.train_tasks import AlignmentPlan, ClamrPlan

log = logging.getLogger("maxreel")

LEARNING_RATES = {"clamr": 1e-5, "flmr": 1e-5, "mire": 1e-4}
"""The papers'."""


def train(config: Config, system: System, out: Path, examples: Path | None = None) -> dict[str, Any]:
    """Return what was trained and measured; at once where the folder holds it already.

    Raises
    ------
    ConfigError
        If settings or examples do not fit, or the folder holds a run of other ones.
    ModelError
        If a model is missing or incomplete.
    ScheduleError
        If the workers do not fit the cluster.
    """
    out = out.expanduser().resolve()
    store = open_store(config) if config.store else None
    version = store.open(MODALITIES).version if store else None
    found = read_examples(system, examples, store, version)
    trained, held_out = found.split(config.train.held_out, config.train.max_held_out, config.train.seed)
    schedule = _schedule(config, system, trained, held_out)
    _check_models(config, system)
    _keep_settings(out, _settings(config, system, found))
    if (out / "metrics.json").exists():
        log.info("train: %s is finished; its metrics are in metrics.json", out)
        metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        return metrics
    started = time.perf_counter()
    ray = config.ray
    with session(ray.address, ray.num_cpus, ray.object_store_bytes, ray.no_progress_seconds):
        plan = _plan(config, system, found, store, version, out)
        prepared = time.perf_counter()
        result = _fit(config, plan, schedule, out)
    seconds = {"features": prepared - started, "training": time.perf_counter() - prepared}
    metrics = _metrics(config, system, found, schedule, result, out) | {"seconds": seconds}
    _write(out / "metrics.json", metrics)
    return metrics


def _schedule(config: Config, system: System, trained: Sequence[int], held_out: Sequence[int]) -> Schedule:
    settings, workers = config.train, config.train.resources.num_workers
    if settings.batch % workers:
        raise ConfigError(
            f"train.batch is {settings.batch}, which {workers} workers cannot share evenly; give a multiple of "
            f"{workers}, for example {workers * max(1, settings.batch // workers)}"
        )
    if len(trained) < settings.batch:
        raise ConfigError(
            f"there are {len(trained)} examples to train on, fewer than train.batch, {settings.batch}; give more "
            "examples or a smaller batch"
        )
    return Schedule(trained, held_out, settings.batch, settings, settings.learning_rate or LEARNING_RATES[system])


def _settings(config: Config, system: System, examples: Examples) -> dict[str, Any]:
    """Return all that what is learned depends on."""
    models: ClamrConfig | TowersConfig = getattr(config.encode, system)
    if isinstance(models, ClamrConfig):
        of_models = find_checkpoint(models.model, models.base, models.head).fingerprints()
    else:
        of_models = [weights.fingerprint(m) for m in (models.text_model, models.vision_model, models.head) if m]
    return {
        "system": system,
        "train": config.train.model_dump(exclude={"resources"}, mode="json"),
        "models": models.model_dump(mode="json"),
        "weights": of_models,
        "examples": examples.fingerprint(),
    }


def _check_models(config: Config, system: System) -> None:
    """Refuse models that cannot be trained on, before a folder is theirs.

    Raises
    ------
    ConfigError
        If what is trained could not name what it was trained on, or the encoder would use it otherwise.
    """
    if system != "clamr":
        if getattr(config.encode, system).model is not None:
            raise ConfigError(
                f"encode.{system}.model is a whole checkpoint; train takes encode.{system}.text_model and vision_model, "
                f"and starts from encode.{system}.head where that is given"
            )
        return
    clamr = config.encode.clamr
    if clamr.context != "joint":
        raise ConfigError(f"encode.clamr.context is {clamr.context}; train sees all modalities of a clip: joint")
    if clamr.base:
        raise ConfigError(
            f"encode.clamr.base is {clamr.base}; train starts from a model that is whole or names its own base, for "
            "example vidore/colqwen2.5-base"
        )


def _keep_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new folder, or check that they are those of the run that it holds."""
    file = out / "settings.json"
    if not file.exists():
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} holds files that are no run of train; give --out a new or empty folder")
        out.mkdir(parents=True, exist_ok=True)
        _write(file, settings)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    other = sorted(_differences(before, settings))
    if other:
        raise ConfigError(
            f"{out} holds a run with other settings ({', '.join(other)}); give these again to go on with it, or "
            "another --out"
        )


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({*before, *now})
        return [found for name in names for found in _differences(before.get(name), now.get(name), f"{path}.{name}")]
    return [] if before == now else [path.removeprefix(".")]


def _plan(
    config: Config, system: System, examples: Examples, store: Store | None, version: int | None, out: Path
) -> AlignmentPlan | ClamrPlan:
    """Return what workers make their task from; of flmr and mire the features are computed here."""
    if system == "clamr":
        assert store is not None and version is not None  # read_examples took them
        clamr = config.encode.clamr
        return ClamrPlan(examples, store, version, clamr, config.train, _first_head(config, out))
    towers: TowersConfig = getattr(config.encode, system)
    models = Towers.of(system, towers, config.train)
    items: dict[Kind, list[str]] = {"pictures": examples.pictures, "passages": examples.documents}
    if system == "mire":
        items["guides"] = examples.queries
    actors = config.train.resources.feature_actors
    features = make_features(out / "features", items, models, store, version, cluster_resources(), actors)
    return AlignmentPlan(system, examples, features, towers, config.train)


def _first_head(config: Config, out: Path) -> str | None:
    """Return the head that training starts from, None for the checkpoint's own; it is drawn where there is none."""
    clamr = config.encode.clamr
    checkpoint = find_checkpoint(clamr.model, clamr.base, clamr.head)
    try:
        checkpoint.head_dim()
    except ModelError:
        return _random_head(config, checkpoint.backbone, out / "first-head")
    return clamr.head


def _random_head(config: Config, backbone: str, folder: Path) -> str:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    log.warning("%s holds no head; training starts from a random one", backbone)
    hidden = AutoConfig.from_pretrained(weights.resolve(backbone)).get_text_config().hidden_size
    torch.manual_seed(config.train.seed)
    head = torch.nn.Linear(hidden, config.train.new_head_dim)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"custom_text_proj.{name}": tensor.detach() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / HEAD_FILE)
    return str(folder)


def _fit(config: Config, plan: AlignmentPlan | ClamrPlan, schedule: Schedule, out: Path) -> dict[str, Any]:
    """Run the loop on the cluster and return what its first worker does."""
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    resources = config.train.resources
    pool = Pool("training", resources.num_workers, 1.0, 1.0 if resources.use_gpu else 0.0)
    check_schedule([pool], 0, cluster_resources())
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"plan": plan, "schedule": schedule, "head": out / "head"},
        scaling_config=ScalingConfig(num_workers=resources.num_workers, use_gpu=resources.use_gpu),
        # A run of the same name and path goes on from its last checkpoint.
        run_config=RunConfig(
            name="checkpoints",
            storage_path=str(out),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    with Progress("train", schedule.num_steps) as progress, _followed(out / "checkpoints", progress):
        result: dict[str, Any] = trainer.fit().return_value
    return result


@contextmanager
def _followed(checkpoints: Path, progress: Progress) -> Iterator[None]:
    """Count the steps that checkpoints in a folder say are done, for as long as the block runs."""
    ended = threading.Event()

    def follow() -> None:
        done = 0
        while not ended.wait(1.0):
            steps = [int(folder.name.removeprefix("step-")) for folder in checkpoints.glob("step-*")]
            progress.advance(max([*steps, done]) - done)
            done = max([*steps, done])

    thread = threading.Thread(target=follow, name="followed", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _metrics(
    config: Config, system: System, examples: Examples, schedule: Schedule, result: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    groups = {examples.rows[row].group for row in schedule.held_out}
    return {
        "system": system,
        "trained": len(schedule.trained),
        "held_out": len(schedule.held_out),
        "held_out_groups": len(groups),
        "steps": schedule.num_steps,
        "losses": result["losses"],
        "measures": _compared(result["before"], result["after"]),
        "head": str(out / "head"),
        "next": [_next_command(config, system, out)],
    }


def _compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return each measure before and after, with intervals over groups."""
    found: dict[str, Any] = {}
    for direction, of_queries in after.items():
        names, place = np.unique(of_queries["group"], return_inverse=True)

        def by_group(values: Sequence[float], place: Any = place, count: int = len(names)) -> Any:
            return np.bincount(place, values, count) / np.bincount(place, minlength=count)

        found[direction] = {"queries": len(place), "groups": len(names), "measures": {}}
        found[direction]["chance"] = float(by_group(of_queries["chance"]).mean())
        for measure in ("R@1", "nDCG@10"):
            first, last = by_group(before[direction][measure]), by_group(of_queries[measure])
            found[direction]["measures"][measure] = {
                "by_group": {str(name): [float(a), float(b)] for name, a, b in zip(names, first, last, strict=True)},
                "before": [float(first.mean()), *bootstrap(first)],
                "after": [float(last.mean()), *bootstrap(last)],
                "difference": asdict(compare(last, first)),
            }
    return found


def _next_command(config: Config, system: System, out: Path) -> str:
    where = "model" if system == "clamr" else "head"
    models = config.encode.clamr if system == "clamr" else getattr(config.encode, system)
    unset = type(models)()
    others = [name for name in ("text_model", "vision_model") if getattr(models, name, 0) != getattr(unset, name, 0)]
    named = "".join(f" --set encode.{system}.{name}={getattr(models, name)}" for name in others)
    return (
        f"maxreel encode --store {config.store or 'STORE'} --set encode.encoder={system}{named} "
        f"--set encode.{system}.{where}={out / 'head'}"
    )


def _write(file: Path, content: Mapping[str, Any]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(file)
