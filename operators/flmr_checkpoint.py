"""Reads FLMR and PreFLMR as their authors' port to transformers saves them (``FLMRModelForRetrieval``).

One file holds a BERT for documents, another for queries where they were trained apart, a CLIP vision model, the mapping
network and PreFLMR's transformer. Modules that are shared are saved under one of several names, or under all; here every
weight must find its place, and names for the same module must hold the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from operators import weights
from operators.checkpoints import read_config, require_whole
from operators.errors import ModelError
from operators.text_tower import UNUSED, TextCheckpoint
from operators.towers import read_weights, renamed
from operators.vision_tower import VisionCheckpoint, without_positions

SUPPORTED = {
    "use_vision_encoder": True,
    "mask_punctuation": True,
    "separate_query_and_context_vision_encoder": False,
    "query_mask_input_ids_skip_list": [],
}
"""Settings of the port that no released checkpoint has otherwise."""

PARTS = re.compile(
    r"(?P<side>context|query)_(?:"
    r"(?P<bert>text_encoder)\.(?:bert_model|text_model)\.|(?P<linear>text_encoder_linear)\.|"
    r"(?P<clip>vision_encoder)\.(?:vision_model\.)+|(?P<mapping>vision_projection)\.)"
)
OF_TRANSFORMER = "transformer_mapping_"


@dataclass(frozen=True)
class FlmrCheckpoint:
    """The parts of a checkpoint.

    Attributes
    ----------
    query, document
        Text towers; one and the same unless they were trained apart.
    vision
        The vision tower.
    head
        Configuration of the head, as `heads.build_head` takes it.
    head_tensors
        Its weights.
    separator
        Word that ends an instruction, whose tokens do not count; None where there are none.
    """

    query: TextCheckpoint
    document: TextCheckpoint
    vision: VisionCheckpoint
    head: dict[str, Any]
    head_tensors: dict[str, Any]
    separator: str | None


def read_flmr(model: str, system: str) -> FlmrCheckpoint:
    """Return the parts of a checkpoint of FLMR or PreFLMR.

    Parameters
    ----------
    model
        Its folder, as `weights.resolve` takes it.
    system
        ``flmr`` or ``preflmr``.

    Raises
    ------
    ModelError
        If it is not one of that system, has settings that are not supported, or weights that have no place.
    """
    folder = Path(weights.resolve(model))
    config = read_config(folder)
    _require_supported(model, config, system)
    parts = _Parts(model, read_weights(folder))
    apart = bool(config.get("separate_query_and_context_text_encoder"))
    sides = ("context",) if apart else ("context", "query")
    document = _text(model, folder / "context_tokenizer", config, parts, sides)
    query = _text(model, folder / "query_tokenizer", config, parts, ("query",) if apart else sides)
    query = replace(query, document_length=document.document_length)
    return FlmrCheckpoint(
        query,
        document if apart else query,
        _vision(model, folder, config, parts),
        _head_config(config, system),
        _head_tensors(parts, system),
        config.get("mask_instruction_token") if system == "preflmr" else None,
    )


def _head_config(config: Mapping[str, Any], system: str) -> dict[str, Any]:
    """Return the configuration of the head, as `heads.build_head` takes it, from that of the checkpoint."""
    head = {
        "system": system,
        "vision_dim": config["vision_config"].get("hidden_size", 768),
        "dim": config.get("dim", 128),
        "num_tokens": config.get("mapping_network_prefix_length", 32),
    }
    if system == "flmr":
        return head
    # The transformer's base is bert-base-uncased in every release, and so is the text tower.
    text = config["text_config"]
    return head | {
        "hidden": text.get("hidden_size", 768),
        "layers": config["transformer_mapping_num_hidden_layers"],
        "heads": text.get("num_attention_heads", 12),
        "intermediate": text.get("intermediate_size", 3072),
        "cross_attention_length": config.get("transformer_mapping_cross_attention_length", 32),
    }


class _Parts:
    """Weights by side and part, by the part's own names."""

    def __init__(self, model: str, tensors: Mapping[str, Any]) -> None:
        self._model = model
        self._tensors: dict[tuple[str, str], dict[str, Any]] = {}
        self.transformer = renamed(tensors, OF_TRANSFORMER)
        others = []
        for name, tensor in tensors.items():
            match = PARTS.match(name)
            if match:
                self._add(str(match["side"]), str(match.lastgroup), name[match.end() :], tensor)
            elif not name.startswith(OF_TRANSFORMER):
                others.append(name)
        require_whole(model, "FLMRModelForRetrieval", [], others)

    def of(self, sides: tuple[str, ...], part: str) -> dict[str, Any]:
        """Return a part's weights, from whichever sides have them."""
        merged: dict[str, Any] = {}
        for side in sides:
            for name, tensor in self._tensors.get((side, part), {}).items():
                self._require_same(f"{side} {part} {name}", merged.setdefault(name, tensor), tensor)
        return merged

    def _add(self, side: str, part: str, name: str, tensor: Any) -> None:
        own = self._tensors.setdefault((side, part), {})
        self._require_same(f"{side} {part} {name}", own.setdefault(name, tensor), tensor)

    def _require_same(self, what: str, one: Any, other: Any) -> None:
        if one is not other and not (one.shape == other.shape and bool((one == other).all())):
            raise ModelError(
                f"model {self._model} holds two different {what}, but its config.json says they are shared"
            )


