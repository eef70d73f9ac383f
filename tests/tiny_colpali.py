"""Tiny ColPali, ColQwen2, ColModernVBert and NeoMME checkpoints with random weights, saved as a hub id would be."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import operators  # noqa: F401  (torchvision's shim, before transformers needs it)

FAMILIES = ("colpali", "colqwen2", "colqwen2_5", "colmodernvbert", "neomme")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN = SMALL | {
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}
QWEN_VISION = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32}
QWEN_2_5_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32} | {
    "fullatt_block_indexes": [1],
    "window_size": 56,
}

CHAT_TEMPLATE = (
    "{%- set content = messages[0].content[0] -%}"
    "{%- if content.type == 'image' -%}{{- document_token + image_token -}}"
    "{%- elif task == 'query' -%}{{- query_token + content.text + mask_token * 10 -}}"
    "{%- else -%}{{- document_token + content.text -}}{%- endif -%}"
)


def save(family, folder, dtype=torch.float32, **shapes):
    """Save a checkpoint of a family with its processor, and return the folder; ``shapes`` are its function's."""
    import transformers

    architecture, config, processor = globals()[family](**shapes)
    torch.manual_seed(FAMILIES.index(family))
    model = getattr(transformers, architecture)._from_config(config, dtype=dtype)
    for name, weight in model.named_parameters():
        # As they are made, attention hardly matters, or not at all: some of NeoMME's projections start at zero.
        if weight.ndim > 1 or name.endswith(("bias", "alpha")):
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


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


def colpali(text=SMALL | {"head_dim": 16}, vision=SMALL | {"image_size": 32, "patch_size": 8}, dim=16):
    """Return ColPali: SigLIP and Gemma; 16 patches a picture, whatever its size."""
    from transformers import (
        ColPaliConfig,
        ColPaliProcessor,
        GemmaConfig,
        PaliGemmaConfig,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    words = tokenizer(["<pad>", "<bos>", "<eos>", "<image>"], pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    side = vision["image_size"]
    pictures = SiglipImageProcessor(size={"height": side, "width": side})
    pictures.image_seq_length = (side // vision["patch_size"]) ** 2
    processor = ColPaliProcessor(pictures, words)
    vlm = PaliGemmaConfig(
        text_config=GemmaConfig(**{"vocab_size": len(words)} | text, num_key_value_heads=1, pad_token_id=0),
        vision_config=SiglipVisionConfig(projection_dim=text["hidden_size"], **vision),
        image_token_index=processor.image_token_id,
        projection_dim=text["hidden_size"],
    )
    return "ColPaliForRetrieval", ColPaliConfig(vlm_config=vlm, embedding_dim=dim), processor


def colqwen2(text=QWEN, vision=QWEN_VISION, max_patches=12, dim=16, backbone="Qwen2VLConfig"):
    """Return ColQwen2: a token for 28 x 28 pixels of a picture."""
    import transformers
    from transformers import ColQwen2Config, ColQwen2Processor, Qwen2VLImageProcessor

    names = ["im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    specials = ["<|endoftext|>", *(f"<|{name}|>" for name in names)]
    words = tokenizer(specials, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    pictures = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": max_patches * 28 * 28})
    ids = {f"{name}_token_id": specials.index(f"<|{name}|>") for name in names[2:4]}
    ids |= {"image_token_id": specials.index("<|image_pad|>"), "video_token_id": specials.index("<|video_pad|>")}
    ends = {"bos_token_id": None, "eos_token_id": None}
    vlm = getattr(transformers, backbone)(
        text_config={"vocab_size": len(words)} | ends | text, vision_config=vision, tie_word_embeddings=True, **ids
    )
    return "ColQwen2ForRetrieval", ColQwen2Config(vlm_config=vlm, embedding_dim=dim), ColQwen2Processor(pictures, words)


def colqwen2_5(vision=QWEN_2_5_VISION, **shapes):
    """Return ColQwen2 on Qwen2.5-VL."""
    return colqwen2(vision=vision, backbone="Qwen2_5_VLConfig", **shapes)


def colmodernvbert(
    text=SMALL | {"local_attention": 8, "global_attn_every_n_layers": 2},
    vision=SMALL | {"image_size": 32, "patch_size": 8},
    shuffle=2,
    longest_edge=96,
    dim=16,
):
    """Return ColModernVBert: tiles of 32 x 32 pixels, 4 tokens each, and the whole picture as one more."""
    from transformers import (
        ColModernVBertConfig,
        ColModernVBertProcessor,
        Idefics3ImageProcessor,
        ModernBertConfig,
        ModernVBertConfig,
        SiglipVisionConfig,
    )

    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<|begin_of_text|>"]
    words = tokenizer(["<pad>", "<unk>", "[CLS]", "[SEP]", *marks, *tiles], pad_token="<pad>", unk_token="<unk>")
    around = {name: words.convert_tokens_to_ids(name) for name in ("[CLS]", "[SEP]")}
    words.backend_tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=list(around.items()))
    side = vision["image_size"]
    pictures = Idefics3ImageProcessor(size={"longest_edge": longest_edge}, max_image_size={"longest_edge": side})
    processor = ColModernVBertProcessor(pictures, words, image_seq_len=(side // vision["patch_size"] // shuffle) ** 2)
    ends = {"pad_token_id": 0, "cls_token_id": around["[CLS]"], "sep_token_id": around["[SEP]"]}
    ends |= {"bos_token_id": around["[CLS]"], "eos_token_id": around["[SEP]"]}
    vlm = ModernVBertConfig(
        text_config=ModernBertConfig(**{"vocab_size": len(words)} | ends | text),
        vision_config=SiglipVisionConfig(**vision),
        image_token_id=processor.image_token_id,
        pixel_shuffle_factor=shuffle,
    )
    return "ColModernVBertForRetrieval", ColModernVBertConfig(vlm_config=vlm, embedding_dim=dim), processor


def neomme(
    text=SMALL | {"head_dim": 16, "num_key_value_heads": 1, "embedding_rank": 16, "patch_size": 8, "sliding_window": 4},
    max_side=48,
    dim=16,
):
    """Return NeoMME: patches of 8 x 8 pixels, one tower for text and pictures."""
    from transformers import NeoMMEConfig, NeoMMEImageProcessor, NeoMMEProcessor

    specials = ["<pad>", "<bos>", "<eos>", "<unk>", "<mask>", "<doc>", "<img>", "<query>", "<row>"]
    marks = {"document": "<doc>", "image": "<img>", "query": "<query>", "row": "<row>"}
    words = tokenizer(
        specials,
        pad_token="<pad>",
        mask_token="<mask>",
        extra_special_tokens={f"{name}_token": token for name, token in marks.items()},
    )
    pictures = NeoMMEImageProcessor(patch_size=text["patch_size"], max_side=max_side)
    config = NeoMMEConfig(**{"vocab_size": len(words)} | text, embedding_dim=dim)
    return "NeoMMEForRetrieval", config, NeoMMEProcessor(pictures, words, chat_template=CHAT_TEMPLATE)
