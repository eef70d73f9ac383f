import inspect
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from operators.encoder_flmr import FlmrEncoder, PreflmrEncoder
from operators.encoders import Content, Query
from operators.errors import ConfigError, ModelError
from operators.heads import build_head, save_head
from operators.text_based_vision import (
    SeenObject,
    choose_regions,
    crop,
    grid_regions,
    render_query,
    render_vision,
    without_markers,
)
from operators.text_tower import TextTower
from operators.vision_tower import VisionTower
from pipelines.config import EncodeConfig, FlmrConfig, PreflmrConfig
from tests.tiny_flmr import (
    DIM,
    HIDDEN,
    MARKERS,
    PATCHES,
    QUERY_LENGTH,
    TOKENS,
    VISION,
    WORDS,
    head_config,
    opened,
    picture,
    processor,
)

VOCABULARY = [*WORDS, *MARKERS]
BOXES = ((0.0, 0.0, 0.5, 0.5), (0.25, 0.5, 1.0, 1.0))


@pytest.fixture(scope="module")
def flmr(tiny_flmr):
    return FlmrEncoder(**FlmrConfig(model=tiny_flmr.flmr).model_dump())


@pytest.fixture(scope="module")
def preflmr(tiny_flmr):
    return PreflmrEncoder(**preflmr_parameters(tiny_flmr.preflmr))


@pytest.fixture(scope="module")
def parts(tiny_flmr):
    return FlmrEncoder(**parts_parameters(tiny_flmr))


def preflmr_parameters(model):
    return PreflmrConfig(model=model, instruction="find the cat:").model_dump()


def parts_parameters(tiny, **more):
    towers = {"text_model": tiny.colbert, "vision_model": tiny.clip, "head": tiny.head_flmr}
    return FlmrConfig(**towers, **more).model_dump()


def spans(*texts):
    return [{"text": text} for text in texts]


def frames(*seeds):
    return [{"jpeg": picture(seed, 60, 32)} for seed in seeds]


def unit(tokens):
    tokens = tokens.detach().double().numpy()
    return tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)


def ids(words, length=0):
    numbers = [VOCABULARY.index(word) for word in words.split()]
    return numbers + [VOCABULARY.index("[MASK]")] * (length - len(numbers))


def of_text(bert, linear, numbers, num_attended=None):
    """Plain transformers: a BERT of which only the first tokens are attended to, and a linear layer."""
    mask = torch.zeros(1, len(numbers), dtype=torch.long)
    mask[:, :num_attended] = 1
    hidden = bert(torch.tensor([numbers]), attention_mask=mask).last_hidden_state[0]
    return hidden, linear(hidden)


def of_vision(tiny, *pictures):
    """Plain transformers: class tokens of the last layer and patches of the one before."""
    pixels = processor()(list(pictures), return_tensors="pt")["pixel_values"]
    output = tiny.modules["vision"](pixels, output_hidden_states=True)
    return output.last_hidden_state[:, 0], output.hidden_states[-2][:, 1:]


def mapped(tiny, *pictures):
    vectors, _ = of_vision(tiny, *pictures)
    return tiny.modules["head_flmr"].model(vectors).reshape(-1, DIM)


def flmr_query(tiny, words):
    numbers = ids(f"[CLS] [unused0] <BOQ> {words} <EOQ> [SEP]", QUERY_LENGTH)
    return of_text(tiny.modules["flmr_bert"], tiny.modules["linear"], numbers, len(words.split()) + 5)[1]


def test_a_query_in_words_is_all_of_colberts_tokens(tiny_flmr, flmr):
    [got] = flmr.encode_queries([Query("what is this?")])
    np.testing.assert_allclose(got, unit(flmr_query(tiny_flmr, "what is this ?")), atol=1e-5)
    assert got.shape == (QUERY_LENGTH, DIM), "no visual tokens without a picture"


