"""What each system trains, on one worker: its module, a batch's loss, how held-out pairs find each other, its head.

A task knows nothing of steps, optimisers or checkpoints, and the loop (`pipelines.train_loop`) nothing of systems.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cluster.store import MODALITIES, Store
from operators import losses, schema
from operators.alignment import VisualTokens, alignment_loss, gathered, hits_and_gains
from operators.encoders import Content, Query, to_device
from operators.errors import ConfigError
from operators.heads import TRAINED_BETWEEN, build_head, check_towers, open_head, save_head, trained_between
from pipelines.config import ClamrConfig, TowersConfig, TrainConfig
from pipelines.train_examples import Examples
from pipelines.train_features import Features, Kind

EVALUATION_ROWS = 64
"""Queries, and documents, encoded or scored at a time on held-out pairs."""

Measured = dict[str, dict[str, list[Any]]]
"""Of each direction: ``group``, ``R@1``, ``nDCG@10`` and ``chance`` (of R@1) of each query."""


class Task(Protocol):
    """What the loop trains."""

    module: nn.Module

    def loss(self, model: Any, rows: Sequence[int], own: slice) -> Tensor:
        """Return the loss of this worker's part of a batch; ``model`` is `module`, wrapped where there are more workers."""
        ...

    def measure(self, rows: Sequence[int]) -> Measured:
        """Return how well held-out examples find each other."""
        ...

    def save(self, folder: Path) -> None:
        """Write what was trained, for ``encode``."""
        ...


@dataclass(frozen=True)
class AlignmentPlan:
    """What an `AlignmentTask` is made from."""

    system: str
    examples: Examples
    features: Mapping[Kind, Features]
    towers: TowersConfig
    train: TrainConfig

    def make(self, device: torch.device) -> AlignmentTask:
        """Return the task on a device."""
        return AlignmentTask(self, device)


