import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from operators.errors import ModelError
from operators.frame_tags import BATCH_FRAMES, FrameTags


@pytest.fixture(scope="module")
def tags():
    return FrameTags(top_k=3, min_probability=0.1)


def jpeg(image):
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=90)
    return stream.getvalue()


def page():
    """A page of text, which ImageNet calls a web site, a menu, a crossword or the like."""
    image = Image.new("RGB", (400, 300), "white")
    for line in range(14):
        text = f"Line {line} of a page with many words in it"
        ImageDraw.Draw(image).text((10, 10 + 20 * line), text, font=ImageFont.load_default(16), fill="black")
    return jpeg(image)


def noise(seed):
    return jpeg(Image.fromarray(np.random.default_rng(seed).integers(0, 255, (90, 120, 3), dtype=np.uint8)))


def test_a_page_of_text_is_seen_as_one(tags):
    (seen,) = tags.tag([page()])
    assert seen[0][0] in {"web site", "menu", "crossword puzzle", "envelope", "book jacket"}


def test_tags_are_few_and_probable_and_in_order(tags):
    for seen in tags.tag([page(), noise(0)]):
        probabilities = [probability for _, probability in seen]
        assert len(seen) <= 3
        assert all(0.1 <= probability <= 1 for probability in probabilities)
        assert probabilities == sorted(probabilities, reverse=True)


def test_a_frame_gets_the_same_tags_in_any_batch(tags):
    jpegs = [page(), *(noise(seed) for seed in range(BATCH_FRAMES))]
    together, alone = tags.tag(jpegs), [tags.tag([one])[0] for one in jpegs]
    for seen, expected in zip(together, alone, strict=True):
        assert [name for name, _ in seen] == [name for name, _ in expected]
        # The order of float32 sums differs with the batch.
        assert [p for _, p in seen] == pytest.approx([p for _, p in expected], abs=1e-4)


def test_no_frames_have_no_tags(tags):
    assert tags.tag([]) == []


def test_a_higher_bar_leaves_no_tag_but_those_that_are_asked_for():
    tags = FrameTags(min_probability=1.0)
    assert tags.tag([noise(0)]) == [[]]
    assert len(tags.tag([noise(0)], at_least=2)[0]) == 2


def test_a_folder_without_one_file_of_weights_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="found 0"):
        FrameTags(model=str(tmp_path))


def test_weights_of_another_network_are_a_model_error(tmp_path):
    import torch

    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="EfficientNet-Lite0"):
        FrameTags(model=str(tmp_path))
