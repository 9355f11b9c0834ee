"""What runs in vLLM's worker, which is another process where vLLM wants it so."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from rlhf_fast.models import sum_fp64


class WeightReceiver:
    """What vLLM's worker gains (`worker_extension_cls`): a full and repaired weight update."""

    def rf_process(self) -> int:
        """Id of the process that the worker runs in."""
        return os.getpid()

    def rf_load(self, weights: Iterable[tuple[str, Tensor]] | str) -> None:
        """Replaces all weights, from tensors or a safetensors file, in one reload.

        One, because a reload that is cut inside a fused layer (q, k, v) leaves garbage.
        """
        if isinstance(weights, str):
            weights = load_file(weights).items()
        # An error inside the reload would leave it open, and no later one would start: it ends
        # early instead, and the error follows.
        errors: list[Exception] = []
        self.reload_weights(weights_iterator=_up_to_an_error(weights, errors))  # type: ignore[attr-defined]
        if errors:
            raise errors[0]
        for module in self.model_runner.model.modules():  # type: ignore[attr-defined]
            # On a CPU a head that is tied to the embedding keeps a packed copy of the old weights.
            if hasattr(module, "cpu_linear") and hasattr(module, "org_vocab_size"):
                module.quant_method.process_weights_after_loading(module)

    def rf_sum(self) -> float | None:
        """The fp64 sum over all parameters, each once; None where some are packed away."""
        parameters = list(self.model_runner.model.parameters())  # type: ignore[attr-defined]
        if any(parameter.numel() == 0 for parameter in parameters):
            return None
        return math.fsum(sum_fp64(x.detach()) for x in parameters)


def _up_to_an_error(items: Iterable[Any], errors: list[Exception]) -> Iterator[Any]:
    try:
        yield from items
    except Exception as error:
        errors.append(error)
