import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from operators import kernels
from operators import search as search_module
from operators.codec import ResidualCodec
from operators.errors import ShapeError
from operators.maxsim import make_scorer, score_clips
from operators.schema import MODALITIES
from operators.search import BATCH_LANES, EXHAUSTIVE, Plan, Searcher
from operators.segment import Segment
from operators.simd import INSTRUCTION_SET

SUM = make_scorer("sum_maxsim", MODALITIES)
SCORERS = {
    "sum_maxsim": SUM,
    "modality_max": make_scorer("modality_max", MODALITIES),
    "modality_weighted": make_scorer("modality_weighted", MODALITIES, weights={"frame": 0.25, "metadata": 2}),
    "group_sum": make_scorer("group_sum", MODALITIES, groups=[["frame", "metadata"], ["speech"]]),
    "only speech": make_scorer("sum_maxsim", MODALITIES, only=["speech"]),
}
EVERYTHING = Plan(10**6, 10**6)


def unit(values):
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def corpus(num_clips=80, dim=32, seed=0, longest=9):
    """Clips of three runs of 0 to ``longest`` tokens around 20 topics; the first clip is empty."""
    rng = np.random.default_rng(seed)
    run_clip = np.repeat(np.arange(num_clips), 3)
    run_lengths = rng.integers(0, longest + 1, len(run_clip)).astype(np.int64)
    run_lengths[:3] = 0
    topics = rng.normal(size=(20, dim))
    tokens = unit(topics[rng.integers(0, 20, run_lengths.sum())] + 0.7 * rng.normal(size=(run_lengths.sum(), dim)))
    return tokens, run_lengths, run_clip, np.tile(np.array([0, 1, 3], np.uint8), num_clips), num_clips


def queries(lengths=(1, 5, 16, 17, 24, 25, 33, 70), dim=32, seed=5):
    rng = np.random.default_rng(seed)
    return [unit(rng.normal(size=(length, dim))) for length in lengths]


def built(nbits=4, dim=32, centroids=24, **more):
    parts = corpus(dim=dim, **more)
    codec = ResidualCodec.train(parts[0], parts[0], nbits, centroids, seed=0)
    return Segment.build(*parts, codec), codec


def decoded_scores(segment, codec, asked, scorer):
    tokens = codec.decode(segment.codes_of(0, len(segment.scales)))
    runs = segment.run_lengths, segment.run_clip, segment.run_modality
    return score_clips(asked, tokens, *runs, segment.num_clips, scorer)


def bound(query, codec):
    """What rounding may add to a score, as `operators.search` states it."""
    steps = np.abs(query).max(axis=1) / 127
    return float((0.5 * steps * np.sqrt(codec.dim) * 1.3 + 6e-5 * 127 * np.sqrt(codec.dim) * steps * 1.5 + 1e-4).sum())


def check_against(found, exact, allowed_error):
    """The same clips, scores within the error, and an order that is right but for it."""
    ordinals, scores = found
    assert sorted(ordinals.tolist()) == np.flatnonzero(np.isfinite(exact)).tolist()
    np.testing.assert_allclose(scores, exact[ordinals], atol=allowed_error)
    assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)
@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_with_everything_looked_at_scores_are_those_of_the_decoded_tokens(nbits, scorer):
    segment, codec = built(nbits)
    asked = queries()
    exact = decoded_scores(segment, codec, asked, scorer)
    searcher = Searcher([segment], codec)
    for plan in (EXHAUSTIVE, EVERYTHING):
        for query, found, wanted in zip(asked, searcher.search(asked, 10**6, plan, scorer), exact, strict=True):
            check_against(found, wanted, 2 * bound(query, codec))


@pytest.mark.parametrize("dim", [4, 13, 96, 128, 384])
@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_any_width_is_searched(nbits, dim):
    segment, codec = built(nbits, dim)
    asked = queries((3, 20, 32), dim)
    exact = decoded_scores(segment, codec, asked, SUM)
    for query, found, wanted in zip(
        asked, Searcher([segment], codec).search(asked, 10**6, EXHAUSTIVE, SUM), exact, strict=True
    ):
        check_against(found, wanted, 2 * bound(query, codec))


