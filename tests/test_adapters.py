import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from operators.clamr_model import load_model
from operators.encoder_clamr import ChatTurns, ClamrEncoder
from operators.encoders import Content, Query
from operators.errors import ModelError

RANK, ALPHA = 4, 12

RELEASED = "(.*(model).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$|.*(custom_text_proj).*$)"
"""Which modules CLaMR adapts: under the names of its day the language model's, under today's the vision tower's too."""

LANGUAGE_MODEL = "model.language_model."


def before_4_52(name):
    return name.replace(LANGUAGE_MODEL, "model.")


NAMINGS = {
    "released": lambda module, factor: f"base_model.model.{before_4_52(module)}.{factor}.weight",
    "current": lambda module, factor: f"base_model.model.{module}.{factor}.weight",
    "twice wrapped, with its adapter's name": lambda module, factor: (
        f"base_model.model.base_model.model.{module}.{factor}.default.weight"
    ),
    "of the backbone alone": lambda module, factor: f"base_model.model.{module.removeprefix('model.')}.{factor}.weight",
    "unwrapped": lambda module, factor: f"{before_4_52(module)}.{factor}.weight",
}
THINKER = "base_model.model.thinker.{}.{}.weight"


@pytest.fixture(scope="module")
def language_modules(tiny_clamr):
    """Shapes (out, in) of what the released adapter adapts, by name: seven in each layer, and the head."""
    adapted = load_model(str(tiny_clamr), precision="float32").named_modules()
    linear = {name: module.weight.shape for name, module in adapted if isinstance(module, torch.nn.Linear)}
    return {name: shape for name, shape in linear.items() if name.startswith((LANGUAGE_MODEL, "custom"))}


def factors(modules):
    draw = np.random.default_rng(0)
    return {
        name: (draw.normal(size=(RANK, columns)).astype(np.float32), draw.normal(size=(rows, RANK)).astype(np.float32))
        for name, (rows, columns) in modules.items()
    }


def write(folder, base, tensors, targets=RELEASED, **config):
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    content |= {"base_model_name_or_path": str(base), "task_type": "FEATURE_EXTRACTION", "bias": "none"} | config
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file({name: torch.as_tensor(tensor) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return str(folder)


def named(drawn, naming):
    return {
        naming(module, factor): value
        for module, pair in drawn.items()
        for factor, value in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def assert_merged(base, merged, drawn, scaling=ALPHA / RANK):
    before, after = (load_model(name, precision="float32").state_dict() for name in (str(base), merged))
    for name, weight in before.items():
        a, b = drawn.get(name.removesuffix(".weight"), (None, None))
        expected = weight.numpy() if a is None else weight.numpy() + scaling * b @ a
        np.testing.assert_allclose(after[name].numpy(), expected, atol=1e-6 if a is None else 1e-5, err_msg=name)


@pytest.mark.parametrize("naming", NAMINGS)
def test_an_adapter_under_any_releases_names_adds_its_product(tiny_clamr, language_modules, tmp_path, naming):
    drawn = factors(language_modules)
    assert len(drawn) == 2 * 7 + 1
    today = "current" in naming or "wrapped, with" in naming
    targets = RELEASED if not today and "backbone" not in naming else sorted(drawn)
    targets = [name.removeprefix("model.") for name in drawn] if "backbone" in naming else targets
    folder = write(tmp_path / "adapter", tiny_clamr, named(drawn, NAMINGS[naming]), targets)
    assert_merged(tiny_clamr, folder, drawn)


def test_an_adapter_of_omnis_thinker_adds_its_product(tiny_clamr_omni, language_modules, tmp_path):
    drawn = factors(language_modules)
    tensors = named(drawn, lambda module, factor: THINKER.format(before_4_52(module), factor))
    own = {
        "base_model.model.custom_text_proj" + name.partition("custom_text_proj")[2]: tensor
        for name, tensor in tensors.items()
        if "custom" in name
    }
    tensors = {name: tensor for name, tensor in tensors.items() if "custom" not in name} | own
    # Omni's sound tower has projections of these names too, but not below a "model".
    folder = write(tmp_path / "adapter", tiny_clamr_omni, tensors)
    assert_merged(tiny_clamr_omni, folder, drawn)


def test_patterns_of_rank_and_alpha_follow_the_names(tiny_clamr, language_modules, tmp_path):
    drawn = factors(language_modules)
    special = f"{LANGUAGE_MODEL}layers.1.mlp.up_proj"
    pattern = {before_4_52(special): 8}
    folder = write(tmp_path / "a", tiny_clamr, named(drawn, NAMINGS["released"]), alpha_pattern=pattern)
    plain, (a, b) = load_model(str(tiny_clamr), precision="float32"), drawn[special]
    merged = load_model(folder, precision="float32").get_submodule(special).weight.detach().numpy()
    np.testing.assert_allclose(
        merged, plain.get_submodule(special).weight.detach().numpy() + 8 / RANK * b @ a, atol=1e-5
    )


def test_an_adapter_of_another_model_is_refused(tiny_clamr, language_modules, tmp_path):
    foreign = named(
        factors(language_modules), lambda module, factor: f"base_model.model.decoder.{module}.{factor}.weight"
    )
    with pytest.raises(ModelError, match="15 of 15 adapted modules have no place.*decoder"):
        load_model(write(tmp_path / "adapter", tiny_clamr, foreign))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("model.layers.1.mlp", "3 modules that its adapter_config.json adapts have no tensors"),
        ("model.layers.1.mlp.up_proj.lora_B", "1 of its modules' tensors are missing"),
    ],
)
def test_an_incomplete_adapter_is_refused(tiny_clamr, language_modules, tmp_path, lost, message):
    tensors = named(factors(language_modules), NAMINGS["released"])
    kept = {name: tensor for name, tensor in tensors.items() if lost not in name}
    with pytest.raises(ModelError, match=message):
        load_model(write(tmp_path / "adapter", tiny_clamr, kept))


def test_an_adapter_of_another_width_is_refused(tiny_clamr, language_modules, tmp_path):
    drawn = factors(language_modules)
    drawn |= {"custom_text_proj": (np.zeros((RANK, 31)), np.zeros((16, RANK)))}
    with pytest.raises(ModelError, match="does not fit its base model.*size mismatch"):
        load_model(write(tmp_path / "adapter", tiny_clamr, named(drawn, NAMINGS["released"])))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"base_model.model.x.weight": np.zeros(2)}, {}, "x.weight, which is no LoRA factor"),
        ({"custom_text_proj.weight": np.zeros((16, 32))}, {}, "holds no LoRA factors"),
        ({"x.lora_A.weight": np.zeros(2)}, {"peft_type": "IA3"}, "is of type IA3; only LORA"),
    ],
)
def test_what_is_no_lora_adapter_is_refused(tiny_clamr, tmp_path, tensors, config, message):
    with pytest.raises(ModelError, match=message):
        load_model(write(tmp_path / "adapter", tiny_clamr, tensors, **config))


