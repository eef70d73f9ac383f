import io
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from operators.chat_turn import NONE, audio_piece, choose_evenly, split_at
from operators.clamr_checkpoint import OMNI, find_checkpoint
from operators.encode import CLIP_MODALITIES, Encode
from operators.encoder_clamr import ChatTurns, ClamrEncoder
from operators.encoders import Content, Query
from operators.errors import ConfigError, MediaError, ModelError
from operators.schema import MODALITIES
from operators.sound import decode_sound, encode_sound
from pipelines.config import ClamrConfig, validated
from tests.tiny_qwen import DIM

TOLERANCE = 1e-5  # float32; sums of another order round otherwise


def spans(*texts):
    return [{"text": text, "start_seconds": float(second)} for second, text in enumerate(texts)]


def jpeg(width, height, seed=0):
    """A picture of blots, so that resizing leaves something of it."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=95)
    return encoded.getvalue()


def frames(count, width=56, height=56):
    return Content(frames=[{"pts_seconds": i * 7.0, "jpeg": jpeg(width, height, i)} for i in range(count)])


def sound(seconds):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, int(seconds * 16_000))
    return encode_sound((samples * 32767).astype("<i2").tobytes())


CLIPS = {
    "text only": {"screen_text": Content(spans("the red", "cat")), "speech": Content(spans("moon, and again"))},
    "frames only": {"frame": frames(3, 84, 56)},
    "both": {"frame": frames(4), "metadata": Content(spans("a moon over")), "speech": Content(spans("red  cat.\n"))},
    "sound": {"frame": frames(2), "speech": Content(spans("moon"), audio=sound(0.73))},
    "one word": {"metadata": Content(spans("x"))},
}


@pytest.fixture(scope="module")
def vl(tiny_clamr):
    return ClamrEncoder(**ClamrConfig(model=str(tiny_clamr), precision="float32").model_dump(), batch_tokens=4096)


@pytest.fixture(scope="module")
def omni(tiny_clamr_omni):
    return ClamrEncoder(str(tiny_clamr_omni), precision="float32")


@pytest.fixture(scope="module")
def vl_turns(tiny_clamr):
    return ChatTurns(str(tiny_clamr), max_frames=24)


class Plain:
    """What a reader of the two libraries' documentation would write: processor, model, head."""

    def __init__(self, folder, hears):
        import transformers
        from safetensors.numpy import load_file

        family = "Qwen2_5Omni" if hears else "Qwen2_5_VL"
        self.processor = getattr(transformers, f"{family}Processor").from_pretrained(folder)
        whole = "Qwen2_5OmniThinkerForConditionalGeneration" if hears else "Qwen2_5_VLForConditionalGeneration"
        self.model = getattr(transformers, whole).from_pretrained(folder)
        self.hears, self.head = hears, load_file(folder / "model.safetensors")
        self.size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}

    def message(self, clip, heard):
        content = [{"type": "text", "text": "Video: "}] * self.hears + [{"type": "video"}] if "frame" in clip else []
        content += [{"type": "text", "text": "Audio: "}, {"type": "audio"}] if heard else []
        for label, name in {" OCR: ": "screen_text", " ASR: ": "speech", " Description: ": "metadata"}.items():
            texts = [span["text"] for span in clip[name].spans] if name in clip else []
            content.append({"type": "text", "text": label + " ".join(texts)})
        system = {"role": "system", "content": [{"type": "text", "text": OMNI.system}]}
        return [system] * self.hears + [{"role": "user", "content": content}]

    def document(self, clip):
        """Return ids (L,) and embeddings (L, dim) of a clip's whole turn."""
        pictures = (
            [np.array(Image.open(io.BytesIO(frame["jpeg"]))) for frame in clip["frame"].frames]
            if "frame" in clip
            else []
        )
        encoded = clip["speech"].audio if "speech" in clip and self.hears else None
        videos = {"videos": [np.stack(pictures)]} if pictures else {}
        heard = {"audio": [decode_sound(encoded)]} if encoded else {}
        inputs = self.processor(
            text=[self.processor.apply_chat_template(self.message(clip, heard), tokenize=False)],
            videos_kwargs={"size": self.size, "do_sample_frames": False, "cap_pixels_per_frame": False},
            return_tensors="pt",
            **videos,
            **heard,
        )
        if pictures and not self.hears:
            inputs["second_per_grid_ts"] = [2.0]  # two frames at one a second, as the released code has it
        return self.embed(inputs)

    def query(self, text, image=None):
        start, end = ("<|vision_bos|>", "<|vision_eos|>") if self.hears else ("<|vision_start|>", "<|vision_end|>")
        before = start + self.processor.image_token + end if image else ""
        picture = {"images": [Image.open(io.BytesIO(image))], "images_kwargs": {"size": self.size}} if image else {}
        text = f"{before}Query: {text}" + "<|endoftext|>" * 10
        return self.embed(self.processor(text=[text], return_tensors="pt", **picture))

    def embed(self, inputs):
        import torch

        with torch.no_grad():
            hidden = self.model(**inputs, output_hidden_states=True).hidden_states[-1][0].numpy()
        projected = hidden @ self.head["custom_text_proj.weight"].T + self.head["custom_text_proj.bias"]
        return inputs["input_ids"][0].numpy(), projected / np.linalg.norm(projected, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def plain_vl(tiny_clamr):
    return Plain(tiny_clamr, hears=False)


@pytest.fixture(scope="module")
def plain_omni(tiny_clamr_omni):
    return Plain(tiny_clamr_omni, hears=True)


@pytest.mark.parametrize("family", ["vl", "omni"])
def test_documents_equal_the_plain_computation_alone_and_among_others(family, request):
    encoder, plain = request.getfixturevalue(family), request.getfixturevalue(f"plain_{family}")
    together = encoder.encode_documents(list(CLIPS.values()))
    for (name, clip), among_others in zip(CLIPS.items(), together, strict=True):
        ids, expected = plain.document(clip)
        [turn] = encoder._turns.documents(clip)
        assert turn.ids.tolist() == ids.tolist(), name
        [alone] = encoder.encode_documents([clip])
        for modality in clip:
            rows = turn.rows_of(modality)
            assert len(rows), (name, modality)
            np.testing.assert_allclose(alone[modality].embeddings, expected[rows], atol=TOLERANCE)
            np.testing.assert_allclose(among_others[modality].embeddings, expected[rows], atol=TOLERANCE)


@pytest.mark.parametrize("family", ["vl", "omni"])
def test_queries_equal_the_plain_computation_alone_and_among_others(family, request):
    encoder, plain = request.getfixturevalue(family), request.getfixturevalue(f"plain_{family}")
    image = jpeg(112, 56)
    queries = [("red cat", None), ("the moon over a very red cat", None), ("red", image), ("", jpeg(60, 90, 1))]
    asked = [Query(text=text, image=picture) for text, picture in queries]
    together = encoder.encode_queries(asked)
    for query, among_others in zip(asked, together, strict=True):
        ids, expected = plain.query(query.text, query.image)
        turn = encoder._turns.query(query)
        assert turn.ids.tolist() == ids.tolist()
        scored = expected[turn.modality != NONE]
        np.testing.assert_allclose(encoder.encode_queries([query])[0], scored, atol=TOLERANCE)
        np.testing.assert_allclose(among_others, scored, atol=TOLERANCE)


def test_embeddings_do_not_depend_on_the_budget_of_a_batch(tiny_clamr_omni, omni):
    clips = list(CLIPS.values())
    for budget in (1, 300):
        other = ClamrEncoder(str(tiny_clamr_omni), precision="float32", batch_tokens=budget)
        for here, there in zip(omni.encode_documents(clips), other.encode_documents(clips), strict=True):
            for modality in here:
                np.testing.assert_allclose(here[modality].embeddings, there[modality].embeddings, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["vl", "omni"])
def test_padding_shifts_no_position(family, request):
    """Attention sees differences of positions only, but in bfloat16 their size costs precision."""
    encoder = request.getfixturevalue(family)
    turns = [turn for clip in CLIPS.values() for turn in encoder._turns.documents(clip)]
    together = encoder._model.collate(turns)["position_ids"]
    for row, turn in enumerate(turns):
        alone = encoder._model.collate([turn])["position_ids"][:, 0]
        assert alone[:, 0].tolist() == [0, 0, 0]
        assert together[:, row, -len(turn) :].tolist() == alone.tolist()


def test_every_key_has_its_own_tokens_and_no_zero_row(vl):
    clip = CLIPS["both"] | {"screen_text": Content()}
    [encoded] = vl.encode_documents([clip])
    assert encoded.keys() == clip.keys()
    assert encoded["screen_text"].embeddings.shape == (0, DIM)
    for name in ("frame", "metadata", "speech"):
        assert encoded[name].embeddings.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(encoded[name].embeddings, axis=1), 1, atol=1e-5)
    assert [tokens.embeddings.shape for tokens in vl.encode_documents([{"speech": Content()}])[0].values()] == [
        (0, DIM)
    ]


