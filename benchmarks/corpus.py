"""Real token embeddings for the benchmarks of the engine, made without a hub or a network.

    python benchmarks/corpus.py OUT --documents corpus.jsonl --queries queries.jsonl [--qrels qrels.txt]
    python benchmarks/corpus.py OUT --docstrings [--tokens 2500000]

The first form takes a corpus in BEIR's form. The second makes one of long documents from what is installed: the
docstrings of every module of the packages in this environment that come to 500 tokens or more, cut at 2,000; its queries
are first sentences of docstrings that were left out of their module, which is their only judgement.

Tokens are the last hidden states of all-MiniLM-L6-v2 (in bfloat16), special tokens dropped, turned from 384 to 128
dimensions by a fixed random orthogonal projection, and normalised. The model was trained with mean pooling, so the
quality of its rankings is a yardstick of fidelity and nothing more.

Writes ``tokens.npy`` (T, 128) float16, ``lengths.npy`` (D,), ``query_tokens.npy``, ``query_lengths.npy``, and
``qrels.json``: for each query its relevant documents by number.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import operators  # noqa: F401  (its import hook must come before transformers)
from operators import weights
from operators.encoders import token_batches
from pipelines.config import OfflineConfig

DIM = 128
MAX_QUERY_TOKENS = 32
PIECE_TOKENS = 256
MIN_TOKENS, MAX_TOKENS = 500, 2000
NUM_QUERIES = 300


def read_beir(corpus: Path, queries: Path, qrels: Path | None) -> tuple[list[str], list[str], dict[int, list[int]]]:
    """Return texts of documents and of judged queries, and relevant documents of each query, by number."""
    rows = [json.loads(line) for line in corpus.open(encoding="utf-8")]
    number = {name_of(row): i for i, row in enumerate(rows)}
    relevant: dict[str, list[int]] = defaultdict(list)
    for line in qrels.open(encoding="utf-8") if qrels else ():
        query, _, document, grade = line.split()
        if int(grade) > 0 and document in number:
            relevant[query].append(number[document])
    asked = [json.loads(line) for line in queries.open(encoding="utf-8")]
    asked = [row for row in asked if name_of(row) in relevant or not qrels]
    texts = [f"{row.get('title', '')} {row['text']}".strip() or "." for row in rows]
    return texts, [row["text"] for row in asked], {i: relevant[name_of(row)] for i, row in enumerate(asked)}


def name_of(row: dict) -> str:
    return row["_id"] if "_id" in row else row["id"]  # BEIR's name, and ours


def read_docstrings(tokenizer, max_total: int) -> tuple[list[str], list[str], dict[int, list[int]]]:
    """Return one document a module, and sentences left out of some of them as queries."""
    rng = np.random.default_rng(0)
    files = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    texts, queries, relevant, total = [], [], {}, 0
    for i in rng.permutation(len(files)):
        docstrings = list(docstrings_of(files[i]))
        long = [d for d in docstrings if len(d.split(". ")[0].split()) > 5]
        held = long.pop(int(rng.integers(len(long)))) if len(long) > 3 else None
        text = " ".join(" ".join(d.split()) for d in docstrings if d != held)
        tokens = min(MAX_TOKENS, len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
        if tokens < MIN_TOKENS:
            continue
        if held and len(queries) < NUM_QUERIES and rng.random() < 0.3:
            relevant[len(queries)] = [len(texts)]
            queries.append(" ".join(held.split(". ")[0].split()))
        texts.append(text)
        total += tokens
        if total >= max_total:
            break
    return texts, queries, relevant


def docstrings_of(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (found := ast.get_docstring(node)):
            yield found


class Embedder:
    """MiniLM's token states, projected."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        path = weights.resolve(OfflineConfig().text_model)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path, add_pooling_layer=False, dtype=torch.bfloat16).eval()
        gaussian = np.random.default_rng(0).standard_normal((self.model.config.hidden_size, DIM))
        self.projection = torch.from_numpy(np.linalg.qr(gaussian)[0].astype(np.float32))

    def __call__(self, texts: list[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens, (T, 128) float16, and how many each text has, at most ``max_tokens``."""
        ids = [self.tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens] for t in texts]
        pieces = [(i, p) for i, of in enumerate(ids) for p in range(0, len(of), PIECE_TOKENS)]
        start, stop = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        lengths = np.array([len(of) for of in ids])
        first = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.empty((first[-1], DIM), np.float16)
        began = time.time()
        sizes = [min(PIECE_TOKENS, len(ids[i]) - p) for i, p in pieces]
        for done, batch in enumerate(token_batches(sizes, 8192)):
            inputs = [[start, *ids[pieces[b][0]][pieces[b][1] : pieces[b][1] + PIECE_TOKENS], stop] for b in batch]
            padded = self.tokenizer.pad({"input_ids": inputs}, return_tensors="pt")
            with torch.inference_mode():
                hidden = self.model(**padded).last_hidden_state.float() @ self.projection
                hidden = torch.nn.functional.normalize(hidden, dim=-1).numpy()
            for row, b in enumerate(batch):
                at = first[pieces[b][0]] + pieces[b][1]
                tokens[at : at + sizes[b]] = hidden[row, 1 : sizes[b] + 1]
            if done % 50 == 0:
                print(f"batch {done}, {time.time() - began:.0f} s of encoding {len(tokens):,} tokens", flush=True)
        return tokens, lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=Path)
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--qrels", type=Path)
    parser.add_argument("--docstrings", action="store_true")
    parser.add_argument("--tokens", type=int, default=2_500_000)
    given = parser.parse_args()
    embed = Embedder()
    if given.docstrings:
        texts, queries, relevant = read_docstrings(embed.tokenizer, given.tokens)
    else:
        texts, queries, relevant = read_beir(given.documents, given.queries, given.qrels)
    given.out.mkdir(parents=True, exist_ok=True)
    for prefix, of, limit in (("query_", queries, MAX_QUERY_TOKENS), ("", texts, MAX_TOKENS)):
        tokens, lengths = embed(of, limit)
        np.save(given.out / f"{prefix}tokens.npy", tokens)
        np.save(given.out / f"{prefix}lengths.npy", lengths)
        print(f"{len(of):,} texts, {len(tokens):,} tokens, mean {lengths.mean():.1f}")
    (given.out / "qrels.json").write_text(json.dumps(relevant))


if __name__ == "__main__":
    main()
