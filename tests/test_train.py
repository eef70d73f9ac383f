"""Training: examples, cached features, the loop with its checkpoints, and heads that encoders then load."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import alignment as alignment_benchmark
from cluster.store import MODALITIES, Store
from operators import schema
from operators.clamr_checkpoint import find_checkpoint
from operators.encoder_clamr import ClamrEncoder
from operators.encoder_flmr import FlmrEncoder
from operators.encoders import Content, Query
from operators.errors import ConfigError, ModelError
from operators.heads import open_head
from pipelines.cli import app
from pipelines.config import load
from pipelines.render_train import trained as render
from pipelines.train import _compared, _first_head, _keep_settings, _plan, _schedule, _settings, train
from pipelines.train_examples import read_examples
from pipelines.train_features import Features, MakeFeatures, Towers, missing
from pipelines.train_loop import CHECKPOINT, Schedule, fit
from pipelines.train_tasks import AlignmentPlan, ClamrPlan

CPU = torch.device("cpu")
TEXTS = ["red cat", "the dog", "moon", "cat on the mat", "red moon", "this dog is red"]


def picture(seed):
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize((40, 32)).save(encoded, "PNG")
    return encoded.getvalue()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twelve pictures of six scenes, with questions, passages and negatives."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for number in range(12):
        scene = number % 6
        (folder / f"{number}.png").write_bytes(picture(number))
        line = {"image": f"{number}.png", "passage": TEXTS[scene], "text": "what is this", "group": f"scene {scene}"}
        lines.append(line | {"negatives": [TEXTS[(scene + 1) % 6]]})
    return write(folder / "pairs.jsonl", lines)


def write(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def config_for(tiny_flmr, system, *assignments, store=None):
    models = [f"encode.{system}.text_model={tiny_flmr.colbert}", f"encode.{system}.vision_model={tiny_flmr.clip}"]
    lengths = [f"encode.{system}.query_length=12", f"encode.{system}.document_length=10"]
    small = ["train.num_tokens=3", "train.num_heads=2", "train.batch=4", "train.epochs=3", "train.held_out=0.3"]
    return load([], [*models, *lengths, *small, "train.learning_rate=0.01", *assignments], store)


def features_of(config, system, examples, folder):
    """Make features without Ray."""
    towers = Towers.of(system, getattr(config.encode, system), config.train)
    items = {"pictures": examples.pictures, "passages": examples.documents, "guides": examples.queries}
    made = {kind: Features(folder / kind, len(of_kind), kind) for kind, of_kind in items.items()}
    MakeFeatures(made, towers, None, None)(pa.Table.from_pylist(missing(made, items)))
    assert missing(made, items) == []
    return made


@pytest.fixture(scope="module", params=["flmr", "mire"])
def alignment(request, pairs, tiny_flmr, tmp_path_factory):
    """A system's plan and schedule."""
    config = config_for(tiny_flmr, request.param)
    examples = read_examples(request.param, pairs, None, None)
    features = features_of(config, request.param, examples, tmp_path_factory.mktemp("features"))
    towers = getattr(config.encode, request.param)
    plan = AlignmentPlan(request.param, examples, features, towers, config.train)
    return plan, Schedule(*examples.split(0.3, 100, 0), 4, config.train, 0.01)


def run(plan, schedule, restored=None, stop_after=None, folder=None):
    """Train in this process; ``stop_after`` so many checkpoints it is killed. Return the module and the losses."""
    torch.manual_seed(0)
    task, reports = plan.make(CPU), []

    def report(metrics, saved):
        reports.append(metrics["step"])
        if stop_after == len(reports):
            (folder / CHECKPOINT).write_bytes((saved / CHECKPOINT).read_bytes())
            raise KeyboardInterrupt

    try:
        return task, fit(task, task.module, schedule, report, restored)
    except KeyboardInterrupt:
        return task, None


def test_no_group_is_on_both_sides_and_the_split_is_the_same_every_time(pairs):
    examples = read_examples("flmr", pairs, None, None)
    trained, held_out = examples.split(0.3, 100, seed=1)
    groups = [{examples.rows[row].group for row in side} for side in (trained, held_out)]
    assert not groups[0] & groups[1]
    assert len(groups[1]) == 2
    assert sorted(trained + held_out) == list(range(12))
    assert (trained, held_out) == read_examples("flmr", pairs, None, None).split(0.3, 100, seed=1)
    assert len(examples.split(0.3, 3, seed=1)[1]) == 3