def test_a_backbone_in_bfloat16_gives_nearly_the_same(tiny_clamr, vl):
    half = ClamrEncoder(str(tiny_clamr))
    assert {str(weight.dtype) for weight in half._model.model.parameters()} == {"torch.bfloat16"}
    [exact], [rounded] = (encoder.encode_documents([CLIPS["both"]]) for encoder in (vl, half))
    assert rounded["frame"].embeddings.dtype == np.float32
    assert 0 < np.abs(rounded["frame"].embeddings - exact["frame"].embeddings).max() < 0.1


SHAPES = {"square": (224, 224), "wide": (640, 360), "portrait": (180, 320)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 10, 24])
def test_frames_have_as_many_tokens_as_the_processor_counts(vl_turns, plain_vl, shape, count):
    width, height = SHAPES[shape]
    [turn] = vl_turns.documents({"frame": frames(count, width, height)})
    videos = plain_vl.processor.video_processor
    patches = videos.get_num_of_video_patches(count, height, width, {"size": plain_vl.size})
    assert len(turn.rows_of("frame")) == patches // 4 == math.prod(turn.grid)
    assert turn.grid[0] == math.ceil(count / 2)


def test_ten_frames_are_320_tokens_where_square_and_300_where_wide(vl_turns):
    turns = [vl_turns.documents({"frame": frames(10, *SHAPES[shape])})[0] for shape in ("square", "wide")]
    assert [(turn.grid, len(turn.rows_of("frame"))) for turn in turns] == [((5, 8, 8), 320), ((5, 6, 10), 300)]


