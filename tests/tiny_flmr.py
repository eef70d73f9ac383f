"""Tiny towers and heads with random weights, saved in the layouts of the released checkpoints, with their modules."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
)

from operators.heads import build_head, save_head

WORDS = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += [
    "what",
    "animal",
    "is",
    "this",
    "a",
    "red",
    "cat",
    "dog",
    "moon",
    "on",
    "the",
    "mat",
    "find",
    "it",
    "can",
    "you",
]
WORDS += [".", ",", ":", "?", "##s"]
MARKERS = ["<BOV>", "<SOV>", "<EOV>", "<BOQ>", "<EOQ>", "<BOC>", "<EOC>", "<BOK>", "<EOK>"]

DIM, HIDDEN, VISION, TOKENS, HEADS, PATCHES = 8, 24, 16, 4, 3, 4
QUERY_LENGTH, DOCUMENT_LENGTH, SIDE = 12, 10, 32


@dataclass
class Tiny:
    """Folders, and the modules whose weights are in them."""

    folder: Path
    modules: dict[str, Any]

    def __getattr__(self, name):
        return str(self.folder / name)


def build(folder):
    """Return folders ``clip``, ``colbert``, ``flmr``, ``preflmr``, ``mire`` and ``head_*`` for the three systems."""
    torch.manual_seed(0)
    modules = {"bert": scatter(bert(len(WORDS))), "linear": nn.Linear(HIDDEN, DIM, bias=False), "clip": scatter(clip())}
    save_colbert(folder / "colbert", modules)
    modules["clip"].save_pretrained(folder / "clip")
    processor().save_pretrained(folder / "clip")
    for system in ("flmr", "preflmr", "mire"):
        modules[f"head_{system}"] = head = build_head(head_config(system)).eval()
        scatter(head)
        save_head(folder / f"head_{system}", head_config(system), head)
    modules["vision"] = CLIPVisionModel.from_pretrained(folder / "clip").eval()
    save_flmr(folder / "flmr", modules, MARKERS)
    modules["query_bert"], modules["query_linear"] = scatter(bert(len(WORDS))), nn.Linear(HIDDEN, DIM, bias=False)
    save_preflmr(folder / "preflmr", modules)
    save_mire(folder / "mire", modules)
    return Tiny(folder, modules)


def bert(vocabulary):
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=48,
    )
    return BertModel(config).eval()


def clip():
    shape = {"hidden_size": VISION, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = shape | {"image_size": SIDE, "patch_size": SIDE // 2}
    return CLIPModel(CLIPConfig(text_config=text | {"vocab_size": 20} | ends, vision_config=vision, projection_dim=8))


def processor():
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def scatter(module):
    """Move every parameter: fresh norms and biases are ones and zeros, which would hide that they are not used."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def head_config(system):
    config = {"system": system, "vision_dim": VISION, "dim": DIM, "num_tokens": TOKENS}
    if system == "mire":
        return config | {"num_heads": HEADS}
    more = {"hidden": HIDDEN, "layers": 1, "heads": 2, "intermediate": 16, "cross_attention_length": 6}
    return config | (more if system == "preflmr" else {})


def save_tokenizer(folder, added=(), **settings):
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return tokenizer


def save_colbert(folder, modules):
    save_tokenizer(folder)
    state = {f"bert.{name}": tensor for name, tensor in modules["bert"].state_dict().items()}
    save_file(state | {"linear.weight": modules["linear"].weight.detach()}, folder / "model.safetensors")
    config = modules["bert"].config.to_dict() | {"architectures": ["HF_ColBERT"]}
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"query_maxlen": QUERY_LENGTH, "doc_maxlen": DOCUMENT_LENGTH, "dim": DIM}
    (folder / "artifact.metadata").write_text(json.dumps(settings))


def named(prefix, module):
    return {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in module.state_dict().items()}


def save_flmr(folder, modules, added):
    """Shared text encoder, in both names of it; a longer table of words than the config says."""
    save_tokenizer(
        folder / "query_tokenizer", added, tokenizer_class="FLMRQueryEncoderTokenizer", query_maxlen=QUERY_LENGTH
    )
    save_tokenizer(folder / "context_tokenizer", added, tokenizer_class="FLMRContextEncoderTokenizer", doc_maxlen=14)
    modules["flmr_bert"] = scatter(bert(len(WORDS) + len(added)))
    state = {}
    for side in ("context", "query"):
        state |= named(f"{side}_text_encoder.bert_model", modules["flmr_bert"])
        state |= named(f"{side}_text_encoder_linear", modules["linear"])
        state |= named(f"{side}_vision_encoder.vision_model.vision_model", modules["vision"])
        state |= named(f"{side}_vision_projection", modules["head_flmr"])
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(port_config(modules)))


def save_preflmr(folder, modules):
    """Text encoders apart; what is shared saved once."""
    settings = {"query_tokenizer": {"query_maxlen": QUERY_LENGTH}, "context_tokenizer": {"doc_maxlen": DOCUMENT_LENGTH}}
    for name, own in settings.items():
        save_tokenizer(folder / name, **own)
    head = modules["head_preflmr"]
    state = named("context_text_encoder.text_model", modules["bert"])
    state |= named("context_text_encoder_linear", modules["linear"])
    state |= named("query_text_encoder.bert_model", modules["query_bert"])
    state |= named("query_text_encoder_linear", modules["query_linear"])
    state |= named("context_vision_encoder.vision_model.vision_model", modules["vision"])
    state |= named("context_vision_projection", head.mapping)
    for name in ("input_linear", "network", "output_linear"):
        state |= named(f"transformer_mapping_{name}", getattr(head.transformer, name))
    save_file(state, folder / "model.safetensors")
    more = {
        "use_transformer_mapping_network": True,
        "transformer_mapping_config_base": "bert-base-uncased",
        "transformer_mapping_num_hidden_layers": 1,
        "transformer_mapping_cross_attention_length": 6,
        "separate_query_and_context_text_encoder": True,
        "mask_instruction_token": ":",
    }
    (folder / "config.json").write_text(json.dumps(port_config(modules) | more))


def port_config(modules):
    return {
        "model_type": "flmr",
        "dim": DIM,
        "mapping_network_prefix_length": TOKENS,
        "text_config": modules["bert"].config.to_dict() | {"query_maxlen": 32},
        "vision_config": modules["vision"].config.to_dict(),
    }


def save_mire(folder, modules):
    save_tokenizer(folder)
    head = modules["head_mire"]
    state = named("model.bert", modules["bert"]) | named("model.linear", modules["linear"])
    state |= named("vision_tower.vision_tower.vision_model", modules["vision"])
    state |= named("query_fusion.split_mlp", head.split_mlp.model)
    for name in ("proj", "k_state", "v_state", "o_proj"):
        state |= named(f"query_fusion.{name}", getattr(head.pooling, name))
    torch.save({"model": state, "epoch": 3}, folder / "mire_epoch_3.pth")
    more = {"num_tokens": TOKENS, "num_heads": HEADS, "vision_model_name": "openai/clip-vit-base-patch32"}
    (folder / "config.json").write_text(json.dumps(modules["bert"].config.to_dict() | more))
    (folder / "artifact.metadata").write_text(json.dumps({"dim": DIM}))


def picture(seed, width=40, height=32):
    """Return a picture of smooth noise, encoded without loss."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(encoded, "PNG")
    return encoded.getvalue()


def opened(encoded):
    return Image.open(io.BytesIO(encoded)).convert("RGB")
