"""Our own codec, segments, store and search, without Ray: one run a document, as `maxreel build-index` writes them."""

import numpy as np
import pyarrow as pa

from cluster.index_store import read_codec, read_index, write_codec, write_manifest, write_segment
from cluster.store import Store
from operators.codec import ResidualCodec
from operators.kmeans import MAX_POINTS, num_centroids
from operators.maxsim import make_scorer, score_clips
from operators.search import Plan, Searcher
from operators.segment import Segment

HELDOUT_TOKENS = 50_000
SEGMENT_TOKENS = 4_000_000
INDEX = "benchmark"


def build(corpus, folder, threads, nbits):
    store = Store.at(folder)
    total = len(corpus.tokens)
    count = num_centroids(total, total)
    drawn = np.random.default_rng(0).permutation(total)[: MAX_POINTS * count + HELDOUT_TOKENS]
    heldout, sample = corpus.tokens[np.sort(drawn[:HELDOUT_TOKENS])], corpus.tokens[np.sort(drawn[HELDOUT_TOKENS:])]
    count = num_centroids(total, len(sample))
    codec = ResidualCodec.train(sample, heldout, nbits, count, seed=0, num_threads=threads)
    write_codec(store, INDEX, codec)
    starts = corpus.starts
    bounds = np.unique(np.searchsorted(starts, np.arange(0, total, SEGMENT_TOKENS)))
    entries = []
    for name, (first, last) in enumerate(zip(bounds, [*bounds[1:], len(starts)], strict=True)):
        lengths, num_clips = corpus.lengths[first:last], int(last - first)
        tokens = np.asarray(corpus.tokens[starts[first] : starts[first] + lengths.sum()])
        modality, ordinals = np.zeros(num_clips, np.uint8), np.arange(num_clips)
        segment = Segment.build(tokens, lengths, ordinals, modality, num_clips, codec, threads)
        clips = pa.table(
            {
                "video_id": [f"{number:011d}" for number in range(first, last)],  # as long as YouTube's
                "clip": pa.array(np.zeros(num_clips), pa.int32()),
                "start_seconds": np.zeros(num_clips),
                "stop_seconds": np.full(num_clips, 60.0),
                "row_ids": pa.LargeListArray.from_arrays(
                    pa.array(np.arange(num_clips + 1)), pa.array(ordinals + first)
                ),
            }
        )
        entries.append(write_segment(store, INDEX, f"{name:06d}", segment, clips, codec.num_centroids))
    write_manifest(store, INDEX, {"segments": entries})


def load(corpus, folder, threads):
    store = Store.at(folder)
    codec = read_codec(store, INDEX)
    entries = store.get_json(f"index/{INDEX}/manifest.json")["segments"]
    searcher = Searcher([read_index(store, INDEX, entries, codec).segment], codec)
    scorer = make_scorer("sum_maxsim", ["text"])
    zero = np.zeros(1, np.int64)

    def search(query, k, probes=4, candidates=256, rescored=0):
        found, _ = searcher.search([query], max(k, rescored), Plan(probes, candidates), scorer)[0]
        if rescored:  # on the float16 vectors, as `cluster.searchers` does from Lance; here from a memory map
            exact = []
            for document in found:
                tokens = corpus.tokens[corpus.starts[document] : corpus.starts[document] + corpus.lengths[document]]
                length = np.array([len(tokens)])
                one = score_clips([query], tokens.astype(np.float32), length, zero, zero.astype(np.uint8), 1, scorer)
                exact.append(one[0, 0])
            found = found[np.argsort(-np.array(exact), kind="stable")]
        return found[:k]

    return search