def test_lines_that_say_so_are_held_out_and_no_others(tmp_path, pairs):
    lines = [
        json.loads(line) | {"held_out": number in (2, 7)} for number, line in enumerate(pairs.read_text().splitlines())
    ]
    file = write(pairs.parent / "said.jsonl", lines)
    assert read_examples("flmr", file, None, None).split(0.5, 100, 0)[1] in ([2, 7], [7, 2])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"passage": "moon"}, "image must be a text"),
        ({"image": "0.png", "passage": " "}, "passage must be a text"),
        ({"image": "none.png", "passage": "moon"}, "there is no image"),
        ({"image": "0.png", "passage": "moon", "negatives": "moon"}, "negatives must be a list"),
        ([1], "is no JSON object"),
    ],
)
def test_a_broken_line_is_named(pairs, line, message):
    file = write(pairs.parent / "broken.jsonl", [{"image": "0.png", "passage": "moon"}, line])
    with pytest.raises(ConfigError, match=f"line 2.*{message}"):
        read_examples("mire", file, None, None)


def test_examples_that_cannot_be_are_refused(tmp_path, pairs):
    with pytest.raises(ConfigError, match="--store whose clips they name"):
        read_examples("clamr", pairs, None, None)
    with pytest.raises(ConfigError, match="or a --store"):
        read_examples("flmr", None, None, None)
    with pytest.raises(ConfigError, match="gives no examples"):
        read_examples("flmr", write(tmp_path / "empty.jsonl", []), None, None)
    one = write(pairs.parent / "one.jsonl", [{"image": "0.png", "passage": "moon"}])
    with pytest.raises(ConfigError, match="cannot be split"):
        read_examples("flmr", one, None, None).split(0.1, 10, 0)


def test_features_are_what_the_towers_give(alignment):
    plan, _ = alignment
    towers = Towers.of(plan.system, plan.towers, plan.train)
    vectors, patches = towers.open_vision().features([Image.open(io.BytesIO(picture(5))).convert("RGB")])
    place = plan.examples.rows[5].picture
    np.testing.assert_allclose(plan.features["pictures"].rows("vectors", [place])[0], vectors[0], atol=2e-3)
    np.testing.assert_allclose(plan.features["pictures"].rows("patches", [place])[0], patches[0], atol=2e-3)
    places = [plan.examples.documents.index("moon"), plan.examples.documents.index("cat on the mat")]
    tokens, mask = plan.features["passages"].texts(places)
    for row, text in enumerate(["moon", "cat on the mat"]):
        [states] = towers.open_text().encode_documents([text])
        wanted = torch.nn.functional.normalize(states.embeddings, dim=-1)[states.row.kept]
        np.testing.assert_allclose(tokens[row][mask[row]], wanted, atol=2e-3)
    assert (tokens[0][~mask[0]] == 0).all()


def test_training_goes_on_from_a_head_but_not_between_other_towers(alignment, tmp_path, tiny_flmr):
    plan, schedule = alignment
    task, _ = run(plan, schedule)
    task.save(tmp_path / "head")
    again = replace(plan, towers=plan.towers.model_copy(update={"head": str(tmp_path / "head")}))
    for name, weight in again.make(CPU).module.state_dict().items():
        assert torch.equal(weight, task.module.state_dict()[name])
    other = plan.towers.model_copy(update={"head": str(tmp_path / "head"), "vision_model": tiny_flmr.flmr})
    with pytest.raises(ModelError, match="another vision_model"):
        replace(plan, towers=other).make(CPU)


def test_a_step_lowers_the_loss_and_only_the_head_learns(alignment):
    plan, schedule = alignment
    task, losses = run(plan, replace(schedule, config=schedule.config.model_copy(update={"epochs": 20})))
    assert len(losses) == 20
    assert losses[-1] < 0.7 * losses[0]
    assert {name.split(".")[0] for name, _ in task.module.named_parameters()} == {"head"}


def test_a_killed_run_ends_with_the_weights_and_losses_of_one_that_was_not(alignment, tmp_path):
    plan, schedule = alignment
    whole, losses = run(plan, schedule)
    run(plan, schedule, stop_after=2, folder=tmp_path)
    restored, again = run(plan, schedule, restored=tmp_path)
    assert again == losses
    for name, weight in whole.module.state_dict().items():
        assert torch.equal(weight, restored.module.state_dict()[name])