def adversarial(kind):
    dim = 16
    if kind == "all similarities negative":
        tokens = unit(np.abs(np.random.default_rng(0).normal(size=(60, dim))))
        return tokens, np.full(20, 3), [-tokens[:4], -tokens[10:11]]
    if kind == "duplicate tokens":
        tokens = np.repeat(unit(np.random.default_rng(0).normal(size=(4, dim))), 15, axis=0)
        return tokens, np.full(20, 3), [tokens[::15]]
    if kind == "one-token clips":
        tokens = unit(np.random.default_rng(0).normal(size=(60, dim)))
        return tokens, np.ones(60, int), [tokens[:5]]
    if kind == "one huge component":
        tokens = np.eye(dim, dtype=np.float32)[np.arange(60) % dim]
        return tokens, np.full(12, 5), [tokens[:3]]
    raise ValueError(kind)


@pytest.mark.parametrize(
    "kind", ["all similarities negative", "duplicate tokens", "one-token clips", "one huge component"]
)
def test_adversarial_inputs_are_scored_as_any_others(kind):
    tokens, lengths, asked = adversarial(kind)
    num_clips = len(lengths)
    codec = ResidualCodec.train(tokens, tokens, 8, 4, seed=0)
    segment = Segment.build(tokens, lengths, np.arange(num_clips), np.zeros(num_clips, np.uint8), num_clips, codec)
    exact = decoded_scores(segment, codec, asked, SUM)
    for plan in (EXHAUSTIVE, EVERYTHING):
        found = Searcher([segment], codec).search(asked, num_clips, plan, SUM)
        for query, one, wanted in zip(asked, found, exact, strict=True):
            check_against(one, wanted, 2 * bound(query, codec))


def test_a_clip_of_a_million_tokens_is_searched():
    rng = np.random.default_rng(0)
    tokens = unit(rng.normal(size=(1_000_010, 8)))
    codec = ResidualCodec.train(tokens[:2000], tokens[:500], 1, 16, seed=0)
    segment = Segment.build(
        tokens, np.array([5, 1_000_000, 5]), np.arange(3), np.zeros(3, np.uint8), 3, codec, num_threads=2
    )
    exact = decoded_scores(segment, codec, [tokens[:3]], SUM)[0]
    [found] = Searcher([segment], codec).search([tokens[:3]], 3, EVERYTHING, SUM)
    check_against(found, exact, 2 * bound(tokens[:3], codec))


def test_a_query_finds_the_same_alone_in_a_batch_and_in_threads():
    segment, codec = built()
    asked = queries() * 8
    assert sum(map(len, asked)) > 2 * BATCH_LANES
    for plan in (EXHAUSTIVE, Plan(2, 12)):
        searcher = Searcher([segment], codec)
        alone = [searcher.search([query], 5, plan, SUM)[0] for query in asked]
        for threads in (1, 3):
            together = searcher.search(asked, 5, plan, SUM, num_threads=threads)
            for (ordinals, scores), (expected, exact) in zip(together, alone, strict=True):
                assert ordinals.tolist() == expected.tolist()
                np.testing.assert_allclose(scores, exact, rtol=1e-6)


@pytest.mark.parametrize("plan", [EXHAUSTIVE, Plan(2, 12), EVERYTHING])
def test_cutting_an_index_into_segments_does_not_change_what_is_found(plan):
    tokens, run_lengths, run_clip, run_modality, num_clips = corpus()
    codec = ResidualCodec.train(tokens, tokens, 4, 24, seed=0)
    cut, at = run_clip < 30, int(run_lengths[run_clip < 30].sum())
    whole = Segment.build(tokens, run_lengths, run_clip, run_modality, num_clips, codec)
    parts = [
        Segment.build(tokens[:at], run_lengths[cut], run_clip[cut], run_modality[cut], 30, codec),
        Segment.build(tokens[at:], run_lengths[~cut], run_clip[~cut] - 30, run_modality[~cut], num_clips - 30, codec),
    ]
    for one, two in zip(
        Searcher([whole], codec).search(queries(), 8, plan, SUM),
        Searcher(parts, codec).search(queries(), 8, plan, SUM),
        strict=True,
    ):
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[1], two[1])


