"""Doctor: what a person would check before the first night, each with its mend."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import obstore

from cluster.objects import describe, is_refusal, open_objects
from operators import torchvision_shim, weights
from operators.errors import ConfigError, MaxreelError
from pipelines.config import Config
from pipelines.encode import encoder_fingerprint
from pipelines.job import open_store

TESTED = {"ray": "2.60", "pylance": "14", "torch": "2.13", "transformers": "5.23"}


@dataclass(frozen=True)
class Check:
    """One finding: ``ok``, ``WARN`` or ``FAIL``, and how to mend it."""

    level: str
    name: str
    detail: str
    mend: str = ""


def examine(config: Config) -> list[dict[str, str]]:
    """Return what was found, in the order a job would meet it."""
    checks = [_python(), *_versions(), _torchvision(), *_decoders(), *_models(config), _machine()]
    if config.store:
        checks.append(_store(config))
    return [asdict(check) for check in checks]


def _python() -> Check:
    return Check("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _versions() -> list[Check]:
    checks = []
    for name, tested in TESTED.items():
        found = importlib.metadata.version(name)
        fits = found.startswith(tested + ".") or found.split("+")[0] == tested
        mend = "" if fits else f"pip install -c constraints.txt '{name}'"
        checks.append(Check("ok" if fits else "WARN", name, f"{found} (tested with {tested})", mend))
    return checks


def _torchvision() -> Check:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        return Check("FAIL", "torchvision", str(error), "reinstall torch and torchvision from constraints.txt")
    if torchvision_shim.is_active():
        return Check(
            "WARN",
            "torchvision",
            "its compiled operators do not fit this torch; declared instead, which is enough here",
        )
    return Check("ok", "torchvision", importlib.metadata.version("torchvision"))


def _decoders() -> list[Check]:
    return [_imports("decord", "decord", "pip install decord"), _imports("PyAV", "av", "pip install av")]


def _imports(name: str, module: str, mend: str) -> Check:
    try:
        version = getattr(importlib.import_module(module), "__version__", "")
    except (ImportError, OSError) as error:
        return Check("FAIL", name, str(error), mend)
    return Check("ok", name, str(version))


def _models(config: Config) -> list[Check]:
    models = {"speech": config.extract.speech.model}
    if config.extract.screen_text.engine == "easyocr":
        models["screen text"] = config.extract.screen_text.model
    for name, value in config.encode.parameters().items():
        if value and (name in ("model", "base", "head") or name.endswith("_model")):
            models[f"encoder {name}"] = value
    return [*(_model(use, model) for use, model in models.items()), _encoder(config)]


def _encoder(config: Config) -> Check:
    def find() -> str:
        return f"{config.encode.encoder}, fingerprint {encoder_fingerprint(config.encode)[:12]}"

    return _attempt("encoder", find, "name what it lacks in the config")


def _model(use: str, model: str) -> Check:
    def find() -> str:
        return f"{use}: {model}, fingerprint {weights.fingerprint(model)[:12]}"

    return _attempt("model", find, "pip install 'maxreel[offline]', or name another model in the config")


def _machine() -> Check:
    free = shutil.disk_usage(os.getcwd()).free / 1e9
    level = "ok" if free > 5 else "WARN"
    return Check(
        level, "machine", f"{os.cpu_count()} cores, {free:.0f} GB of disk free", "" if free > 5 else "free some disk"
    )


def _store(config: Config) -> Check:
    try:
        store = open_store(config)
        objects = open_objects(store.uri, store.options, patient=False)
        path = f"_doctor/{uuid.uuid4().hex}"
        obstore.put(objects, path, b"x", mode="create")
        try:
            obstore.put(objects, path, b"y", mode="create")
            one_writer = False
        except obstore.exceptions.AlreadyExistsError:
            one_writer = True
        obstore.delete(objects, path)
    except (MaxreelError, OSError, ValueError, obstore.exceptions.BaseError) as error:
        return Check("FAIL", "store", describe(error), _mend(error, config))
    if not one_writer:
        mend = "use a server that honours If-None-Match, or see to it that no two jobs write at once"
        return Check("FAIL", "store", f"{store.uri} lets two runs create one object: no lease holds there", mend)
    return Check("ok", "store", f"{store.uri} can be written, by one run at a time")


def _mend(error: Exception, config: Config) -> str:
    if is_refusal(error):
        return (
            "the store refuses these credentials: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the variables that "
            "storage.access_key_id_env and secret_access_key_env name) and that they may list, read, write and delete there"
        )
    if isinstance(error, FileNotFoundError):
        return "create the bucket, or correct the store's address"
    if isinstance(error, ConfigError):
        return "correct the setting"
    if "169.254." in str(error):
        return (
            "no credentials were found, so that the machine was asked for its own: set AWS_ACCESS_KEY_ID and the like"
        )
    endpoint = config.storage.to_options().get("aws_endpoint", "the provider's own")
    return f"check the path or address, the network, and storage.endpoint (in force: {endpoint})"


def _attempt(name: str, action: Callable[[], Any], mend: str) -> Check:
    try:
        return Check("ok", name, str(action()))
    except (MaxreelError, OSError, ValueError) as error:
        return Check("FAIL", name, str(error), mend)