def test_a_tower_that_is_not_there_and_a_batch_that_cannot_be_shared_are_refused(pairs, tiny_flmr, tmp_path):
    with pytest.raises(ConfigError, match=r"2 workers cannot share evenly.*for example 2"):
        train(config_for(tiny_flmr, "flmr", "train.batch=3", "train.resources.num_workers=2"), "flmr", tmp_path, pairs)
    with pytest.raises(ConfigError, match=r"fewer than train.batch"):
        train(config_for(tiny_flmr, "flmr", "train.batch=64"), "flmr", tmp_path, pairs)
    whole = config_for(tiny_flmr, "mire", f"encode.mire.model={tiny_flmr.mire}")
    with pytest.raises(ConfigError, match=r"encode.mire.model is a whole checkpoint"):
        train(whole, "mire", tmp_path, pairs)
    assert not list(tmp_path.iterdir())
    (tmp_path / "others").write_text("mine")
    with pytest.raises(ConfigError, match="no run of train"):
        train(config_for(tiny_flmr, "flmr"), "flmr", tmp_path, pairs)


def test_the_folder_of_a_run_with_other_settings_is_refused_by_their_names(pairs, tiny_flmr, tmp_path):
    examples = read_examples("flmr", pairs, None, None)
    _keep_settings(tmp_path / "run", _settings(config_for(tiny_flmr, "flmr"), "flmr", examples))
    _keep_settings(tmp_path / "run", _settings(config_for(tiny_flmr, "flmr"), "flmr", examples))
    faster = config_for(tiny_flmr, "flmr", "train.resources.num_workers=2")
    _keep_settings(tmp_path / "run", _settings(faster, "flmr", examples))
    other = config_for(tiny_flmr, "flmr", "train.seed=3", "encode.flmr.query_length=11")
    with pytest.raises(ConfigError, match=r"models.query_length, train.seed"):
        _keep_settings(tmp_path / "run", _settings(other, "flmr", examples))


def test_a_group_counts_once_however_many_queries_it_has():
    before = {"x": {"group": ["a", "a", "a", "b"], "R@1": [0, 0, 0, 1], "nDCG@10": [0] * 4, "chance": [0.5] * 4}}
    after = {"x": before["x"] | {"R@1": [1, 1, 0, 1]}}
    found = _compared(before, after)["x"]
    assert found["measures"]["R@1"]["before"][0] == 0.5
    assert found["measures"]["R@1"]["after"][0] == pytest.approx((2 / 3 + 1) / 2)
    assert found["measures"]["R@1"]["difference"]["difference"] == pytest.approx(1 / 3)
    assert (found["queries"], found["groups"]) == (4, 2)


@pytest.fixture(scope="module")
def trained(pairs, tiny_flmr, tmp_path_factory, cluster):
    """A whole run of two workers: its folder, and what it returned."""
    out = tmp_path_factory.mktemp("trained") / "out"
    resources = ["train.resources.num_workers=2", "train.resources.feature_actors=1"]
    return out, train(config_for(tiny_flmr, "flmr", *resources), "flmr", out, pairs)


def test_two_workers_learn_what_one_does(trained, pairs, tiny_flmr, cluster):
    out, metrics = trained
    config = config_for(tiny_flmr, "flmr")
    examples = read_examples("flmr", pairs, None, None)
    task, losses = run(
        _plan(config, "flmr", examples, None, None, out), _schedule(config, "flmr", *examples.split(0.3, 1000, 0))
    )
    assert metrics["losses"] == pytest.approx(losses, abs=1e-5)
    assert len(losses) == 3
    _, head = open_head(metrics["head"], "flmr")
    for name, weight in task.module.head.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], weight, atol=1e-5, rtol=1e-5)


def test_a_trained_head_is_loaded_by_the_encoder(trained, tiny_flmr):
    out, metrics = trained
    config = config_for(tiny_flmr, "flmr", f"encode.flmr.head={metrics['head']}")
    encoder = FlmrEncoder(**config.encode.flmr.model_dump())
    [tokens] = encoder.encode_queries([Query(image=picture(0))])
    assert tokens.shape == (3, encoder.dim)
    assert f"encode.flmr.head={out / 'head'}" in metrics["next"][0]
    assert tiny_flmr.colbert in metrics["next"][0]


def test_a_finished_run_is_not_run_again(trained, pairs, tiny_flmr):
    out, metrics = trained
    before = (out / "head" / "head.safetensors").stat().st_mtime_ns
    assert train(config_for(tiny_flmr, "flmr"), "flmr", out, pairs) == json.loads(json.dumps(metrics))
    assert (out / "head" / "head.safetensors").stat().st_mtime_ns == before


