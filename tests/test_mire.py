import json
import shutil

import numpy as np
import pytest
import torch

from operators.encoder_mire import GUIDE, MireEncoder
from operators.encoders import Content, Query
from operators.errors import ConfigError, ModelError
from pipelines.config import MireConfig
from tests.test_flmr import CLIPS, QUERIES, frames, ids, of_text, of_vision, spans, unit
from tests.test_towers import arrays, pooling
from tests.tiny_flmr import DIM, HEADS, TOKENS, WORDS, opened, picture

LENGTHS = {"query_length": 12, "document_length": 10}
ASKED = "[CLS] [unused0] can you [UNK] the [UNK] [UNK] [UNK] this [UNK] ? [SEP]"
"""The fixed question in the tiny vocabulary, at its own length."""


def parameters(tiny, **more):
    return MireConfig(model=tiny.mire, vision_model=tiny.clip, **{**LENGTHS, "query_length": 16, **more}).model_dump()


@pytest.fixture(scope="module")
def mire(tiny_flmr):
    return MireEncoder(**parameters(tiny_flmr))


@pytest.fixture(scope="module")
def parts(tiny_flmr):
    towers = {"text_model": tiny_flmr.colbert, "vision_model": tiny_flmr.clip, "head": tiny_flmr.head_mire}
    return MireEncoder(**MireConfig(**towers, **LENGTHS | {"query_length": 16}).model_dump())


def of_question(tiny, words, length=0, num_attended=None):
    """Plain transformers: token embeddings of a question, not normalised."""
    return of_text(tiny.modules["bert"], tiny.modules["linear"], ids(words, length), num_attended)[1]


def visual(tiny, text, *pictures, padding=0):
    """E_g of plain torch and E_m of NumPy, guided by the same text."""
    vectors, patches = of_vision(tiny, *pictures)
    head = tiny.modules["head_mire"]
    of_vectors = head.split_mlp.model(vectors).reshape(len(pictures), TOKENS, DIM)
    given = text.detach().double().numpy()
    pooled = [pooling(arrays(head.pooling), own.detach().double().numpy(), given, padding) for own in patches]
    return torch.cat([of_vectors, torch.tensor(np.stack(pooled))], 1).reshape(-1, DIM)


def test_a_query_in_words_is_its_tokens_without_the_masks(tiny_flmr, mire):
    [got] = mire.encode_queries([Query("what is this?")])
    expected = of_question(tiny_flmr, "[CLS] [unused0] what is this ? [SEP]", 16, 7)[:7]
    np.testing.assert_allclose(got, unit(expected), atol=1e-5)


def test_a_query_of_both_is_global_pooled_and_text_tokens(tiny_flmr, mire):
    [got] = mire.encode_queries([Query("what is this?", picture(0))])
    text = of_question(tiny_flmr, "[CLS] [unused0] what is this ? [SEP]", 16, 7)[:7]
    expected = torch.cat([visual(tiny_flmr, text, opened(picture(0))), text])
    np.testing.assert_allclose(got, unit(expected), atol=1e-5)
    assert len(got) == TOKENS + HEADS + 7


@pytest.mark.parametrize("padding", ["attended", "leaked"])
def test_masks_count_as_in_the_released_training_or_leak_as_in_its_evaluation(tiny_flmr, padding):
    [got] = MireEncoder(**parameters(tiny_flmr, padding=padding)).encode_queries([Query("what is this?", picture(0))])
    words = "[CLS] [unused0] what is this ? [SEP]"
    if padding == "attended":
        text = of_question(tiny_flmr, words, 16)
        of_picture = visual(tiny_flmr, text, opened(picture(0)))
    else:
        text = of_question(tiny_flmr, words, 16, 7)[:7]
        of_picture = visual(tiny_flmr, text, opened(picture(0)), padding=9)
    np.testing.assert_allclose(got, unit(torch.cat([of_picture, text])), atol=1e-5)


@pytest.mark.parametrize("padding", ["dropped", "attended", "leaked"])
def test_a_picture_alone_is_asked_the_fixed_question(tiny_flmr, padding):
    encoder = MireEncoder(**parameters(tiny_flmr, padding=padding))
    expected = unit(visual(tiny_flmr, of_question(tiny_flmr, ASKED), opened(picture(0))))
    [got] = encoder.encode_queries([Query(image=picture(0))])
    np.testing.assert_allclose(got, expected, atol=1e-5)
    [clip] = encoder.encode_documents([{"frame": Content(frames=[{"jpeg": picture(0)}])}])
    np.testing.assert_allclose(clip["frame"].embeddings, expected, atol=1e-5)


def test_the_fixed_question_fits_the_tiny_vocabulary():
    known = [word if word in WORDS else "[UNK]" for word in GUIDE.lower().replace("?", " ?").split()]
    assert f"[CLS] [unused0] {' '.join(known)} [SEP]" == ASKED


