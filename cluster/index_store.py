"""An index on disk: Lance tables and a manifest, written once and never changed.

``index/<id>/`` holds what one run made: ``codec.lance``, and for each segment ``segments/<n>/clips.lance`` (a clip a row:
key, bounds, runs, rows of the token embedding table, residual codes) and ``segments/<n>/tokens.lance`` (centroid ids, in as
many bits as they need, and scales). ``manifest.json`` names the codec and all segments by their paths, so that an index
that grew from another shares its files, and ``tombstones.lance`` says which of their clips are no longer there. It is
written last: an index without it was never finished and no release names it.

There are no inverted lists: they are made from the centroid ids while loading, at 10 ns a token. At 128 dimensions and
16,384 centroids a token takes 64 + 1.75 + 1 bytes at 4 bits, and 32 + 2.75 at 2; codec, keys and runs come to it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import numpy.typing as npt
import obstore
import pyarrow as pa
import pyarrow.compute as pc

from cluster.retries import retried
from cluster.store import STORAGE_VERSION, Store
from operators import kernels
from operators.codec import ResidualCodec
from operators.errors import StorageError
from operators.search import Fetch
from operators.segment import Segment, checksum, id_type

FORMAT = 3
"""Of the folder; a reader refuses others."""

PREFIX = "index"

CLIP_COLUMNS = ["video_id", "clip", "start_seconds", "stop_seconds", "row_ids"]


LOAD_THREADS = 8
"""Segments read at a time; reading waits for storage more than for the processor."""


@dataclass(frozen=True, eq=False)
class LoadedIndex:
    """Segments in memory as one, with what is known of their clips."""

    segment: Segment
    clips: pa.Table
    """A row a clip: video_id, clip, start_seconds, stop_seconds, row_ids."""
    alive: npt.NDArray[np.bool_] | None
    """Which clips have no tombstone; None if none has."""
    fetch: Fetch | None
    """Reads residual codes of clips, where they stay on disk."""


Tombstones = Mapping[str, npt.NDArray[np.uint32]]
"""Clips that are no longer there, by the path of their segment: rising ordinals."""


def _path(index_id: str, *parts: str) -> str:
    return "/".join((PREFIX, index_id, *parts))


def _write(store: Store, path: str, table: pa.Table) -> None:
    options = dict(store.options) or None
    uri = f"{store.uri}/{path}"

    def write() -> None:
        lance.write_dataset(table, uri, mode="overwrite", data_storage_version=STORAGE_VERSION, storage_options=options)

    retried(write, f"writing {path}")


def _read(store: Store, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        dataset = lance.dataset(f"{store.uri}/{path}", storage_options=dict(store.options) or None)
        return dataset.to_table(columns=list(columns) if columns else None)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {store.uri}/{path}: {error}; build the index again") from error


def _write_arrays(store: Store, path: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays, one a row."""
    ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    table = pa.table(
        {
            "name": list(ordered),
            "dtype": [array.dtype.str for array in ordered.values()],
            "shape": pa.array([list(array.shape) for array in ordered.values()], pa.list_(pa.int64())),
            "data": pa.array([array.tobytes() for array in ordered.values()], pa.large_binary()),
        }
    )
    _write(store, path, table)


def _read_arrays(store: Store, path: str) -> dict[str, npt.NDArray[Any]]:
    rows = _read(store, path).to_pylist()
    return {row["name"]: np.frombuffer(row["data"], np.dtype(row["dtype"])).reshape(row["shape"]) for row in rows}


def write_codec(store: Store, index_id: str, codec: ResidualCodec) -> dict[str, str]:
    """Write a codec and return its entry for the manifest."""
    arrays, path = codec.to_arrays(), _path(index_id, "codec.lance")
    _write_arrays(store, path, arrays)
    return {"path": path, "checksum": checksum(arrays)}


def read_codec(store: Store, entry: Mapping[str, str]) -> ResidualCodec:
    """Read a codec.

    Parameters
    ----------
    entry
        Of the manifest.

    Raises
    ------
    StorageError
        If it is missing, or its checksum is not the manifest's.
    """
    return ResidualCodec.from_arrays(_read_checked(store, entry))


