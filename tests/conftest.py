import functools
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from cluster.store import Store
from tests.s3_keys import ACCESS_KEY, SECRET_KEY

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="Run the tests marked slow, too (`make test-all`).")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session")
def cluster():
    """One small Ray cluster for all tests; jobs join it."""
    import ray

    from cluster.session import session

    with session(address=None, num_cpus=2, object_store_bytes=300_000_000, no_progress_seconds=120):
        yield ray


class S3:
    """The S3 server of the tests (``tests/s3_server.py``)."""

    def __init__(self, url):
        self.url = url
        self.options = {
            "aws_endpoint": url,
            "aws_region": "us-east-1",
            "aws_access_key_id": ACCESS_KEY,
            "aws_secret_access_key": SECRET_KEY,
            "allow_http": "true",
        }

    def store(self, name):
        """Return a store in the bucket that is there for them."""
        return Store.at(f"s3://night/{name}", self.options)

    def fail(self, what, times=1, method=".*", path=""):
        """Let the next requests that fit go wrong."""
        self._call("_faults", [{"what": what, "times": times, "method": method, "path": path}])

    def requests(self):
        """Return method and path of what was asked since the last call, and let nothing go wrong any more."""
        self._call("_faults", [])
        return self._call("_requests", None)

    def _call(self, path, content):
        with urllib.request.urlopen(f"{self.url}/{path}", json.dumps(content).encode()) as reply:
            return json.loads(reply.read() or b"null")


@pytest.fixture(scope="session")
def s3_server():
    program = str(Path(__file__).with_name("s3_server.py"))
    root = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, program], stdout=subprocess.PIPE, text=True, env=os.environ | root
    ) as server:
        yield S3(f"http://127.0.0.1:{int(server.stdout.readline())}")
        server.kill()


@pytest.fixture
def s3(s3_server):
    """The server, with nothing going wrong."""
    s3_server.requests()
    return s3_server


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    """An empty store: the same is expected of a folder and of an object store."""
    if request.param == "folder":
        return Store.at(str(tmp_path / "store"))
    return request.getfixturevalue("s3").store(tmp_path.name)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A late-interaction model with random weights and an eight-word vocabulary, saved as Sentence Transformers does."""
    import torch
    from sentence_transformers import MultiVectorEncoder
    from transformers import BertConfig, BertModel, BertTokenizerFast

    import operators  # noqa: F401  (torchvision's shim, before transformers needs it)

    folder = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "green", "cat", "dog", "moon", ",", "."]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "backbone")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(folder / "backbone")
    MultiVectorEncoder(str(folder / "backbone")).save(str(folder / "late"))
    return folder


@pytest.fixture(scope="session")
def tiny_clamr(tmp_path_factory):
    """A tiny Qwen2.5-VL with a head, random weights and a whole processor."""
    from tests.tiny_qwen import save_vl

    return save_vl(tmp_path_factory.mktemp("clamr"))


@pytest.fixture(scope="session")
def tiny_clamr_omni(tmp_path_factory):
    """A tiny Qwen2.5-Omni thinker with a head, random weights and a whole processor."""
    from tests.tiny_qwen import save_omni

    return save_omni(tmp_path_factory.mktemp("clamr_omni"))


@pytest.fixture(scope="session")
def tiny_flmr(tmp_path_factory):
    """Tiny CLIP, ColBERT, FLMR, PreFLMR, MIRe and heads with random weights, saved as the released ones are."""
    import operators  # noqa: F401  (torchvision's shim, before transformers needs it)
    from tests.tiny_flmr import build

    return build(tmp_path_factory.mktemp("flmr"))


@pytest.fixture(scope="session")
def tiny_colpali(tmp_path_factory):
    """Return the folder of a family's checkpoint (`tests.tiny_colpali.FAMILIES`), made when it is first asked for."""
    from tests.tiny_colpali import save

    folder = tmp_path_factory.mktemp("colpali")
    return functools.cache(lambda family: save(family, folder / family))