@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)
def test_few_probes_may_miss_clips_but_never_change_the_score_of_one_found(scorer, monkeypatch):
    monkeypatch.setattr(Searcher, "_scans_cheaper", lambda *_: False)
    segment, codec = built()
    searcher = Searcher([segment], codec)
    everything = searcher.search(queries(), 10**6, EXHAUSTIVE, scorer)
    few = searcher.search(queries(), 5, Plan(1, 10), scorer)
    for (ordinals, scores), (all_ordinals, all_scores) in zip(few, everything, strict=True):
        known = dict(zip(all_ordinals.tolist(), all_scores.tolist(), strict=True))
        assert 0 < len(ordinals) <= 5
        assert scores.tolist() == pytest.approx([known[clip] for clip in ordinals.tolist()], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("plan", "recall"), [(Plan(1, 20), 0.6), (Plan(2, 40), 0.85), (Plan(4, 80), 0.97)])
def test_a_planted_clip_is_found_first_and_recall_grows_with_the_work(plan, recall, monkeypatch):
    """400 clips of tokens around 32 topics; queries are noisy copies of a clip's tokens."""
    monkeypatch.setattr(Searcher, "_scans_cheaper", lambda *_: False)
    rng = np.random.default_rng(0)
    tokens = unit(rng.normal(size=(32, 24))[rng.integers(0, 32, 4000)] + 0.6 * rng.normal(size=(4000, 24)))
    codec = ResidualCodec.train(tokens, tokens[:500], 4, 32, seed=0)
    segment = Segment.build(tokens, np.full(400, 10), np.arange(400), np.zeros(400, np.uint8), 400, codec)
    asked = [tokens[10 * c : 10 * c + 6] + 0.05 * rng.normal(size=(6, 24)).astype(np.float32) for c in range(0, 400, 9)]
    searcher = Searcher([segment], codec)
    found, exact = searcher.search(asked, 10, plan, SUM), searcher.search(asked, 10, EXHAUSTIVE, SUM)
    assert [clips[0] for clips, _ in found] == list(range(0, 400, 9))
    shared = [len(set(f.tolist()) & set(e.tolist())) / 10 for (f, _), (e, _) in zip(found, exact, strict=True)]
    assert np.mean(shared) >= recall


@pytest.mark.parametrize("plan", [EXHAUSTIVE, Plan(2, 12), EVERYTHING])
def test_only_allowed_clips_are_found_and_they_are_found_as_if_alone(plan):
    segment, codec = built()
    searcher = Searcher([segment], codec)
    allowed = np.arange(segment.num_clips) % 7 == 3
    everything = searcher.search(queries(), 10**6, EXHAUSTIVE, SUM)
    for (ordinals, scores), (all_ordinals, all_scores) in zip(
        searcher.search(queries(), 4, plan, SUM, allowed), everything, strict=True
    ):
        assert allowed[ordinals].all()
        kept = allowed[all_ordinals]
        assert ordinals.tolist() == all_ordinals[kept][:4].tolist()
        np.testing.assert_allclose(scores, all_scores[kept][:4], rtol=1e-5)


def test_equal_scores_rank_by_ordinal():
    token = queries((1,))[0]
    _, codec = built()
    segment = Segment.build(
        np.repeat(token, 6, axis=0), np.ones(6, np.int64), np.arange(6), np.zeros(6, np.uint8), 6, codec
    )
    for plan in (EXHAUSTIVE, EVERYTHING):
        [(ordinals, _)] = Searcher([segment], codec).search([token], 4, plan, SUM)
        assert ordinals.tolist() == [0, 1, 2, 3]