def test_a_picture_alone_is_its_mapped_tokens_alone(tiny_flmr, flmr):
    [got] = flmr.encode_queries([Query(image=picture(0))])
    np.testing.assert_allclose(got, unit(mapped(tiny_flmr, opened(picture(0)))), atol=1e-5)
    assert got.shape == (TOKENS, DIM)


def test_text_picture_and_crops_lie_side_by_side(tiny_flmr, flmr):
    [got] = flmr.encode_queries([Query("what is this", picture(0), BOXES)])
    whole = opened(picture(0))  # 40 by 32
    regions = whole, whole.crop((0, 0, 20, 16)), whole.crop((10, 16, 40, 32))
    expected = torch.cat([flmr_query(tiny_flmr, "what is this"), mapped(tiny_flmr, *regions)])
    np.testing.assert_allclose(got, unit(expected), atol=1e-5)


def test_what_others_saw_follows_the_question(tiny_flmr, flmr):
    seen = render_vision([SeenObject("cat", (("red", 0.4),))])
    [got] = flmr.encode_queries([Query("what", vision_text=seen)])
    numbers = ids("[CLS] [unused0] <BOQ> what <EOQ> <BOV> red cat <SOV> <EOV> [SEP]", QUERY_LENGTH)
    expected = of_text(tiny_flmr.modules["flmr_bert"], tiny_flmr.modules["linear"], numbers, 11)[1]
    np.testing.assert_allclose(got, unit(expected), atol=1e-5)


def test_crops_are_limited_and_a_grid_of_them_is_on_demand(tiny_flmr):
    limited = FlmrEncoder(**parts_parameters(tiny_flmr, num_crops=1))
    grid = FlmrEncoder(**parts_parameters(tiny_flmr, num_crops=5, crops="grid"))
    [with_boxes], [without] = (e.encode_queries([Query(image=picture(0), boxes=BOXES)]) for e in (limited, grid))
    assert len(with_boxes) == 2 * TOKENS
    assert len(without) == 3 * TOKENS, "boxes that are given are not replaced"
    [cells] = grid.encode_queries([Query(image=picture(0))])
    by_hand = limited.encode_queries([Query(image=picture(0), boxes=(box,)) for box in grid_regions(4)])
    assert len(cells) == 5 * TOKENS
    np.testing.assert_allclose(cells[TOKENS:], np.concatenate([each[TOKENS:] for each in by_hand]), atol=1e-5)


def test_documents_stand_between_passage_markers_in_every_piece(tiny_flmr, flmr):
    """The context tokenizer's limit is 14: nine words a piece."""
    [clip] = flmr.encode_documents([{"speech": Content(spans("a red, cat", "on the moon is it this dog mat"))}])
    first = ids("[CLS] [unused1] <BOK> a red , cat on the moon is it <EOK> [SEP]")
    second = ids("[CLS] [unused1] <BOK> this dog mat <EOK> [SEP]")
    bert, linear = tiny_flmr.modules["flmr_bert"], tiny_flmr.modules["linear"]
    expected = torch.cat([of_text(bert, linear, numbers, None)[1] for numbers in (first, second)])
    kept = [i for i, number in enumerate(first + second) if number != VOCABULARY.index(",")]
    np.testing.assert_allclose(clip["speech"].embeddings, unit(expected[kept]), atol=1e-5)
    assert clip["speech"].span_index.tolist() == [0] * 6 + [1] * 7 + [1] * 8


def test_frames_are_their_mapped_tokens(tiny_flmr, flmr):
    [clip] = flmr.encode_documents([{"frame": Content(frames=frames(0, 1, 2))}])
    expected = unit(mapped(tiny_flmr, *(opened(frame["jpeg"]) for frame in frames(0, 1, 2))))
    np.testing.assert_allclose(clip["frame"].embeddings, expected, atol=1e-5)
    assert clip["frame"].span_index.tolist() == [0] * TOKENS + [1] * TOKENS + [2] * TOKENS
    assert clip["frame"].grid is None


