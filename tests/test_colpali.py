import functools
import io
import json
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from operators.encoder_colpali import FAMILIES, ColpaliEncoder, one_ahead
from operators.encoders import Content, Query
from operators.errors import ConfigError, ModelError
from operators.maxsim import run_maxima
from pipelines.config import EncodeConfig
from pipelines.encode import ENCODERS
from tests import tiny_colpali as tiny

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
SQUARE, WIDE, PORTRAIT = (48, 48), (96, 54), (40, 90)
TEXTS = ["a red car", "two dogs, and a moon over the sea at night", "x"]


def picture(seed, size=SQUARE):
    # Smooth, so that what is left of it after compression and scaling is still its own.
    noise = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image):
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def frames(*images):
    return Content(frames=[{"jpeg": encoded(image)} for image in images])


def spans(*texts):
    return Content([{"text": text} for text in texts])


@pytest.fixture(scope="module")
def made(tiny_colpali):
    """Return an encoder of a family, in float32, by its settings."""
    return functools.cache(
        lambda family, **settings: ColpaliEncoder(str(tiny_colpali(family)), precision="float32", **settings)
    )


@pytest.fixture(scope="module")
def plain(tiny_colpali):
    """Return model and processor of a family as transformers itself loads them."""
    import transformers

    def load(family):
        folder = tiny_colpali(family)
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
        model = getattr(transformers, architecture).from_pretrained(folder).eval()
        return model, transformers.AutoProcessor.from_pretrained(folder)

    return functools.cache(load)


def image_inputs(processor, images):
    process = getattr(processor, "process_images", processor)
    return process(images=images, return_tensors="pt", text_kwargs={"padding": True})


def query_inputs(processor, texts):
    if hasattr(processor, "process_queries"):
        return processor.process_queries(text=texts)
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts]
    options = {"return_tensors": "pt", "padding": True}
    return processor.apply_chat_template(chats, task="query", tokenize=True, return_dict=True, processor_kwargs=options)


@torch.inference_mode()
def scored(model, inputs):
    """Return what the papers score of each row: all that is not padding."""
    return [
        row[mask.bool()].numpy() for row, mask in zip(model(**inputs).embeddings, inputs["attention_mask"], strict=True)
    ]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # padded products round otherwise


@every_family
def test_queries_are_what_transformers_makes_of_them(made, plain, family):
    model, processor = plain(family)
    encoder = made(family)
    ours = encoder.encode_queries([Query(text) for text in TEXTS])
    assert_same(ours, scored(model, query_inputs(processor, TEXTS)))
    assert [len(rows) for rows in ours] == [len(encoder.query_tokens(Query(text))) for text in TEXTS]
    augmentation = {"colmodernvbert": "<end_of_utterance>", "neomme": "<mask>", "colpali": "<pad>"}
    assert encoder.query_tokens(Query("x")).count(augmentation.get(family, "<|endoftext|>")) == 10