def test_nothing_is_found_without_query_tokens_without_clips_or_in_lists_that_are_empty():
    segment, codec = built()
    none = np.zeros(0, np.int64)
    empty = Segment.build(np.empty((0, 32), np.float32), none, none, none.astype(np.uint8), 0, codec)
    for plan in (EXHAUSTIVE, Plan(1, 12)):
        assert Searcher([segment], codec).search([queries()[0][:0]], 5, plan, SUM)[0][0].size == 0
        assert Searcher([empty], codec).search(queries(), 5, plan, SUM)[0][0].size == 0
    far, near = codec.centroids.floats[:1], codec.centroids.floats[1:2]
    one = Segment.build(near, np.array([1]), np.array([0]), np.array([0], np.uint8), 1, codec)
    searcher = Searcher([one], codec)
    assert searcher._probe_and_score(far, 5, Plan(1, 12), SUM, None)[0].size == 0


def test_at_least_twice_k_candidates_are_scored_by_their_codes(monkeypatch):
    monkeypatch.setattr(Searcher, "_scans_cheaper", lambda *_: False)
    segment, codec = built()
    searcher = Searcher([segment], codec)
    for starved, generous in zip(
        searcher.search(queries(), 10, Plan(100, 1), SUM),
        searcher.search(queries(), 10, Plan(100, 20), SUM),
        strict=True,
    ):
        assert starved[0].tolist() == generous[0].tolist()


def test_the_cheaper_of_probing_and_scanning_is_chosen():
    segment, codec = built()
    searcher = Searcher([segment], codec)
    assert searcher._scans_cheaper(Plan(24, 80), queries(), None)
    assert not searcher._scans_cheaper(Plan(1, 1), [queries()[1]], None)


def test_codes_may_stay_where_they_are():
    segment, codec = built()
    residuals, first = segment.residuals, segment.token_of_clip
    light = Segment.from_arrays(segment.to_arrays() | {"residuals": residuals[:0]})

    def fetch(clips):
        return np.concatenate([residuals[first[c] : first[c + 1]] for c in clips])

    for plan in (EXHAUSTIVE, Plan(2, 12)):
        for one, two in zip(
            Searcher([segment], codec).search(queries(), 5, plan, SUM),
            Searcher([light], codec, fetch).search(queries(), 5, plan, SUM),
            strict=True,
        ):
            np.testing.assert_array_equal(one[0], two[0])
            np.testing.assert_array_equal(one[1], two[1])


@pytest.mark.parametrize("num_bytes", [1, 700])
def test_the_memory_of_a_scan_does_not_change_what_is_found(num_bytes, monkeypatch):
    segment, codec = built()
    whole = Searcher([segment], codec).search(queries(), 7, EXHAUSTIVE, SUM)
    monkeypatch.setattr(search_module, "SCAN_BYTES", num_bytes)
    for one, two in zip(whole, Searcher([segment], codec).search(queries(), 7, EXHAUSTIVE, SUM), strict=True):
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[1], two[1])


def test_inverted_lists_hold_exactly_the_clips_of_each_centroid():
    segment, codec = built()
    searcher = Searcher([segment], codec)
    clip_of_token = np.repeat(segment.run_clip, segment.run_lengths)
    for centroid in range(codec.num_centroids):
        held = searcher._lists[searcher._offsets[centroid] : searcher._offsets[centroid + 1]]
        assert held.tolist() == sorted(set(clip_of_token[segment.centroid_ids == centroid].tolist()))


def test_a_query_of_another_width_or_without_numbers_is_refused():
    segment, codec = built()
    with pytest.raises(ShapeError, match="not finite"):
        Searcher([segment], codec).search([queries()[0] * np.nan], 5, EXHAUSTIVE, SUM)
    with pytest.raises(ShapeError, match="width 8; the index has 32"):
        Searcher([segment], codec).search(queries(dim=8), 5, EXHAUSTIVE, SUM)


