"""What is computed: Arrow batches, NumPy and torch in and out. Knows nothing of Ray or Lance."""

from operators import torchvision_shim

torchvision_shim.install()