def write_tombstones(store: Store, index_id: str, tombstones: Tombstones) -> dict[str, str]:
    """Write which clips are no longer there, and return the entry for the manifest."""
    path = _path(index_id, "tombstones.lance")
    _write_arrays(store, path, tombstones)
    return {"path": path, "checksum": checksum(tombstones)}


def read_tombstones(store: Store, manifest: Mapping[str, Any]) -> Tombstones:
    """Read which clips of an index are no longer there.

    Raises
    ------
    StorageError
        If the file is missing, or its checksum is not the manifest's.
    """
    return _read_checked(store, manifest["tombstones"]) if manifest["tombstones"] else {}


def _read_checked(store: Store, entry: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    arrays = _read_arrays(store, entry["path"])
    if checksum(arrays) != entry["checksum"]:
        raise _damaged(store, entry["path"])
    return arrays


def _damaged(store: Store, path: str) -> StorageError:
    return StorageError(
        f"{store.uri}/{path} does not match its checksum: the file was damaged or replaced. "
        "Build the index again with `maxreel build-index --full`."
    )


def write_segment(
    store: Store, index_id: str, name: str, segment: Segment, clips: pa.Table, num_centroids: int, error: float
) -> dict[str, Any]:
    """Write one segment and return its entry for the manifest.

    Parameters
    ----------
    clips
        Of the segment, in its order: key, bounds, and ``row_ids`` of the embeddings that each was made from.
    error
        Of its codes; see `Segment.error`.
    """
    path = _path(index_id, "segments", name)
    code_bytes = segment.residuals.shape[1]
    table = clips.append_column("run_lengths", _lists(segment.run_of_clip, segment.run_lengths.astype(np.uint32)))
    table = table.append_column("run_modality", _lists(segment.run_of_clip, segment.run_modality))
    codes = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(),
        segment.num_clips,
        [
            None,
            pa.py_buffer(segment.token_of_clip * code_bytes),
            pa.py_buffer(np.ascontiguousarray(segment.residuals)),
        ],
    )
    _write(store, f"{path}/clips.lance", table.append_column("codes", codes))
    bits = _id_bits(num_centroids)
    packed = np.zeros(-(-len(segment.centroid_ids) * bits // 8) + 8, dtype=np.uint8)
    kernels.pack_ids(segment.centroid_ids, bits, packed)
    arrays = {"centroid_ids": packed, "scales": segment.scales}
    _write_arrays(store, f"{path}/tokens.lance", arrays)
    return {
        "path": path,
        "num_clips": segment.num_clips,
        "num_tokens": len(segment.scales),
        "num_dead_clips": 0,
        "num_dead_tokens": 0,
        "error": error,
        "checksum": _checksum(segment, clips),
        "codes_checksum": checksum({"residuals": segment.residuals}),
    }


def _id_bits(num_centroids: int) -> int:
    return max(1, (num_centroids - 1).bit_length())


def _checksum(segment: Segment, clips: pa.Table) -> str:
    keys = "\n".join(clips["video_id"].to_pylist()).encode()
    columns = {name: clips[name].to_numpy() for name in ("clip", "start_seconds", "stop_seconds")}
    rows = {"row_ids": _flat(clips["row_ids"])}
    arrays = {name: array for name, array in segment.to_arrays().items() if name != "residuals"}
    return checksum(arrays | {"video_id": np.frombuffer(keys, np.uint8)} | columns | rows)


def _lists(offsets: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> pa.LargeListArray:
    return pa.LargeListArray.from_arrays(pa.array(offsets.astype(np.int64)), pa.array(values))


def read_index(
    store: Store,
    entries: Sequence[Mapping[str, Any]],
    codec: ResidualCodec,
    tombstones: Tombstones,
    codes_on_disk: bool = False,
) -> LoadedIndex:
    """Read segments, several at a time, into one.

    Parameters
    ----------
    codes_on_disk
        Leave the residual codes, nine tenths of an index, where they are, and read those of a query's candidates
        only. Those are then read without a look at their checksum.

    Raises
    ------
    StorageError
        If one is missing, or its checksum is not the manifest's.
    """
    num_tokens = [int(entry["num_tokens"]) for entry in entries]
    residuals = np.empty((0 if codes_on_disk else sum(num_tokens), codec.code_bytes), dtype=np.uint8)
    before = np.concatenate([[0], np.cumsum(num_tokens)])

    def read(i: int) -> tuple[Segment, pa.Table]:
        out = residuals[:0] if codes_on_disk else residuals[before[i] : before[i + 1]]
        return _read_segment(store, entries[i], codec, out, codes_on_disk)

    with ThreadPoolExecutor(LOAD_THREADS) as pool:
        read_segments = list(pool.map(read, range(len(entries))))
    joined = Segment.join([segment for segment, _ in read_segments], residuals)
    clips = pa.concat_tables([table for _, table in read_segments])
    fetch = _fetcher(store, entries, codec) if codes_on_disk else None
    return LoadedIndex(joined, clips, _alive(entries, tombstones), fetch)


def _alive(entries: Sequence[Mapping[str, Any]], tombstones: Tombstones) -> npt.NDArray[np.bool_] | None:
    first_clips = np.concatenate([[0], np.cumsum([entry["num_clips"] for entry in entries])])
    alive = np.ones(first_clips[-1], dtype=bool)
    for entry, first in zip(entries, first_clips[:-1], strict=True):
        alive[first + tombstones.get(entry["path"], np.empty(0, np.uint32)).astype(np.int64)] = False
    return None if alive.all() else alive


def read_made_from(
    store: Store, entry: Mapping[str, Any]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return what a segment's clips were made from: row ids, rows of each clip, and tokens of each clip."""
    table = _read(store, f"{entry['path']}/clips.lance", ["row_ids", "run_lengths"])
    rows_each = pc.list_value_length(table["row_ids"]).to_numpy().astype(np.int64)
    runs = np.concatenate([[0], np.cumsum(pc.list_value_length(table["run_lengths"]).to_numpy())])
    tokens = np.concatenate([[0], np.cumsum(_flat(table["run_lengths"]).astype(np.int64))])
    return _flat(table["row_ids"]).astype(np.uint64), rows_each, np.diff(tokens[runs])


def _read_segment(
    store: Store,
    entry: Mapping[str, Any],
    codec: ResidualCodec,
    residuals: npt.NDArray[np.uint8],
    codes_on_disk: bool,
) -> tuple[Segment, pa.Table]:
    path = entry["path"]
    columns = [*CLIP_COLUMNS, "run_lengths", "run_modality", *([] if codes_on_disk else ["codes"])]
    table = _read(store, f"{path}/clips.lance", columns)
    arrays = _read_arrays(store, f"{path}/tokens.lance")
    ids = np.empty(len(arrays["scales"]), dtype=id_type(codec.num_centroids))
    bits = _id_bits(codec.num_centroids)
    if len(arrays["centroid_ids"]) != -(-len(ids) * bits // 8) + 8 or len(ids) != entry["num_tokens"]:
        raise _damaged(store, path)
    kernels.unpack_ids(arrays["centroid_ids"], bits, ids)
    if not codes_on_disk:
        codes = _binary(table["codes"])
        if codes.size != residuals.size:
            raise _damaged(store, path)
        residuals[:] = codes.reshape(residuals.shape)
    runs_per_clip = pc.list_value_length(table["run_lengths"]).to_numpy()
    segment = Segment(
        run_lengths=_flat(table["run_lengths"]).astype(np.int64),
        run_clip=np.repeat(np.arange(table.num_rows), runs_per_clip),
        run_modality=_flat(table["run_modality"]),
        centroid_ids=ids,
        scales=arrays["scales"],
        residuals=residuals,
        num_clips=table.num_rows,
    )
    clips = table.select(CLIP_COLUMNS)
    whole = codes_on_disk or checksum({"residuals": residuals}) == entry["codes_checksum"]
    if not whole or _checksum(segment, clips) != entry["checksum"]:
        raise _damaged(store, path)
    return segment, clips


def _fetcher(store: Store, entries: Sequence[Mapping[str, Any]], codec: ResidualCodec) -> Fetch:
    first_clips = np.concatenate([[0], np.cumsum([entry["num_clips"] for entry in entries])])
    datasets = [
        lance.dataset(f"{store.uri}/{entry['path']}/clips.lance", storage_options=dict(store.options) or None)
        for entry in entries
    ]

    def fetch(clips: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        parts = [np.empty(0, np.uint8)]
        for dataset, first, last in zip(datasets, first_clips[:-1], first_clips[1:], strict=True):
            own = clips[np.searchsorted(clips, first) : np.searchsorted(clips, last)] - first
            if len(own):
                parts.append(_binary(dataset.take(own.tolist(), columns=["codes"])["codes"]))
        return np.concatenate(parts).reshape(-1, codec.code_bytes)

    return fetch


def _binary(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """Return the bytes of a binary column after one another, copied only where it has several chunks."""
    parts = []
    for chunk in column.chunks:
        _, offsets, data = chunk.cast(pa.large_binary()).buffers()
        bounds = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        parts.append(np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]] if data else np.empty(0, np.uint8))
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint8), *parts])


def _flat(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    flat: npt.NDArray[Any] = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat


def write_manifest(store: Store, index_id: str, manifest: Mapping[str, Any]) -> None:
    """Write the manifest: from here on the index exists."""
    store.put_json(_path(index_id, "manifest.json"), dict(manifest) | {"format": FORMAT})


def read_manifest(store: Store, index_id: str) -> dict[str, Any]:
    """Read an index's manifest.

    Raises
    ------
    StorageError
        If it is missing, or written by another format.
    """
    manifest: dict[str, Any] = store.get_json(_path(index_id, "manifest.json"))
    if manifest.get("format") != FORMAT:
        raise StorageError(
            f"index {index_id} has format {manifest.get('format')}, this version reads {FORMAT}; build the index again"
        )
    return manifest


def find_manifest(store: Store, index_id: str) -> dict[str, Any] | None:
    """Return an index's manifest, or None where it was never finished; what was written of it is deleted."""
    if store.exists(_path(index_id, "manifest.json")):
        return read_manifest(store, index_id)
    left = [entry["path"] for batch in obstore.list(store.objects, _path(index_id, "")) for entry in batch]
    if left:
        obstore.delete(store.objects, left)
    return None


def parts(manifest: Mapping[str, Any]) -> set[str]:
    """Return the paths of everything that an index is made of: files, and folders of them."""
    entries = [manifest["codec"], *manifest["segments"], *filter(None, [manifest["tombstones"]])]
    return {_path(manifest["index_id"], "manifest.json"), *(entry["path"] for entry in entries)}


def list_objects(store: Store, parts: Collection[str], index_ids: Collection[str] = ()) -> tuple[list[Any], list[Any]]:
    """Return the objects of indices that belong to parts, and those that do not.

    Parameters
    ----------
    index_ids
        Of the folders to look into; all of them if none is named.
    """
    prefixes = [_path(index_id, "") for index_id in index_ids] or [f"{PREFIX}/"]
    belonging: list[Any] = []
    others: list[Any] = []
    for entry in (e for prefix in prefixes for batch in obstore.list(store.objects, prefix) for e in batch):
        steps = entry["path"].split("/")
        mine = any("/".join(steps[: i + 1]) in parts for i in range(len(steps)))
        (belonging if mine else others).append(entry)
    return belonging, others


def num_bytes(store: Store, manifest: Mapping[str, Any]) -> int:
    """Return the size of everything that an index keeps on disk."""
    of_index = parts(manifest)
    belonging, _ = list_objects(store, of_index, {path.split("/")[1] for path in of_index})
    return sum(entry["size"] for entry in belonging)
