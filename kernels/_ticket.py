"""How the last block of a launch knows that it is: a counter, at 0 between launches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_TICKETS: dict[tuple[int, int], Tensor] = {}


def ticket(device: torch.device) -> Tensor:
    """A counter at 0 for the launch that comes next on the current stream; int32 [1].

    On a GPU it is the stream's own, for good. In a CUDA graph it is the graph's, which may be
    replayed on any stream.
    """
    fresh = {"dtype": torch.int32, "device": device}
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, **fresh)
    stream = torch.cuda.current_stream(device)
    key = (device.index, stream.cuda_stream)
    if key not in _TICKETS:

        def allocate() -> Tensor:
            with torch.cuda.stream(stream):
                return torch.zeros(1, **fresh)

        # While torch.compile warms up for a CUDA graph, its pool takes what this thread allocates,
        # and may not hold what lives on. It doesn't take what others do.
        with ThreadPoolExecutor(1) as thread:
            _TICKETS[key] = thread.submit(allocate).result()
    return _TICKETS[key]
