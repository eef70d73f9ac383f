import numpy as np
import pytest

from cluster.upkeep import MAX_DEAD_SHARE, MERGE_WIDTH, live_tokens, plan_merges
from operators.codec import ResidualCodec
from operators.segment import Segment

FULL = 1000


def entry(path, num_tokens, num_dead=0):
    return {"path": path, "num_tokens": num_tokens, "num_dead_tokens": num_dead}


def names(merges):
    return [sorted(e["path"] for e in merge) for merge in merges]


def test_segments_of_one_size_are_merged_when_there_are_enough():
    few = [entry(str(i), 10) for i in range(MERGE_WIDTH - 1)]
    assert plan_merges(few, FULL) == []
    assert names(plan_merges([*few, entry("last", 10)], FULL)) == [["0", "1", "2", "last"]]


def test_segments_of_other_sizes_wait_for_their_like():
    assert plan_merges([entry(str(i), 4**i) for i in range(4)], FULL) == []


def test_a_merge_that_fills_the_next_size_is_merged_with_it_at_once():
    larger = [entry(f"large{i}", 40) for i in range(MERGE_WIDTH - 1)]
    small = [entry(f"small{i}", 10) for i in range(MERGE_WIDTH)]
    [merge] = plan_merges([*larger, *small], FULL)
    assert len(merge) == 2 * MERGE_WIDTH - 1


def test_no_segment_is_made_larger_than_a_full_one_and_full_ones_are_left_alone():
    merges = plan_merges([entry(str(i), 400) for i in range(5)] + [entry("full", 700)], FULL)
    assert all(sum(map(live_tokens, merge)) <= FULL for merge in merges)
    assert "full" not in sum(names(merges), [])


def test_a_segment_of_which_much_is_dead_is_written_again():
    dead = int(800 * MAX_DEAD_SHARE)
    assert names(plan_merges([entry("a", 800, dead + 1), entry("b", 800, dead)], FULL)) == [["a"]]


@pytest.mark.parametrize("seed", range(5))
def test_many_nights_leave_few_segments_and_write_each_token_few_times(seed):
    rng = np.random.default_rng(seed)
    segments, written, total = [], 0, 0
    for night in range(300):
        size = int(rng.integers(1, 60))
        total += size
        segments.append(entry(f"night{night}", size))
        for number, merge in enumerate(plan_merges(segments, FULL)):
            gone = {e["path"] for e in merge}
            together = sum(map(live_tokens, merge))
            segments = [e for e in segments if e["path"] not in gone] + [entry(f"{night}-{number}", together)]
            written += together
    assert sum(map(live_tokens, segments)) == total
    small = [e for e in segments if e["num_tokens"] < FULL / 2]
    sizes = int(np.log(FULL / 2) / np.log(MERGE_WIDTH)) + 1
    assert len(small) < MERGE_WIDTH * sizes
    assert written < total * (sizes + 1)


@pytest.fixture(scope="module")
def built():
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((8, 16))
    tokens = (centers[rng.integers(0, 8, 300)] + 0.2 * rng.standard_normal((300, 16))).astype(np.float32)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    codec = ResidualCodec.train(tokens, tokens[:100], nbits=4, num_centroids=8, seed=0)
    lengths = np.array([10, 0, 50, 40, 100, 60, 40])
    clips = np.array([0, 0, 1, 2, 3, 3, 4])
    modality = np.array([0, 1, 0, 1, 0, 1, 3], np.uint8)
    return tokens, codec, Segment.build(tokens, lengths, clips, modality, 5, codec)


def test_a_segment_without_some_of_its_clips_holds_the_codes_of_the_others(built):
    _, codec, segment = built
    kept = segment.keep(np.array([True, False, True, True, False]))
    assert kept.num_clips == 3
    assert kept.run_lengths.tolist() == [10, 0, 40, 100, 60]
    assert kept.run_clip.tolist() == [0, 0, 1, 2, 2]
    assert kept.run_modality.tolist() == [0, 1, 1, 0, 1]
    before = codec.decode(segment.codes_of(0, 300))
    np.testing.assert_array_equal(codec.decode(kept.codes_of(0, 210)), before[[*range(10), *range(60, 260)]])


def test_the_error_of_codes_is_what_decoding_loses_and_rises_with_unlike_tokens(built):
    tokens, codec, segment = built
    decoded = codec.decode(segment.codes_of(0, 300))
    assert segment.error(tokens, codec) == pytest.approx(((tokens - decoded) ** 2).sum(axis=1).mean(), rel=1e-5)
    unlike = np.random.default_rng(1).standard_normal((50, 16)).astype(np.float32)
    unlike /= np.linalg.norm(unlike, axis=1, keepdims=True)
    other = Segment.build(unlike, np.array([50]), np.array([0]), np.zeros(1, np.uint8), 1, codec)
    assert other.error(unlike, codec) > 2 * segment.error(tokens, codec)
