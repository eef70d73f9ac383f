import subprocess
import sys


def test_a_fresh_process_can_import_torchvision_easyocr_and_a_transformers_model():
    program = (
        "import operators, torchvision, easyocr\n"
        "from transformers import AutoModel, BertModel\n"
        "print(BertModel.__name__, len(torchvision.__version__) > 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "BertModel True", result.stderr


def test_importing_operators_does_not_pay_for_torch():
    program = "import sys, operators, operators.schema; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
