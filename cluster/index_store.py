"""An index on disk: one folder of Lance tables and a manifest, written once and never changed.

``index/<id>/`` holds ``codec.lance`` (an array a row), ``segments/<n>/clips.lance`` (a clip a row: key, bounds, modality
runs, centroid ids, residual codes), ``segments/<n>/ivf.lance`` (a centroid a row: the clips that hold it) and
``manifest.json``, which is written last: an index without it was never finished and no release names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import numpy.typing as npt
import obstore
import pyarrow as pa

from cluster.store import STORAGE_VERSION, Store
from operators.codec import ResidualCodec
from operators.errors import StorageError
from operators.segment import Segment

FORMAT = 1
"""Of the folder; a reader refuses others."""


@dataclass(frozen=True)
class LoadedSegment:
    """A segment in memory, with the keys of its clips."""

    segment: Segment
    clips: pa.Table


def _path(index_id: str, *parts: str) -> str:
    return "/".join(("index", index_id, *parts))


def _write(store: Store, path: str, table: pa.Table) -> None:
    options = dict(store.options) or None
    uri = f"{store.uri}/{path}"
    lance.write_dataset(table, uri, mode="overwrite", data_storage_version=STORAGE_VERSION, storage_options=options)


def _read(store: Store, path: str) -> pa.Table:
    try:
        return lance.dataset(f"{store.uri}/{path}", storage_options=dict(store.options) or None).to_table()
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {store.uri}/{path}: {error}; build the index again") from error


def write_codec(store: Store, index_id: str, codec: ResidualCodec) -> None:
    """Write a codec, an array a row."""
    arrays = {name: np.asarray(array, order="C") for name, array in codec.to_arrays().items()}
    table = pa.table(
        {
            "name": list(arrays),
            "dtype": [array.dtype.str for array in arrays.values()],
            "shape": pa.array([list(array.shape) for array in arrays.values()], pa.list_(pa.int64())),
            "data": pa.array([array.tobytes() for array in arrays.values()], pa.large_binary()),
        }
    )
    _write(store, _path(index_id, "codec.lance"), table)


def read_codec(store: Store, index_id: str) -> ResidualCodec:
    """Read an index's codec."""
    rows = _read(store, _path(index_id, "codec.lance")).to_pylist()
    arrays = {row["name"]: np.frombuffer(row["data"], np.dtype(row["dtype"])).reshape(row["shape"]) for row in rows}
    return ResidualCodec.from_arrays(arrays)


def write_segment(store: Store, index_id: str, name: str, segment: Segment, clips: pa.Table) -> dict[str, Any]:
    """Write one segment and return its entry for the manifest.

    Parameters
    ----------
    clips
        Key and bounds of each clip of the segment, in its order.
    """
    arrays = segment.to_arrays()
    runs_of_clip = np.searchsorted(arrays["run_clip"], np.arange(segment.num_clips + 1))
    tokens_before_run = np.concatenate([[0], np.cumsum(arrays["run_lengths"])])
    tokens_of_clip = tokens_before_run[runs_of_clip]
    code_bytes = arrays["codes"].shape[1]
    table = clips.append_column("run_lengths", _lists(runs_of_clip, arrays["run_lengths"]))
    table = table.append_column("run_modality", _lists(runs_of_clip, arrays["run_modality"]))
    table = table.append_column("centroid_ids", _lists(tokens_of_clip, arrays["centroid_ids"]))
    codes = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(),
        segment.num_clips,
        [None, pa.py_buffer(tokens_of_clip * code_bytes), pa.py_buffer(np.ascontiguousarray(arrays["codes"]))],
    )
    _write(store, _path(index_id, "segments", name, "clips.lance"), table.append_column("codes", codes))
    ivf = pa.table({"clips": _lists(arrays["ivf_offsets"], arrays["ivf_clips"])})
    _write(store, _path(index_id, "segments", name, "ivf.lance"), ivf)
    return {
        "name": name,
        "num_clips": segment.num_clips,
        "num_tokens": int(tokens_of_clip[-1]),
        "checksum": segment.checksum(),
    }


def _lists(offsets: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> pa.LargeListArray:
    return pa.LargeListArray.from_arrays(pa.array(offsets.astype(np.int64)), pa.array(values))


def read_segment(store: Store, index_id: str, entry: Mapping[str, Any]) -> LoadedSegment:
    """Read one segment into memory.

    Raises
    ------
    StorageError
        If it is missing, or its checksum is not the manifest's.
    """
    table = _read(store, _path(index_id, "segments", entry["name"], "clips.lance")).combine_chunks()
    ivf = _read(store, _path(index_id, "segments", entry["name"], "ivf.lance"))["clips"].combine_chunks()
    run_lengths, run_modality, centroid_ids = (
        _flat(table[name]) for name in ("run_lengths", "run_modality", "centroid_ids")
    )
    runs_per_clip = pa.compute.list_value_length(table["run_lengths"]).to_numpy()
    codes = np.frombuffer(b"".join(table["codes"].to_pylist()), np.uint8).reshape(len(centroid_ids), -1)
    lengths = pa.compute.list_value_length(ivf).to_numpy()
    segment = Segment.from_arrays(
        {
            "run_lengths": run_lengths,
            "run_clip": np.repeat(np.arange(table.num_rows), runs_per_clip),
            "run_modality": run_modality,
            "centroid_ids": centroid_ids,
            "codes": codes,
            "ivf_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "ivf_clips": ivf.flatten().to_numpy(zero_copy_only=False),
            "num_clips": np.array(table.num_rows),
        }
    )
    if segment.checksum() != entry["checksum"]:
        raise StorageError(
            f"segment {entry['name']} of index {index_id} does not match its checksum: the file was damaged or replaced. "
            "Build the index again with `maxreel build-index`."
        )
    return LoadedSegment(segment, table.select(["video_id", "clip", "start_seconds", "stop_seconds"]))


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


def num_bytes(store: Store, index_id: str) -> int:
    """Return the size of everything that an index keeps on disk."""
    return sum(entry["size"] for batch in obstore.list(store.objects, _path(index_id, "")) for entry in batch)