def test_a_patch_is_of_the_first_frame_of_its_pair(vl):
    [encoded] = vl.encode_documents([{"frame": frames(3, 84, 56)}])
    assert encoded["frame"].grid == (2, 2, 3)
    assert encoded["frame"].span_index.tolist() == [0] * 6 + [2] * 6


def test_an_odd_last_frame_is_shown_twice(vl):
    three, four = frames(3), frames(3).frames
    [odd], [even] = (vl.encode_documents([{"frame": c}]) for c in (three, Content(frames=[*four, four[-1]])))
    np.testing.assert_allclose(odd["frame"].embeddings, even["frame"].embeddings, atol=TOLERANCE)


def test_too_many_frames_are_thinned_out_over_all_of_the_clip(tiny_clamr):
    [turn] = ChatTurns(str(tiny_clamr), max_frames=4).documents({"frame": frames(24)})
    assert np.unique(turn.span_index[turn.rows_of("frame")]).tolist() == [0, 15]
    assert choose_evenly(24, 4) == [0, 8, 15, 23]
    assert choose_evenly(3, 4) == [0, 1, 2]


@pytest.mark.parametrize("size", [(1000, 4), (4, 1000)])
def test_a_frame_of_extreme_shape_is_taken_all_the_same(vl_turns, size):
    [turn] = vl_turns.documents({"frame": frames(1, *size)})
    assert len(turn.rows_of("frame"))


def test_tokens_spell_the_span_that_they_belong_to(vl_turns):
    texts = ["The red", "cät 日本.", "", "moon\n", "re<|video_pad|><|im_end|>d"]
    [turn] = vl_turns.documents({"speech": Content(spans(*texts)), "metadata": Content(spans("other"))})
    speech = turn.modality == MODALITIES.index("speech")
    decoded = [vl_turns._tokenizer.decode(turn.ids[speech & (turn.span_index == i)]) for i in range(len(texts))]
    assert [text.strip() for text in decoded] == [f"ASR: {texts[0]}", *map(str.strip, texts[1:])]
    assert vl_turns._tokenizer.decode(turn.ids[turn.rows_of("metadata")]) == " Description: other"
    placeholder = vl_turns._processor.video_token_id
    assert placeholder not in turn.ids, "a text that spells a placeholder shows no picture"


