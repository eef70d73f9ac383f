"""CLaMR's claims on data of which all is known: what the gold modality, joint encoding and late interaction are worth.

Each clip holds concepts in four modalities; a concept looks different in each, and different again in a query. A query asks
for the concepts of one modality of its clip and does not say of which. Trained and tested clips share concepts, not
combinations, so that R@1 says whether the concepts were learned.

1. *Gold modality.* Without it the best modality so far is taught, which at the start is any; the model learns its
   training clips by heart through the wrong ones. Same data, steps and start.
2. *Joint encoding.* Every set of words is spoken in every scene, and a query means words in one scene ("bank" at a river).
   The same transformer sees all tokens of a clip, or those of one modality at a time.
3. *Late interaction.* A clip holds a dozen concepts, a query asks for three; MaxSim over tokens, or one mean vector each.

    python benchmarks/clamr_toy.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from operators import losses

NUM_MODALITIES, CONCEPTS, OF_EACH, WIDTH, NOISE = 4, 40, 4, 64, 0.1
TRAINED, TESTED, QUERIES = 1000, 100, 400
BATCH, STEPS, LEARNING_RATE = 64, 200, 1e-2


@dataclass
class Clips:
    """Clips, queries for them, and which clip and modality each query is about."""

    tokens: Tensor  # (D, Td, WIDTH)
    modality: Tensor  # (Td,)
    queries: Tensor  # (Q, Tq, WIDTH)
    clip: Tensor  # (Q,)
    gold: Tensor  # (Q,)


class Towers(nn.Module):
    """One MLP for queries and one for each modality, applied token by token."""

    def __init__(self, num_modalities: int) -> None:
        super().__init__()
        self.of_query = _mlp()
        self.of_modality = nn.ModuleList(_mlp() for _ in range(num_modalities))

    def encode_queries(self, tokens: Tensor) -> Tensor:
        """Return (Q, Tq, WIDTH) embeddings."""
        return normalize(self.of_query(tokens), dim=-1)

    def encode_clips(self, tokens: Tensor, modality: Tensor) -> Tensor:
        """Return (D, Td, WIDTH) embeddings."""
        parts = [tower(tokens[:, modality == number]) for number, tower in enumerate(self.of_modality)]
        return normalize(torch.cat(parts, dim=1), dim=-1)


class Transformer(Towers):
    """One layer over the tokens of a clip: of all modalities, or where ``joint`` is false, of each alone."""

    def __init__(self, num_modalities: int, joint: bool) -> None:
        super().__init__(num_modalities)
        self.joint = joint
        self.modality_embedding = nn.Embedding(num_modalities, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.out = nn.Linear(WIDTH, WIDTH)

    def encode_clips(self, tokens: Tensor, modality: Tensor) -> Tensor:
        """Return (D, Td, WIDTH) embeddings."""
        unseen = None if self.joint else modality[:, None] != modality[None, :]
        return normalize(self.out(self.layer(tokens + self.modality_embedding(modality), src_mask=unseen)), dim=-1)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def make_modalities(seed: int) -> tuple[Clips, Clips]:
    """Return clips to train on and clips to test on, of the same concepts."""
    draw = torch.Generator().manual_seed(seed)
    shown = torch.randn(NUM_MODALITIES, CONCEPTS, WIDTH, generator=draw)
    asked = torch.randn(CONCEPTS, WIDTH, generator=draw)

    def clips(num_clips: int, num_queries: int) -> Clips:
        order = torch.rand(num_clips, CONCEPTS, generator=draw).argsort(dim=1)
        held = order[:, : NUM_MODALITIES * OF_EACH].view(num_clips, NUM_MODALITIES, OF_EACH)
        tokens = shown[torch.arange(NUM_MODALITIES)[None, :, None], held].flatten(1, 2)
        clip = torch.randint(num_clips, (num_queries,), generator=draw)
        gold = torch.randint(NUM_MODALITIES, (num_queries,), generator=draw)
        modality = torch.arange(NUM_MODALITIES).repeat_interleave(OF_EACH)
        return Clips(_noisy(tokens, draw), modality, _noisy(asked[held[clip, gold]], draw), clip, gold)

    return clips(TRAINED, 4 * TRAINED), clips(TESTED, QUERIES)


def make_scenes(
    seed: int, scenes: int = 5, words: int = 30, num_sets: int = 200, tested_sets: int = 20
) -> tuple[Clips, Clips]:
    """Return clips of every set of words in every scene; a query's tokens mean words in one scene."""
    draw = torch.Generator().manual_seed(seed)
    seen = torch.randn(scenes, WIDTH, generator=draw)
    said = torch.randn(words, WIDTH, generator=draw)
    asked_scene = torch.randn(scenes, WIDTH, generator=draw)
    asked_word = torch.randn(words, WIDTH, generator=draw)

    def clips(num: int, num_queries: int) -> Clips:
        sets = torch.rand(num, words, generator=draw).argsort(dim=1)[:, :OF_EACH].repeat_interleave(scenes, dim=0)
        scene = torch.arange(scenes).repeat(num)
        tokens = torch.cat([seen[scene][:, None].expand(-1, 2, -1), said[sets]], dim=1)
        clip = torch.randint(len(sets), (num_queries,), generator=draw)
        queries = asked_word[sets[clip, :3]] + asked_scene[scene[clip]][:, None]
        modality = torch.tensor([0] * 2 + [1] * OF_EACH)
        return Clips(_noisy(tokens, draw), modality, _noisy(queries, draw), clip, torch.ones_like(clip))

    return clips(num_sets, 20 * num_sets), clips(tested_sets, QUERIES)


