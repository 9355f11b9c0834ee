"""One training run: its devices, its optimiser steps, its folder and its metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
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

CONFIG, METRICS, SAMPLES = "config.yaml", "metrics.jsonl", "samples.jsonl"
Metrics = dict[str, Tensor]


class Run:
    """What the three trainers share: accelerate, the optimiser, metrics.jsonl, a progress bar.

    Args:
        config: A stage's configuration.
        folder: Where config.yaml, metrics.jsonl and checkpoints go; None writes nothing.
        resume: Go on from the newest checkpoint in `folder`.

    Raises:
        ConfigError: The batch does not divide among the processes, `folder` holds another run, or
            the tracker of `log_with` is not installed.
    """

    def __init__(self, config: _Config, folder: str | Path | None, *, resume: bool = False) -> None:
        self.config = config
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self._check_folder(self.folder, resume)
        if config.log_with is not None:
            self._check_tracker(config.log_with)
        live = AcceleratorState._shared_state.get("_mixed_precision", config.mixed_precision)
        if live != config.mixed_precision:
            # accelerate keeps one precision a process; here each stage may have its own.
            AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=config.log_with,
            project_dir=self.folder,
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
        self._bar: Progress | None = None
        if config.log_with is not None:
            self.accelerator.init_trackers("rlhf_fast", config.model_dump())

    def _check_folder(self, folder: Path, resume: bool) -> None:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"run_dir {str(folder)!r} is a file; name a folder")
        metrics = folder / METRICS
        begun = metrics.exists() and metrics.stat().st_size > 0
        if not resume:
            if begun:
                raise ConfigError(
                    f"run_dir {str(folder)!r} already holds a run; go on with resume=True, or "
                    "name another folder"
                )
            return
        stored = folder / CONFIG
        if not stored.exists():
            return  # `checkpoint.restore` says what is missing
        # A field that is newer than the run has its default.
        before = {**type(self.config)().model_dump(), **yaml.safe_load(stored.read_text())}
        now = self.config.model_dump()
        changed = [
            f"{name}: {before.get(name)!r} -> {now[name]!r}"
            for name in now
            if before.get(name) != now[name] and name not in self.config.may_change
        ]
        if changed:
            raise ConfigError(
                f"the run in {str(folder)!r} was begun with another configuration "
                f"({'; '.join(changed)}); resume it with its own, in {stored}"
            )

    def _check_tracker(self, name: str) -> None:
        if self.folder is None:
            raise ConfigError(f"log_with = {name!r} needs a run_dir; name one")
        if find_spec(name) is None:
            raise ConfigError(f"log_with = {name!r}: `pip install {name}` brings it")

    def open_folder(self) -> Path:
        """The run's folder, made and described on first use: a failed start leaves nothing."""
        assert self.folder is not None
        if not (self.folder / CONFIG).exists() or not self.history:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / CONFIG).write_text(yaml.safe_dump(self.config.model_dump()))
        return self.folder

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        """In which layers compute, by `mixed_precision`."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return half.get(self.config.mixed_precision, torch.float32)

    def optimizer(
        self, groups: list[dict[str, Any]], steps: int
    ) -> tuple[torch.optim.Optimizer, Any]:
        """AdamW over what is trained of parameter `groups`, and its schedule over `steps` steps."""
        config = self.config
        optimizer = torch.optim.AdamW(
            [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups],
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
        if not self.accelerator.optimizer_step_was_skipped:  # fp16 skips where it overflowed
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

    def reduce_means(self, metrics: Metrics) -> dict[str, float]:
        """Means over all processes, of equal shares, or the maximum where the name ends so."""
        shares = {k: v if k.endswith("max") else v / self.world for k, v in metrics.items()}
        return self.reduce(shares)

    def log(self, metrics: dict[str, float]) -> None:
        """Appends `metrics` of the current step to the history, metrics.jsonl and the tracker.

        Raises:
            FloatingPointError: A metric is not finite: the weights are beyond repair.
        """
        row = {"step": float(self.step), **metrics}
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        # fp16 overflows now and then; accelerate skips such a step.
        if broken and not self.accelerator.optimizer_step_was_skipped:
            raise FloatingPointError(
                f"training broke down at step {self.step}: {broken[0]} is {metrics[broken[0]]}; "
                "lower learning_rate, or look at the scale of the rewards"
            )
        if self.accelerator.is_main_process and self.folder is not None:
            # JSON has no NaN: a reader that is not Python would stop at it.
            safe = {k: v if math.isfinite(v) else None for k, v in row.items()}
            self._append(METRICS, [safe])
            self.accelerator.log(metrics, step=self.step)
        self.history.append(row)

    def keep_samples(self, samples: Iterable[dict[str, Any]]) -> None:
        """Appends what the policy said at the current step to samples.jsonl."""
        if self.accelerator.is_main_process and self.folder is not None:
            self._append(SAMPLES, [{"step": self.step, **sample} for sample in samples])

    def _append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        with (self.open_folder() / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def cut_history(self, step: int) -> None:
        """Forgets what was logged after `step`; the files in the folder lose those rows too."""
        assert self.folder is not None
        for name in (METRICS, SAMPLES):
            path = self.folder / name
            rows = _read_rows(path) if path.exists() else []
            kept = [row for row in rows if row["step"] <= step]
            if name == METRICS:
                self.history = kept
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process and path.exists():
                path.unlink()
                self._append(name, kept)

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
            self._bar = bar
            try:
                for step in range(self.step, total):
                    yield step
                    last = self.history[-1].get(show) if self.history else None
                    shown = "" if last is None else f"{show} {last:.3f}"
                    bar.update(task, completed=step + 1, shown=shown)
            finally:
                self._bar = None

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A second bar under that of `steps`, which the function it gives moves forward."""
        bar = self._bar
        if bar is None:
            yield lambda count: None
            return
        task = bar.add_task(f"  {title}", total=total, shown="")
        try:
            yield lambda count: bar.advance(task, count)
        finally:
            bar.remove_task(task)

    def finish(self) -> None:
        """Closes the trackers; not `end_training`, which ends the process group for good."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line that was cut off by the end of a run is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
