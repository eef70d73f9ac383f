"""Tiny ColPali, ColQwen2, ColModernVBert and NeoMME checkpoints with random weights, saved as a hub id would be."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import operators  # noqa: F401  (torchvision's shim, before transformers needs it)

FAMILIES = ("colpali", "colqwen2", "colqwen2_5", "colmodernvbert", "neomme")

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}

CHAT_TEMPLATE = (
    "{%- set content = messages[0].content[0] -%}"
    "{%- if content.type == 'image' -%}{{- document_token + image_token -}}"
    "{%- elif task == 'query' -%}{{- query_token + content.text + mask_token * 10 -}}"
    "{%- else -%}{{- document_token + content.text -}}{%- endif -%}"
)


def tokenizer(specials, **named):
    """Return a tokenizer of bytes, but that a word's first letter is one token with the space before it."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    starts = [("Ġ", letter) for letter in string.ascii_lowercase]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet, *map("".join, starts)])}
    of_bytes = Tokenizer(models.BPE(vocabulary, starts))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_bytes.decoder = decoders.ByteLevel()
    of_bytes.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(tokenizer_object=of_bytes, **named)


def save(family, folder):
    """Save a checkpoint of a family with its processor, and return the folder."""
    torch.manual_seed(FAMILIES.index(family))
    make = {"colqwen2": colqwen2, "colqwen2_5": colqwen2_5}.get(family) or globals()[family]
    model, processor = make()
    for name, weight in model.named_parameters():
        # As they are made, attention hardly matters, or not at all: some of NeoMME's projections start at zero.
        if weight.ndim > 1 or name.endswith(("bias", "alpha")):
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def colpali():
    """Return ColPali: SigLIP and Gemma; 16 patches a picture, whatever its size."""
    from transformers import (
        ColPaliConfig,
        ColPaliForRetrieval,
        ColPaliProcessor,
        GemmaConfig,
        PaliGemmaConfig,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    words = tokenizer(["<pad>", "<bos>", "<eos>", "<image>"], pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    pictures = SiglipImageProcessor(size={"height": 32, "width": 32})
    pictures.image_seq_length = 16
    processor = ColPaliProcessor(pictures, words)
    text = GemmaConfig(vocab_size=len(words), num_key_value_heads=1, head_dim=16, pad_token_id=0, **TEXT)
    vision = SiglipVisionConfig(image_size=32, patch_size=8, projection_dim=32, **SIGLIP)
    vlm = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=processor.image_token_id, projection_dim=32
    )
    return ColPaliForRetrieval(ColPaliConfig(vlm_config=vlm, embedding_dim=16)), processor


def colqwen2(of_2_5=False):
    """Return ColQwen2 on Qwen2-VL or on Qwen2.5-VL: as many patches as the picture is large."""
    from transformers import (
        ColQwen2Config,
        ColQwen2ForRetrieval,
        ColQwen2Processor,
        Qwen2_5_VLConfig,
        Qwen2VLConfig,
        Qwen2VLImageProcessor,
    )

    names = ["im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    specials = ["<|endoftext|>", *(f"<|{name}|>" for name in names)]
    words = tokenizer(specials, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    # A merged patch is 28 x 28 pixels; at most 12 of them.
    pictures = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 12 * 28 * 28})
    text = TEXT | {
        "vocab_size": len(words),
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    ids = {f"{name}_token_id": specials.index(f"<|{name}|>") for name in names[2:4]}
    ids |= {"image_token_id": specials.index("<|image_pad|>"), "video_token_id": specials.index("<|video_pad|>")}
    if of_2_5:
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
        vlm = Qwen2_5_VLConfig(
            text_config=text, vision_config=vision | {"fullatt_block_indexes": [1], "window_size": 56}, **ids
        )
    else:
        vlm = Qwen2VLConfig(
            text_config=text, vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32}, **ids
        )
    return ColQwen2ForRetrieval(ColQwen2Config(vlm_config=vlm, embedding_dim=16)), ColQwen2Processor(pictures, words)


def colqwen2_5():
    """Return ColQwen2 on Qwen2.5-VL."""
    return colqwen2(of_2_5=True)


def colmodernvbert():
    """Return ColModernVBert: tiles of 32 x 32 pixels, 4 tokens each, and the whole picture as one more."""
    from transformers import (
        ColModernVBertConfig,
        ColModernVBertForRetrieval,
        ColModernVBertProcessor,
        Idefics3ImageProcessor,
        ModernBertConfig,
        ModernVBertConfig,
        SiglipVisionConfig,
    )

    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<|begin_of_text|>"]
    words = tokenizer(["<pad>", "<unk>", "[CLS]", "[SEP]", *marks, *tiles], pad_token="<pad>", unk_token="<unk>")
    around = [(name, words.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    words.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    pictures = Idefics3ImageProcessor(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    processor = ColModernVBertProcessor(pictures, words, image_seq_len=4)
    text = ModernBertConfig(
        vocab_size=len(words), pad_token_id=0, local_attention=8, global_attn_every_n_layers=2, **TEXT
    )
    vision = SiglipVisionConfig(image_size=32, patch_size=8, **SIGLIP)
    vlm = ModernVBertConfig(
        text_config=text, vision_config=vision, image_token_id=processor.image_token_id, pixel_shuffle_factor=2
    )
    return ColModernVBertForRetrieval(ColModernVBertConfig(vlm_config=vlm, embedding_dim=16)), processor


def neomme():
    """Return NeoMME: patches of 8 x 8 pixels, one tower for text and pictures."""
    from transformers import NeoMMEConfig, NeoMMEForRetrieval, NeoMMEImageProcessor, NeoMMEProcessor

    specials = ["<pad>", "<bos>", "<eos>", "<unk>", "<mask>", "<doc>", "<img>", "<query>", "<row>"]
    marks = {"document": "<doc>", "image": "<img>", "query": "<query>", "row": "<row>"}
    words = tokenizer(
        specials,
        pad_token="<pad>",
        mask_token="<mask>",
        extra_special_tokens={f"{name}_token": token for name, token in marks.items()},
    )
    pictures = NeoMMEImageProcessor(patch_size=8, max_side=48)
    shape = TEXT | {"head_dim": 16, "num_key_value_heads": 1, "embedding_rank": 16, "embedding_dim": 16}
    config = NeoMMEConfig(vocab_size=len(words), patch_size=8, sliding_window=4, **shape)
    return NeoMMEForRetrieval(config), NeoMMEProcessor(pictures, words, chat_template=CHAT_TEMPLATE)