def test_a_long_text_is_cut_with_its_label_and_the_others_stay(vl):
    words = Content([{"text": f"word{i}"} for i in range(10_000)])
    [turn] = vl._turns.documents({"speech": words, "screen_text": Content(), "metadata": Content(spans("moon"))})
    assert [len(turn.rows_of(name)) for name in ("screen_text", "speech")] == [0, 512]
    decoded = vl._turns._tokenizer.decode(turn.ids)
    assert decoded.count("OCR:") == 1, "an empty text's label is in the turn, and belongs to none"
    [encoded] = vl.encode_documents([{"speech": words}])
    assert encoded["speech"].embeddings.shape == (512, DIM)


def test_template_tokens_are_dropped_or_kept_with_what_is_beside_them(tiny_clamr, vl):
    clip = CLIPS["both"]
    keeping = ClamrEncoder(str(tiny_clamr), precision="float32", template_tokens=True)
    [turn] = vl._turns.documents(clip)
    [dropped], [kept] = (encoder.encode_documents([clip]) for encoder in (vl, keeping))
    own = sum(len(tokens.embeddings) for tokens in dropped.values())
    assert own == (turn.modality != NONE).sum() < len(turn)
    assert sum(len(tokens.embeddings) for tokens in kept.values()) == len(turn)
    assert kept["frame"].grid is None
    rows = turn.rows_of("frame")
    # The system text and the picture's start come before the frames, its end and the empty text's label after them.
    np.testing.assert_allclose(
        kept["frame"].embeddings[rows[0] : rows[-1] + 1], dropped["frame"].embeddings, atol=TOLERANCE
    )
    assert len(kept["frame"].embeddings) > rows[-1] + 2


def test_modalities_are_seen_together_or_apart(tiny_clamr, vl):
    apart = ClamrEncoder(str(tiny_clamr), precision="float32", context="separate")
    clip = CLIPS["both"]
    [joint], [separate] = (encoder.encode_documents([clip]) for encoder in (vl, apart))
    for name in clip:
        [alone] = apart.encode_documents([{name: clip[name]}])
        np.testing.assert_allclose(separate[name].embeddings, alone[name].embeddings, atol=TOLERANCE)
    assert np.abs(joint["speech"].embeddings - separate["speech"].embeddings).max() > 0.01
    assert (ClamrEncoder.joint_of(context="joint"), ClamrEncoder.joint_of(context="separate")) == (True, False)


def test_a_query_keeps_its_augmentation_however_long_it_is(vl):
    short, long = Query(text="red cat"), Query(text="the red cat and the moon " * 40)
    for query, count in ((short, None), (long, 64)):
        names = vl.query_tokens(query)
        [embedded] = vl.encode_queries([query])
        assert len(names) == len(embedded) == (count or len(names))
        assert names[-10:] == ["<|endoftext|>"] * 10
        assert names[-11] != "<|endoftext|>"
    assert {"red", "cat"} <= set(vl.query_tokens(short))


def test_an_image_query_names_its_patches_and_sees_its_picture(vl):
    query = Query(text="red", image=jpeg(112, 84))
    names = vl.query_tokens(query)
    assert names[: 4 * 3 + 1] == ["[image]"] * 12 + ["Q"]
    one, other = vl.encode_queries([query, replace(query, image=jpeg(112, 84, seed=1))])
    assert len(one) == len(names)
    assert np.abs(one - other).max() > 0.01
    with pytest.raises(ConfigError, match="empty"):
        vl.encode_queries([Query()])


@pytest.mark.parametrize("seconds", [0.035, 0.3, 1.0, 2.01, 31.0])
def test_sound_has_the_features_and_tokens_of_the_processor(omni, plain_omni, seconds):
    samples = decode_sound(sound(seconds))
    expected = plain_omni.processor.feature_extractor(
        samples, sampling_rate=16_000, padding="max_length", return_attention_mask=True, return_tensors="np"
    )
    length = int(expected["attention_mask"].sum())
    [turn] = omni._turns.documents({"speech": Content(audio=sound(seconds))})
    heard = turn.media["input_features"].numpy()
    np.testing.assert_allclose(heard[0], expected["input_features"][0][:, :length], atol=1e-5)
    [wanted] = plain_omni.processor._get_num_multimodal_tokens(audio_lengths=[len(samples)])["num_audio_tokens"]
    assert len(turn.rows_of("speech")) == wanted


