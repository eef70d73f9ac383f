"""Late-interaction models that transformers has itself: ColPali, ColQwen2 (on Qwen2-VL or 2.5), ColModernVBert, NeoMME.

The class follows from ``model_type`` of a checkpoint's ``config.json``: transformers' own table of retrieval models lacks
half of them. A frame is a document of its own, or, where the model takes video, all frames of a clip are one. Patches
alone stand for a frame; the papers also score the instruction that goes with it, which says nothing of the picture:
``prompt_tokens`` keeps it. A text as a document is its bare tokens, as colpali-engine has it, or what NeoMME's own template
makes of it; for models that were trained on pictures alone it is zero-shot.

While a batch is computed the next one is decoded and normalised by another thread; on a GPU its pictures are normalised
there. Batches are padded on the right, where no model sees it: positions stay what they are alone.

References
----------
ColPali, arXiv:2407.01449; ModernVBERT, arXiv:2510.01149
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from operators import weights
from operators.checkpoints import load_whole, read_config
from operators.encoders import (
    Content,
    Floats,
    Ints,
    Query,
    TokenEmbeddings,
    check_query,
    join_spans,
    open_picture,
    span_of,
    to_device,
    token_batches,
)
from operators.errors import ConfigError, ModelError
from operators.fingerprint import fingerprint

Grid = tuple[int, int, int] | None
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Family:
    """How the models of one ``model_type`` take their input.

    Attributes
    ----------
    architecture, processor
        Classes of transformers.
    query_ids
        Token ids of a query's text, with all that the processor adds.
    text_document
        A text as a document's, with all that the processor or the model's makers add.
    patches
        Where in (B, T) token ids a patch of the picture stands.
    grids
        Rows and columns of each picture's patches; None where they are no grid.
    options
        Of the model's forward, which would else compute what is not used.
    limit_pixels
        Sets the most pixels of a picture; None where all pictures get the same size.
    """

    architecture: str
    processor: str
    query_ids: Callable[[Any, str], list[int]]
    text_document: Callable[[Any, str], str]
    patches: Callable[[Any, Any], Any]
    grids: Callable[[Any, Mapping[str, Any], Any], list[tuple[int, int] | None]]
    options: Mapping[str, bool]
    limit_pixels: Callable[[Any, int], None] | None = None


@dataclass(frozen=True)
class Prepared:
    """A batch as a model takes it.

    Attributes
    ----------
    inputs
        Keyword arguments of the model, on its device.
    kept : (B, T), bool
        The tokens whose embeddings are wanted; on the CPU.
    span_index
        Of each item's wanted tokens.
    grids
        Of each item.
    """

    inputs: Mapping[str, Any]
    kept: Any
    span_index: Sequence[Ints]
    grids: Sequence[Grid]


@dataclass(frozen=True)
class Piece:
    """Token ids of a text, the part of them that is wanted, and the span of each of those."""

    ids: Sequence[int]
    kept: slice
    span_index: Ints


class ColpaliEncoder:
    """A native ColPali-like model of transformers. Separate: one modality at a time.

    Parameters
    ----------
    model
        Hub id with optional ``@revision``, local path, or ``pkg:`` package.
    frames
        ``images``: each frame is seen alone. ``video``: a clip's frames are seen together, two to a patch.
    text
        ``encode``: text modalities are documents of text. ``skip``: they have no tokens.
    max_text_tokens
        Longer texts are encoded in pieces of this many tokens.
    max_pixels
        Of a frame, in place of the processor's own limit. ColModernVBert sees whole tiles, one at least.
    prompt_tokens
        Keep the tokens of the instruction too, as the papers score documents; then there is no patch grid.
    positions
        Of ColQwen2's patches: ``native``, as transformers' forward has them, one after another like words; or ``mrope``,
        by time, row and column, as the backbone and colpali-engine, which trained the released models, have them.
    precision
        ``float32`` or ``bfloat16``.
    attention
        Implementation, as transformers names it.
    batch_tokens
        Padded tokens in one forward pass.

    Raises
    ------
    ModelError
        If the model is of another type, or its checkpoint incomplete.
    ConfigError
        If the model cannot do what ``frames``, ``positions`` or ``max_pixels`` ask for.
    """

    VERSION = "1"

    def __init__(
        self,
        model: str,
        frames: str = "images",
        text: str = "encode",
        max_text_tokens: int = 512,
        max_pixels: int | None = None,
        prompt_tokens: bool = False,
        positions: str = "native",
        precision: str = "bfloat16",
        attention: str = "sdpa",
        batch_tokens: int = 8192,
        device: str = "cpu",
        num_threads: int = 1,
    ) -> None:
        import torch
        import transformers

        torch.set_num_threads(num_threads)
        self._family = _family_of(model, frames, positions, max_pixels)
        self._processor = _load_processor(getattr(transformers, self._family.processor), model)
        self._tokenizer = self._processor.tokenizer
        self._tokenizer.padding_side = "right"  # positions as alone: in bfloat16 others move embeddings by up to 0.009
        if max_pixels and self._family.limit_pixels:
            self._family.limit_pixels(self._processor.image_processor, max_pixels)
        self._model = load_whole(
            getattr(transformers, self._family.architecture),
            model,
            unexpected=[LANGUAGE_HEAD],
            key_mapping=OLD_NAMES,
            dtype=getattr(torch, precision),
            attn_implementation=attention,
        ).to(device)
        self._frames, self._text, self._prompt_tokens, self._positions = frames, text, prompt_tokens, positions
        self._max_text_tokens, self._batch_tokens, self._num_threads = max_text_tokens, batch_tokens, num_threads
        self._around_text = _around_text(self._tokenizer, self._family.text_document(self._processor, MARK))
        self._frame_lengths: dict[tuple[int, int], int] = {}
        self.dim = int(self._model.config.embedding_dim)

    @classmethod
    def fingerprint_of(
        cls,
        model: str,
        frames: str = "images",
        text: str = "encode",
        max_text_tokens: int = 512,
        max_pixels: int | None = None,
        prompt_tokens: bool = False,
        positions: str = "native",
        precision: str = "bfloat16",
        **_: Any,
    ) -> str:
        """Return what the output depends on, without loading the model.

        Raises
        ------
        ModelError, ConfigError
            As the constructor, weights aside.
        """
        _family_of(model, frames, positions, max_pixels)
        settings = frames, text, max_text_tokens, max_pixels, prompt_tokens, positions, precision
        return fingerprint("colpali", cls.VERSION, weights.fingerprint(model), *settings)

    @classmethod
    def joint_of(cls, **_: Any) -> bool:
        """Return False: one modality at a time."""
        return False

    @classmethod
    def dim_of(cls, model: str, **_: Any) -> int:
        """Return the width of a token embedding, without loading the model."""
        return int(read_config(Path(weights.resolve(model))).get("embedding_dim", 128))

    def encode_documents(self, clips: Sequence[Mapping[str, Content]]) -> list[dict[str, TokenEmbeddings]]:
        """Return token embeddings for each modality of each clip."""
        contents = [content for clip in clips for content in clip.values()]
        of_frames = iter(self._encode_frames([content.frames for content in contents if content.frames]))
        of_texts = iter(self._encode_texts([content.spans for content in contents if not content.frames]))
        results = iter([next(of_frames if content.frames else of_texts) for content in contents])
        return [{modality: next(results) for modality in clip} for clip in clips]

    def encode_queries(self, queries: Sequence[Query]) -> list[Floats]:
        """Return (Tq, dim) token embeddings for each query; an image is encoded as a frame is.

        Raises
        ------
        ConfigError
            If a query is empty, or has both a text and an image.
        """
        for query in queries:
            _check(query)
        of_images = iter(self._encode_pictures([query.image for query in queries if query.image]))
        pieces = [self._query_piece(query.text or "") for query in queries if not query.image]
        of_texts = iter(self._encode(pieces, [len(piece.ids) for piece in pieces], self._prepare_texts))
        return [next(of_images if query.image else of_texts).embeddings for query in queries]

    def query_tokens(self, query: Query) -> list[str]:
        """Return what each of a query's token embeddings stands for."""
        _check(query)
        if query.image and not self._prompt_tokens:
            prepared = self._prepare_pictures([query.image])
            [grid], num_patches = prepared.grids, int(prepared.kept.sum())
            places = [divmod(patch, grid[2]) for patch in range(num_patches)] if grid else range(num_patches)
            return [f"patch {place}" for place in places]
        ids = self._picture_inputs([query.image])["input_ids"][0] if query.image else self._query_ids(query.text or "")
        tokens: list[str] = self._tokenizer.convert_ids_to_tokens(ids)
        return tokens

    def _encode(
        self, items: Sequence[Item], lengths: Sequence[int], prepare: Callable[[Sequence[Item]], Prepared]
    ) -> list[TokenEmbeddings]:
        """Return each item's token embeddings, computed in batches of about as long ones."""
        results: dict[int, TokenEmbeddings] = {}
        batches = token_batches(lengths, self._batch_tokens)
        for batch, prepared in one_ahead(lambda batch: prepare([items[i] for i in batch]), batches):
            encoded = zip(self._embeddings(prepared), prepared.span_index, prepared.grids, strict=True)
            results |= {i: TokenEmbeddings(*of_item) for i, of_item in zip(batch, encoded, strict=True)}
        return [results[i] for i in range(len(items))]

    def _embeddings(self, prepared: Prepared) -> list[Floats]:
        import torch

        # On the CPU: the GPU need not be waited for to know how many there are.
        rows, columns = prepared.kept.nonzero(as_tuple=True)
        with torch.inference_mode():
            embeddings = self._forward(prepared.inputs)[self._moved(rows), self._moved(columns)]
            flat: Floats = torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()
        return np.split(flat, np.cumsum(prepared.kept.sum(1).numpy())[:-1])

    def _forward(self, inputs: Mapping[str, Any]) -> Any:
        if "video_grid_thw" not in inputs:
            return self._model(**inputs, **self._family.options).embeddings
        # ColQwen2's forward drops videos; this is what it does with images.
        vlm, placeholders = self._model.vlm, inputs["input_ids"] == self._model.config.vlm_config.video_token_id
        seen = vlm.visual(inputs["pixel_values"], grid_thw=inputs["video_grid_thw"], return_dict=True).pooler_output
        words = vlm.get_input_embeddings()(inputs["input_ids"])
        mixed = words.masked_scatter(placeholders.unsqueeze(-1), seen.to(words.dtype))
        rest = {name: inputs[name] for name in ("attention_mask", "position_ids") if name in inputs}
        return self._model(inputs_embeds=mixed, **rest, **self._family.options).embeddings

    def _mrope(self, inputs: Mapping[str, Any], **grids: Any) -> Any:
        """Return (3, B, T) positions in time, height and width; a patch of two frames is a second long."""
        ids, vlm = inputs["input_ids"], self._model.config.vlm_config
        kinds = (ids == vlm.image_token_id).int() + 2 * (ids == vlm.video_token_id).int()
        mask = inputs["attention_mask"]
        positions, _ = self._model.vlm.get_rope_index(ids, mm_token_type_ids=kinds, attention_mask=mask, **grids)
        return positions

    def _moved(self, tensor: Any) -> Any:
        return to_device(tensor, str(self._model.device))

    def _encode_frames(self, contents: Sequence[Sequence[Mapping[str, Any]]]) -> list[TokenEmbeddings]:
        encoded = [[frame["jpeg"] for frame in frames] for frames in contents]
        if self._frames == "video":
            lengths = [self._frame_length(_size(frames[0])) * -(-len(frames) // 2) for frames in encoded]
            return self._encode(encoded, lengths, self._prepare_videos)
        of_frames = iter(self._encode_pictures([frame for frames in encoded for frame in frames]))
        return [_joined([next(of_frames) for _ in frames]) for frames in encoded]

    def _encode_pictures(self, encoded: Sequence[bytes]) -> list[TokenEmbeddings]:
        return self._encode(
            encoded, [self._frame_length(_size(picture)) for picture in encoded], self._prepare_pictures
        )

    def _frame_length(self, size: tuple[int, int]) -> int:
        """Return how many tokens the processor makes of a picture of this width and height."""
        from PIL import Image

        if size not in self._frame_lengths:
            blank = self._process_images([_within_ratio(Image.new("RGB", size))])
            self._frame_lengths[size] = int(blank["input_ids"].shape[1])
        return self._frame_lengths[size]

    def _prepare_pictures(self, encoded: Sequence[bytes]) -> Prepared:
        inputs = self._picture_inputs(encoded)
        patches = self._family.patches(self._processor, inputs["input_ids"])
        kept = inputs["attention_mask"].bool() if self._prompt_tokens else patches
        shapes = self._family.grids(self._processor, inputs, patches)
        if self._positions == "mrope":
            inputs["position_ids"] = self._mrope(inputs, image_grid_thw=inputs["image_grid_thw"])
        return Prepared(
            {name: self._moved(tensor) for name, tensor in inputs.items()},
            kept,
            [np.zeros(count, np.int32) for count in kept.sum(1).tolist()],
            [(1, *shape) if shape and not self._prompt_tokens else None for shape in shapes],
        )

    def _picture_inputs(self, encoded: Sequence[bytes]) -> dict[str, Any]:
        return self._process_images(self._open(encoded))

    def _open(self, encoded: Sequence[bytes]) -> list[Any]:
        with ThreadPoolExecutor(self._num_threads) as threads:
            return [_within_ratio(picture) for picture in threads.map(open_picture, encoded)]

    def _process_images(self, pictures: list[Any]) -> dict[str, Any]:
        process = getattr(self._processor, "process_images", self._processor)
        options = {"images_kwargs": {"device": str(self._model.device)}, "text_kwargs": {"padding": True}}
        inputs = process(images=pictures, return_tensors="pt", **options)
        return {name: tensor for name, tensor in inputs.items() if name != "labels"}

    def _prepare_videos(self, clips: Sequence[Sequence[bytes]]) -> Prepared:
        """Pair each clip's frames, the last with itself if it has none (Qwen2-VL, arXiv:2409.12191, sec. 2.1)."""
        import torch

        seen = [self._see(self._open(frames)) for frames in clips]
        grids = torch.stack([grid for _, grid in seen])
        merge = self._processor.image_processor.merge_size
        shapes = [(pairs, rows // merge, columns // merge) for pairs, rows, columns in grids.tolist()]
        ids, mask = _padded([self._video_ids(math.prod(shape)) for shape in shapes], self._tokenizer.pad_token_id)
        patches = ids == self._model.config.vlm_config.video_token_id
        kept = mask.bool() if self._prompt_tokens else patches
        # What stands before the first patch belongs to the first frame, what stands after the last to the last pair.
        place = (patches.cumsum(1) - 1).clamp(min=0)
        pixels = torch.cat([pixels for pixels, _ in seen])
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "video_grid_thw": grids}
        if self._positions == "mrope":
            inputs["position_ids"] = self._mrope(inputs, video_grid_thw=grids)
        return Prepared(
            {name: self._moved(tensor) for name, tensor in inputs.items()},
            kept,
            [
                (2 * (place[i][kept[i]] // (rows * columns))).numpy().astype(np.int32)
                for i, (_, rows, columns) in enumerate(shapes)
            ],
            [None if self._prompt_tokens else shape for shape in shapes],
        )

    def _see(self, pictures: list[Any]) -> tuple[Any, Any]:
        """Return the patches of a clip's pictures, two pictures to a patch, and how many in time, height and width."""
        import torch

        pictures = [picture.resize(pictures[0].size) for picture in pictures]
        pictures += pictures[-1:] * (len(pictures) % 2)
        processor = self._processor.image_processor
        inputs = processor(images=pictures, return_tensors="pt", device=str(self._model.device))
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        # An image's patch holds it twice, (channels, 2, side, side): of each pair, the first takes the first half.
        halves = inputs["pixel_values"].view(len(pictures) // 2, 2, rows * columns, -1, 2, processor.patch_size**2)
        pairs = torch.stack([halves[:, 0, :, :, 0], halves[:, 1, :, :, 1]], dim=3)
        return pairs.flatten(2).flatten(0, 1), torch.tensor([len(pictures) // 2, rows, columns])

    def _video_ids(self, num_patches: int) -> list[int]:
        ids: list[int] = self._tokenizer(self._processor.visual_prompt_prefix)["input_ids"]
        at = ids.index(self._processor.image_token_id)
        return ids[:at] + [self._model.config.vlm_config.video_token_id] * num_patches + ids[at + 1 :]

    def _encode_texts(self, contents: Sequence[Sequence[Mapping[str, Any]]]) -> list[TokenEmbeddings]:
        of_contents = [self._pieces(spans) if self._text == "encode" else [] for spans in contents]
        pieces = [piece for of_content in of_contents for piece in of_content]
        encoded = iter(self._encode(pieces, [len(piece.ids) for piece in pieces], self._prepare_texts))
        return [self._text_embeddings([next(encoded) for _ in of_content]) for of_content in of_contents]

    def _text_embeddings(self, pieces: Sequence[TokenEmbeddings]) -> TokenEmbeddings:
        if not pieces:
            return TokenEmbeddings(np.zeros((0, self.dim), np.float32), np.zeros(0, np.int32))
        return TokenEmbeddings(
            np.concatenate([piece.embeddings for piece in pieces]),
            np.concatenate([piece.span_index for piece in pieces]),
        )

    def _pieces(self, spans: Sequence[Mapping[str, Any]]) -> list[Piece]:
        """Return the spans' joined text, tokenised once and cut, each part with all that goes with a document."""
        text, starts = join_spans(spans)
        own = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # By their last character: a word's token may begin with the space before it, which is of the span before.
        last = np.array([max(start, stop - 1) for start, stop in own["offset_mapping"]], dtype=np.int64)
        of_tokens = span_of(last, starts)
        head, tail = self._around_text
        pieces = []
        for first in range(0, len(of_tokens), self._max_text_tokens):
            ids = own["input_ids"][first : first + self._max_text_tokens]
            of_ids = of_tokens[first : first + self._max_text_tokens]
            if self._prompt_tokens:
                of_all = np.concatenate([of_ids[:1].repeat(len(head)), of_ids, of_ids[-1:].repeat(len(tail))])
                pieces.append(Piece([*head, *ids, *tail], slice(None), of_all))
            else:
                pieces.append(Piece([*head, *ids, *tail], slice(len(head), len(head) + len(ids)), of_ids))
        return pieces

    def _query_piece(self, text: str) -> Piece:
        ids = self._query_ids(text)
        return Piece(ids, slice(None), np.zeros(len(ids), np.int32))

    def _query_ids(self, text: str) -> list[int]:
        return self._family.query_ids(self._processor, text)

    def _prepare_texts(self, pieces: Sequence[Piece]) -> Prepared:
        import torch

        ids, mask = _padded([piece.ids for piece in pieces], self._tokenizer.pad_token_id)
        kept = torch.zeros_like(mask, dtype=torch.bool)
        for row, piece in zip(kept, pieces, strict=True):
            row[: len(piece.ids)][piece.kept] = True
        inputs = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self._processor.model_input_names:
            inputs["token_type_ids"] = torch.zeros_like(ids)  # ColPali's text is a prefix that sees itself both ways
        moved = {name: self._moved(tensor) for name, tensor in inputs.items()}
        return Prepared(moved, kept, [piece.span_index for piece in pieces], [None] * len(pieces))


def one_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[tuple[Item, Made]]:
    """Yield each item with what is made of it, the next being made meanwhile by another thread."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        before = None
        for item in items:
            making = thread.submit(make, item)
            if before is not None:
                yield before[0], before[1].result()
            before = item, making
        if before is not None:
            yield before[0], before[1].result()


def _family_of(model: str, frames: str, positions: str, max_pixels: int | None) -> Family:
    """Return the family of a model, or refuse what it cannot do."""
    model_type = read_config(Path(weights.resolve(model))).get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ModelError(
            f"model {model} is of type {model_type!r}; the encoder colpali takes {', '.join(FAMILIES)}. "
            "Others may load with encode.encoder=multivector"
        )
    for setting, what in ((f"frames={frames}", "takes no video"), (f"positions={positions}", "has no such positions")):
        if setting in ("frames=video", "positions=mrope") and model_type != COLQWEN2:
            raise ConfigError(f"{setting}, but model {model} ({model_type}) {what}; only {COLQWEN2} does. Leave it out")
    if max_pixels and family.limit_pixels is None:
        raise ConfigError(f"max_pixels={max_pixels}, but a {model_type} scales all pictures to one size; leave it out")
    return family


def _load_processor(processor: Any, model: str) -> Any:
    try:
        return processor.from_pretrained(weights.resolve(model))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {model} has no processor that {processor.__name__} loads: {error}") from error


def _check(query: Query) -> None:
    check_query(query, "colpali", image=True)
    if query.image:
        open_picture(query.image)  # says so if it is none


def _size(encoded: bytes) -> tuple[int, int]:
    """Return a picture's width and height, from its first bytes."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as picture:
        return picture.width, picture.height


def _within_ratio(picture: Any) -> Any:
    """Return a picture whose sides Qwen's processors do not refuse: none over 200 times the other."""
    width, height = picture.size
    fitting = max(width, -(-height // MAX_RATIO)), max(height, -(-width // MAX_RATIO))
    return picture if picture.size == fitting else picture.resize(fitting)


def _joined(frames: Sequence[TokenEmbeddings]) -> TokenEmbeddings:
    """Return the frames of a clip as one; their patches are a grid if those of all frames are the same."""
    counts = [len(frame.embeddings) for frame in frames]
    [grid, *others] = {frame.grid for frame in frames}
    return TokenEmbeddings(
        np.concatenate([frame.embeddings for frame in frames]),
        np.arange(len(frames)).repeat(counts).astype(np.int32),
        (len(frames), *grid[1:]) if grid and not others else None,
    )


def _padded(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Any, Any]:
    """Return (B, T) token ids, padded on the right, and their mask."""
    import torch

    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = torch.full(mask.shape, pad_id)
    padded[mask] = torch.tensor([token for ids in sequences for token in ids])
    return padded, mask.long()


def _around_text(tokenizer: Any, document: str) -> tuple[list[int], list[int]]:
    """Return the token ids before and after `MARK` in a document."""
    whole = tokenizer(document, return_offsets_mapping=True, return_special_tokens_mask=True)
    inside = range(document.rindex(MARK), document.rindex(MARK) + len(MARK))
    own = [
        i
        for i, ((first, _), special) in enumerate(
            zip(whole["offset_mapping"], whole["special_tokens_mask"], strict=True)
        )
        if first in inside and not special
    ]
    return whole["input_ids"][: own[0]], whole["input_ids"][own[-1] + 1 :]


def _query_of_processor(processor: Any, text: str) -> list[int]:
    ids: list[int] = processor.process_queries(text=[text])["input_ids"][0].tolist()
    return ids


def _neomme_query(processor: Any, text: str) -> list[int]:
    from jinja2 import TemplateError

    try:
        ids: list[int] = _neomme_chat(processor, text, "query", tokenize=True, return_dict=True)["input_ids"][0]
    except TemplateError as error:
        raise ConfigError(f"the model's chat template does not take the query {text!r}: {error}") from error
    return ids


def _neomme_chat(processor: Any, text: str, task: str, **options: Any) -> Any:
    conversation = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    return processor.apply_chat_template(conversation, task=task, **options)


def _image_tokens(processor: Any, ids: Any) -> Any:
    return ids == processor.image_token_id


def _neomme_patches(processor: Any, ids: Any) -> Any:
    """Return where patches stand: the image token right after the document token only opens the picture."""
    return _image_tokens(processor, ids) & (ids.roll(1, dims=1) != processor.tokenizer.document_token_id)


def _square(patches: Any) -> list[tuple[int, int] | None]:
    sides = [math.isqrt(count) for count in patches.sum(1).tolist()]
    return [(side, side) for side in sides]


def _qwen_grids(processor: Any, inputs: Mapping[str, Any], _: Any) -> list[tuple[int, int] | None]:
    merge = processor.image_processor.merge_size
    return [(rows // merge, columns // merge) for _, rows, columns in inputs["image_grid_thw"].tolist()]


def _tile_grids(processor: Any, _: Any, patches: Any) -> list[tuple[int, int] | None]:
    """Return a grid for pictures of one tile: others are cut in tiles, and the whole picture follows."""
    whole = (patches.sum(1) == processor.image_seq_len).tolist()
    return [grid if one_tile else None for grid, one_tile in zip(_square(patches), whole, strict=True)]


def _neomme_grids(processor: Any, inputs: Mapping[str, Any], patches: Any) -> list[tuple[int, int] | None]:
    rows = (inputs["input_ids"] == processor.tokenizer.row_token_id).sum(1)
    return [(int(r), int(count // r)) for r, count in zip(rows, patches.sum(1), strict=True)]


def _limit_qwen(pictures: Any, max_pixels: int) -> None:
    least = min(dict(pictures.size)["shortest_edge"], max_pixels)
    pictures.size = {"shortest_edge": least, "longest_edge": max_pixels}


def _limit_tiles(pictures: Any, max_pixels: int) -> None:
    tile = dict(pictures.max_image_size)["longest_edge"]
    pictures.size = {"longest_edge": max(1, math.isqrt(max_pixels) // tile) * tile}


def _limit_neomme(pictures: Any, max_pixels: int) -> None:
    pictures.size = {"min_pixels": 1, "max_pixels": max_pixels}


MARK = "text"
"""Stands for a text, to find what goes around it."""

MAX_RATIO = 200
"""Of a picture's sides."""

COLQWEN2 = "colqwen2"

OLD_NAMES = {
    r"^vlm\.language_model\.model\.": "vlm.language_model.",
    r"^vlm\.model\.(layers|embed_tokens|norm)\b": r"vlm.language_model.\1",
    r"^vlm\.model\.": "vlm.",
}
"""Of backbones in checkpoints that transformers before 5 saved; of ColQwen2 it knows one itself, of the others none."""

LANGUAGE_HEAD = r"vlm\.(language_model\.)?lm_head\.weight"
"""Checkpoints of older releases carry it; token embeddings are taken below it."""

FAMILIES = {
    "colpali": Family(
        "ColPaliForRetrieval",
        "ColPaliProcessor",
        _query_of_processor,
        lambda processor, text: f"{processor.tokenizer.bos_token}{text}",
        _image_tokens,
        lambda _, __, patches: _square(patches),
        {"use_cache": False},
    ),
    COLQWEN2: Family(
        "ColQwen2ForRetrieval",
        "ColQwen2Processor",
        _query_of_processor,
        lambda _, text: text,
        _image_tokens,
        _qwen_grids,
        {"use_cache": False},
        _limit_qwen,
    ),
    "colmodernvbert": Family(
        "ColModernVBertForRetrieval",
        "ColModernVBertProcessor",
        _query_of_processor,
        lambda _, text: text,
        _image_tokens,
        _tile_grids,
        {},
        _limit_tiles,
    ),
    "neomme": Family(
        "NeoMMEForRetrieval",
        "NeoMMEProcessor",
        _neomme_query,
        lambda processor, text: _neomme_chat(processor, text, "document", tokenize=False),
        _neomme_patches,
        _neomme_grids,
        {"output_dense": False},
        _limit_neomme,
    ),
}
