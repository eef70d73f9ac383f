import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cluster.lease import Lease
from cluster.store import Store
from operators.errors import MaxreelError, ModelError
from pipelines import cli
from pipelines.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_python_m_pipelines_is_the_same_program():
    result = subprocess.run([sys.executable, "-m", "pipelines", "--help"], capture_output=True, text=True, check=True)
    for command in ("index", "ingest", "extract", "encode", "build-index", "search", "evaluate", "status", "doctor"):
        assert f"  {command} " in result.stdout
    assert "5 the store is held by another run" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("search", "x"), 2, "no store was given"),
        (("search", "x", "--set", "serch.probes=1"), 2, "Did you mean search?"),
        (("index", "nowhere.jsonl", "--store", "{store}"), 2, "there is no manifest"),
        (("search", "x", "--store", "{store}"), 1, "has no published index yet"),
        (("status", "--store", "{store}"), 1, "maxreel index MANIFEST"),
    ],
)
def test_what_went_wrong_has_its_exit_code_and_what_to_do(tmp_path, arguments, code, message):
    result = run(*(argument.format(store=tmp_path / "store") for argument in arguments))
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


def test_json_is_exactly_one_document_also_when_something_went_wrong(tmp_path):
    result = run("status", "--store", tmp_path / "store", "--json")
    assert json.loads(result.stdout)["error"]["exit_code"] == result.exit_code == 1


def test_a_held_store_ends_with_code_5_and_says_who_holds_it(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"video_id": "v", "title": "t"}\n')
    with Lease(Store.at(str(tmp_path / "store")), "the-other-run", "index"):
        result = run("ingest", tmp_path / "m.jsonl", "--store", tmp_path / "store")
    assert result.exit_code == 5
    assert "the-other-run" in result.stderr


def test_a_dry_run_counts_and_writes_nothing(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"video_id": "v", "title": "t"}\n')
    result = run("index", tmp_path / "m.jsonl", "--store", tmp_path / "store", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["counts"]["new"] == 1
    assert not (tmp_path / "store").exists()


def test_the_doctor_names_a_missing_model_and_its_mend(tmp_path):
    result = run("doctor", "--store", tmp_path, "--set", "extract.speech.model=pkg:no_such_package", "--json")
    checks = json.loads(result.stdout)["checks"]
    [bad] = [check for check in checks if check["level"] == "FAIL"]
    assert "no_such_package" in bad["detail"]
    assert bad["mend"]
    assert [check["level"] for check in checks if check["name"] == "store"] == ["ok"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("LanceError(IO): No space left on device (os error 28), x.rs", "there is no space left on the disk"),
        ("[Errno 30] Read-only file system: '/x'", "the file system is read-only"),
    ],
)
def test_a_worker_that_cannot_write_says_why_and_what_to_do(cluster, text, said):
    import ray.data

    def write(batch):
        raise OSError(text)

    with pytest.raises(Exception) as raised:  # noqa: B017
        ray.data.range(1).map_batches(write).materialize()
    known, message = cli._explain(raised.value, MaxreelError)
    assert known is None
    assert message.startswith(said)
    assert message.endswith(f"(OSError: {text})")


def test_the_doctor_says_what_an_encoder_lacks(tmp_path):
    result = run("doctor", "--store", tmp_path, "--set", "encode.encoder=flmr", "--json")
    [bad] = [check for check in json.loads(result.stdout)["checks"] if check["level"] == "FAIL"]
    assert bad["name"] == "encoder"
    assert "encode.flmr.head" in bad["detail"]


def test_a_defect_in_a_worker_is_shown_by_its_own_line():
    text = (
        "ray::f() (pid=1)\n  File x\n    raise KeyError('a')\nKeyError: 'a'\nUDF failed.\nTo change retries, configure."
    )
    assert cli._explain(RuntimeError(text), MaxreelError) == (None, "KeyError: 'a' (-v shows where)")
    assert cli._explain(ValueError("odd"), MaxreelError) == (None, "ValueError: odd (-v shows where)")


def test_an_actor_that_could_not_start_says_what_our_error_says():
    text = "The actor died\nray::Encode()\n    raise ModelError(\noperators.errors.ModelError: 1 weights are missing\n"
    known, message = cli._explain(RuntimeError(text), MaxreelError)
    assert (type(known), message) == (ModelError, "1 weights are missing")


@pytest.mark.parametrize(
    "command", [("gc",), ("publish",), ("rollback", "--reason", "r"), ("retry",), ("build-index",)]
)
def test_commands_that_need_a_store_make_none(tmp_path, command):
    result = run(*command, "--store", tmp_path / "typo")
    assert result.exit_code == 1
    assert "has no table 'videos'" in result.stderr
    assert not (tmp_path / "typo").exists()