def preflmr_text(tiny, words):
    numbers = ids(f"[CLS] [unused0] find the cat : {words} [SEP]", QUERY_LENGTH)
    attended = len(words.split()) + 7
    return of_text(tiny.modules["query_bert"], tiny.modules["query_linear"], numbers, attended)


def preflmr_vision(tiny, hidden, *pictures):
    """Every patch sees every patch, then the first six hidden states."""
    vectors, patches = of_vision(tiny, *pictures)
    head = tiny.modules["head_preflmr"]
    states = head.transformer.input_linear(patches)
    everything = torch.zeros(1, 1, 1, states.shape[1]), torch.zeros(1, 1, 1, 6)
    first = hidden[None, :6].expand(len(pictures), -1, -1)
    out = head.transformer.network(states, everything[0], first, everything[1]).last_hidden_state
    of_patches = head.transformer.output_linear(out)
    return torch.cat([head.mapping(vectors), of_patches], 1).reshape(-1, DIM)


COUNTED = [0, 1, *range(6, QUERY_LENGTH)]
"""Of ``[CLS] [Q] find the cat : …``: all but the instruction and its colon."""


@pytest.mark.parametrize("words", ["what is this", ""])
def test_preflmr_has_no_tokens_of_its_instruction_and_patches_that_saw_it(tiny_flmr, preflmr, words):
    [got] = preflmr.encode_queries([Query(words, picture(0))])
    hidden, tokens = preflmr_text(tiny_flmr, words)
    expected = torch.cat([tokens[COUNTED], preflmr_vision(tiny_flmr, hidden, opened(picture(0)))])
    np.testing.assert_allclose(got, unit(expected), atol=1e-5)
    assert len(got) == QUERY_LENGTH - 4 + TOKENS + PATCHES


def test_preflmr_in_words_and_with_crops(tiny_flmr):
    parameters = preflmr_parameters(tiny_flmr.preflmr) | {"num_crops": 2}
    encoder = PreflmrEncoder(**parameters)
    hidden, tokens = preflmr_text(tiny_flmr, "this dog")
    in_words, both = encoder.encode_queries([Query("this dog"), Query("this dog", picture(0), BOXES[:1])])
    np.testing.assert_allclose(in_words, unit(tokens[COUNTED]), atol=1e-5)
    whole = opened(picture(0))
    visual = preflmr_vision(tiny_flmr, hidden, whole, whole.crop((0, 0, 20, 16)))
    np.testing.assert_allclose(both, unit(torch.cat([tokens[COUNTED], visual])), atol=1e-5)


def test_preflmr_documents_have_their_own_text_encoder_and_mapped_frames(tiny_flmr, preflmr):
    [clip] = preflmr.encode_documents([{"speech": Content(spans("red cat")), "frame": Content(frames=frames(4))}])
    numbers = ids("[CLS] [unused1] red cat [SEP]")
    expected = of_text(tiny_flmr.modules["bert"], tiny_flmr.modules["linear"], numbers)[1]
    np.testing.assert_allclose(clip["speech"].embeddings, unit(expected), atol=1e-5)
    vectors, _ = of_vision(tiny_flmr, opened(frames(4)[0]["jpeg"]))
    of_frame = tiny_flmr.modules["head_preflmr"].mapping(vectors)[0]
    np.testing.assert_allclose(clip["frame"].embeddings, unit(of_frame), atol=1e-5)