def test_sound_belongs_to_speech_beside_its_text(omni, vl):
    speech = Content([span | {"start_seconds": 60 + span["start_seconds"]} for span in spans("red", "cat")])
    speech = replace(speech, audio=sound(1.5), start_seconds=60.0)
    [heard], [unheard] = (encoder.encode_documents([{"speech": speech}]) for encoder in (omni, vl))
    [text] = vl.encode_documents([{"speech": Content(speech.spans)}])
    assert unheard["speech"].span_index.tolist() == text["speech"].span_index.tolist(), "Qwen2.5-VL does not hear"
    num_tokens = 37  # 150 frames, halved twice
    assert len(heard["speech"].span_index) == num_tokens + len(text["speech"].span_index)
    assert heard["speech"].span_index[:num_tokens].tolist() == [0] * 25 + [1] * 12, (
        "the second span starts at one second"
    )


def test_rows_of_a_later_clip_know_the_span_that_their_sound_is_of(tiny_clamr_omni):
    said = [{"start_seconds": second, "stop_seconds": second + 1, "text": "red"} for second in (60.0, 61.0)]
    speech = {"modality": "speech", "fingerprint": "", "spans": said, "frames": [], "audio": sound(1.5)}
    clip = {"video_id": "v", "clip": 1, "start_seconds": 60.0, "stop_seconds": 70.0, "modalities": [speech]}
    encode = Encode(ClamrEncoder, "clamr", {"model": str(tiny_clamr_omni)}, pool_tokens={})
    [row] = encode(pa.Table.from_pylist([clip], schema=CLIP_MODALITIES)).to_pylist()
    assert row["span_index"][:37] == [0] * 25 + [1] * 12


def test_sound_before_the_first_span_goes_with_it_and_without_spans_with_none_other():
    later = [{"start_seconds": 0.1}, {"start_seconds": 0.2}]
    assert audio_piece(7, 8, later).span_index.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert audio_piece(7, 3, []).span_index.tolist() == [0, 0, 0]


def test_sound_too_short_for_a_token_is_none_and_what_is_no_sound_is_refused(omni):
    assert omni._turns.documents({"speech": Content(audio=sound(0.01))}) == []
    with pytest.raises(MediaError, match="7 bytes are not a sound file"):
        omni.encode_documents([{"speech": Content(audio=b"nothing")}])


def test_a_template_without_a_slot_is_refused():
    assert split_at("aXbYc", ["X", "Y"]) == ["a", "b", "c"]
    with pytest.raises(ModelError, match="'X'"):
        split_at("aYbXc", ["Y", "X", "X"])


