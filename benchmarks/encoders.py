"""Clips and tokens a second of a neural encoder, and which share of the device's peak that is (MFU).

    python -m benchmarks.encoders [ENCODER ...] [--size tiny|real] [--device cuda] [--batch-tokens 4096 8192 16384]

Weights are random and of the real size (``--size real``) or tiny; nothing is downloaded. The checkpoint is saved to
``--folder`` (5 GB for ColQwen2-2B, 8 GB for Qwen2.5-VL-3B; kept for the next run if you name one) and loaded as a hub id
would be, by the encoder that ``maxreel index`` uses. Tokenizers are those of the tests: most make a token of a letter, so
the texts are as many letters as tokens are wanted; those of FLMR and MIRe make one of a word, of five letters.

A clip is ``--frames`` JPEG frames of 768 x 432 pixels, and speech, screen text and metadata of 400, 120 and 40 tokens. Clips
are handed over ``--batch-clips`` at a time, as ``encode`` does; decoding and normalising the frames is in the time. Start-up
is loading the model and encoding the first clips; tokens are those that come out.

FLOPs are those of the matrix products and convolutions of the forward pass, two to a multiply-add, as torch's
`FlopCounterMode` counts them with every item in a batch of its own and attention written out (``eager``; a causal mask
saves nothing there). So padding and recomputation are no work done, and MFU is of use alone. The peak is the data sheet's,
dense bfloat16, for GPUs that `PEAKS` names, else what a large matrix product reaches; that is printed in any case.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import re
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from operators.encoders import Content
from pipelines.config import EncodeConfig
from pipelines.encode import ENCODERS

PEAKS = {
    r"B200": 2250e12,
    r"H[12]00 NVL": 835e12,
    r"H200|H100.*HBM3": 989.4e12,
    r"H100": 756e12,
    r"A100\b": 312e12,
    r"L40S": 362e12,
    r"L4\b": 121e12,
    r"A10\b": 125e12,
}
"""FLOP/s of dense bfloat16 by the name that torch gives a GPU; the first that fits (NVIDIA's data sheets)."""

TEXT_TOKENS = {"speech": 400, "screen_text": 120, "metadata": 40}
DISTINCT_CLIPS = 4


@dataclass(frozen=True)
class Row:
    """One measurement; memory is the device's, or on a CPU the process's so far."""

    encoder: str
    size: str
    device: str
    precision: str
    attention: str
    batch_tokens: int
    parameters: int
    startup_seconds: float
    seconds: float
    clips_per_second: float
    tokens_per_second: float
    flops_per_clip: float
    flops_per_second: float
    peak_flops_per_second: float
    mfu: float
    peak_memory_gb: float


def colpali(family: str, size: str, folder: Path) -> tuple[str, dict[str, Any]]:
    from tests import tiny_colpali

    if not (folder / "config.json").exists():
        shapes = REAL[family] if size == "real" else {}
        tiny_colpali.save(family, folder, torch.bfloat16 if size == "real" else torch.float32, **shapes)
    return "colpali", {"model": str(folder)}


def clamr(size: str, folder: Path) -> tuple[str, dict[str, Any]]:
    from tests import tiny_qwen

    if not (folder / "config.json").exists():
        tiny_qwen.save_vl(folder)
        if size == "real":
            grow_qwen(folder)
    return "clamr", {"model": str(folder)}


def grow_qwen(folder: Path) -> None:
    """Put a Qwen2.5-VL-3B with a head in the place of a tiny one; its processor stays."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tiny = Qwen2_5_VLConfig.from_pretrained(folder)
    of_3b, tokens = (
        REAL["colqwen2_5"],
        {name: value for name, value in vars(tiny).items() if name.endswith("_token_id")},
    )
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = Qwen2_5_VLConfig(
        text_config=of_3b["text"] | ends, vision_config=of_3b["vision"], **tokens | {"tie_word_embeddings": True}
    )
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.custom_text_proj = torch.nn.Linear(of_3b["text"]["hidden_size"], of_3b["dim"], dtype=torch.bfloat16)
    model.save_pretrained(folder)


def towers(system: str, size: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Save ColBERT's BERT-base, CLIP ViT-L/14 and the head of FLMR, PreFLMR or MIRe between them; or tiny ones."""
    from tests import tiny_flmr

    if size == "tiny" and not folder.exists():
        tiny_flmr.build(folder)
    if size == "real" and not folder.exists():
        save_towers(system, folder)
    parts = {"text_model": folder / "colbert", "vision_model": folder / "clip", "head": folder / f"head_{system}"}
    lengths = (64, 384) if size == "real" else (tiny_flmr.QUERY_LENGTH, tiny_flmr.DOCUMENT_LENGTH)
    settings = {"model": None, "frames": "mapped", "query_length": lengths[0], "document_length": lengths[1]}
    return system, settings | {name: str(part) for name, part in parts.items()}


def save_towers(system: str, folder: Path) -> None:
    from transformers import BertConfig, BertModel, CLIPConfig, CLIPImageProcessor, CLIPModel

    from operators.heads import build_head, save_head
    from tests import tiny_flmr

    bert = BertModel(BertConfig())
    linear = torch.nn.Linear(768, 128, bias=False)
    tiny_flmr.save_colbert(folder / "colbert", {"bert": bert, "linear": linear})
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    CLIPModel(CLIPConfig(vision_config=vision | {"patch_size": 14})).save_pretrained(folder / "clip")
    CLIPImageProcessor().save_pretrained(folder / "clip")
    head = {"system": system, "vision_dim": 1024, "dim": 128, "num_tokens": 32}
    if system == "preflmr":
        head |= {"hidden": 768, "layers": 1, "heads": 12, "intermediate": 3072, "cross_attention_length": 32}
    if system == "mire":
        head |= {"num_tokens": 16, "num_heads": 12}
    save_head(folder / f"head_{system}", head, build_head(head))


QWEN_VISION = {"depth": 32, "num_heads": 16}
REAL: dict[str, dict[str, Any]] = {
    # vidore/colpali-v1.3-hf: PaliGemma-3B at 448 pixels
    "colpali": {
        "text": {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8}
        | {"head_dim": 256, "vocab_size": 257216},
        "vision": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
        | {"image_size": 448, "patch_size": 14},
        "dim": 128,
    },
    # vidore/colqwen2-v1.0-hf: Qwen2-VL-2B
    "colqwen2": {
        "text": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
        | {"num_key_value_heads": 2, "vocab_size": 151936}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
        "vision": QWEN_VISION | {"embed_dim": 1280, "hidden_size": 1536},
        "max_patches": 768,
        "dim": 128,
    },
    # Qwen2.5-VL-3B
    "colqwen2_5": {
        "text": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
        | {"num_key_value_heads": 2, "vocab_size": 151936}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
        "vision": QWEN_VISION
        | {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048, "window_size": 112}
        | {"fullatt_block_indexes": [7, 15, 23, 31]},
        "max_patches": 768,
        "dim": 128,
    },
    # ModernVBERT/colmodernvbert: ModernBERT-150M and SigLIP2-base at 512 pixels
    "colmodernvbert": {
        "text": {"hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12}
        | {"vocab_size": 50368, "local_attention": 128, "global_attn_every_n_layers": 3},
        "vision": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"image_size": 512, "patch_size": 16},
        "shuffle": 4,
        "longest_edge": 2048,
        "dim": 128,
    },
    # Hcompany/NeoMME-260M-Retriever
    "neomme": {
        "text": {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 17, "num_attention_heads": 16}
        | {"num_key_value_heads": 4, "head_dim": 64, "embedding_rank": 256, "vocab_size": 131072}
        | {"patch_size": 32, "sliding_window": 256},
        "max_side": 2048,
        "dim": 128,
    },
}
"""What `tests.tiny_colpali` makes tiny, as large as the checkpoints above it."""

CANDIDATES: dict[str, Callable[[str, Path], tuple[str, dict[str, Any]]]] = {
    **{family: partial(colpali, family) for family in REAL},
    "clamr": clamr,
    **{system: partial(towers, system) for system in ("flmr", "preflmr", "mire")},
}
"""What saves a checkpoint of a size in a folder, and returns the encoder's name and the settings that differ."""


def make_clips(num_clips: int, num_frames: int) -> list[dict[str, Content]]:
    """Return clips of words of random letters and of frames that are blurred noise."""
    generator = np.random.default_rng(0)
    return [
        {"frame": Content(frames=[{"jpeg": jpeg(generator)} for _ in range(num_frames)])}
        | {name: Content([{"text": words(generator, count)}]) for name, count in TEXT_TOKENS.items()}
        for _ in range(num_clips)
    ]


def jpeg(generator: np.random.Generator) -> bytes:
    noise = Image.fromarray(generator.integers(0, 255, (27, 48, 3), dtype=np.uint8))
    stream = io.BytesIO()
    noise.resize((768, 432), Image.Resampling.BICUBIC).save(stream, format="JPEG", quality=90)
    return stream.getvalue()


def words(generator: np.random.Generator, num_tokens: int) -> str:
    letters = generator.integers(ord("a"), ord("z") + 1, num_tokens).astype(np.uint8).tobytes().decode()
    return " ".join(letters[start : start + 5] for start in range(0, num_tokens, 5))


def flops_of(make: Any, parameters: dict[str, Any], clips: list[dict[str, Content]]) -> float:
    """Return the FLOPs of a clip's useful work."""
    encoder = make(**parameters | {"attention": "eager", "batch_tokens": 1})
    with FlopCounterMode(display=False) as counter:
        encoder.encode_documents(clips)
    return counter.get_total_flops() / len(clips)


def matmul_flops_per_second(device: str, dtype: torch.dtype) -> float:
    """Return what a large matrix product reaches: the best of ten."""
    side = 8192 if device.startswith("cuda") else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_of(device: str, precision: str) -> tuple[str, float, float]:
    """Return the device's name, its peak FLOP/s, and what a matrix product reaches."""
    reached = matmul_flops_per_second(device, getattr(torch, precision))
    name = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    )
    known = [peak for pattern, peak in PEAKS.items() if re.search(pattern, name)] if precision == "bfloat16" else []
    return name, known[0] if known else reached, reached


