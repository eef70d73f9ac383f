"""Lance's own index of multi-vectors: IVF_PQ over all tokens, optionally refined on the float16 vectors of the table.

One list for every 8,192 tokens and 32 bytes a token.
"""

import lance
import numpy as np
import pyarrow as pa

VECTORS_FOLDER = "data"
TOKENS_PER_LIST = 8192
TOKENS_PER_FILE = 1 << 18


def build(corpus, folder, threads):
    width = corpus.tokens.shape[1]
    kind = pa.list_(pa.list_(pa.float16(), width))
    schema = pa.schema([("number", pa.int64()), ("tokens", kind)])
    ends = corpus.starts + corpus.lengths

    def batches():
        first = 0
        while first < len(ends):
            last = max(int(np.searchsorted(ends, corpus.starts[first] + TOKENS_PER_FILE, side="right")), first + 1)
            flat = pa.array(np.array(corpus.tokens[corpus.starts[first] : ends[last - 1]]).reshape(-1))
            offsets = np.concatenate([[0], np.cumsum(corpus.lengths[first:last])]).astype(np.int32)
            rows = pa.ListArray.from_arrays(pa.array(offsets), pa.FixedSizeListArray.from_arrays(flat, width))
            yield pa.record_batch([pa.array(np.arange(first, last)), rows.cast(kind)], schema=schema)
            first = last

    table = lance.write_dataset(batches(), f"{folder}/table", schema=schema, mode="overwrite")
    table.create_index(
        "tokens",
        "IVF_PQ",
        metric="cosine",
        num_partitions=max(1, len(corpus.tokens) // TOKENS_PER_LIST),
        num_sub_vectors=width // 4,
    )


def load(corpus, folder, threads):
    table = lance.dataset(f"{folder}/table")

    def search(query, k, **settings):
        nearest = {"column": "tokens", "q": query.astype(np.float16), "k": k, "metric": "cosine", **settings}
        return table.to_table(columns=["number"], nearest=nearest)["number"].to_numpy()

    return search