def test_the_summary_says_what_was_learned_and_what_to_type(trained, capsys):
    render(trained[1])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("text to frame", "image to text", "chance", "R@1", "maxreel encode --store"))


def test_flmrs_mapping_trained_on_photographs_lets_texts_find_frames(tmp_path):
    """Crops and wordings that were not trained on, of photographs that were: `benchmarks/alignment.py` in small."""
    settings = ["train.num_tokens=2", "train.epochs=6", "train.batch=26", "train.learning_rate=0.002"]
    config = load([], settings)
    examples = read_examples("flmr", alignment_benchmark.write_known(tmp_path, crops=4, held_out=2), None, None)
    features = features_of(config, "flmr", examples, tmp_path / "features")
    plan = AlignmentPlan("flmr", examples, features, config.encode.flmr, config.train)
    schedule = _schedule(config, "flmr", *examples.split(0.5, 1000, 0))
    torch.manual_seed(0)
    before = plan.make(CPU).measure(schedule.held_out)
    task, _ = run(plan, schedule)
    found = _compared(before, task.measure(schedule.held_out))["text to frame"]
    assert found["chance"] == pytest.approx(1 / 13)
    assert found["measures"]["R@1"]["before"][0] < 0.3
    assert found["measures"]["R@1"]["after"][0] > 0.6
    assert found["measures"]["R@1"]["difference"]["low"] > 0.3