def test_documents_are_colberts(tiny_flmr, mire):
    [clip] = mire.encode_documents([{"speech": Content(spans("a red, cat")), "frame": Content(frames=frames(0, 1))}])
    expected = of_question(tiny_flmr, "[CLS] [unused1] a red , cat [SEP]")[[0, 1, 2, 3, 5, 6]]
    np.testing.assert_allclose(clip["speech"].embeddings, unit(expected), atol=1e-5)
    assert clip["frame"].span_index.tolist() == [0] * (TOKENS + HEADS) + [1] * (TOKENS + HEADS)


def test_a_checkpoint_and_its_parts_say_the_same(mire, parts):
    for one, other in zip(mire.encode_queries(QUERIES), parts.encode_queries(QUERIES), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    for one, other in zip(mire.encode_documents(CLIPS), parts.encode_documents(CLIPS), strict=True):
        for modality in one:
            np.testing.assert_allclose(one[modality].embeddings, other[modality].embeddings, atol=1e-6)


@pytest.mark.parametrize("padding", ["dropped", "leaked"])
def test_nothing_depends_on_batch_mates_or_budgets(tiny_flmr, padding):
    encoder = MireEncoder(**parameters(tiny_flmr, padding=padding))
    small = MireEncoder(**parameters(tiny_flmr, padding=padding), batch_tokens=12)
    together, documents = encoder.encode_queries(QUERIES), encoder.encode_documents(CLIPS)
    for other in (encoder, small):
        for query, expected in zip(QUERIES, together, strict=True):
            np.testing.assert_allclose(other.encode_queries([query])[0], expected, atol=1e-5)
            assert len(other.query_tokens(query)) == len(expected)
        for clip, expected in zip(CLIPS, documents, strict=True):
            [alone] = other.encode_documents([clip])
            for modality in clip:
                np.testing.assert_allclose(alone[modality].embeddings, expected[modality].embeddings, atol=1e-5)


def test_query_tokens_say_what_they_stand_for(mire):
    names = mire.query_tokens(Query("this", picture(0), vision_text="<BOV> red cat <SOV> <EOV>"))
    assert names[TOKENS - 1 : TOKENS + 1] == [f"[picture: {TOKENS - 1}]", "[patches: head 0]"]
    assert names[TOKENS + HEADS :] == ["[CLS]", "[unused0]", "this", "red", "cat", ",", "[SEP]"]


def test_a_query_that_is_none_is_refused(mire):
    with pytest.raises(ConfigError, match="empty"):
        mire.encode_queries([Query(" ")])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("query_fusion.k_state.weight"), "are missing"),
        (lambda t: t.pop("vision_tower.vision_tower.vision_model.post_layernorm.bias"), "are missing"),
        (lambda t: t.pop("model.bert.embeddings.LayerNorm.bias"), "are missing"),
        (lambda t: t.pop("model.linear.weight"), "it is no MIRe"),
        (lambda t: t.update({"query_fusion.extra": torch.zeros(1)}), "have no place"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(tiny_flmr, tmp_path, change, complaint):
    folder = tmp_path / "m"
    shutil.copytree(tiny_flmr.mire, folder)
    file = folder / "mire_epoch_3.pth"
    content = torch.load(file, weights_only=True)
    change(content["model"])
    torch.save(content, file)
    with pytest.raises(ModelError, match=complaint):
        MireEncoder(**parameters(tiny_flmr) | {"model": str(folder)})


def test_a_file_that_would_run_code_is_refused(tiny_flmr, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_flmr.mire, folder)
    torch.save({"model": {}, "config": MireConfig()}, folder / "mire_epoch_3.pth")
    with pytest.raises(ModelError, match="without running code"):
        MireEncoder(**parameters(tiny_flmr) | {"model": str(folder)})
    shutil.copy(folder / "mire_epoch_3.pth", folder / "mire_epoch_4.pth")
    with pytest.raises(ModelError, match="found 2"):
        MireEncoder(**parameters(tiny_flmr) | {"model": str(folder)})


def test_its_width_and_fingerprint_are_known_without_its_weights(tiny_flmr, tmp_path):
    shutil.copytree(tiny_flmr.mire, tmp_path / "m")
    (tmp_path / "m" / "mire_epoch_3.pth").unlink()
    assert MireEncoder.dim_of(**parameters(tiny_flmr) | {"model": str(tmp_path / "m")}) == DIM
    towers = {"text_model": tiny_flmr.colbert, "vision_model": tiny_flmr.clip, "head": tiny_flmr.head_mire}
    base = MireConfig(**towers).model_dump()
    assert MireEncoder.dim_of(**base) == json.loads((tiny_flmr.folder / "head_mire/config.json").read_text())["dim"]
    changes = {"padding": "leaked", "query_length": 9, "vision_model": tiny_flmr.colbert, "model": tiny_flmr.mire}
    prints = [MireEncoder.fingerprint_of(**base | {name: value}) for name, value in changes.items()]
    assert len({MireEncoder.fingerprint_of(**base), *prints}) == 5
    assert MireEncoder.fingerprint_of(**base, batch_tokens=3) == MireEncoder.fingerprint_of(**base)
