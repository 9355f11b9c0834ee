"""One training run: its devices, its optimiser steps, its folder and its metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import get_scheduler

from rlhf_fast.config import ConfigError, _Config
from rlhf_fast.data import batch_indices

Metrics = dict[str, Tensor]


class Run:
    """What the three trainers share: accelerate, the optimiser, metrics.jsonl, a progress bar.

    Args:
        config: A stage's configuration.
        folder: Where config.yaml, metrics.jsonl and checkpoints go; None writes nothing.
        resume: Go on from the newest checkpoint in `folder`.

    Raises:
        ConfigError: The batch does not divide among the processes, or `folder` holds another run.
    """

    def __init__(self, config: _Config, folder: str | Path | None, *, resume: bool = False) -> None:
        self.config = config
        self.folder = None if folder is None else Path(folder)
        # accelerate keeps one precision a process; here each stage may have its own.
        AcceleratorState._reset_state()
        tracked = config.log_with if self.folder is not None else None
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, log_with=tracked, project_dir=self.folder
        )
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if config.micro_batch % self.world:
            raise ConfigError(
                f"micro-batches of {config.micro_batch} do not divide among {self.world} "
                "processes (batch sizes are global); make micro_batch_size a multiple of it"
            )
        set_seed(config.seed)
        self.step = 0
        self.history: list[dict[str, float]] = []
        if self.folder is not None:
            self._open(self.folder, resume)
        if tracked:
            self.accelerator.init_trackers("rlhf_fast", config.model_dump())

    def _open(self, folder: Path, resume: bool) -> None:
        self._metrics = folder / "metrics.jsonl"
        if self._metrics.exists() and not resume:
            raise ConfigError(
                f"run_dir {str(folder)!r} already holds a run; go on with resume=True, or name "
                "another folder"
            )
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(self.config.model_dump()))
            self._metrics.touch()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def optimizer(
        self, groups: list[dict[str, Any]], steps: int
    ) -> tuple[torch.optim.Optimizer, Any]:
        """AdamW over parameter `groups`, and its schedule over `steps` optimiser steps."""
        config = self.config
        optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )
        # The scheduler is stepped here once an optimiser step, so it is not prepared: accelerate
        # would step it once a process.
        schedule = get_scheduler(config.lr_schedule, optimizer, config.warmup_steps, steps)
        return optimizer, schedule

    def local(self, index: Tensor) -> Tensor:
        """This process's share of the global row numbers `index` [K]."""
        return index[self.rank :: self.world]

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over the processes."""
        return self.accelerator.reduce(x, "sum") if self.world > 1 else x

    def optimize(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        pieces: Iterable[Any],
        loss: Callable[[Any], tuple[Tensor, Metrics]],
    ) -> Metrics:
        """One optimiser step on `pieces`, the micro-batches of one global batch.

        `loss(piece)` is already divided by the global batch's normaliser, so that pieces and
        processes add up; metrics add up likewise (those that end in "max" take the maximum).
        """
        pieces = list(pieces)
        metrics: Metrics = {}
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            sync: AbstractContextManager[Any] = (
                nullcontext() if last else self.accelerator.no_sync(module)
            )
            with sync:
                value, parts = loss(piece)
                # Data parallelism averages gradients over processes; ours are parts of a sum.
                self.accelerator.backward(value * self.world)
            for name, part in parts.items():
                if name not in metrics:
                    metrics[name] = part
                elif name.endswith("max"):
                    metrics[name] = torch.maximum(metrics[name], part)
                else:
                    metrics[name] = metrics[name] + part
        if self.config.max_grad_norm is not None:
            norm = self.accelerator.clip_grad_norm_(module.parameters(), self.config.max_grad_norm)
            metrics["grad_norm"] = torch.as_tensor(norm) / self.world
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return metrics

    def reduce(self, metrics: Metrics) -> dict[str, float]:
        """Metrics of all processes as floats: summed, or the maximum where the name ends so."""
        if self.world > 1:
            metrics = {
                name: self.accelerator.gather(x.detach().float().to(self.device).reshape(1))
                for name, x in metrics.items()
            }
            metrics = {k: v.amax() if k.endswith("max") else v.sum() for k, v in metrics.items()}
        return {name: float(x) for name, x in metrics.items()}

    def log(self, metrics: dict[str, float]) -> None:
        """Appends `metrics` of the current step to the history, metrics.jsonl and the tracker."""
        row = {"step": float(self.step), **metrics}
        self.history.append(row)
        if not self.accelerator.is_main_process or self.folder is None:
            return
        with self._metrics.open("a") as file:
            # JSON has no NaN: a reader that is not Python would stop at it.
            safe = {k: v if math.isfinite(v) else None for k, v in row.items()}
            file.write(json.dumps(safe) + "\n")
        self.accelerator.log(metrics, step=self.step)

    def keep_samples(self, samples: Iterable[dict[str, Any]]) -> None:
        """Appends what the policy said at the current step to samples.jsonl."""
        if self.folder is not None and self.accelerator.is_main_process:
            with (self.folder / "samples.jsonl").open("a") as file:
                for sample in samples:
                    row = {"step": self.step, **sample}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def cut_history(self, step: int) -> None:
        """Forgets what was logged after `step`; the files in the folder lose those rows too."""
        if self.folder is None:
            return
        rows = [json.loads(line) for line in self._metrics.read_text().splitlines()]
        self.history = [row for row in rows if row["step"] <= step]
        if self.accelerator.is_main_process:
            for path in (self._metrics, self.folder / "samples.jsonl"):
                if path.exists():
                    lines = path.read_text().splitlines()
                    kept = [line for line in lines if json.loads(line)["step"] <= step]
                    path.write_text("".join(line + "\n" for line in kept))

    def steps(self, total: int, title: str, show: str) -> Iterator[int]:
        """Yields step numbers up to `total` from where the run stands, with a progress bar.

        Args:
            total: Steps in all.
            title: Shown before the bar.
            show: Name of the metric shown behind it.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
        )
        quiet = not self.accelerator.is_main_process
        with Progress(*columns, disable=quiet) as bar:
            task = bar.add_task(title, total=total, completed=self.step, shown="")
            for step in range(self.step, total):
                yield step
                last = self.history[-1].get(show) if self.history else None
                shown = "" if last is None else f"{show} {last:.3f}"
                bar.update(task, completed=step + 1, shown=shown)

    def finish(self) -> None:
        """Closes the trackers; not `end_training`, which ends the process group for good."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def count_steps(size: int, batch_size: int, epochs: float) -> int:
    """Optimiser steps of `epochs` passes over `size` rows, the last batch filled up.

    Raises:
        ConfigError: There are fewer rows than a batch holds.
    """
    if size < batch_size:
        raise ConfigError(
            f"batch_size = {batch_size} is more than the {size} rows of the data; make it at "
            f"most {size}"
        )
    return math.ceil(size * epochs / batch_size)


def pieces_of(run: Run, step: int, size: int) -> list[Tensor]:
    """Row numbers of the micro-batches of `step`, this process's share of each."""
    config = run.config
    index = batch_indices(step, size, config.batch_size, config.seed)
    return [run.local(piece) for piece in index.split(config.micro_batch)]