def measure(
    make: Any, parameters: dict[str, Any], clips: list[dict[str, Content]], num_clips: int, batch_clips: int
) -> dict[str, float]:
    """Return start-up seconds, seconds for all clips, tokens a second and so on, of one setting."""
    device = parameters["device"]
    gc.collect()  # of the model before
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    encoder = make(**parameters)
    encoder.encode_documents(clips)
    startup = time.perf_counter() - started
    many = [clips[i % len(clips)] for i in range(num_clips)]
    num_tokens = 0
    started = time.perf_counter()
    for first in range(0, num_clips, batch_clips):
        encoded = encoder.encode_documents(many[first : first + batch_clips])
        num_tokens += sum(len(tokens.embeddings) for clip in encoded for tokens in clip.values())
    seconds = time.perf_counter() - started
    on_gpu = device.startswith("cuda")
    memory = (
        torch.cuda.max_memory_allocated(device) if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "startup_seconds": startup,
        "seconds": seconds,
        "clips_per_second": num_clips / seconds,
        "tokens_per_second": num_tokens / seconds,
        "peak_memory_gb": memory / 1e9,
    }


def run(name: str, arguments: argparse.Namespace, folder: Path, peak: float) -> list[Row]:
    """Return the measurements of an encoder, one a batch size; print them."""
    encoder, settings = CANDIDATES[name](arguments.size, folder)
    chosen = {"precision": arguments.precision, "attention": arguments.attention}
    config = EncodeConfig.model_validate({"encoder": encoder, encoder: settings | chosen})
    make = ENCODERS[encoder]
    parameters = config.parameters() | {"device": arguments.device, "num_threads": arguments.num_threads}
    num_parameters = count_parameters(folder)
    clips = make_clips(min(DISTINCT_CLIPS, arguments.clips), arguments.frames)
    flops = flops_of(make, parameters, clips)
    print(f"\n{name} ({arguments.size}): {num_parameters / 1e6:,.1f} M parameters, {flops / 1e12:.4g} TFLOP a clip")
    print("batch_tokens  start-up s    clips/s   tokens/s    TFLOP/s     MFU   memory GB")
    rows = []
    for batch_tokens in arguments.batch_tokens:
        found = measure(
            make, parameters | {"batch_tokens": batch_tokens}, clips, arguments.clips, arguments.batch_clips
        )
        rate = flops * found["clips_per_second"]
        row = Row(
            name,
            arguments.size,
            arguments.device,
            batch_tokens=batch_tokens,
            parameters=num_parameters,
            flops_per_clip=flops,
            flops_per_second=rate,
            peak_flops_per_second=peak,
            mfu=rate / peak,
            **chosen,
            **found,
        )
        figures = f"{batch_tokens:12,}  {row.startup_seconds:10.1f}  {row.clips_per_second:9.3f}"
        print(
            f"{figures}  {row.tokens_per_second:9,.0f}  {rate / 1e12:9.4g}  {row.mfu:6.1%}  {row.peak_memory_gb:10.2f}"
        )
        rows.append(row)
    return rows


def count_parameters(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="*", default=["colqwen2"], metavar="ENCODER", help=", ".join(CANDIDATES))
    parser.add_argument("--size", choices=["tiny", "real"], default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--attention", choices=["sdpa", "flash_attention_2", "eager"], default="sdpa")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--batch-clips", type=int, default=16)
    parser.add_argument("--frames", type=int, default=10)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept; a temporary folder by default")
    parser.add_argument("--out", type=Path, help="a JSON file of all figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name, peak, reached = peak_of(arguments.device, arguments.precision)
    print(
        f"{name}, {arguments.precision}, attention {arguments.attention}: peak {peak / 1e12:.4g} TFLOP/s, "
        f"a matrix product reaches {reached / 1e12:.4g}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        kept = arguments.folder or Path(temporary)
        rows = [
            row
            for encoder in arguments.encoders
            for row in run(encoder, arguments, kept / f"{encoder}-{arguments.size}", peak)
        ]
    if arguments.out:
        arguments.out.write_text(json.dumps({"device_name": name, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