def test_preflmr_of_parts_and_of_a_plain_bert(tiny_flmr, tmp_path):
    towers = {"text_model": tiny_flmr.colbert, "vision_model": tiny_flmr.clip, "head": tiny_flmr.head_preflmr}
    encoder = PreflmrEncoder(**PreflmrConfig(**towers, instruction="find the cat").model_dump())
    [got] = encoder.encode_queries([Query("what", picture(0))])
    numbers = ids("[CLS] [unused0] find the cat : what [SEP]", QUERY_LENGTH)
    hidden, tokens = of_text(tiny_flmr.modules["bert"], tiny_flmr.modules["linear"], numbers, 8)
    expected = torch.cat([tokens[COUNTED], preflmr_vision(tiny_flmr, hidden, opened(picture(0)))])
    np.testing.assert_allclose(got, unit(expected), atol=1e-5)

    plain = altered(
        tiny_flmr.colbert, tmp_path / "bert", lambda t: t.pop("linear.weight"), lambda c: c.pop("architectures")
    )
    config = head_config("preflmr") | {"dim": HIDDEN}
    save_head(tmp_path / "head", config, build_head(config))
    towers |= {"text_model": plain, "head": str(tmp_path / "head")}
    encoder = PreflmrEncoder(**PreflmrConfig(**towers, instruction="find the cat").model_dump())
    assert encoder.query_tokens(Query("what dog")) == ["what", "dog"]
    short, long = Query("what", picture(0)), Query("what dog on the mat", picture(1))
    for one, both in zip((short, long), encoder.encode_queries([short, long]), strict=True):
        np.testing.assert_allclose(encoder.encode_queries([one])[0], both, atol=1e-5)


def test_heads_can_be_trained_on_what_the_towers_give(tiny_flmr):
    """Tensors of inference mode could not be."""
    vectors, patches = VisionTower(tiny_flmr.clip).features([opened(picture(0))])
    [query] = TextTower(tiny_flmr.colbert).encode_queries(["what"])
    head = build_head(head_config("preflmr"))
    head(vectors, patches, query.hidden[None], torch.ones(1, QUERY_LENGTH, dtype=torch.bool)).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize(
    ("instruction", "complaint"), [("find: this", "holds ':'"), ("find the cat on the mat it is a", "fills all of 12")]
)
def test_an_instruction_that_cannot_be_told_from_the_text_is_refused(tiny_flmr, instruction, complaint):
    with pytest.raises(ConfigError, match=complaint):
        PreflmrEncoder(**preflmr_parameters(tiny_flmr.preflmr) | {"instruction": instruction})


QUERIES = [
    Query("what is this"),
    Query(image=picture(3)),
    Query("a red cat on the mat on the moon", picture(5), BOXES),
    Query("it", picture(6, 20, 60)),
]
CLIPS = [
    {"speech": Content(spans("a cat " * 20)), "frame": Content(frames=frames(0, 1, 2, 3, 4))},
    {"frame": Content(), "metadata": Content(spans("moon"))},
    {"frame": Content(frames=frames(7)), "screen_text": Content(spans(""))},
]


@pytest.mark.parametrize("name", ["flmr", "preflmr", "parts"])
def test_nothing_depends_on_batch_mates_or_budgets(tiny_flmr, request, name):
    encoder = request.getfixturevalue(name)
    small = {
        "flmr": lambda: FlmrEncoder(**FlmrConfig(model=tiny_flmr.flmr).model_dump(), batch_tokens=12),
        "preflmr": lambda: PreflmrEncoder(**preflmr_parameters(tiny_flmr.preflmr), batch_tokens=12),
        "parts": lambda: FlmrEncoder(**parts_parameters(tiny_flmr), batch_tokens=12),
    }[name]()
    together = encoder.encode_queries(QUERIES)
    documents = encoder.encode_documents(CLIPS)
    for other in (encoder, small):
        for query, expected in zip(QUERIES, together, strict=True):
            np.testing.assert_allclose(other.encode_queries([query])[0], expected, atol=1e-5)
        for clip, expected in zip(CLIPS, documents, strict=True):
            [alone] = other.encode_documents([clip])
            assert alone.keys() == clip.keys()
            for modality in clip:
                np.testing.assert_allclose(alone[modality].embeddings, expected[modality].embeddings, atol=1e-5)


