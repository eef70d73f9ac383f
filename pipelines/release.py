"""Opens the newest published release: the consistent set of table versions and the index that readers use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from cluster.index_store import read_manifest
from cluster.store import RELEASES, Store
from operators.encoders import Encoder
from operators.errors import ModelError, StorageError
from pipelines.config import EncodeConfig
from pipelines.encode import ENCODERS, encoder_fingerprint


@dataclass(frozen=True)
class Release:
    """What a reader opens."""

    release_id: int
    index_id: str
    tables: dict[str, int]
    encode: EncodeConfig
    encoder_fingerprint: str
    manifest: dict[str, Any]

    @property
    def token_table(self) -> str:
        """The token embedding table that the index was made from."""
        return str(self.manifest["table"])

    def load_encoder(self, num_threads: int) -> Encoder:
        """Load the encoder that made the index, to encode queries with.

        Raises
        ------
        ModelError
            If the model on this machine is not the one that made the index.
        """
        here = encoder_fingerprint(self.encode)
        if here != self.encoder_fingerprint:
            raise ModelError(
                f"the {self.encode.encoder} encoder here is not the one that made index {self.index_id} "
                f"(fingerprint {here}, wanted {self.encoder_fingerprint}): scores would mean nothing. "
                "Install the same model revision, or encode and build the index again."
            )
        parameters = self.encode.parameters() | {"num_threads": num_threads}
        encoder: Encoder = ENCODERS[self.encode.encoder](**parameters)
        return encoder


def open_release(store: Store) -> Release:
    """Return the newest published release.

    Raises
    ------
    StorageError
        If nothing was released yet.
    """
    releases = store.open(RELEASES).to_table()
    published = releases.filter(pc.equal(releases["state"], "published")).sort_by("release_id").to_pylist()
    if not published:
        raise StorageError(f"{store.uri} has no index yet; run `maxreel build-index --store {store.uri}`")
    row, encode = published[-1], json.loads(published[-1]["encode"])
    return Release(
        release_id=row["release_id"],
        index_id=row["index_id"],
        tables=json.loads(row["tables"]),
        encode=EncodeConfig.model_validate(encode["config"]),
        encoder_fingerprint=encode["fingerprint"],
        manifest=read_manifest(store, row["index_id"]),
    )