class AlignmentTask:
    """FLMR's mapping network or MIRe's pooling, between cached features of frozen towers."""

    def __init__(self, plan: AlignmentPlan, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._examples, self._features = plan.examples, plan.features
        self._guided = plan.system == "mire"
        if plan.towers.head is not None:
            self._config, head = open_head(plan.towers.head, plan.system)
            check_towers(self._config, plan.towers.head, plan.towers.text_model, plan.towers.vision_model)
        else:
            self._config = self._new_head()
            head = build_head(self._config)
        self.module = VisualTokens(head.train(), self._guided).to(device)

    def _new_head(self) -> dict[str, Any]:
        vectors = self._features["pictures"].rows("vectors", [0])
        passages, _ = self._features["passages"].texts([0])
        towers, train = self._plan.towers, self._plan.train
        shape = {"num_tokens": train.num_tokens} | ({"num_heads": train.num_heads} if self._guided else {})
        return {name: value for name, value in shape.items() if value is not None} | {
            "system": self._plan.system,
            "vision_dim": vectors.shape[1],
            "dim": passages.shape[2],
            TRAINED_BETWEEN: trained_between(towers.text_model, towers.vision_model),
        }

    def loss(self, model: Any, rows: Sequence[int], own: slice) -> Tensor:
        """Return the loss of the pictures ``rows[own]`` among the passages of all rows."""
        batch = [self._examples.rows[row] for row in rows]
        negatives = [(place, document) for place, row in enumerate(batch) for document in row.negatives]
        documents = [row.document for row in batch] + [document for _, document in negatives]
        owner = torch.tensor([*range(len(batch)), *(place for place, _ in negatives)], device=self._device)
        groups = np.array([row.group for row in batch])[owner.cpu().numpy()]
        of_document = np.array(documents)
        # A negative is one of its own query; to others of that group it is as much one as any other passage.
        is_positive = np.arange(len(documents)) < len(batch)
        same = (groups[:, None] == groups[None, :]) & is_positive | (of_document[:, None] == of_document[None, :])
        passages, mask = self._texts("passages", documents)
        train = self._plan.train
        return alignment_loss(
            model(*self._pictures([rows[place] for place in range(len(rows))[own]])),
            passages,
            mask,
            torch.from_numpy(same).to(self._device),
            owner,
            own.start,
            self._plan.system,
            train.temperature,
            train.both_ways,
        )

    def measure(self, rows: Sequence[int]) -> Measured:
        """Return how pictures find their texts, and texts their frames, among those of the held-out examples."""
        held = [self._examples.rows[row] for row in rows]
        pictures = list(dict.fromkeys((row.picture, row.query) for row in held))
        texts = list(dict.fromkeys(row.document for row in held))
        places = {(row.picture, row.query): place for row, place in zip(held, rows, strict=True)}
        pairs = {((row.picture, row.query), row.document) for row in held}
        relevant = np.array([[(picture, text) in pairs for text in texts] for picture in pictures])
        scores, back = self._score([places[picture] for picture in pictures], texts)
        of_picture = [self._examples.rows[places[picture]].group for picture in pictures]
        of_text = [next(row.group for row in held if row.document == text) for text in texts]
        return {
            "image to text": _measured(scores, relevant, of_picture),
            "text to frame": _measured(back, relevant.T, of_text),
        }

    @torch.no_grad()
    def _score(self, rows: Sequence[int], texts: Sequence[int]) -> tuple[Any, Any]:
        """Return MaxSim of pictures to texts, (P, T), and of texts to pictures, (T, P)."""
        tokens = torch.cat([self.module(*self._pictures(part)) for part in _parts(rows)])
        real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=self._device)
        to_text, to_picture = [], []
        for part in _parts(texts):
            passages, mask = self._texts("passages", part)
            to_text.append([losses.masked_maxsim(of, passages, mask) for of in tokens.split(EVALUATION_ROWS)])
            to_picture.append(
                [
                    losses.masked_maxsim(passages, of, known, mask)
                    for of, known in zip(tokens.split(EVALUATION_ROWS), real.split(EVALUATION_ROWS), strict=True)
                ]
            )
        forth = torch.cat([torch.cat(of_part) for of_part in to_text], dim=1)
        back = torch.cat([torch.cat(of_part, dim=1) for of_part in to_picture])
        return forth.double().cpu().numpy(), back.double().cpu().numpy()

    def save(self, folder: Path) -> None:
        """Write the head."""
        save_head(folder, self._config, self.module.head)

    def _pictures(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        chosen = [self._examples.rows[row] for row in rows]
        pictures = [row.picture for row in chosen]
        vectors = self._moved(self._features["pictures"].rows("vectors", pictures))
        if not self._guided:
            return vectors, None, None, None
        guide, mask = self._texts("guides", [row.query for row in chosen])
        return vectors, self._moved(self._features["pictures"].rows("patches", pictures)), guide, mask

    def _texts(self, kind: Kind, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        tokens, mask = self._features[kind].texts(places)
        return self._moved(tokens), torch.from_numpy(mask).to(self._device)

    def _moved(self, array: npt.NDArray[np.float16]) -> Tensor:
        return torch.from_numpy(array).to(self._device).float()


@dataclass(frozen=True)
class ClamrPlan:
    """What a `ClamrTask` is made from; ``head`` is that to start from, None for the checkpoint's own."""

    examples: Examples
    store: Store
    version: int
    clamr: ClamrConfig
    train: TrainConfig
    head: str | None

    def make(self, device: torch.device) -> ClamrTask:
        """Return the task on a device."""
        return ClamrTask(self, device)


class Pairs(nn.Module):
    """A model that takes queries and documents in one call, as DDP wants it; what is trained of it is float32."""

    def __init__(self, model: nn.Module, precision: torch.dtype) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, queries: Mapping[str, Tensor], documents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return embeddings of both, (B, L, dim) each."""
        device = queries["input_ids"].device.type
        with torch.autocast(device, self.precision, enabled=self.precision != torch.float32):
            return self.model(queries), self.model(documents)


class ClamrTask:
    """CLaMR's head, trained whole, and LoRA adapters of its backbone's language model.

    CLaMR's released settings adapt the head by LoRA too, and save none of its own weights.
    """

    ADAPTED = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"

    def __init__(self, plan: ClamrPlan, device: torch.device) -> None:
        from operators.clamr_model import load_model
        from operators.encoder_clamr import ChatTurns

        self._plan, self._device = plan, device
        clamr = plan.clamr
        turns = clamr.model_dump(exclude={"model", "base", "head", "precision", "attention", "context"})
        self._turns = ChatTurns(clamr.model, clamr.base, context="joint", device=str(device), **turns)
        self._clamr = load_model(clamr.model, clamr.base, plan.head, clamr.precision, clamr.attention)
        self.module = Pairs(self._with_adapters(), getattr(torch, clamr.precision)).to(device)
        self._rows = self._row_ids()

    def _with_adapters(self) -> nn.Module:
        rank = self._plan.train.lora_rank
        self._clamr.requires_grad_(False)
        model: nn.Module = self._clamr
        if rank:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=rank, lora_alpha=rank, lora_dropout=0.1, init_lora_weights="gaussian", target_modules=self.ADAPTED
            )
            model = get_peft_model(model, config)
            # A third more time; without it 2,000 tokens of a clip keep the activations of every layer.
            self._clamr.model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        self._clamr.custom_text_proj.float().requires_grad_(True)  # bfloat16 would round small steps away
        return model

    def _row_ids(self) -> dict[str, list[int]]:
        table = self._plan.store.open(MODALITIES, self._plan.version)
        rows = table.scanner(columns=["video_id", "clip"], with_row_id=True).to_table().to_pylist()
        found: dict[str, list[int]] = {}
        for row in rows:
            found.setdefault(json.dumps([row["video_id"], row["clip"]]), []).append(row["_rowid"])
        return found

    def loss(self, model: Any, rows: Sequence[int], own: slice) -> Tensor:
        """Return the loss of the queries ``rows[own]`` among the clips of all workers."""
        whole = [self._plan.examples.rows[row] for row in rows]
        batch = whole[own]
        # Each worker encodes as many negatives, so that their rows can be gathered: those of its own examples, the first
        # again where one has fewer than another.
        most = max(len(row.negatives) for row in whole)
        of_row = [
            [row.document, *(list(row.negatives or (row.document,)) * most)[:most]] if most else [row.document]
            for row in whole
        ]
        order = [document for column in zip(*of_row[own], strict=True) for document in column]
        queries, documents = self._queries([row.query for row in batch]), self._documents(order)
        asked, found = model(queries, documents)
        everything, modality = self._gathered(found, documents["modality"])
        # As gathered: for each worker, its positives, then its negatives.
        size = own.stop - own.start
        held = [
            (place, document)
            for first in range(0, len(whole), size)
            for column in zip(*of_row[first : first + size], strict=True)
            for place, document in enumerate(column, start=first)
        ]
        positive = torch.arange(size) + own.start * (most + 1)
        groups = np.array([row.group for row in whole])
        keys = np.array([document for _, document in held])
        same = keys[None, :] == np.array([row.document for row in batch])[:, None]
        is_positive = np.tile(np.arange(size * (most + 1)) < size, len(whole) // size)
        # What stands in for missing negatives, and clips given more than once, count once.
        same |= ~np.isin(np.arange(len(keys)), np.unique(keys, return_index=True)[1])
        same |= (groups[[place for place, _ in held]][None, :] == groups[own][:, None]) & is_positive
        scores = losses.modality_scores(
            asked,
            everything,
            modality,
            len(schema.MODALITIES),
            self._plan.train.aggregation,
            queries["modality"] >= 0,
        )
        temperature = self._plan.train.temperature or losses.CLAMR_TEMPERATURE
        gold = torch.tensor([row.modality for row in batch], device=self._device)
        return losses.LOSSES[self._plan.train.loss](
            scores, positive.to(self._device), gold, temperature, torch.from_numpy(same).to(self._device)
        )

    def _gathered(self, embeddings: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
        """Return the documents of all workers, as wide as the widest, and the modality of their tokens."""
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return embeddings, modality
        width = torch.tensor(embeddings.shape[1], device=self._device)
        torch.distributed.all_reduce(width, op=torch.distributed.ReduceOp.MAX)
        missing = int(width) - embeddings.shape[1]
        padded = nn.functional.pad(embeddings, (0, 0, missing, 0))
        return gathered(padded), gathered(nn.functional.pad(modality, (missing, 0), value=-1).int())

    @torch.no_grad()
    def measure(self, rows: Sequence[int]) -> Measured:
        """Return how queries find their clips among those of the held-out examples, by MaxSim over all modalities."""
        held = [self._plan.examples.rows[row] for row in rows]
        queries = list(dict.fromkeys(row.query for row in held))
        clips = list(dict.fromkeys(row.document for row in held))
        pairs = {(row.query, row.document) for row in held}
        scores = np.zeros((len(queries), len(clips)))
        self.module.eval()
        for part in _parts(range(len(clips)), 4):
            documents = self._documents([clips[place] for place in part])
            for asked in _parts(range(len(queries)), 16):
                batch = self._queries([queries[place] for place in asked])
                asking, found = self.module(batch, documents)
                of_pair = losses.masked_maxsim(asking, found, documents["modality"] >= 0, batch["modality"] >= 0)
                scores[np.ix_(asked, part)] = of_pair.cpu().numpy()
        self.module.train(self._plan.train.lora_rank > 0)
        relevant = np.array([[(query, clip) in pairs for clip in clips] for query in queries])
        groups = [next(row.group for row in held if row.query == query) for query in queries]
        return {"text to clip": _measured(scores, relevant, groups)}

    def save(self, folder: Path) -> None:
        """Write the head, and the adapter where there is one."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        head = {
            f"custom_text_proj.{name}": tensor.detach().float().cpu().contiguous()
            for name, tensor in self._clamr.custom_text_proj.state_dict().items()
        }
        save_file(head, folder / "head.safetensors")
        model = Path(self._plan.clamr.model).expanduser()
        config = {"system": "clamr", "base": str(model.resolve()) if model.exists() else self._plan.clamr.model}
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        if self._plan.train.lora_rank:
            self.module.model.peft_config["default"].base_model_name_or_path = config["base"]  # type: ignore
            self.module.model.save_pretrained(str(folder))  # type: ignore[operator]

    def _queries(self, places: Sequence[int]) -> dict[str, Tensor]:
        turns = [self._turns.query(Query(self._plan.examples.queries[place])) for place in places]
        return self._moved(self._clamr.collate(turns))

    def _documents(self, places: Sequence[int]) -> dict[str, Tensor]:
        keys = [self._plan.examples.documents[place] for place in places]
        distinct = list(dict.fromkeys(keys))
        row_ids = [row_id for key in distinct for row_id in self._rows[key]]
        columns = ["modality", "start_seconds", "spans", "frames", "audio"]
        rows = iter(self._plan.store.take(MODALITIES, self._plan.version, row_ids, columns).to_pylist())
        turns = {}
        for key in distinct:
            of_clip = [next(rows) for _ in self._rows[key]]
            clip = {
                row["modality"]: Content(
                    row["spans"] or (), row["frames"] or (), row["audio"], row["start_seconds"] or 0.0
                )
                for row in of_clip
            }
            of_document = self._turns.documents(clip)
            if not of_document:
                raise ConfigError(f"the clip {key} holds nothing to be found by; leave it out of the examples")
            [turns[key]] = of_document
        return self._moved(self._clamr.collate([turns[key] for key in keys]))

    def _moved(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: to_device(tensor, str(self._device)) for name, tensor in batch.items()}


def _measured(scores: Any, relevant: Any, groups: Sequence[str]) -> dict[str, list[Any]]:
    hits, gains = hits_and_gains(scores, relevant)
    return {
        "group": list(groups),
        "R@1": hits.tolist(),
        "nDCG@10": gains.tolist(),
        "chance": relevant.mean(axis=1).tolist(),
    }


def _parts(places: Sequence[int], size: int = EVALUATION_ROWS) -> list[Sequence[int]]:
    return [places[first : first + size] for first in range(0, len(places), size)]
