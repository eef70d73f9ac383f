"""The loop of training, alike for all systems: what runs on each worker of Ray Train.

What a step does depends on the seed and on its number only: which examples it takes, its random numbers, its learning rate.
So a checkpoint holds weights, the optimiser's state and the number of steps done, and a run that was killed ends with the
weights of one that was not. Batches are the whole cluster's; a worker takes its part of each, so that the number of
workers changes speed, not what is learned.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipelines.config import TrainConfig
from pipelines.train_tasks import Measured, Task

CHECKPOINT = "training.pt"


@dataclass(frozen=True)
class Schedule:
    """Steps and their learning rates.

    Attributes
    ----------
    trained, held_out
        Places of examples.
    batch
        Examples in a step, of all workers.
    """

    trained: Sequence[int]
    held_out: Sequence[int]
    batch: int
    config: TrainConfig
    learning_rate: float

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the examples; what is left over takes part in other epochs."""
        return len(self.trained) // self.batch

    @property
    def num_steps(self) -> int:
        """Steps of all epochs."""
        return self.steps_per_epoch * self.config.epochs

    def rows(self, step: int) -> list[int]:
        """Return the examples of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.trained))
        return [self.trained[i] for i in order[place * self.batch : (place + 1) * self.batch]]

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: up to its most over the warm-up, then down to 0, in straight lines."""
        warmup = math.ceil(self.config.warmup * self.num_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * (self.num_steps - step) / (self.num_steps - warmup)

    def is_due(self, done: int) -> bool:
        """Return whether a checkpoint is written after so many steps."""
        return done % (self.config.checkpoint_steps or self.steps_per_epoch) == 0 or done == self.num_steps


Report = Callable[[dict[str, Any], Path | None], None]
"""What is told after a checkpoint's steps, and the folder that holds it; None on all workers but the first."""


def fit(
    task: Task,
    model: Any,
    schedule: Schedule,
    report: Report,
    restored: Path | None = None,
    rank: int = 0,
    num_workers: int = 1,
) -> list[float]:
    """Train a task and return the mean loss between checkpoints.

    Parameters
    ----------
    task
        With its module as at the start.
    model
        That module, wrapped where there are more workers.
    schedule
        What each step takes.
    report
        Called on every worker after a checkpoint's steps.
    restored
        Folder of the checkpoint to go on from.
    rank, num_workers
        Which worker this is, of how many.
    """
    trainable = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
    config = schedule.config
    optimizer = torch.optim.AdamW(trainable, lr=schedule.learning_rate, weight_decay=config.weight_decay)
    first, history = _restore(restored, task.module, optimizer) if restored else (0, [])
    part = schedule.batch // num_workers
    recent: list[torch.Tensor] = []
    for step in range(first, schedule.num_steps):
        torch.manual_seed(config.seed * 1_000_003 + step * num_workers + rank)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = task.loss(model, schedule.rows(step), slice(rank * part, (rank + 1) * part))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, config.clip_norm)
        optimizer.step()
        recent.append(loss.detach())
        if schedule.is_due(step + 1):
            history, recent = [*history, _mean(recent, num_workers)], []
            _checkpoint(report, task.module, optimizer, step + 1, history, rank)
    return history


def _mean(recent: Sequence[torch.Tensor], num_workers: int) -> float:
    mean = torch.stack(list(recent)).mean()
    if num_workers > 1:
        torch.distributed.all_reduce(mean)
    return float(mean) / num_workers


def _checkpoint(
    report: Report, module: nn.Module, optimizer: Any, done: int, history: Sequence[float], rank: int
) -> None:
    metrics = {"step": done, "loss": history[-1]}
    if rank:
        report(metrics, None)
        return
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    with tempfile.TemporaryDirectory() as folder:
        content = {"done": done, "history": list(history), "optimizer": optimizer.state_dict(), "weights": trained}
        torch.save(content, Path(folder) / CHECKPOINT)
        report(metrics, Path(folder))


def _restore(folder: Path, module: nn.Module, optimizer: Any) -> tuple[int, list[float]]:
    """Fill module and optimiser, and return how many steps are done and the losses so far."""
    content = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, weight in content["weights"].items():
            parameters[name].copy_(weight)
    optimizer.load_state_dict(content["optimizer"])
    return content["done"], content["history"]


def train_on_worker(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Train on one worker of Ray Train; the first writes the head and returns what was measured before and after.

    Parameters
    ----------
    settings
        ``plan`` of the task, ``schedule``, and ``head``, the folder to write.
    """
    import ray.train
    import ray.train.torch

    schedule: Schedule = settings["schedule"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    torch.set_num_threads(schedule.config.resources.num_threads)
    torch.manual_seed(schedule.config.seed)
    task: Task = settings["plan"].make(ray.train.torch.get_device())
    before = task.measure(schedule.held_out) if rank == 0 else None
    model = ray.train.torch.prepare_model(task.module)

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        saved = ray.train.Checkpoint.from_directory(str(folder)) if folder else None
        ray.train.report(metrics, checkpoint=saved, checkpoint_dir_name=f"step-{metrics['step']:08d}")

    latest = ray.train.get_checkpoint()
    restored = Path(latest.path) if latest else None
    history = fit(task, model, schedule, report, restored, rank, context.get_world_size())
    if before is None:
        return None
    task.save(settings["head"])
    after: Measured = task.measure(schedule.held_out)
    return {"losses": history, "before": before, "after": after}