@pytest.mark.parametrize("name", ["flmr", "preflmr", "parts"])
def test_embeddings_are_unit_float32_and_named_one_by_one(request, name):
    encoder = request.getfixturevalue(name)
    for query, tokens in zip(QUERIES, encoder.encode_queries(QUERIES), strict=True):
        assert len(encoder.query_tokens(query)) == len(tokens)
    for tokens in (*encoder.encode_queries(QUERIES), encoder.encode_documents(CLIPS)[0]["frame"].embeddings):
        assert tokens.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(tokens, axis=1), 1, atol=1e-5)
    assert encoder.encode_documents(CLIPS)[1]["frame"].embeddings.shape == (0, DIM)


def test_query_tokens_say_what_they_stand_for(preflmr, flmr):
    assert preflmr.query_tokens(Query("this", picture(0)))[:5] == ["[CLS]", "[unused0]", "this", "[SEP]", "[MASK]"]
    assert preflmr.query_tokens(Query("this", picture(0)))[-1] == f"[picture: patch {PATCHES - 1}]"
    assert flmr.query_tokens(Query(image=picture(0), boxes=BOXES))[TOKENS] == "[crop 1: 0]"


def test_a_checkpoint_and_its_parts_say_the_same(tiny_flmr, parts):
    """Same CLIP and mapping network; the ColBERT is another, so only what is seen is the same."""
    [expected] = FlmrEncoder(**FlmrConfig(model=tiny_flmr.flmr).model_dump()).encode_queries([Query(image=picture(1))])
    np.testing.assert_allclose(parts.encode_queries([Query(image=picture(1))])[0], expected, atol=1e-5)
    plain = Query("what", vision_text=render_vision([SeenObject("cat"), SeenObject("dog")], caption="the mat"))
    assert parts.query_tokens(plain)[2:8] == ["what", "cat", ",", "dog", ",", "the"]


def test_frames_as_words_or_not_at_all(tiny_flmr):
    red = [{"jpeg": picture(9, 300, 300)}]
    words = FlmrEncoder(**parts_parameters(tiny_flmr, frames="tags", min_probability=0.0, top_k=2))
    [clip] = words.encode_documents([{"frame": Content(frames=red * 2)}])
    assert set(clip["frame"].span_index.tolist()) == {0, 1}
    assert not len(words.encode_documents([{"frame": Content()}])[0]["frame"].embeddings)
    nothing = FlmrEncoder(**parts_parameters(tiny_flmr, frames="none"))
    assert nothing.encode_documents([{"frame": Content(frames=red)}])[0]["frame"].embeddings.shape == (0, DIM)


def test_the_packaged_towers_work_with_a_head(tmp_path):
    config = {"system": "flmr", "vision_dim": 1280, "dim": 384, "num_tokens": 2}
    save_head(tmp_path, config, build_head(config))
    encoder = FlmrEncoder(**FlmrConfig(head=str(tmp_path)).model_dump())
    [tokens] = encoder.encode_queries([Query("a cat", picture(0))])
    assert tokens.shape == (2 + 2, 384), "two words and two tokens of the picture"
    assert encoder.query_tokens(Query("a cat", picture(0)))[:2] == ["a", "cat"]


def test_bfloat16_is_near_float32(tiny_flmr, preflmr):
    half = PreflmrEncoder(**preflmr_parameters(tiny_flmr.preflmr) | {"precision": "bfloat16"})
    for one, other in zip(preflmr.encode_queries(QUERIES), half.encode_queries(QUERIES), strict=True):
        assert (one * other).sum(axis=1).min() > 0.98
    for one, other in zip(preflmr.encode_documents(CLIPS), half.encode_documents(CLIPS), strict=True):
        assert all((one[m].embeddings * other[m].embeddings).sum(axis=1).min(initial=1) > 0.98 for m in one)