def make_long(seed: int, concepts: int = 60, held: int = 12, asked_for: int = 3) -> tuple[Clips, Clips]:
    """Return clips of many concepts in one modality; a query asks for three of them."""
    draw = torch.Generator().manual_seed(seed)
    shown = torch.randn(concepts, WIDTH, generator=draw)
    asked = torch.randn(concepts, WIDTH, generator=draw)

    def clips(num_clips: int, num_queries: int) -> Clips:
        of_clip = torch.rand(num_clips, concepts, generator=draw).argsort(dim=1)[:, :held]
        clip = torch.randint(num_clips, (num_queries,), generator=draw)
        wanted = of_clip[clip, :asked_for]
        if num_clips == TESTED:  # what is asked for is in one clip only
            has_all = (of_clip[None, :, :, None] == wanted[:, None, None, :]).any(dim=2).all(dim=2)
            clip, wanted = clip[has_all.sum(dim=1) == 1], wanted[has_all.sum(dim=1) == 1]
        modality = torch.zeros(held, dtype=torch.long)
        return Clips(_noisy(shown[of_clip], draw), modality, _noisy(asked[wanted], draw), clip, torch.zeros_like(clip))

    return clips(TRAINED, 4 * TRAINED), clips(TESTED, QUERIES)


def _noisy(tokens: Tensor, draw: torch.Generator) -> Tensor:
    return tokens + NOISE * torch.randn(tokens.shape, generator=draw)


Score = Callable[[Tensor, Tensor, Tensor], losses.Scores]


def by_tokens(num_modalities: int, aggregation: losses.Aggregation) -> Score:
    """Return late interaction."""
    return lambda queries, documents, modality: losses.modality_scores(
        queries, documents, modality.expand(len(documents), -1), num_modalities, aggregation
    )


def by_mean(queries: Tensor, documents: Tensor, modality: Tensor) -> losses.Scores:
    """Return the cosine of mean vectors."""
    total = normalize(queries.mean(dim=1), dim=-1) @ normalize(documents.mean(dim=1), dim=-1).T
    return losses.Scores(total, total[:, :, None])


