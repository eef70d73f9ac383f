import os

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def cluster():
    """One small Ray cluster for all tests; jobs join it."""
    import ray

    from cluster.session import session

    with session(address=None, num_cpus=2, object_store_bytes=300_000_000, no_progress_seconds=120):
        yield ray


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
