"""A text model whose token states are projected to token embeddings: ColBERT, or a plain BERT.

ColBERT: a marker for query or document after ``[CLS]``; queries filled up with ``[MASK]``, whose embeddings count as
terms of the query though no token attends to them; punctuation of documents left out. A plain BERT gives its token states
themselves, without special tokens. A document longer than the limit is encoded in pieces, so that nothing of it is lost.

References
----------
ColBERT, arXiv:2004.12832, sec. 3.2.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from operators import weights
from operators.checkpoints import read_config
from operators.encoders import to_device, token_batches
from operators.errors import ConfigError, ModelError
from operators.towers import load_tower, read_weights
from operators.vision_tower import without_positions

QUERY_MARKER, DOCUMENT_MARKER = "[unused0]", "[unused1]"
UNUSED = re.compile(r"(?:bert\.)?pooler\..*|cls\..*")
"""Of a BERT checkpoint: heads of its own training."""


@dataclass(frozen=True)
class TextCheckpoint:
    """A BERT with or without ColBERT's linear layer, out of whatever file holds it.

    Attributes
    ----------
    model
        Where it is from, for messages.
    config
        Its ``BertConfig``.
    tensors
        Its weights, by BertModel's names, the pooler left out.
    linear : (dim, H) or None
        ColBERT's linear layer; None for a plain BERT.
    tokenizer
        Folder of its tokenizer.
    query_length, document_length
        Tokens of a query, and of a piece of a document, special ones included.
    attends_to_masks
        Whether tokens attend to the ``[MASK]`` that queries are filled up with.
    """

    model: str
    config: Any
    tensors: Mapping[str, Any]
    linear: Any
    tokenizer: Path
    query_length: int
    document_length: int
    attends_to_masks: bool = False


@dataclass(frozen=True)
class TokenRow:
    """What goes into the model for one text, or came back for it from several pieces.

    Attributes
    ----------
    ids : (T,), int64
        Token ids.
    attended : (T,), bool
        True where other tokens attend to it: not a ``[MASK]`` that fills a query up.
    kept : (T,), bool
        True where its embedding represents the text: not punctuation of a document, not a special token of a plain BERT.
    offsets : (T,), int64
        Where in the text it starts; special tokens take their neighbour's.
    """

    ids: npt.NDArray[np.int64]
    attended: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]


@dataclass(frozen=True)
class TextStates:
    """Token embeddings of one text, with all of its tokens: `TokenRow.kept` says which represent it.

    Attributes
    ----------
    row
        Its tokens.
    embeddings : (T, dim), float32
        On the device, not normalised.
    hidden : (T, H), float32 or None
        The model's last hidden states, of queries only.
    """

    row: TokenRow
    embeddings: Any
    hidden: Any


class TextTower:
    """A BERT whose weights do not change, and its linear layer where it has one.

    Parameters
    ----------
    model
        A ColBERT (``bert.*`` and ``linear.weight``) or a plain BERT, as `weights.resolve` takes it; or what `read_text`
        and the like return.
    precision
        ``float32`` or ``bfloat16``; the linear layer is computed in float32.
    attention
        Of transformers. Flash attention returns zeros for tokens that nothing attends to, ``[MASK]`` among them, so it
        is ``sdpa`` here.
    query_length, document_length
        Tokens of a query, which is cut or filled up to it, and of a piece of a document; the checkpoint's own unless
        given.
    attends_to_masks
        Whether tokens attend to the ``[MASK]`` that queries are filled up with; the checkpoint's own unless given.
    document_markers
        Tokens put around each piece of a document where the vocabulary knows them, such as FLMR's ``<BOK>``, ``<EOK>``.
    batch_tokens
        Padded tokens in one forward pass.

    Attributes
    ----------
    dim, hidden_size
        Width of a token embedding, and of a hidden state, H.
    is_colbert
        Whether it has a linear layer, and with it ColBERT's markers.
    query_length
        Tokens of a query.

    Raises
    ------
    ModelError
        If the weights are missing or do not fit.
    ConfigError
        If a length is more than the model has positions, or leaves no room for text.
    """

    def __init__(
        self,
        model: str | TextCheckpoint,
        precision: str = "float32",
        device: str = "cpu",
        num_threads: int = 1,
        attention: str = "sdpa",
        query_length: int | None = None,
        document_length: int | None = None,
        attends_to_masks: bool | None = None,
        document_markers: tuple[str, str] | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        import torch
        from transformers import BertModel

        torch.set_num_threads(num_threads)
        checkpoint = read_text(model) if isinstance(model, str) else model
        self._model = load_tower(
            BertModel,
            checkpoint.config,
            checkpoint.tensors,
            checkpoint.model,
            precision,
            attn_implementation="eager" if attention == "eager" else "sdpa",
            add_pooling_layer=False,
        ).to(device)
        self._linear = None if checkpoint.linear is None else checkpoint.linear.float().to(device)
        self._tokenizer = _open_tokenizer(checkpoint.tokenizer)
        self._device, self._batch_tokens = device, batch_tokens
        self.is_colbert = self._linear is not None
        self.hidden_size = int(checkpoint.config.hidden_size)
        self.dim = self.hidden_size if self._linear is None else int(self._linear.shape[0])
        self.query_length = query_length or checkpoint.query_length
        self._document_length = document_length or checkpoint.document_length
        self._attends_to_masks = checkpoint.attends_to_masks if attends_to_masks is None else attends_to_masks
        self._around = self.ids_of(document_markers if document_markers and self.knows(document_markers[0]) else ())
        self._skipped = self._punctuation() if self.is_colbert else np.zeros(0, np.int64)
        room = checkpoint.config.max_position_embeddings
        for name, length, around in (
            ("query_length", self.query_length, 3),
            ("document_length", self._document_length, 3 + len(self._around)),
        ):
            if not around < length <= room:
                raise ConfigError(
                    f"{name} is {length}; {checkpoint.model} has {room} positions, and {around} go to special tokens"
                )

    def knows(self, token: str) -> bool:
        """Return whether a token is one of the vocabulary, such as FLMR's ``<BOQ>``."""
        return token in self._tokenizer.get_vocab()

    def ids_of(self, tokens: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the ids of tokens of the vocabulary."""
        return np.array([self._tokenizer.convert_tokens_to_ids(token) for token in tokens], dtype=np.int64)

    def names_of(self, row: TokenRow) -> list[str]:
        """Return the tokens of a row as they are written."""
        names: list[str] = self._tokenizer.convert_ids_to_tokens(row.ids.tolist())
        return names

    def query_rows(self, texts: Sequence[str], filled: bool = True) -> list[TokenRow]:
        """Return what goes into the model for each query: cut to `query_length`, and with ColBERT filled up to it."""
        rows = []
        for ids, offsets in self._tokenized(texts):
            room = self.query_length - (3 if self.is_colbert else 2)
            row = self._row(ids[:room], offsets[:room], QUERY_MARKER, np.zeros(0, np.int64))
            rows.append(self._filled_up(row) if filled and self.is_colbert else row)
        return rows

    def encode_queries(self, texts: Sequence[str], filled: bool = True) -> list[TextStates]:
        """Return token embeddings and hidden states for each query; an empty one still has its special tokens."""
        rows = self.query_rows(texts, filled)
        return [
            TextStates(row, embeddings, hidden)
            for row, (embeddings, hidden) in zip(rows, self._encode(rows, with_hidden=True), strict=True)
        ]

    def encode_documents(self, texts: Sequence[str]) -> list[TextStates]:
        """Return token embeddings for each document; an empty one has none."""
        pieces: list[TokenRow] = []
        owners: list[int] = []
        for text, (ids, offsets) in enumerate(self._tokenized(texts)):
            of_text = self._pieces(ids, offsets)
            pieces += of_text
            owners += [text] * len(of_text)
        encoded = [embeddings for embeddings, _ in self._encode(pieces, with_hidden=False)]
        return [
            self._joined([i for i, owner in enumerate(owners) if owner == text], pieces, encoded)
            for text in range(len(texts))
        ]

    def _tokenized(self, texts: Sequence[str]) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Return ids and character offsets of each text, without special tokens."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            (np.array(ids, dtype=np.int64), np.array([start for start, _ in offsets], dtype=np.int64))
            for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _pieces(self, ids: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> list[TokenRow]:
        prefix, suffix = self._around[:1], self._around[1:]
        room = self._document_length - len(self._around) - (3 if self.is_colbert else 2)
        return [
            self._row(
                np.concatenate([prefix, ids[start : start + room], suffix]),
                np.pad(offsets[start : start + room], (len(prefix), len(suffix)), mode="edge"),
                DOCUMENT_MARKER,
                self._skipped,
            )
            for start in range(0, len(ids), room)
        ]

    def _row(
        self,
        ids: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
        marker: str,
        skipped: npt.NDArray[np.int64],
    ) -> TokenRow:
        """Return ids with special tokens around them; those are kept with ColBERT and not with a plain BERT."""
        before = self.ids_of([self._tokenizer.cls_token, *([marker] if self.is_colbert else [])])
        after = self.ids_of([self._tokenizer.sep_token])
        whole = np.concatenate([before, ids, after])
        special = np.ones(len(whole), dtype=bool)
        special[len(before) : len(whole) - len(after)] = False
        places = np.pad(offsets, (len(before), len(after)), mode="edge") if len(offsets) else np.zeros_like(whole)
        kept = ~np.isin(whole, skipped) if self.is_colbert else ~special
        return TokenRow(whole, np.ones(len(whole), dtype=bool), kept, places)

    def _filled_up(self, row: TokenRow) -> TokenRow:
        missing = self.query_length - len(row.ids)
        return TokenRow(
            np.pad(row.ids, (0, missing), constant_values=self._tokenizer.mask_token_id),
            np.pad(row.attended, (0, missing), constant_values=self._attends_to_masks),
            np.pad(row.kept, (0, missing), constant_values=True),
            np.pad(row.offsets, (0, missing), mode="edge"),
        )

    def _encode(self, rows: Sequence[TokenRow], with_hidden: bool) -> list[tuple[Any, Any]]:
        """Return (T, dim) embeddings of each row, and (T, H) hidden states or None: those of documents are large."""
        import torch

        encoded: dict[int, tuple[Any, Any]] = {}
        for batch in token_batches([len(row.ids) for row in rows], self._batch_tokens):
            shape = len(batch), max(len(rows[i].ids) for i in batch)
            ids, attended = np.full(shape, self._tokenizer.pad_token_id), np.zeros(shape, dtype=np.int64)
            for place, i in enumerate(batch):
                ids[place, : len(rows[i].ids)], attended[place, : len(rows[i].ids)] = rows[i].ids, rows[i].attended
            with torch.no_grad():  # not inference mode: heads are trained on what comes out
                hidden = self._model(
                    input_ids=to_device(torch.from_numpy(ids), self._device),
                    attention_mask=to_device(torch.from_numpy(attended), self._device),
                ).last_hidden_state.float()
                embeddings = hidden if self._linear is None else hidden @ self._linear.T
            for place, i in enumerate(batch):
                length = len(rows[i].ids)
                encoded[i] = embeddings[place, :length], hidden[place, :length] if with_hidden else None
        return [encoded[i] for i in range(len(rows))]

    def _joined(self, own: Sequence[int], pieces: Sequence[TokenRow], encoded: Sequence[Any]) -> TextStates:
        import torch

        if not own:
            nothing = TokenRow(np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, bool), np.zeros(0, np.int64))
            return TextStates(nothing, torch.zeros(0, self.dim, device=self._device), None)
        fields = ("ids", "attended", "kept", "offsets")
        row = TokenRow(*(np.concatenate([getattr(pieces[i], name) for i in own]) for name in fields))
        return TextStates(row, torch.cat([encoded[i] for i in own]), None)

    def _punctuation(self) -> npt.NDArray[np.int64]:
        """Return the token that each mark of punctuation becomes."""
        encoded = self._tokenizer(list(string.punctuation), add_special_tokens=False)["input_ids"]
        return np.array([ids[0] for ids in encoded], dtype=np.int64)


def read_text(model: str) -> TextCheckpoint:
    """Return the text model of a ColBERT or BERT folder.

    Raises
    ------
    ModelError
        If it is another model, or says that it is a ColBERT and lacks its linear layer.
    """
    from transformers import BertConfig

    folder = Path(weights.resolve(model))
    content = read_config(folder)
    if content.get("model_type") != "bert":
        raise ModelError(f"text model {model} is of type {content.get('model_type')}; give a ColBERT or a BERT")
    tensors = {name: tensor for name, tensor in read_weights(folder).items() if not UNUSED.fullmatch(name)}
    linear = tensors.pop("linear.weight", None)
    if linear is None and "HF_ColBERT" in (content.get("architectures") or []):
        raise ModelError(f"text model {model} says that it is a ColBERT but holds no linear.weight")
    settings = read_colbert_settings(folder)
    of_bert = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    return TextCheckpoint(
        model,
        BertConfig.from_dict(content),
        without_positions(of_bert),
        linear,
        folder,
        int(settings.get("query_maxlen", 256 if linear is None else 32)),
        int(settings.get("doc_maxlen", 256 if linear is None else 180)),
        bool(settings.get("attend_to_mask_tokens", False)),
    )


def read_colbert_settings(folder: Path) -> dict[str, Any]:
    """Return what a ColBERT's ``artifact.metadata`` says of it, or nothing where it has none."""
    file = folder / "artifact.metadata"
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return settings


def _open_tokenizer(folder: Path) -> Any:
    """Return a folder's tokenizer; FLMR's own classes are BERT's with another ``__call__``, which is not used here."""
    from transformers import AutoTokenizer, BertTokenizer

    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    is_flmr = str(settings.get("tokenizer_class")).startswith("FLMR")
    return (BertTokenizer if is_flmr else AutoTokenizer).from_pretrained(folder)
