"""Words as they are written: every word has a random direction of its own, the same everywhere.

Late interaction over it counts which query words occur. It knows no meaning and sees no frames; it needs no model and
encodes some hundred thousand words a second on a core, which makes it the stand-in for trying out and testing the job at
a size whose encoding would take days, and a lexical baseline beside real encoders.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from operators.encoders import Content, Floats, Query, TokenEmbeddings, check_query, join_spans, span_of
from operators.errors import ConfigError
from operators.fingerprint import fingerprint

WORD = re.compile(r"\w+")


class LexicalEncoder:
    """Encodes text by its words.

    Parameters
    ----------
    dim
        Width of a token embedding. Two words have a cosine of about ``dim ** -0.5``.
    """

    VERSION = "1"

    def __init__(self, dim: int = 64, **_: Any) -> None:
        self.dim = dim

    @classmethod
    def fingerprint_of(cls, dim: int = 64, **_: Any) -> str:
        """Return what the output depends on."""
        return fingerprint("lexical", cls.VERSION, dim)

    @classmethod
    def joint_of(cls, **_: Any) -> bool:
        """Return False: one modality at a time."""
        return False

    @classmethod
    def dim_of(cls, dim: int = 64, **_: Any) -> int:
        """Return the width of a token embedding."""
        return dim

    def encode_documents(self, clips: Sequence[Mapping[str, Content]]) -> list[dict[str, TokenEmbeddings]]:
        """Return token embeddings for each modality of each clip, a word a token; none for frames."""
        return [{modality: self._encode(content) for modality, content in clip.items()} for clip in clips]

    def _encode(self, content: Content) -> TokenEmbeddings:
        text, starts = join_spans(content.spans)
        words = list(WORD.finditer(text))
        offsets = np.array([word.start() for word in words], dtype=np.int64)
        return TokenEmbeddings(self._vectors([word.group() for word in words]), span_of(offsets, starts))

    def _vectors(self, words: Sequence[str]) -> Floats:
        if not words:
            return np.zeros((0, self.dim), np.float32)
        return np.stack([direction(word.casefold(), self.dim) for word in words])

    def encode_queries(self, queries: Sequence[Query]) -> list[Floats]:
        """Return (Tq, dim) token embeddings for each query.

        Raises
        ------
        ConfigError
            If a query has no words, or an image.
        """
        for query in queries:
            check_query(query, "lexical")
            if not self.query_tokens(query):
                raise ConfigError(f"the query {query.text!r} has no words; the lexical encoder matches words only")
        return [self._vectors(self.query_tokens(query)) for query in queries]

    def query_tokens(self, query: Query) -> list[str]:
        """Return the query's words."""
        return WORD.findall(query.text or "")


@lru_cache(maxsize=100_000)
def direction(word: str, dim: int) -> Floats:
    """Return the unit vector of a word, (dim,)."""
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
    vector = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    unit: Floats = vector / np.linalg.norm(vector)
    return unit
