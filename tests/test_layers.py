"""The three rooms: operators know nothing of Ray or Lance, cluster knows no models, nothing imports pipelines."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"operators": {"ray", "lance", "cluster", "pipelines"}, "cluster": {"pipelines", "torch", "transformers"}}
MODELS_OF_OPERATORS = {
    "decode",
    "speech",
    "screen_text",
    "frame_tags",
    "encoder_offline",
    "encoder_multivector",
    "encoder_clamr",
    "clamr_checkpoint",
    "clamr_model",
    "adapters",
    "encoder_towers",
    "encoder_flmr",
    "encoder_mire",
    "flmr_checkpoint",
    "mire_checkpoint",
    "towers",
    "text_tower",
    "vision_tower",
    "mapping_network",
    "attentive_pooling",
    "heads",
    "encoder_colpali",
    "encode",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_only_what_lies_below_it(package):
    files = list((ROOT / package).glob("*.py"))
    assert files
    wrong = {
        f"{file.name}: {name}" for file in files for name in imports(file) if name.split(".")[0] in FORBIDDEN[package]
    }
    assert wrong == set()


def test_cluster_loads_no_model():
    wrong = {
        f"{file.name}: {name}"
        for file in (ROOT / "cluster").glob("*.py")
        for name in imports(file)
        if name.startswith("operators.") and name.split(".")[1] in MODELS_OF_OPERATORS
    }
    assert wrong == set()


def test_help_imports_nothing_heavy():
    heavy = {"ray", "torch", "lance", "pyarrow", "pydantic"}
    program = f"import sys; import pipelines.cli; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
