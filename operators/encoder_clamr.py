"""CLaMR: all modalities of a clip in one chat turn of a Qwen2.5 backbone, one vector a token (arXiv:2506.06144, sec. 3).

The turn is the released code's: frames, then screen text, speech and metadata, each text with its label and cut at 512
tokens. It departs where that loses or blurs what is there (`operators.chat_turn`, `operators.clamr_checkpoint`): spans are
exact, frames are chosen all over the clip, a long query keeps its augmentation tokens, Omni hears the sound, and tokens of
the template do not compete as a modality of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from operators.chat_turn import (
    LABELS,
    NONE,
    Piece,
    Turn,
    audio_piece,
    choose_evenly,
    join_pieces,
    patch_piece,
    query_pieces,
    split_at,
    template_piece,
    text_piece,
)
from operators.clamr_checkpoint import Family, find_checkpoint, open_processor
from operators.encoders import (
    Content,
    Floats,
    Query,
    TokenEmbeddings,
    check_query,
    open_picture,
    to_device,
    token_batches,
)
from operators.fingerprint import fingerprint
from operators.schema import FRAME, MODALITIES, SAMPLE_RATE_HZ, SPEECH
from operators.sound import decode_sound

AUDIO = "audio"
"""The slot of sound in a turn."""

MIN_PIXELS = 56 * 56
"""Of one frame or picture, as qwen-vl-utils has it; the video processor's own default is above 224 x 224."""

MAX_RATIO = 200
"""Of a picture's sides; the processors refuse more."""

GROUPED_BATCHES = 2
"""So many batches' worth of turns are sorted by length at a time: more pad less, fewer let the model begin sooner."""