def without_head(tiny_clamr, folder):
    from tests.test_clamr import copy

    return copy(tiny_clamr, folder, lambda t: {name: tensor for name, tensor in t.items() if "custom" not in name})


def test_factors_of_a_head_are_no_head(tiny_clamr, language_modules, tmp_path):
    """As CLaMR released it: on plain Qwen2.5-VL the head that the factors were trained on is lost."""
    bare = without_head(tiny_clamr, tmp_path / "bare")
    folder = write(tmp_path / "adapter", bare, named(factors(language_modules), NAMINGS["released"]))
    with pytest.raises(ModelError, match="LoRA factors only"):
        ClamrEncoder(folder)
    [clip] = ClamrEncoder(folder, head=str(tiny_clamr)).encode_documents([{"speech": Content([{"text": "moon"}])}])
    assert len(clip["speech"].embeddings)
    assert ClamrEncoder.dim_of(folder, base=str(tiny_clamr)) == 16


def test_a_head_saved_whole_beside_the_factors_is_used(tiny_clamr, language_modules, tmp_path):
    bare = without_head(tiny_clamr, tmp_path / "bare")
    inner = {name: shape for name, shape in language_modules.items() if "custom" not in name}
    tensors = named(factors(inner), NAMINGS["current"])
    head = {"custom_text_proj.weight": torch.randn(8, 32), "custom_text_proj.bias": torch.randn(8)}
    saved = {f"base_model.model.{name}": tensor for name, tensor in head.items()}
    folder = write(tmp_path / "a", bare, tensors | saved, sorted(inner), modules_to_save=["custom_text_proj"])
    loaded = load_model(folder, precision="float32").custom_text_proj
    assert torch.equal(loaded.weight, head["custom_text_proj.weight"])
    assert torch.equal(loaded.bias, head["custom_text_proj.bias"])
    assert ClamrEncoder.dim_of(folder) == 8


def test_what_peft_trained_and_saved_encodes_as_it_did_in_training(tiny_clamr, tmp_path):
    """The way of training: the module that encodes, wrapped by peft, its turns and its batches."""
    from peft import LoraConfig, get_peft_model

    model, turns = load_model(str(tiny_clamr), precision="float32"), ChatTurns(str(tiny_clamr))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=RELEASED)
    trained = get_peft_model(model, config)
    batch = model.collate([turns.query(Query(text=text)) for text in ("red cat", "a moon over the cat")])
    optimizer = torch.optim.SGD([weight for weight in trained.parameters() if weight.requires_grad], lr=5.0)
    for _ in range(2):
        embeddings = trained(batch)
        (embeddings[0, -1] @ embeddings[1, -2]).backward()
        optimizer.step()
    with torch.no_grad():
        expected = trained.eval()(batch)
    trained.save_pretrained(str(tmp_path))
    head = {
        f"custom_text_proj.{name}": tensor for name, tensor in model.custom_text_proj.base_layer.state_dict().items()
    }
    save_file(head, tmp_path / "head.safetensors")
    assert any("visual" in name for name in load_file(tmp_path / "adapter_model.safetensors")), "today's names have it"
    encoder = ClamrEncoder(str(tmp_path), precision="float32")
    for row, text in enumerate(("red cat", "a moon over the cat")):
        [query] = encoder.encode_queries([Query(text=text)])
        np.testing.assert_allclose(query, expected[row][batch["modality"][row] >= 0].numpy(), atol=1e-5)


def test_an_adapter_may_lie_on_what_was_trained_before(tiny_clamr, language_modules, tmp_path):
    first, second = factors(language_modules), factors(dict(reversed(language_modules.items())))
    below = write(tmp_path / "first", tiny_clamr, named(first, NAMINGS["released"]))
    above = write(tmp_path / "second", below, named(second, NAMINGS["released"]))
    both = {
        name: (np.vstack([first[name][0], second[name][0]]), np.hstack([first[name][1], second[name][1]]))
        for name in first
    }
    assert_merged(tiny_clamr, above, both)
    assert load_model(above).name_or_path == above, "what is trained on it next names it as its base"
    assert ClamrEncoder.fingerprint_of(above) != ClamrEncoder.fingerprint_of(below)


def test_an_adapter_config_that_is_none_is_refused(tiny_clamr, language_modules, tmp_path):
    write(tmp_path, tiny_clamr, named(factors(language_modules), NAMINGS["released"]))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        ClamrEncoder.dim_of(str(tmp_path))