def test_without_a_head_it_says_how_to_come_by_one(tiny_flmr):
    parameters = parts_parameters(tiny_flmr) | {"head": None}
    for call in (lambda: FlmrEncoder(**parameters), lambda: FlmrEncoder.fingerprint_of(**parameters)):
        with pytest.raises(ModelError, match=r"encode\.flmr\.head.*`maxreel train`"):
            call()


def test_a_head_of_other_widths_is_refused(tiny_flmr, tmp_path):
    config = {"system": "flmr", "vision_dim": VISION, "dim": DIM + 1, "num_tokens": 2}
    save_head(tmp_path, config, build_head(config))
    with pytest.raises(ModelError, match="'dim': 9"):
        FlmrEncoder(**parts_parameters(tiny_flmr) | {"head": str(tmp_path)})


def altered(folder, to, tensors=lambda t: None, config=lambda c: None):
    """Copy a checkpoint and change its tensors and its configuration."""
    shutil.copytree(folder, to)
    own = load_file(to / "model.safetensors")
    tensors(own)
    save_file(own, to / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((to / "config.json").read_text())
    config(content)
    (to / "config.json").write_text(json.dumps(content))
    return str(to)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"tensors": lambda t: t.pop("query_text_encoder.bert_model.encoder.layer.1.output.dense.bias")},
            "are missing",
        ),
        ({"tensors": lambda t: t.pop("query_text_encoder_linear.weight")}, "lacks the text encoder of query"),
        ({"tensors": lambda t: t.pop("transformer_mapping_output_linear.bias")}, "are missing"),
        ({"tensors": lambda t: t.pop("context_vision_projection.model.0.weight")}, "are missing"),
        ({"tensors": lambda t: t.update(encode_proj=torch.zeros(1))}, "have no place"),
        ({"tensors": lambda t: t.update(transformer_mapping_extra=torch.zeros(1))}, "have no place"),
        ({"config": lambda c: c.update(query_mask_input_ids_skip_list=[3])}, "supported is"),
        ({"config": lambda c: c.update(use_transformer_mapping_network=False)}, "for the encoder flmr, not preflmr"),
        ({"config": lambda c: c.update(model_type="bert")}, "not an FLMR"),
        ({"config": lambda c: c.update(separate_query_and_context_text_encoder=False)}, "holds two different"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(tiny_flmr, tmp_path, change, complaint):
    with pytest.raises(ModelError, match=complaint):
        PreflmrEncoder(**preflmr_parameters(altered(tiny_flmr.preflmr, tmp_path / "m", **change)))


def test_shared_modules_may_be_saved_under_one_name(tiny_flmr, tmp_path, flmr):
    def only_context(tensors):
        for name in [name for name in tensors if name.startswith("query_")]:
            tensors.pop(name)

    once = FlmrEncoder(**FlmrConfig(model=altered(tiny_flmr.flmr, tmp_path / "m", only_context)).model_dump())
    for one, other in zip(once.encode_queries(QUERIES), flmr.encode_queries(QUERIES), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_fingerprint_is_of_what_changes_the_output(tiny_flmr):
    base = preflmr_parameters(tiny_flmr.preflmr)
    values = {
        "model": tiny_flmr.flmr,
        "instruction": "other",
        "frames": "none",
        "num_crops": 3,
        "crops": "grid",
        "query_length": 10,
        "document_length": 9,
        "precision": "bfloat16",
    }
    prints = {name: PreflmrEncoder.fingerprint_of(**base | {name: value}) for name, value in values.items()}
    assert len({PreflmrEncoder.fingerprint_of(**base), *prints.values()}) == len(values) + 1
    speed = {"attention": "eager", "batch_tokens": 5, "device": "cuda", "num_threads": 3}
    assert PreflmrEncoder.fingerprint_of(**base, **{k: v for k, v in speed.items() if k != "attention"}) == (
        PreflmrEncoder.fingerprint_of(**base | {"attention": "eager"})
    )
    parts = parts_parameters(tiny_flmr)
    others = [parts | {"text_model": tiny_flmr.clip}, parts | {"head": tiny_flmr.head_mire}]
    assert len({FlmrEncoder.fingerprint_of(**each) for each in (parts, *others)}) == 3


def test_its_width_is_known_without_its_weights(tiny_flmr, tmp_path):
    (tmp_path / "m").mkdir()
    shutil.copy(f"{tiny_flmr.flmr}/config.json", tmp_path / "m")
    assert FlmrEncoder.dim_of(**FlmrConfig(model=str(tmp_path / "m")).model_dump()) == DIM
    assert FlmrEncoder.dim_of(**parts_parameters(tiny_flmr)) == DIM
    assert FlmrEncoder.joint_of(**parts_parameters(tiny_flmr)) is False


@pytest.mark.parametrize("name", ["flmr", "preflmr", "mire"])
def test_the_configuration_has_the_encoders_parameters(name):
    from pipelines.encode import ENCODERS

    speed = {"batch_tokens", "device", "num_threads"}
    signature = set(inspect.signature(ENCODERS[name].__init__).parameters) - {"self", "parameters"} - speed
    if name == "preflmr":
        signature |= set(inspect.signature(FlmrEncoder.__init__).parameters) - {"self"} - speed
    assert set(EncodeConfig(encoder=name).parameters()) == signature


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        (Query(), "empty"),
        (Query("what", b"no picture"), "not an image"),
        (Query("what", picture(0), ((0.5, 0, 0.4, 1),)), "left < right"),
        (Query("what", picture(0), ((0, 0, 20, 20),)), "shares of the picture"),
    ],
)
def test_queries_that_are_none_are_refused(flmr, query, complaint):
    with pytest.raises(ConfigError, match=complaint):
        flmr.encode_queries([query])