def train(
    model: Towers, clips: Clips, score: Score, loss: str, seed: int, steps: int = STEPS, rate: float = LEARNING_RATE
) -> None:
    """Train for so many batches, drawn from the seed."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        rows = torch.randint(len(clips.queries), (BATCH,), generator=draw)
        of_clip = clips.clip[rows]
        documents = model.encode_clips(clips.tokens[of_clip], clips.modality)
        scores = score(model.encode_queries(clips.queries[rows]), documents, clips.modality)
        same = of_clip[:, None] == of_clip[None, :]
        value = losses.LOSSES[loss](scores, torch.arange(BATCH), clips.gold[rows], excluded=same)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


@torch.no_grad()
def recall(model: Towers, clips: Clips, score: Score) -> float:
    """Return R@1 over all test clips."""
    documents = model.encode_clips(clips.tokens, clips.modality)
    scores = score(model.encode_queries(clips.queries), documents, clips.modality)
    return float((scores.total.argmax(dim=1) == clips.clip).float().mean())


def gold_modality(seed: int, loss: str, aggregation: losses.Aggregation) -> float:
    """Return R@1 on unseen clips of a model trained by a loss, ranked by ``modality_max``."""
    training, testing = make_modalities(seed)
    torch.manual_seed(seed)
    model = Towers(NUM_MODALITIES)
    train(model, training, by_tokens(NUM_MODALITIES, aggregation), loss, seed)
    return recall(model, testing, by_tokens(NUM_MODALITIES, "modality_max"))


def joint_encoding(seed: int, joint: bool) -> float:
    """Return R@1 on unseen clips of a transformer over whole clips, or over one modality at a time."""
    training, testing = make_scenes(seed)
    torch.manual_seed(seed)
    model = Transformer(2, joint)
    train(model, training, by_tokens(2, "token_max"), "contrastive", seed, steps=300, rate=2e-3)
    return recall(model, testing, by_tokens(2, "token_max"))


def late_interaction(seed: int, late: bool) -> float:
    """Return R@1 on unseen clips of MaxSim over tokens, or of one mean vector each."""
    training, testing = make_long(seed)
    torch.manual_seed(seed)
    model, score = Towers(1), by_tokens(1, "token_max") if late else by_mean
    train(model, training, score, "contrastive", seed, steps=400)
    return recall(model, testing, score)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=3)
    seeds = range(options.parse_args().seeds)
    torch.set_num_threads(1)
    rows: list[tuple[str, Callable[[int], float]]] = [
        (
            "gold modality: contrastive_hard_positive",
            lambda s: gold_modality(s, "contrastive_hard_positive", "modality_max"),
        ),
        (
            "gold modality: contrastive_hard_negative",
            lambda s: gold_modality(s, "contrastive_hard_negative", "modality_max"),
        ),
        ("without: contrastive, modality_max", lambda s: gold_modality(s, "contrastive", "modality_max")),
        ("without: contrastive, token_max", lambda s: gold_modality(s, "contrastive", "token_max")),
        ("without: pairwise, modality_max", lambda s: gold_modality(s, "pairwise", "modality_max")),
        ("joint encoding", lambda s: joint_encoding(s, True)),
        ("separate encoding", lambda s: joint_encoding(s, False)),
        ("late interaction", lambda s: late_interaction(s, True)),
        ("one mean vector", lambda s: late_interaction(s, False)),
    ]
    print(f"R@1 among {TESTED} clips not trained on (chance {1 / TESTED:.2f}), of {len(seeds)} seeds")
    for name, measure in rows:
        started = time.process_time()
        values = [measure(seed) for seed in seeds]
        spent = (time.process_time() - started) / len(values)
        print(
            f"{name:42s} {np.mean(values):.3f}  {min(values):.3f} to {max(values):.3f}  {spent:.1f} CPU s", flush=True
        )


if __name__ == "__main__":
    main()