@every_family
def test_frames_are_what_transformers_makes_of_them(made, plain, family):
    images = [picture(1), picture(2, WIDE), picture(3, PORTRAIT), picture(4, WIDE)]
    model, processor = plain(family)
    inputs = image_inputs(processor, images)
    [clip] = made(family, prompt_tokens=True).encode_documents([{"frame": frames(*images)}])
    whole = scored(model, inputs)
    assert_same([clip["frame"].embeddings], [np.concatenate(whole)])
    assert clip["frame"].grid is None, "the instruction's tokens are no patches"
    assert clip["frame"].span_index.tolist() == np.arange(4).repeat([len(rows) for rows in whole]).tolist()

    [clip] = made(family).encode_documents([{"frame": frames(*images)}])
    opening = 1 if family == "neomme" else 0  # its first image token holds no patch
    patches = [
        rows[np.flatnonzero(ids[mask.bool()].numpy() == processor.image_token_id)[opening:]]
        for rows, ids, mask in zip(whole, inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    assert_same([clip["frame"].embeddings], [np.concatenate(patches)])
    assert clip["frame"].span_index.tolist() == np.arange(4).repeat([len(rows) for rows in patches]).tolist()


@every_family
def test_text_documents_are_what_the_tokenizer_makes_of_them(made, plain, family):
    model, processor = plain(family)
    begin = {"colpali": "<bos>", "neomme": "<doc>"}.get(family, "")
    inputs = processor.tokenizer([begin + text for text in TEXTS], padding=True, return_tensors="pt")
    if family == "colpali":
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    whole = scored(model, inputs)
    clips = [{"speech": spans(text)} for text in TEXTS]
    kept = made(family, prompt_tokens=True).encode_documents(clips)
    assert_same([clip["speech"].embeddings for clip in kept], whole)

    first, last = {"colpali": (1, 0), "neomme": (1, 0), "colmodernvbert": (1, 1)}.get(family, (0, 0))
    [clip] = made(family, prompt_tokens=True).encode_documents([{"speech": spans("ab", "c")}])
    assert clip["speech"].span_index.tolist() == [0] * (first + 2) + [1] * (1 + last), "as the text beside them"
    ours = made(family).encode_documents(clips)
    assert_same([clip["speech"].embeddings for clip in ours], [rows[first : len(rows) - last] for rows in whole])


@every_family
def test_the_head_is_a_projection_and_a_norm(made, family):
    encoder = made(family)
    model = encoder._model
    head = model.multi_vector_head.proj if family == "neomme" else model.embedding_proj_layer
    states = []
    hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0].numpy()))
    [ours] = encoder.encode_queries([Query("a red car")])
    hook.remove()
    [hidden] = states
    projected = hidden @ head.weight.detach().numpy().T + (0 if head.bias is None else head.bias.detach().numpy())
    np.testing.assert_allclose(ours, projected / np.linalg.norm(projected, axis=1, keepdims=True), atol=1e-5)


@every_family
def test_batch_mates_never_matter(made, family):
    # A tight budget cuts the batches otherwise than a wide one.
    images = [picture(1), picture(2, WIDE), picture(3, PORTRAIT), picture(4)]
    clips = [
        {"frame": frames(*images[:3]), "speech": spans("a red car", "and a blue one")},
        {"metadata": spans("x"), "frame": frames(images[3])},
        {"speech": spans("a long talk about the sea at night " * 5)},
    ]
    together = made(family).encode_documents(clips)
    alone = [clip for one in clips for clip in made(family).encode_documents([one])]
    tight = made(family, batch_tokens=64).encode_documents(clips)
    for other in (alone, tight):
        for a, b in zip(together, other, strict=True):
            assert list(a) == list(b)
            for modality in a:
                assert_same([a[modality].embeddings], [b[modality].embeddings])
                assert a[modality].span_index.tolist() == b[modality].span_index.tolist()
                assert a[modality].grid == b[modality].grid


@every_family
def test_nothing_is_computed_that_is_not_used(made, family):
    encoder = made(family)
    outputs = []
    hook = encoder._model.register_forward_hook(lambda _, __, output: outputs.append(output))
    encoder.encode_documents([{"frame": frames(picture(1)), "speech": spans("a red car")}])
    hook.remove()
    assert len(outputs) == 2
    for output in outputs:
        assert {name for name, value in output.items() if value is not None} <= {
            "embeddings",
            "last_hidden_state",
            "image_hidden_states",
        }


def test_padding_outscores_in_transformers_and_never_here(plain):
    query = torch.tensor([[1.0, 0.0]])
    opposite, longer = torch.tensor([[-1.0, 0.0]]), torch.tensor([[-1.0, 0.0]] * 3)
    _, processor = plain("colqwen2")
    [[alone]] = processor.score_retrieval([query], [opposite]).tolist()
    [[beside, _]] = processor.score_retrieval([query], [opposite, longer]).tolist()
    assert (alone, beside) == (-1, 0), "its padding's zeros outscore"

    tokens = torch.cat([opposite, longer]).numpy()
    [both] = run_maxima(query.numpy(), tokens, np.array([1, 3])).tolist()
    [[single]] = run_maxima(query.numpy(), opposite.numpy(), np.array([1])).tolist()
    assert both == [single, -1] == [-1, -1]