def test_the_command_says_what_it_needs(tmp_path):
    result = CliRunner().invoke(app, ["train", "flmr", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "takes --examples FILE.jsonl, or a --store" in result.stderr


def row(video_id, modality, texts=(), frames=(), clip=0):
    spans = [
        {"start_seconds": 0.0, "stop_seconds": 1.0, "text": text, "confidence": 1.0, "language": "en"} for text in texts
    ]
    pictures = [{"pts_seconds": float(i), "jpeg": picture(seed)} for i, seed in enumerate(frames)]
    return {"video_id": video_id, "clip": clip, "modality": modality, "num_clips": 1} | {
        "start_seconds": 0.0,
        "stop_seconds": 1.0,
        "fingerprint": f"{video_id} {modality}",
        "spans": spans,
        "frames": pictures,
    }


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A store of six clips: two frames, something said, and for some a title."""
    store = Store.at(str(tmp_path_factory.mktemp("clips") / "store"))
    store.prepare()
    rows = []
    for number, text in enumerate(TEXTS):
        rows.append(row(f"v{number}", schema.FRAME, frames=(number, number + 50)))
        rows.append(row(f"v{number}", schema.SPEECH, [text]))
        if number % 2:
            rows.append(row(f"v{number}", schema.METADATA, [f"title {number}"]))
    rows.append(row("long", schema.SPEECH, ["one"]))
    rows.append(row("long", schema.SPEECH, ["two"], clip=1))
    store.append(MODALITIES, pa.Table.from_pylist(rows, schema=schema.MODALITY_ROWS))
    return store


def test_a_store_pairs_each_frame_with_the_texts_of_its_clip(clips):
    examples = read_examples("mire", None, clips, clips.open(MODALITIES).version)
    pairs = [(row.group, json.loads(examples.pictures[row.picture])["frame"]) for row in examples.rows]
    assert sorted(set(pairs)) == [(f"v{number}", frame) for number in range(6) for frame in range(2)]
    assert len(pairs) == 2 * (6 + 3)
    assert set(examples.documents) == {*TEXTS, "title 1", "title 3", "title 5"}


def test_frames_of_a_store_are_the_pictures_whose_features_are_made(clips, tiny_flmr, tmp_path):
    version = clips.open(MODALITIES).version
    examples = read_examples("flmr", None, clips, version)
    towers = Towers.of("flmr", config_for(tiny_flmr, "flmr").encode.flmr, config_for(tiny_flmr, "flmr").train)
    features = Features(tmp_path / "pictures", len(examples.pictures), "pictures")
    work = pa.Table.from_pylist([{"kind": "pictures", "shard": 0, "items": examples.pictures}])
    MakeFeatures({"pictures": features}, towers, clips, version)(work)
    wanted, _ = towers.open_vision().features([Image.open(io.BytesIO(picture(53))).convert("RGB")])
    place = next(row.picture for row in examples.rows if row.group == "v3" and '"frame": 1' in
                 examples.pictures[row.picture])  # fmt: skip
    np.testing.assert_allclose(features.rows("vectors", [place])[0], wanted[0], atol=2e-3)


@pytest.fixture(scope="module")
def tiny_clamr(tmp_path_factory):
    from tests.tiny_qwen import save_vl

    return str(save_vl(tmp_path_factory.mktemp("clamr")))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    lines = [
        {"text": f"red {text}", "video_id": f"v{number}", "target_modality": "speech", "negatives": ["long"] * 0}
        for number, text in enumerate(TEXTS)
    ]
    lines[0]["negatives"] = ["v3"]
    return write(tmp_path_factory.mktemp("questions") / "questions.jsonl", lines)


def clamr_plan(tiny_clamr, clips, questions, *assignments):
    small = ["encode.clamr.max_pixels=3136", "encode.clamr.precision=float32", "train.batch=3", "train.epochs=4"]
    config = load([], [f"encode.clamr.model={tiny_clamr}", *small, *assignments])
    version = clips.open(MODALITIES).version
    examples = read_examples("clamr", questions, clips, version)
    schedule = Schedule(*examples.split(0.3, 10, 0), 3, config.train, 0.01)
    return ClamrPlan(examples, clips, version, config.encode.clamr, config.train, None), schedule


@pytest.mark.parametrize(("rank", "loss"), [(0, "contrastive_hard_positive"), (2, "contrastive_hard_negative")])
def test_clamr_trains_its_head_or_adapters_and_the_encoder_loads_them(
    tiny_clamr, clips, questions, tmp_path, rank, loss
):
    plan, schedule = clamr_plan(tiny_clamr, clips, questions, f"train.lora_rank={rank}", f"train.loss={loss}")
    task, losses = run(plan, schedule)
    assert losses[-1] < losses[0]
    learned = {name for name, parameter in task.module.named_parameters() if parameter.requires_grad}
    assert any("lora_" in name for name in learned) == bool(rank)
    assert all("lora_" in name or "custom_text_proj" in name for name in learned)
    task.save(tmp_path / "head")
    settings = plan.clamr.model_dump() | {"model": str(tmp_path / "head")}
    clip = {"speech": Content([{"text": "red cat"}])}
    before = ClamrEncoder(**plan.clamr.model_dump()).encode_documents([clip])[0]["speech"].embeddings
    after = ClamrEncoder(**settings).encode_documents([clip])[0]["speech"].embeddings
    task.module.eval()
    [turn] = task._turns.documents(clip)
    batch = task._clamr.collate([turn])
    with torch.no_grad():
        trained = task.module(batch, batch)[0][0][torch.from_numpy(turn.modality >= 0)]
    np.testing.assert_allclose(after, trained.numpy(), atol=1e-5)
    assert np.abs(after - before).max() > 1e-3


def test_a_clamr_that_train_cannot_start_from_is_refused(tiny_clamr, clips, questions, tmp_path):
    for setting, message in (("context=separate", "joint"), (f"base={tiny_clamr}", "whole or names its own base")):
        settings = [f"encode.clamr.model={tiny_clamr}", f"encode.clamr.{setting}", "train.batch=3"]
        with pytest.raises(ConfigError, match=message):
            train(load([], settings, clips.uri), "clamr", tmp_path / "out", questions)
        assert not (tmp_path / "out").exists()


def test_a_backbone_without_a_head_gets_one_of_the_width_that_is_asked_for(tmp_path, tiny_clamr):
    from safetensors.torch import load_file, save_file

    bare = tmp_path / "bare"
    shutil.copytree(tiny_clamr, bare)
    tensors = load_file(bare / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("custom_text_proj")}
    save_file(kept, bare / "model.safetensors", metadata={"format": "pt"})
    config = load([], [f"encode.clamr.model={bare}", "train.new_head_dim=24"])
    head = _first_head(config, tmp_path / "out")
    assert find_checkpoint(str(bare), None, head).head_dim() == 24
    assert _first_head(load([], [f"encode.clamr.model={tiny_clamr}"]), tmp_path / "out") is None


def test_clamrs_examples_name_clips_that_are_there(clips, tmp_path):
    version = clips.open(MODALITIES).version
    for line, message in (
        ({"text": "a", "video_id": "none"}, "no clip None of a video 'none'"),
        ({"text": "a", "video_id": "long"}, 'has 2 clips; say which with "clip"'),
        ({"text": "a", "video_id": "v1", "target_modality": "smell"}, "no modality 'smell'"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_examples("clamr", write(tmp_path / "q.jsonl", [line]), clips, version)
    named = write(tmp_path / "q.jsonl", [{"text": "a", "video_id": "long", "clip": 1}])
    assert read_examples("clamr", named, clips, version).documents == ['["long", 1]']
