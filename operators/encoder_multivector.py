"""Any late-interaction model that Sentence Transformers' ``MultiVectorEncoder`` loads: PyLate, Stanford ColBERT, ColPali.

Text modalities are encoded as documents. Frames are encoded as images where the model takes images; where it does not,
the frame modality has no tokens. Prompt and special tokens that the model scores belong to the span beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np

from operators import weights
from operators.checkpoints import whole_checkpoints
from operators.encoders import (
    Content,
    Floats,
    Query,
    TokenEmbeddings,
    check_query,
    join_spans,
    open_picture,
    span_of,
    token_batches,
)
from operators.errors import ModelError
from operators.fingerprint import fingerprint


class MultiVectorModel:
    """A `sentence_transformers.MultiVectorEncoder` behind our contract. Separate: one modality at a time.

    Parameters
    ----------
    model
        Hub id with optional ``@revision``, local path, or ``pkg:`` package.
    batch_tokens
        Padded tokens in one forward pass, estimated from the text's own token count.

    Raises
    ------
    ModelError
        If the model is a bare backbone, for which the library would add a random projection, or its checkpoint lacks
        weights.
    """

    VERSION = "2"

    def __init__(self, model: str, batch_tokens: int = 8192, device: str = "cpu", num_threads: int = 1) -> None:
        import torch
        from sentence_transformers import MultiVectorEncoder

        torch.set_num_threads(num_threads)
        path = weights.resolve(model)
        _require_projection(model, Path(path))
        with whole_checkpoints(model, missing=[r"(.*\.)?pooler\..*"]):
            self._model = MultiVectorEncoder(path, device=device)
        self._batch_tokens = batch_tokens
        self._takes_images = self._model.supports("image")
        self.dim = int(self._model.get_embedding_dimension())

    @classmethod
    def fingerprint_of(cls, model: str, **_: Any) -> str:
        """Return what the output depends on, without loading the model."""
        return fingerprint("multivector", cls.VERSION, weights.fingerprint(model))

    @classmethod
    def joint_of(cls, **_: Any) -> bool:
        """Return False: one modality at a time."""
        return False

    @classmethod
    def dim_of(cls, **parameters: Any) -> int:
        """Return the width of a token embedding. Loads the model: its width is where its family keeps it."""
        return cls(**parameters).dim

    def encode_documents(self, clips: Sequence[Mapping[str, Content]]) -> list[dict[str, TokenEmbeddings]]:
        """Return token embeddings for each modality of each clip."""
        return [
            {
                modality: self._encode_frames(content) if content.frames else encoded
                for (modality, content), encoded in zip(clip.items(), self._encode_texts(clip), strict=True)
            }
            for clip in clips
        ]

    def encode_queries(self, queries: Sequence[Query]) -> list[Floats]:
        """Return (Tq, dim) token embeddings for each query.

        Raises
        ------
        ConfigError
            If a query has an image and the model takes none, or has both text and image.
        """
        return [
            self._normalised(self._model.encode_query([self._query(query)], output_value=None)[0]) for query in queries
        ]

    def query_tokens(self, query: Query) -> list[str]:
        """Return what each of a query's token embeddings stands for."""
        output = self._model.encode_query([self._query(query)], output_value=None)[0]
        ids = output["input_ids"][output["attention_mask"].bool()].tolist()
        tokens: list[str] = self._model.tokenizer.convert_ids_to_tokens(ids)
        return tokens

    def _query(self, query: Query) -> Any:
        check_query(query, "multivector", image=self._takes_images)
        return open_picture(query.image) if query.image else query.text

    def _encode_texts(self, clip: Mapping[str, Content]) -> list[TokenEmbeddings]:
        joined = [join_spans(content.spans) for content in clip.values()]
        lengths = [len(self._model.tokenizer(text)["input_ids"]) if text else 0 for text, _ in joined]
        results = [TokenEmbeddings(np.zeros((0, self.dim), np.float32), np.zeros(0, np.int32)) for _ in joined]
        for batch in token_batches(lengths, self._batch_tokens):
            batch = [i for i in batch if joined[i][0]]
            outputs = self._model.encode_document(
                [joined[i][0] for i in batch], output_value=None, show_progress_bar=False
            )
            for i, output in zip(batch, outputs, strict=True):
                scored = output["attention_mask"].bool().cpu().numpy()
                spans = span_of(self._offsets(joined[i][0], output["input_ids"].tolist()), joined[i][1])
                results[i] = TokenEmbeddings(self._normalised(output), spans[scored])
        return results

    def _offsets(self, text: str, ids: list[int]) -> np.ndarray:
        """Return where in the text each input token is; prompt and special tokens take their neighbour's place."""
        own = self._model.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        offsets = np.zeros(len(ids), dtype=np.int64)
        known = np.zeros(len(ids), dtype=bool)
        for block in SequenceMatcher(None, ids, own["input_ids"], autojunk=False).get_matching_blocks():
            # By the last character: a byte-level token begins with the space before its word, which is another span's.
            last = [max(start, stop - 1) for start, stop in own["offset_mapping"][block.b : block.b + block.size]]
            offsets[block.a : block.a + block.size] = last
            known[block.a : block.a + block.size] = True
        last_known = np.maximum.accumulate(np.where(known, np.arange(len(ids)), 0))
        return offsets[last_known]

    def _encode_frames(self, content: Content) -> TokenEmbeddings:
        if not self._takes_images:
            return TokenEmbeddings(np.zeros((0, self.dim), np.float32), np.zeros(0, np.int32))
        pictures = [open_picture(frame["jpeg"]) for frame in content.frames]
        outputs = self._model.encode_document(pictures, batch_size=4, output_value=None, show_progress_bar=False)
        embeddings = [self._normalised(output) for output in outputs]
        return TokenEmbeddings(
            np.concatenate(embeddings),
            np.repeat(np.arange(len(embeddings)), [len(e) for e in embeddings]).astype(np.int32),
        )

    def _normalised(self, output: Mapping[str, Any]) -> Floats:
        import torch

        embeddings = output["token_embeddings"][output["attention_mask"].bool()].float()
        normalised: Floats = torch.nn.functional.normalize(embeddings, dim=-1).cpu().numpy()
        return normalised


def _require_projection(model: str, path: Path) -> None:
    """Refuse a bare backbone: the library would put a random projection on it, and every score would be noise."""
    if (path / "modules.json").exists():
        return
    config = path / "config.json"
    architectures = json.loads(config.read_text()).get("architectures") or [] if config.exists() else []
    if not any(name == "HF_ColBERT" or name.endswith("ForRetrieval") for name in architectures):
        raise ModelError(
            f"{model} is not a late-interaction model (architectures {architectures}, no modules.json): its projection "
            "would be random. Give one saved by Sentence Transformers or PyLate, a Stanford ColBERT or a ColPali model."
        )
