"""Tiny Qwen2.5-VL and Qwen2.5-Omni thinkers with random weights and whole processors, laid out as a hub id would be.

The tokenizer is Qwen's own kind (byte-level BPE behind its splitting rule) with an alphabet of bytes and a few merges, so
that any text has tokens and a word has several.
"""

import re

import operators  # noqa: F401  (torchvision's shim, before transformers needs it)

TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}@VISION_START@@IMAGE@@VISION_END@\
{% elif content['type'] == 'video' %}@VISION_START@@VIDEO@@VISION_END@\
{% elif content['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}"""
"""What the two families' own templates come to, without tools and without numbers of pictures."""

VL_TOKENS = {"VISION_START": "<|vision_start|>", "VISION_END": "<|vision_end|>"} | {
    "IMAGE": "<|image_pad|>",
    "VIDEO": "<|video_pad|>",
}
OMNI_TOKENS = {"VISION_START": "<|vision_bos|>", "VISION_END": "<|vision_eos|>", "IMAGE": "<|IMAGE|>"} | {
    "VIDEO": "<|VIDEO|>",
    "AUDIO": "<|AUDIO|>",
    "AUDIO_START": "<|audio_bos|>",
    "AUDIO_END": "<|audio_eos|>",
}
OMNI_NAMES = {"VISION_START": "vision_bos_token", "VISION_END": "vision_eos_token", "IMAGE": "image_token"} | {
    "VIDEO": "video_token",
    "AUDIO": "audio_token",
    "AUDIO_START": "audio_bos_token",
    "AUDIO_END": "audio_eos_token",
}
MERGES = ["e r", "i n", "Ġ t", "o n", "a n", "Ġ c", "Ġc a", "Ġca t", "Ġ m", "o on", "Ġm oon", "r e", "re d", "Ġ red"]

DIM = 16
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}
VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32} | {
    "fullatt_block_indexes": [1],
    "window_size": 56,
}
AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "output_dim": 32}


def save_vl(folder):
    """Save a tiny Qwen2.5-VL with a head of its own; return the folder."""
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _tokenizer(VL_TOKENS)
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor())
    processor.chat_template = _template(VL_TOKENS)
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None},
        vision_config=VISION,
        tie_word_embeddings=True,
        **_ids(tokenizer, VL_TOKENS, image_token_id="IMAGE", video_token_id="VIDEO"),
        **_ids(tokenizer, VL_TOKENS, vision_start_token_id="VISION_START", vision_end_token_id="VISION_END"),
    )
    return _save_with_head(Qwen2_5_VLForConditionalGeneration(config), folder)


def save_omni(folder):
    """Save a tiny Qwen2.5-Omni thinker with a head of its own; return the folder."""
    import torch
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer = _tokenizer(OMNI_TOKENS, {OMNI_NAMES[name]: token for name, token in OMNI_TOKENS.items()})
    ears = WhisperFeatureExtractor(feature_size=16, chunk_length=30, return_attention_mask=True)
    processor = Qwen2_5OmniProcessor(Qwen2VLImageProcessor(), Qwen2VLVideoProcessor(), ears, tokenizer)
    processor.chat_template = _template(OMNI_TOKENS)
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2_5OmniThinkerConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None},
        vision_config=VISION,
        audio_config=AUDIO | {"num_mel_bins": 16},
        **_ids(tokenizer, OMNI_TOKENS, image_token_id="IMAGE", video_token_id="VIDEO", audio_token_id="AUDIO"),
        **_ids(tokenizer, OMNI_TOKENS, vision_start_token_id="VISION_START", vision_end_token_id="VISION_END"),
        **_ids(tokenizer, OMNI_TOKENS, audio_start_token_id="AUDIO_START", audio_end_token_id="AUDIO_END"),
    )
    return _save_with_head(Qwen2_5OmniThinkerForConditionalGeneration(config), folder)


def _save_with_head(model, folder):
    import torch

    model.custom_text_proj = torch.nn.Linear(TEXT["hidden_size"], DIM)
    model.save_pretrained(folder)
    return folder


def _tokenizer(tokens, names=None):
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    pieces = sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(merge.split()) for merge in MERGES],
        extra_special_tokens=names or {},
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *tokens.values()]
    tokenizer.add_special_tokens({"additional_special_tokens": special}, replace_extra_special_tokens=False)
    return tokenizer


def _template(tokens):
    return re.sub("@([A-Z_]+)@", lambda match: tokens[match[1]], TEMPLATE)


def _ids(tokenizer, tokens, **names):
    return {field: tokenizer.convert_tokens_to_ids(tokens[name]) for field, name in names.items()}