def copy(folder, to, change=lambda tensors: tensors, config=None):
    """Copy a checkpoint, with its tensors or its config changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    save_file(change(load_file(folder / "model.safetensors")), to / "model.safetensors", metadata={"format": "pt"})
    if config:
        (to / "config.json").write_text(json.dumps(config(json.loads((folder / "config.json").read_text()))))
    return str(to)


def renamed(rename):
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def current_names(name):
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return f"model.{name}" if name.startswith(("visual.", "audio_tower.")) else name


def same(one, other):
    [here], [there] = (encoder.encode_documents([CLIPS["both"]]) for encoder in (one, other))
    return all(np.array_equal(here[name].embeddings, there[name].embeddings) for name in here)


@pytest.mark.parametrize("rename", [current_names, lambda name: current_names(name).removeprefix("model.")])
def test_a_checkpoint_under_any_releases_names_loads_the_same(tiny_clamr, vl, tmp_path, rename):
    path = copy(tiny_clamr, tmp_path / "renamed", renamed(rename))
    assert same(vl, ClamrEncoder(path, precision="float32"))


def test_a_whole_omni_checkpoint_loads_its_thinker(tiny_clamr_omni, omni, tmp_path):
    import torch

    path = copy(
        tiny_clamr_omni,
        tmp_path / "whole",
        lambda tensors: (
            renamed(lambda n: n if n.startswith("custom") else f"thinker.{n}")(tensors)
            | {"talker.x.weight": torch.zeros(2), "token2wav.y.weight": torch.zeros(2)}
        ),
        lambda thinker: {"model_type": "qwen2_5_omni", "thinker_config": thinker, "enable_audio_output": False},
    )
    assert same(omni, ClamrEncoder(path, precision="float32"))


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "visual.blocks.0.norm1.weight"])
def test_a_backbone_that_lacks_a_weight_is_refused(tiny_clamr, tmp_path, lost):
    path = copy(tiny_clamr, tmp_path / "lacking", lambda tensors: {n: t for n, t in tensors.items() if n != lost})
    with pytest.raises(ModelError, match="1 weights are missing"):
        ClamrEncoder(path)


def test_a_model_without_a_head_is_refused_and_takes_one_from_elsewhere(tiny_clamr, vl, tmp_path):
    from safetensors.torch import load_file, save_file

    bare = copy(tiny_clamr, tmp_path / "bare", lambda t: {n: v for n, v in t.items() if not n.startswith("custom")})
    for ask in (ClamrEncoder, ClamrEncoder.dim_of):
        with pytest.raises(ModelError, match="custom_text_proj.weight.*encode.clamr.head"):
            ask(model=bare)
    whole = load_file(tiny_clamr / "model.safetensors")
    (tmp_path / "head").mkdir()
    save_file({n: t for n, t in whole.items() if n.startswith("custom")}, tmp_path / "head" / "head.safetensors")
    assert same(vl, ClamrEncoder(bare, head=str(tmp_path / "head"), precision="float32"))
    assert ClamrEncoder.dim_of(bare, head=str(tmp_path / "head")) == DIM
    # A folder that training of a head alone wrote.
    (tmp_path / "head" / "config.json").write_text(json.dumps({"system": "clamr", "base": bare}))
    assert same(vl, ClamrEncoder(str(tmp_path / "head"), precision="float32"))
    assert ClamrEncoder.dim_of(str(tmp_path / "head")) == DIM
    no_bias = {"custom_text_proj.weight": whole["custom_text_proj.weight"][:5].contiguous()}
    save_file(no_bias, tmp_path / "head" / "head.safetensors")
    assert ClamrEncoder(str(tmp_path / "head")).dim == ClamrEncoder.dim_of(str(tmp_path / "head")) == 5
    save_file(
        {"custom_text_proj.weight": whole["custom_text_proj.weight"].T.contiguous()},
        tmp_path / "head" / "head.safetensors",
    )
    with pytest.raises(ModelError, match="width 16.*32 wide"):
        ClamrEncoder(str(tmp_path / "head"))


def test_a_base_is_asked_for_where_one_is_needed_and_refused_where_not(tiny_clamr, tmp_path):
    (tmp_path / "config.json").write_text('{"system": "clamr"}')
    with pytest.raises(ModelError, match="set encode.clamr.base"):
        find_checkpoint(str(tmp_path))
    with pytest.raises(ConfigError, match="whole model"):
        find_checkpoint(str(tiny_clamr), base=str(tiny_clamr))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="of type bert; the encoder clamr takes qwen2_5_vl"):
        ChatTurns(str(tmp_path))


def test_fingerprints_change_with_what_changes_the_output_and_not_with_speed(tiny_clamr, tiny_clamr_omni):
    config = ClamrConfig(model=str(tiny_clamr)).model_dump()
    base = ClamrEncoder.fingerprint_of(**config)
    speed = {"attention": "eager", "batch_tokens": 1, "device": "cuda", "num_threads": 9}
    assert ClamrEncoder.fingerprint_of(**(config | speed)) == base
    others = {
        "model": str(tiny_clamr_omni),
        "context": "separate",
        "max_frames": 9,
        "max_pixels": 3136,
        "precision": "float32",
    }
    others |= {
        "max_text_tokens": 99,
        "query_length": 32,
        "augmentation_tokens": 5,
        "template_tokens": True,
        "head": str(tiny_clamr_omni),
    }
    changed = {name: ClamrEncoder.fingerprint_of(**(config | {name: value})) for name, value in others.items()}
    assert len({base, *changed.values()}) == 1 + len(others)
    assert ClamrEncoder.dim_of(**config) == DIM


def test_a_query_length_that_leaves_no_word_is_refused():
    with pytest.raises(ConfigError, match="at least 8 more"):
        validated(ClamrConfig, {"query_length": 12})