@every_family
@pytest.mark.parametrize("size", [SQUARE, WIDE, PORTRAIT])
def test_frames_have_as_many_tokens_as_the_processor_reckons(made, plain, family, size):
    _, processor = plain(family)
    width, height = size
    if family == "neomme":
        expected = processor.image_processor.get_number_of_image_patches(height, width)
    else:
        [expected] = processor._get_num_multimodal_tokens([(height, width)])["num_image_tokens"]
    for num_frames in (1, 5, 24):
        [clip] = made(family).encode_documents([{"frame": frames(*[picture(0, size)] * num_frames)}])
        tokens = clip["frame"]
        if family == "colmodernvbert":  # it reckons with the marks of tiles, too
            num_tiles, *_ = processor.image_processor.get_number_of_image_patches(height, width)
            assert len(tokens.embeddings) == num_frames * num_tiles * processor.image_seq_len
            assert tokens.grid is None
        else:
            assert len(tokens.embeddings) == num_frames * expected
            assert tokens.grid[0] == num_frames
            assert np.prod(tokens.grid) == num_frames * expected
        assert np.bincount(tokens.span_index).tolist() == [len(tokens.embeddings) // num_frames] * num_frames


@every_family
def test_a_patch_is_where_the_grid_says(made, family):
    settings = {"max_pixels": 32 * 32} if family == "colmodernvbert" else {}  # one tile
    size = {"colpali": (32, 32), "colmodernvbert": (32, 32), "neomme": (48, 40)}.get(family, (112, 84))  # whole patches
    grey = Image.new("RGB", size, (90, 90, 90))
    [before] = made(family, **settings).encode_documents([{"frame": frames(grey)}])
    _, rows, columns = before["frame"].grid
    assert (rows > 1) and (columns > 1)
    row, column = rows - 1, 1
    painted = grey.copy()
    width, height = size[0] // columns, size[1] // rows
    painted.paste((255, 0, 160), (column * width, row * height, (column + 1) * width, (row + 1) * height))
    [after] = made(family, **settings).encode_documents([{"frame": frames(painted)}])
    change = np.linalg.norm(after["frame"].embeddings - before["frame"].embeddings, axis=1)
    assert divmod(int(change.argmax()), columns) == (row, column)


def test_frames_of_unlike_shapes_have_no_common_grid(made):
    [clip] = made("colqwen2").encode_documents([{"frame": frames(picture(0), picture(1, (140, 84)))}])
    assert clip["frame"].grid is None
    assert np.bincount(clip["frame"].span_index).tolist() == [4, 8], "15 are more than the processor's limit"


@every_family
def test_every_token_of_a_long_transcript_is_kept_and_knows_its_span(made, family):
    words = [f"w{i} is said" for i in range(60)]
    encoder = made(family, max_text_tokens=32)
    [clip] = encoder.encode_documents([{"speech": spans(*words)}])
    # A token a letter, but for the space before a word, which goes with the word's first letter.
    expected = np.repeat(np.arange(60), [len(word.replace(" ", "")) for word in words])
    assert clip["speech"].span_index.tolist() == expected.tolist()
    np.testing.assert_allclose(np.linalg.norm(clip["speech"].embeddings, axis=1), 1, rtol=1e-5)
    # A piece sees nothing of the others.
    [fewer] = encoder.encode_documents([{"speech": spans(*words[:10])}])
    assert_same([clip["speech"].embeddings[:32]], [fewer["speech"].embeddings[:32]])


@every_family
def test_modalities_without_content_have_no_tokens(made, family):
    clip = {"speech": spans(), "frame": Content(), "metadata": spans(""), "screen_text": spans("sea")}
    [ours] = made(family).encode_documents([clip])
    assert {name: len(tokens.embeddings) for name, tokens in ours.items()} == {
        "speech": 0,
        "frame": 0,
        "metadata": 0,
        "screen_text": 3,
    }
    assert ours["speech"].embeddings.shape == (0, 16)
    [skipped] = made(family, text="skip").encode_documents([clip])
    assert len(skipped["screen_text"].embeddings) == 0


@every_family
def test_an_image_query_is_encoded_as_the_frame_is(made, family):
    image = picture(7, WIDE)
    for settings in ({}, {"prompt_tokens": True}):
        encoder = made(family, **settings)
        query = Query(image=encoded(image))
        [text, ours] = encoder.encode_queries([Query("a red car"), query])
        [clip] = encoder.encode_documents([{"frame": frames(image)}])
        assert_same([ours], [clip["frame"].embeddings])
        assert_same([text], encoder.encode_queries([Query("a red car")]))
        assert len(encoder.query_tokens(query)) == len(ours)
    names = made(family).query_tokens(query)
    assert names[:2] == (["patch 0", "patch 1"] if family == "colmodernvbert" else ["patch (0, 0)", "patch (0, 1)"])


@pytest.mark.parametrize("query", [Query("a", image=b"b"), Query(" "), Query(image=b"no picture")])
def test_queries_that_no_family_takes_are_refused(made, query):
    with pytest.raises(ConfigError, match="not both|empty|not an image"):
        made("neomme").encode_queries([query])


def test_a_query_that_the_chat_template_refuses_is_an_error_of_the_query(made, monkeypatch):
    template = "{{ raise_exception('<img> is reserved') }}"
    monkeypatch.setattr(made("neomme")._processor, "chat_template", template)
    with pytest.raises(ConfigError, match="'what is <img>'.*reserved"):
        made("neomme").encode_queries([Query("what is <img>")])


@pytest.mark.parametrize("family", ["colqwen2", "colqwen2_5"])
def test_a_video_is_what_the_backbone_makes_of_it(made, plain, family):
    from transformers import Qwen2VLVideoProcessor

    images = [picture(i, (112, 84)) for i in range(5)]
    model, processor = plain(family)
    video = np.stack([np.asarray(image) for image in [*images, images[-1]]]).transpose(0, 3, 1, 2)
    size = dict(processor.image_processor.size)
    seen = Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)([torch.tensor(video)], return_tensors="pt")
    assert seen["video_grid_thw"].tolist() == [[3, 6, 8]]
    prompt = processor.visual_prompt_prefix.replace("<|image_pad|>", "<|video_pad|>" * 36)
    inputs = processor.tokenizer(prompt, return_tensors="pt")
    num_tokens = inputs["input_ids"].shape[1]
    # Its own positions in time, height and width are left out, as the native forward does with images.
    flat = torch.arange(num_tokens).expand(3, 1, num_tokens)
    with torch.inference_mode():
        hidden = model.vlm(**inputs, **seen, position_ids=flat).last_hidden_state[0]
        whole = torch.nn.functional.normalize(model.embedding_proj_layer(hidden), dim=-1).numpy()
    is_patch = inputs["input_ids"][0].numpy() == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")

    other = {"frame": frames(picture(9, WIDE))}
    for clips in ([{"frame": frames(*images)}], [other, {"frame": frames(*images)}]):
        ours = made(family, frames="video").encode_documents(clips)[-1]["frame"]
        assert_same([ours.embeddings], [whole[is_patch]])
        assert ours.grid == (3, 3, 4)
        assert ours.span_index.tolist() == np.array([0, 2, 4]).repeat(12).tolist()
    kept = made(family, frames="video", prompt_tokens=True).encode_documents(clips)[-1]["frame"]
    assert_same([kept.embeddings], [whole])
    assert kept.grid is None
    assert kept.span_index.tolist() == sorted(kept.span_index.tolist())


