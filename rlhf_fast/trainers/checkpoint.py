"""Checkpoints that all trainers share: written whole or not at all, read back to the bit."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_fast.config import ConfigError
from rlhf_fast.trainers.run import Run

# A tied head is one tensor under two names; accelerate warns at each save that it keeps one.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    found = (folder / "checkpoints").glob("step-*")
    named = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in found)
    return sorted((int(match[1]), path) for match, path in named if match)


def save(run: Run, state: dict[str, Any], export: Callable[[Path], None]) -> Path | None:
    """Writes `checkpoints/step-<n>` in the run's folder.

    It holds accelerate's state (weights, optimiser, random generators), `state` as JSON, and in
    `model/` what `export` writes there: a folder that `from_pretrained` loads.

    Returns:
        The folder, or None for a run that writes nothing.
    """
    if run.folder is None:
        return None
    final = run.open_folder() / "checkpoints" / f"step-{run.step}"
    # Renamed when complete: a run that dies while writing leaves no half checkpoint to resume.
    partial = final.with_name(final.name + ".partial")
    run.accelerator.save_state(str(partial))
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        export(partial / "model")
        (partial / "trainer.json").write_text(json.dumps({"step": run.step, **state}) + "\n")
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
    run.accelerator.wait_for_everyone()
    return final


def restore(run: Run) -> dict[str, Any]:
    """Loads the newest checkpoint into what the run's accelerator prepared.

    Rows of metrics.jsonl after the checkpoint's step are cut off: those steps run again.

    Returns:
        The `state` that was saved with it.

    Raises:
        ConfigError: There is no checkpoint.
    """
    found = [] if run.folder is None else _steps(run.folder)
    if run.folder is None or not found:
        raise ConfigError(
            f"nothing to resume in {str(run.folder)!r}: it holds no checkpoint; set save_every "
            "in the first run, or start without resume"
        )
    step, folder = found[-1]
    try:
        run.accelerator.load_state(str(folder))
        state = json.loads((folder / "trainer.json").read_text())
    except Exception as error:
        raise ConfigError(
            f"{folder} cannot be resumed: {type(error).__name__}: {str(error)[:300]}. Either "
            "model or critic are not those of the run, or the checkpoint is damaged: then delete "
            "its folder, and the one before it is taken"
        ) from error
    run.step = step
    run.cut_history(step)
    return state
