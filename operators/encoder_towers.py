"""What the encoders of a text tower and a vision tower share: documents, frames as pictures or as words, batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from operators.encoders import Content, Floats, TokenEmbeddings, join_spans, open_picture, span_of
from operators.errors import ModelError
from operators.frame_tags import FrameTags
from operators.text_tower import TextStates, TextTower
from operators.vision_tower import VisionTower


class TowerEncoder(ABC):
    """Text modalities by a text tower, frames by a vision tower. Separate: one modality at a time.

    Parameters
    ----------
    documents
        Text tower for documents.
    vision
        Vision tower.
    frames
        ``mapped``: visual tokens of each frame; ``tags``: the words of an ImageNet classifier, as a document; ``none``.
    tags
        That classifier, where frames are tags.
    batch_tokens
        Patches in one pass of the vision tower.
    """

    dim: int

    def __init__(
        self, documents: TextTower, vision: VisionTower, frames: str, tags: FrameTags | None, batch_tokens: int
    ) -> None:
        self._documents, self._vision = documents, vision
        self._frames, self._tags = frames, tags
        self._batch_pictures = max(1, batch_tokens // (vision.num_patches + 1))
        self.dim = documents.dim

    @classmethod
    def joint_of(cls, **_: Any) -> bool:
        """Return False: one modality at a time."""
        return False

    def encode_documents(self, clips: Sequence[Mapping[str, Content]]) -> list[dict[str, TokenEmbeddings]]:
        """Return token embeddings for each modality of each clip."""
        contents = [content for clip in clips for content in clip.values()]
        texts = iter(self._encode_texts([content for content in contents if not self._is_mapped(content)]))
        frames = iter(self._encode_frames([content for content in contents if self._is_mapped(content)]))
        return [
            {modality: next(frames if self._is_mapped(content) else texts) for modality, content in clip.items()}
            for clip in clips
        ]

    @abstractmethod
    def _frame_tokens(self, pictures: Sequence[Any]) -> Any:
        """Return (B, n, dim) token embeddings of pictures as documents."""

    def _is_mapped(self, content: Content) -> bool:
        return self._frames == "mapped" and bool(content.frames)

    def _encode_texts(self, contents: Sequence[Content]) -> list[TokenEmbeddings]:
        joined = [join_spans(content.spans or self._tag_spans(content)) for content in contents]
        encoded = self._documents.encode_documents([text for text, _ in joined])
        return [
            TokenEmbeddings(kept_of(states), span_of(states.row.offsets[states.row.kept], starts))
            for states, (_, starts) in zip(encoded, joined, strict=True)
        ]

    def _tag_spans(self, content: Content) -> list[dict[str, str]]:
        """Return one span of tag names a frame, so that a span index is a frame index."""
        if self._tags is None or not content.frames:
            return []
        tags = self._tags.tag([frame["jpeg"] for frame in content.frames])
        return [{"text": ", ".join(name for name, _ in of_frame)} for of_frame in tags]

    def _encode_frames(self, contents: Sequence[Content]) -> list[TokenEmbeddings]:
        jpegs = [frame["jpeg"] for content in contents for frame in content.frames]
        tokens = in_batches(jpegs, self._batch_pictures, self._tokens_of)
        results = []
        for content in contents:
            count = len(content.frames)
            of_clip, tokens = tokens[:count], tokens[count:]
            index = np.repeat(np.arange(count), [len(of_frame) for of_frame in of_clip]).astype(np.int32)
            results.append(TokenEmbeddings(np.concatenate(of_clip), index))
        return results

    def _tokens_of(self, jpegs: Sequence[bytes]) -> list[Floats]:
        return list(normalised(self._frame_tokens([open_picture(jpeg) for jpeg in jpegs])))


def in_batches(items: Sequence[Any], size: int, encode: Callable[[Sequence[Any]], list[Floats]]) -> list[Floats]:
    """Return what ``encode`` gives for all items, so many of them at a time."""
    return [result for start in range(0, len(items), size) for result in encode(items[start : start + size])]


def kept_of(states: TextStates) -> Floats:
    """Return the L2-normalised embeddings of the tokens that represent a text."""
    return normalised(states.embeddings)[states.row.kept]


def normalised(embeddings: Any) -> Floats:
    """Return L2-normalised embeddings as NumPy."""
    import torch

    result: Floats = torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()
    return result


def frame_tags(frames: str, model: str, top_k: int, min_probability: float, num_threads: int) -> FrameTags | None:
    """Return the classifier where frames are to be tags."""
    if frames != "tags":
        return None
    return FrameTags(model, top_k=top_k, min_probability=min_probability, num_threads=num_threads)


def require_head(encoder: str, head: str | None) -> str:
    """Return the head, or refuse to go on without one.

    Raises
    ------
    ModelError
        Saying how to come by one.
    """
    if head is None:
        raise ModelError(
            f"the encoder {encoder} needs what lies between its towers: give encode.{encoder}.head, a folder that "
            f"`maxreel train` wrote for the system {encoder}, or encode.{encoder}.model, a released checkpoint"
        )
    return head


def require_fit(encoder: str, config: Mapping[str, Any], text: TextTower, vision: VisionTower) -> None:
    """Refuse a head whose widths are not its towers'.

    Raises
    ------
    ModelError
        Naming both.
    """
    wanted = {"dim": text.dim, "vision_dim": vision.vision_dim, "hidden": text.hidden_size}
    got = {name: config[name] for name in wanted if name in config}
    if any(wanted[name] != value for name, value in got.items()):
        of_towers = {name: wanted[name] for name in got}
        raise ModelError(f"the head of the encoder {encoder} has widths {got}, its towers have {of_towers}")