class ChatTurns:
    """Makes turns of clips and of queries, for encoding and for training alike.

    Parameters
    ----------
    model, base
        As `find_checkpoint` takes them; of them only the processor is read.
    context
        ``joint``: all modalities in one turn. ``separate``: each in its own (the released code then gives texts no turn).
    max_frames
        More frames than these are thinned out evenly.
    max_pixels
        Of one frame or picture, after resizing.
    max_text_tokens
        Of one text, its label included.
    query_length, augmentation_tokens
        Most tokens of a query's text and augmentation together; how many of them are augmentation.
    template_tokens
        Keep tokens of the template and of empty modalities' labels, each with the modality beside it, as the paper's
        contextual late interaction does.
    device
        Where pictures are resized and normalised.
    """

    def __init__(
        self,
        model: str,
        base: str | None = None,
        context: Literal["joint", "separate"] = "joint",
        max_frames: int = 10,
        max_pixels: int = 224 * 224,
        max_text_tokens: int = 512,
        query_length: int = 64,
        augmentation_tokens: int = 10,
        template_tokens: bool = False,
        device: str = "cpu",
    ) -> None:
        checkpoint = find_checkpoint(model, base)
        self._family: Family = checkpoint.family
        self._processor = open_processor(checkpoint)
        self._tokenizer = self._processor.tokenizer
        self._context, self._max_frames, self._max_text_tokens = context, max_frames, max_text_tokens
        self._size = {"shortest_edge": min(MIN_PIXELS, max_pixels), "longest_edge": max_pixels}
        self._query_length, self._augmentation_tokens = query_length, augmentation_tokens
        self._template_tokens, self._device = template_tokens, device
        self._templates: dict[tuple[str, ...], list[Piece]] = {}

    def documents(self, clip: Mapping[str, Content]) -> list[Turn]:
        """Return the turns of a clip: one, or one a modality that has content, or none.

        In the joint turn stand the labels of all texts, also of those that a clip has not: the released code gives an
        empty string for them.
        """
        sound = self._hear(clip)
        present = [name for name in MODALITIES if _has_content(clip, name) or (name == SPEECH and sound)]
        if self._context == "separate":
            return [self._document(clip, {modality}, sound) for modality in present]
        return [self._document(clip, {*present, *LABELS}, sound)] if present else []

    def query(self, query: Query) -> Turn:
        """Return the turn of a query: its picture, if it has one, its text and its augmentation tokens; no template.

        Raises
        ------
        ConfigError
            If it is empty, or its picture cannot be read.
        """
        check_query(query, "clamr", image=True, both=True)
        pieces = query_pieces(self._tokenizer, query.text or "", self._query_length, self._augmentation_tokens)
        if not query.image:
            return join_pieces(pieces)
        pixels = to_device(_to_pixels(open_picture(query.image)), self._device)
        inputs = self._processor.image_processor(images=[pixels], size=self._size, return_tensors="pt")
        _, rows, columns = self._merged(inputs["image_grid_thw"])
        patches = Piece([self._processor.image_token_id] * (rows * columns), FRAME)
        before, after = self._around_picture()
        media = {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"].cpu()}
        return join_pieces([before, patches, after, *pieces], media=media)

    def names(self, turn: Turn) -> list[str]:
        """Return what a query's scored tokens stand for."""
        tokens = turn.ids[turn.modality != NONE].tolist()
        pictures = {self._processor.image_token_id: "[image]"}
        return [pictures.get(token) or self._tokenizer.decode([token]).strip() or " " for token in tokens]

    def _document(self, clip: Mapping[str, Content], modalities: set[str], sound: Mapping[str, Any]) -> Turn:
        contents: dict[str, Piece] = {}
        media: dict[str, Any] = {}
        grid = None
        if FRAME in modalities:
            media, chosen = self._see(clip[FRAME].frames)
            grid = self._merged(media["video_grid_thw"])
            contents[FRAME] = patch_piece(self._processor.video_token_id, grid, chosen)
        if SPEECH in modalities and sound:
            length = _num_tokens(sound["feature_attention_mask"].shape[-1])
            contents[AUDIO] = audio_piece(
                self._processor.audio_token_id, length, clip[SPEECH].spans, clip[SPEECH].start_seconds
            )
            media |= sound
        for name in LABELS:
            if name in modalities:
                spans = clip[name].spans if name in clip else ()
                contents[name] = text_piece(self._tokenizer, name, spans, self._max_text_tokens)
        first, *others = self._template(tuple(contents))
        pieces = [piece for pair in zip(contents.values(), others, strict=True) for piece in pair]
        return join_pieces([first, *pieces], self._template_tokens, None if self._template_tokens else grid, media)

    def _template(self, slots: tuple[str, ...]) -> list[Piece]:
        """Return what the chat template puts before, between and after the slots."""
        if slots not in self._templates:
            marks = [self._mark(slot) for slot in slots]
            parts = split_at(self._render([item for slot in slots for item in self._item(slot)]), marks)
            self._templates[slots] = [template_piece(self._tokenizer, part) for part in parts]
        return self._templates[slots]

    def _render(self, content: list[dict[str, str]]) -> str:
        messages = [{"role": "user", "content": content}]
        if self._family.system:
            messages = [{"role": "system", "content": [{"type": "text", "text": self._family.system}]}, *messages]
        rendered: str = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        return rendered

    def _mark(self, slot: str) -> str:
        """Return what stands in a rendered template where the slot is."""
        marks = {FRAME: self._processor.video_token, AUDIO: getattr(self._processor, "audio_token", "")}
        return marks.get(slot) or f"\ue000{slot}\ue001"

    def _item(self, slot: str) -> list[dict[str, str]]:
        labels = {FRAME: self._family.video_label, AUDIO: self._family.audio_label}
        label = [{"type": "text", "text": labels[slot]}] if labels.get(slot) else []
        kinds = {FRAME: {"type": "video"}, AUDIO: {"type": "audio"}}
        return [*label, kinds.get(slot) or {"type": "text", "text": self._mark(slot)}]

    def _around_picture(self) -> tuple[Piece, Piece]:
        """Return the two tokens between which a picture stands."""
        before, after = split_at(self._render([{"type": "image"}]), [self._processor.image_token])
        return (
            Piece(template_piece(self._tokenizer, before).ids[-1:]),
            Piece(template_piece(self._tokenizer, after).ids[:1]),
        )

    def _see(self, frames: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[int]]:
        """Return the inputs of a video of the frames, an odd last one twice, and which frames they are."""
        import torch

        chosen = choose_evenly(len(frames), self._max_frames)
        pictures = [open_picture(frames[index]["jpeg"]) for index in chosen]
        pixels = torch.stack([_to_pixels(picture, pictures[0].size) for picture in pictures])
        inputs = self._processor.video_processor(
            videos=[to_device(pixels, self._device)],
            size=self._size,
            do_sample_frames=False,
            cap_pixels_per_frame=False,  # said, because its default changes with the release
            return_tensors="pt",
        )
        grid = inputs["video_grid_thw"].cpu()
        return {"pixel_values_videos": inputs["pixel_values_videos"], "video_grid_thw": grid}, chosen

    def _merged(self, grid: Any) -> tuple[int, int, int]:
        """Return the grid of tokens of a picture's or video's grid of patches (1, 3)."""
        frames, rows, columns = grid[0].tolist()
        merge = self._processor.image_processor.merge_size
        return frames, rows // merge, columns // merge

    def _hear(self, clip: Mapping[str, Content]) -> dict[str, Any]:
        """Return the inputs of a clip's sound; none where it has none, or the backbone cannot hear."""
        encoded = clip[SPEECH].audio if SPEECH in clip else None
        if encoded is None or not self._family.audio_label:
            return {}
        import torch

        extract = self._processor.feature_extractor
        samples = decode_sound(encoded)[: extract.n_samples]
        num_frames = -(-len(samples) // extract.hop_length)
        if _num_tokens(num_frames) < 1:
            return {}
        # The processor pads to five minutes; a window of zeros gives the same frames and costs what the sound is long.
        window = extract.n_fft + extract.hop_length
        padded = np.pad(samples, (0, min(window, extract.n_samples - len(samples))))
        features = extract(padded, sampling_rate=SAMPLE_RATE_HZ, padding=False, truncation=False, return_tensors="pt")
        heard = features["input_features"][:, :, :num_frames]
        return {"input_features": heard, "feature_attention_mask": torch.ones((1, num_frames), dtype=torch.long)}


class ClamrEncoder:
    """A CLaMR model with exact spans. See `ChatTurns` and `operators.clamr_model` for what the parameters mean.

    Parameters
    ----------
    model, base, head
        A whole checkpoint, or an adapter or a head and its base.
    context, max_frames, max_pixels, max_text_tokens, query_length, augmentation_tokens, template_tokens
        Of the turns.
    precision, attention
        Of the backbone.
    batch_tokens
        Padded tokens in one forward pass.
    """

    VERSION = "1"

    def __init__(
        self,
        model: str,
        base: str | None = None,
        head: str | None = None,
        precision: Literal["float32", "bfloat16"] = "bfloat16",
        attention: str = "sdpa",
        batch_tokens: int = 8192,
        device: str = "cpu",
        num_threads: int = 1,
        **turns: Any,
    ) -> None:
        import torch

        from operators.clamr_model import load_model

        torch.set_num_threads(num_threads)
        self._turns = ChatTurns(model, base, device=device, **turns)
        self._model = load_model(model, base, head, precision, attention).to(device)
        self._batch_tokens, self._device = batch_tokens, device
        self.dim = int(self._model.custom_text_proj.out_features)

    @classmethod
    def fingerprint_of(
        cls,
        model: str,
        base: str | None = None,
        head: str | None = None,
        attention: str = "",
        batch_tokens: int = 0,
        device: str = "",
        num_threads: int = 0,
        **parameters: Any,
    ) -> str:
        """Return what the output depends on, without loading the model."""
        return fingerprint("clamr", cls.VERSION, find_checkpoint(model, base, head).fingerprints(), parameters)

    @classmethod
    def joint_of(cls, context: str = "joint", **_: Any) -> bool:
        """Return whether all modalities of a clip are in one turn."""
        return context == "joint"

    @classmethod
    def dim_of(cls, model: str, base: str | None = None, head: str | None = None, **_: Any) -> int:
        """Return the width of the head, without loading it."""
        return find_checkpoint(model, base, head).head_dim()

    def encode_documents(self, clips: Sequence[Mapping[str, Content]]) -> list[dict[str, TokenEmbeddings]]:
        """Return token embeddings for each modality of each clip."""
        nothing = TokenEmbeddings(np.zeros((0, self.dim), np.float32), np.zeros(0, np.int32))
        results = [dict.fromkeys(clip, nothing) for clip in clips]
        with ThreadPoolExecutor(1) as ahead:  # decodes and tokenises while the model is at the clips before
            of_clips = ahead.map(self._turns.documents, clips)
            made = ((result, turn) for result, turns in zip(results, of_clips, strict=True) for turn in turns)
            for group in _groups(made, GROUPED_BATCHES * self._batch_tokens):
                embedded = self._encode([turn for _, turn in group])
                for (result, turn), embeddings in zip(group, embedded, strict=True):
                    result |= _by_modality(turn, embeddings)
        return results

    def encode_queries(self, queries: Sequence[Query]) -> list[Floats]:
        """Return (Tq, dim) token embeddings for each query: of its picture's patches, its text and its augmentation.

        Raises
        ------
        ConfigError
            If a query is empty, or its picture cannot be read.
        """
        return self._encode([self._turns.query(query) for query in queries])

    def query_tokens(self, query: Query) -> list[str]:
        """Return what each of a query's token embeddings stands for."""
        return self._turns.names(self._turns.query(query))

    def _encode(self, turns: Sequence[Turn]) -> list[Floats]:
        """Return the embeddings of each turn's tokens that belong to a modality, in their order."""
        import torch

        found: dict[int, Floats] = {}
        for rows in token_batches([len(turn) for turn in turns], self._batch_tokens):
            batch = self._model.collate([turns[row] for row in rows])
            kept = batch["modality"] != NONE
            with torch.inference_mode():
                moved = {name: to_device(tensor, self._device) for name, tensor in batch.items()}
                embeddings = self._model(moved)[to_device(kept, self._device)].cpu().numpy()
            found |= zip(rows, np.split(embeddings, kept.sum(1).cumsum(0)[:-1].tolist()), strict=True)
        return [found[row] for row in range(len(turns))]


def _groups(made: Iterable[tuple[Any, Turn]], tokens: int) -> Iterator[list[tuple[Any, Turn]]]:
    """Yield what was made in groups of at least so many tokens, the last aside."""
    group: list[tuple[Any, Turn]] = []
    for one in made:
        group.append(one)
        if sum(len(turn) for _, turn in group) >= tokens:
            yield group
            group = []
    if group:
        yield group


def _by_modality(turn: Turn, embeddings: Floats) -> Iterator[tuple[str, TokenEmbeddings]]:
    kept = turn.modality != NONE
    for code in np.unique(turn.modality[kept]):
        own = turn.modality[kept] == code
        modality = MODALITIES[code]
        grid = turn.grid if modality == FRAME else None
        yield modality, TokenEmbeddings(embeddings[own], turn.span_index[kept][own], grid)


def _has_content(clip: Mapping[str, Content], modality: str) -> bool:
    content = clip.get(modality, Content())
    return bool(content.frames) if modality == FRAME else any(span["text"].strip() for span in content.spans)


def _to_pixels(picture: Any, size: tuple[int, int] | None = None) -> Any:
    """Return a picture as (3, rows, columns) uint8, of a size and of a shape that the processors take."""
    import torch

    width, height = size or picture.size
    width, height = max(width, math.ceil(height / MAX_RATIO)), max(height, math.ceil(width / MAX_RATIO))
    fitting = picture if picture.size == (width, height) else picture.resize((width, height))
    return torch.from_numpy(np.array(fitting)).permute(2, 0, 1)


def _num_tokens(num_frames: int) -> int:
    """Return how many tokens Qwen2.5-Omni makes of so many frames of 10 ms."""
    return ((num_frames - 1) // 2 + 1 - 2) // 2 + 1