@pytest.mark.parametrize("bits", [1, 3, 8, 14, 17, 25])
def test_ids_come_back_from_as_many_bits_as_they_need(bits):
    ids = np.random.default_rng(0).integers(0, 2**bits, 1001).astype(np.uint32)
    packed = np.zeros(-(-1001 * bits // 8) + 8, np.uint8)
    kernels.pack_ids(ids, bits, packed)
    again = np.empty(1001, np.uint32)
    kernels.unpack_ids(packed, bits, again)
    np.testing.assert_array_equal(again, ids)


PROGRAM = """
import sys
sys.path.insert(0, "tests")
import numpy as np
from operators.simd import INSTRUCTION_SET
from operators import kernels
from test_search import SUM, EXHAUSTIVE, EVERYTHING, Searcher, built, queries
assert INSTRUCTION_SET == sys.argv[1], INSTRUCTION_SET
arrays = {}
for nbits in (2, 4):
    segment, codec = built(nbits)
    arrays[f"codes{nbits}"] = segment.residuals
    for plan in (EXHAUSTIVE, EVERYTHING):
        for i, (ordinals, scores) in enumerate(Searcher([segment], codec).search(queries(), 50, plan, SUM)):
            arrays[f"{nbits} {plan.probes} {i}"] = np.array([ordinals, scores])
np.savez(sys.argv[2], **arrays)
assembly = "".join(kernels.score_residuals.inspect_asm().values())
assert sys.argv[3] in assembly, "the kernel does not use the vector instructions"
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors")
@pytest.mark.parametrize(
    ("instructions", "processor", "features", "instruction"),
    [
        ("avx512vnni", "host", None, "vpdpbusd"),
        ("avx2", "haswell", "+avx2,+fma,+f16c", "vpmaddwd"),
        ("generic", "x86-64", "", "pmaddwd"),
    ],
)
def test_every_instruction_set_computes_the_same(instructions, processor, features, instruction, tmp_path):
    """Numba compiles for a named processor; what it makes for an older x86 also runs here."""
    if processor == "host" and instructions != INSTRUCTION_SET:
        pytest.skip(f"this processor has {INSTRUCTION_SET}")
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    if features is not None:
        environment |= {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features}
    out = tmp_path / "found.npz"
    command = [sys.executable, "-c", PROGRAM, instructions, str(out), instruction]
    subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, check=True)
    theirs = np.load(out)
    for nbits in (2, 4):
        segment, codec = built(nbits)
        np.testing.assert_array_equal(theirs[f"codes{nbits}"], segment.residuals)
        for plan in (EXHAUSTIVE, EVERYTHING):
            for i, found in enumerate(Searcher([segment], codec).search(queries(), 50, plan, SUM)):
                np.testing.assert_array_equal(theirs[f"{nbits} {plan.probes} {i}"][0], found[0])
                np.testing.assert_allclose(theirs[f"{nbits} {plan.probes} {i}"][1], found[1], rtol=1e-5)


@pytest.mark.parametrize("probes", [1, 2, 4])
@pytest.mark.parametrize("candidates", [4, 16, 10**6])
def test_a_trace_tells_what_the_search_did(monkeypatch, probes, candidates):
    monkeypatch.setattr(Searcher, "_scans_cheaper", lambda *_: False)
    segment, codec = built(longest=4)
    searcher, [query] = Searcher([segment], codec), queries((5,))
    plan = Plan(probes, candidates)
    [(ranked, _)] = searcher.search([query], 2, plan, SUM)
    [(scored, _)] = searcher.search([query], segment.num_clips, Plan(probes, 10**6), SUM)
    met, _ = searcher.candidates(query, probes, SUM)
    stages = set()
    for clip in range(segment.num_clips):
        fate = searcher.trace(query, np.array([clip]), 2, plan, SUM)
        stages.add(fate.stage)
        assert (fate.stage == "not probed") == (clip not in met)
        if fate.stage == "pruned":
            assert fate.place > fate.limit == max(candidates, 4)
            assert searcher.trace(query, np.array([clip]), 2, Plan(probes, fate.place), SUM).stage == "scored"
        if fate.stage == "scored":
            assert (fate.place <= 2) == (clip in ranked)
            if candidates == 10**6:
                assert scored[fate.place - 1] == clip
    assert "scored" in stages and ("pruned" in stages) == (candidates < len(met))