def test_what_is_seen_is_rendered_as_flmr_was_trained():
    objects = [
        SeenObject("cat", (("red", 0.9), ("small", 0.05), ("wet", 0.06), ("old", 0.3), ("fat", 0.9))),
        SeenObject("mat"),
    ]
    seen = render_vision(objects, ["STOP\nHERE", "stop", "STOP HERE"], "a cat on a mat")
    assert seen == "<BOV> red wet old cat <SOV> mat <SOV> STOP HERE stop <EOV> <BOC> a cat on a mat <EOC>"
    assert render_query("what?", seen) == f"<BOQ> what? <EOQ> {seen}"
    assert without_markers(render_query("what?", seen)) == "what? red wet old cat, mat, STOP HERE stop a cat on a mat"
    assert render_vision([SeenObject("cat")] * 50).count("<SOV>") == 40


def test_regions_that_the_question_names_come_first_then_the_large():
    small, middle, large = (0, 0, 0.1, 0.1), (0, 0, 0.5, 0.5), (0, 0, 1, 1)
    objects = [SeenObject("dog", box=middle), SeenObject("car", box=large), SeenObject("Cat", box=small)]
    objects.append(SeenObject("scene"))
    assert choose_regions(objects, "a scary cat?", 2) == [small, large], "a car is not in what is scary"
    assert choose_regions(objects, "", 5) == [large, middle, small, small, small], "the last is given again"
    assert choose_regions([SeenObject("cat")]) == []


def test_a_hairs_breadth_is_widened_within_the_picture():
    whole = opened(picture(0, 100, 80))
    assert crop(whole, (0.5, 0, 0.501, 1)).size == (5, 80)
    assert crop(whole, (0.999, 0, 1, 0.001)).size == (3, 3)
    assert crop(whole, (0.1, 0.25, 0.6, 0.75)).size == (50, 40)


def test_pieces_of_a_grid_cover_the_picture_once():
    cells = grid_regions(9)
    assert len(cells) == 9
    assert cells[0][:2] == (0, 0) and cells[-1][2:] == (1, 1)
    assert sum((right - left) * (bottom - top) for left, top, right, bottom in cells) == pytest.approx(1)