def _require_supported(model: str, config: Mapping[str, Any], system: str) -> None:
    if config.get("model_type") != "flmr" or not {"text_config", "vision_config"} <= config.keys():
        raise ModelError(
            f"model {model} is of type {config.get('model_type')}, not an FLMR in the layout of FLMRModelForRetrieval; "
            "give its parts instead: text_model, vision_model and head"
        )
    own = "preflmr" if config.get("use_transformer_mapping_network") else "flmr"
    if own != system:
        raise ModelError(f"model {model} is a checkpoint for the encoder {own}, not {system}")
    for name, value in SUPPORTED.items():
        if config.get(name, value) != value:
            raise ModelError(f"model {model} has {name} {config[name]}; supported is {value}")


def _text(
    model: str, tokenizer: Path, config: Mapping[str, Any], parts: _Parts, sides: tuple[str, ...]
) -> TextCheckpoint:
    from transformers import BertConfig

    tensors = {name: tensor for name, tensor in parts.of(sides, "bert").items() if not UNUSED.fullmatch(name)}
    linear = parts.of(sides, "linear").get("weight")
    if linear is None or "embeddings.word_embeddings.weight" not in tensors:
        raise ModelError(f"model {model} lacks the text encoder of {sides[0]} or its linear layer")
    if not tokenizer.is_dir():
        raise ModelError(f"model {model} lacks the folder {tokenizer.name}")
    text = config["text_config"]
    # FLMR's nine special tokens lengthen the table of words, but not everywhere the vocabulary's size in the config.
    bert = BertConfig.from_dict({**text, "vocab_size": len(tensors["embeddings.word_embeddings.weight"])})
    file = tokenizer / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return TextCheckpoint(
        model,
        bert,
        without_positions(tensors),
        linear,
        tokenizer,
        int(settings.get("query_maxlen", text.get("query_maxlen", 32))),
        int(settings.get("doc_maxlen", 512)),
        bool(settings.get("attend_to_mask_tokens", False)),
    )


def _vision(model: str, folder: Path, config: Mapping[str, Any], parts: _Parts) -> VisionCheckpoint:
    from transformers import CLIPVisionConfig

    of_clip = without_positions(parts.of(("context", "query"), "clip"))
    return VisionCheckpoint(model, CLIPVisionConfig.from_dict(config["vision_config"]), of_clip, folder)


def _head_tensors(parts: _Parts, system: str) -> dict[str, Any]:
    mapping = parts.of(("context", "query"), "mapping")
    if system == "flmr":
        return mapping | parts.transformer
    return renamed(mapping, "", "mapping.") | renamed(parts.transformer, "", "transformer.")