@pytest.mark.parametrize("family", ["colqwen2", "colqwen2_5"])
def test_mrope_gives_what_the_backbone_makes_of_pictures_and_videos(made, plain, family):
    images = [picture(1, (112, 84)), picture(2, (112, 84)), picture(3, PORTRAIT)]
    model, processor = plain(family)
    seen = processor.image_processor(images=images, return_tensors="pt")
    inputs = {name: image_inputs(processor, images)[name] for name in ("input_ids", "attention_mask")}
    kinds = (inputs["input_ids"] == processor.image_token_id).int()
    with torch.inference_mode():
        hidden = model.vlm(**inputs, **seen, mm_token_type_ids=kinds).last_hidden_state[kinds.bool()]
        expected = torch.nn.functional.normalize(model.embedding_proj_layer(hidden), dim=-1).numpy()
    [clip] = made(family, positions="mrope").encode_documents(
        [{"frame": frames(*images), "speech": spans("a red car")}]
    )
    assert_same([clip["frame"].embeddings], [expected])
    [flat] = made(family).encode_documents([{"frame": frames(*images), "speech": spans("a red car")}])
    assert np.abs(flat["frame"].embeddings - expected).max() > 0.1, "the native forward has other positions"
    assert_same([clip["speech"].embeddings], [flat["speech"].embeddings])

    prompt = processor.visual_prompt_prefix.replace("<|image_pad|>", "<|video_pad|>" * 12)
    inputs = processor.tokenizer(prompt, return_tensors="pt")
    halves = seen["pixel_values"][: 2 * 48].view(2, 48, 3, 2, -1)
    pairs = torch.stack([halves[0, :, :, 0], halves[1, :, :, 0]], dim=2).reshape(48, -1)
    kinds = 2 * (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")).int()
    video = {"pixel_values_videos": pairs, "video_grid_thw": torch.tensor([[1, 6, 8]])}
    with torch.inference_mode():
        hidden = model.vlm(**inputs, **video, mm_token_type_ids=kinds).last_hidden_state[kinds.bool()]
        expected = torch.nn.functional.normalize(model.embedding_proj_layer(hidden), dim=-1).numpy()
    encoder = made(family, positions="mrope", frames="video")
    [clip] = encoder.encode_documents([{"frame": frames(*images[:2])}])
    assert_same([clip["frame"].embeddings], [expected])


def test_a_clip_whose_frames_differ_in_size_is_still_one_video(made):
    [clip] = made("colqwen2", frames="video").encode_documents([{"frame": frames(picture(0, WIDE), picture(1))}])
    [same] = made("colqwen2", frames="video").encode_documents(
        [{"frame": frames(picture(0, WIDE), picture(1).resize(WIDE))}]
    )
    assert_same([clip["frame"].embeddings], [same["frame"].embeddings])


@pytest.mark.parametrize("family", ["colpali", "colmodernvbert", "neomme"])
def test_what_only_colqwen2_can_do_is_refused_by_others(tiny_colpali, family):
    for ask in (ColpaliEncoder, ColpaliEncoder.fingerprint_of):
        with pytest.raises(ConfigError, match="frames=video.*takes no video; only colqwen2 does"):
            ask(str(tiny_colpali(family)), frames="video")
        with pytest.raises(ConfigError, match="positions=mrope.*no such positions; only colqwen2 does"):
            ask(str(tiny_colpali(family)), positions="mrope")


@every_family
def test_a_picture_of_any_shape_is_encoded(made, family):
    [clip] = made(family).encode_documents([{"frame": frames(picture(0, (1, 300)), picture(0, (300, 2)))}])
    assert set(clip["frame"].span_index) == {0, 1}


@pytest.mark.parametrize(
    ("family", "max_pixels", "tokens"),
    [("colqwen2", 4 * 28 * 28, 4), ("colqwen2_5", 28 * 28, 1), ("colmodernvbert", 1024, 4), ("neomme", 16 * 64, 16)],
)
def test_max_pixels_bounds_a_frame(made, family, max_pixels, tokens):
    square = {"frame": frames(picture(0, (128, 128)))}
    [clip] = made(family, max_pixels=max_pixels).encode_documents([square])
    [whole] = made(family).encode_documents([square])
    assert len(clip["frame"].embeddings) == tokens < len(whole["frame"].embeddings)


def test_max_pixels_is_refused_where_all_pictures_get_one_size(tiny_colpali):
    with pytest.raises(ConfigError, match="max_pixels=1000, but a colpali"):
        ColpaliEncoder.fingerprint_of(str(tiny_colpali("colpali")), max_pixels=1000)


@every_family
def test_half_precision_is_close_and_comes_out_normalised(made, tiny_colpali, family):
    clip = {"frame": frames(picture(0)), "speech": spans("a red car")}
    [ours] = ColpaliEncoder(str(tiny_colpali(family))).encode_documents([clip])
    [exact] = made(family).encode_documents([clip])
    for modality, tokens in ours.items():
        assert tokens.embeddings.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(tokens.embeddings, axis=1), 1, rtol=1e-5)
        assert (tokens.embeddings * exact[modality].embeddings).sum(1).min() > 0.98
        assert not np.array_equal(tokens.embeddings, exact[modality].embeddings)


def without(folder, tmp_path, dropped, added=()):
    """Return a copy of a checkpoint that lacks the first weight whose name ends so, and has others besides."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    for name in [name for name in sorted(tensors) if dropped and name.endswith(dropped)][:1]:
        del tensors[name]
    save_file(tensors | {name: torch.zeros(2, 2) for name in added}, copy / "model.safetensors", {"format": "pt"})
    return str(copy)


@every_family
@pytest.mark.parametrize("part", ["words", "tower", "head"])
def test_a_checkpoint_that_lacks_a_weight_is_refused(tiny_colpali, tmp_path, family, part):
    endings = {
        "words": "embeddings.weight" if family == "neomme" else ("embed_tokens.weight", "tok_embeddings.weight"),
        "tower": ("q_proj.weight", "qkv.weight"),
        "head": ("embedding_proj_layer.weight", "multi_vector_head.proj.weight"),
    }
    with pytest.raises(ModelError, match="1 weights are missing and would be random"):
        ColpaliEncoder(without(tiny_colpali(family), tmp_path, endings[part]))


@pytest.mark.parametrize(
    ("family", "now", "before"),
    [
        ("colpali", r"^vlm\.", "vlm.model."),
        ("colpali", r"^vlm\.language_model\.", "vlm.language_model.model."),
        ("colqwen2", r"^vlm\.", "vlm.model."),
        ("colqwen2_5", r"^vlm\.language_model\.", "vlm.model."),
        ("colmodernvbert", r"^vlm\.", "vlm.model."),
    ],
)
def test_checkpoints_of_older_releases_load_whole(made, tiny_colpali, tmp_path, family, now, before):
    shutil.copytree(tiny_colpali(family), tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    renamed = {re.sub(now, before, name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    encoder = ColpaliEncoder(str(tmp_path / "old"), precision="float32")
    assert_same(encoder.encode_queries([Query("a red car")]), made(family).encode_queries([Query("a red car")]))


def test_a_language_head_is_the_only_weight_too_many(tiny_colpali, tmp_path):
    ColpaliEncoder(without(tiny_colpali("colqwen2"), tmp_path, None, ["vlm.lm_head.weight"]))
    with pytest.raises(ModelError, match=r"1 weights have no place in it, for example vlm\.other\.weight"):
        ColpaliEncoder(without(tiny_colpali("colqwen2"), tmp_path / "b", None, ["vlm.other.weight"]))


def test_models_of_other_types_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="'bert'; the encoder colpali takes colpali, colqwen2, colmodernvbert, neomme"):
        ColpaliEncoder(str(tmp_path))


def test_a_checkpoint_without_its_processor_is_refused(tiny_colpali, tmp_path):
    shutil.copytree(tiny_colpali("colpali"), tmp_path / "copy")
    (tmp_path / "copy" / "processor_config.json").unlink()
    (tmp_path / "copy" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no processor that ColPaliProcessor loads"):
        ColpaliEncoder(str(tmp_path / "copy"))


def test_the_fingerprint_follows_what_changes_the_output(tiny_colpali):
    model = str(tiny_colpali("colqwen2"))
    changes = [
        {"frames": "video"},
        {"text": "skip"},
        {"max_text_tokens": 8},
        {"max_pixels": 1000},
        {"prompt_tokens": True},
        {"positions": "mrope"},
        {"precision": "float32"},
        {"model": str(tiny_colpali("colqwen2_5"))},
    ]
    prints = {ColpaliEncoder.fingerprint_of(**({"model": model} | change)) for change in [{}, *changes]}
    assert len(prints) == len(changes) + 1
    speed = {"attention": "eager", "batch_tokens": 1, "device": "cuda"}
    assert ColpaliEncoder.fingerprint_of(model, **speed) == ColpaliEncoder.fingerprint_of(model)


def test_a_config_makes_the_encoder(tiny_colpali):
    settings = {"model": str(tiny_colpali("neomme")), "precision": "float32", "attention": "eager"}
    config = EncodeConfig.model_validate({"encoder": "colpali", "colpali": settings})
    architecture = ENCODERS["colpali"]
    assert architecture.dim_of(**config.parameters()) == 16 == architecture(**config.parameters()).dim
    assert not architecture.joint_of(**config.parameters())
    assert architecture.fingerprint_of(**config.parameters())


def test_the_next_batch_is_made_while_one_is_used():
    second = threading.Event()
    for item, made_of_it in one_ahead(lambda item: (second.set() if item == 2 else None, -item), [1, 2]):
        assert made_of_it[1] == -item
        assert second.wait(timeout=30), "2 is made before 1 is done with"


def test_an_error_in_the_thread_is_an_error_here():
    with pytest.raises(ZeroDivisionError):
        list(one_ahead(lambda item: 1 // item, [1, 0, 2]))


def test_all_types_of_the_table_are_tested():
    assert set(FAMILIES) == {family.removesuffix("_5") for family in tiny.FAMILIES}
