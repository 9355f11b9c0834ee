"""Which tests of the ops run on emulated CUDA kernels; names are searched for as patterns."""

from __future__ import annotations

import re

import emulated_cuda
import pytest

CANNOT_APPLY = {
    r"opcheck": "it calls the registered ops, which run _C on CPU tensors",
    r"compiles_|one_graph": "torch.compile would trace the emulator's own wrapper of the launcher",
    r"real_vocabularies\[.*shape0|2_to_the_31": "70,000 blocks or 2^31 elements take many minutes",
}
WITHOUT_NOISE = {
    # At log-ratios of 1 nat the sum of p (u - 1) + q amplifies an error of ex2 four times.
    r"test_adversarial_": "their budgets count one rounding an exp, and 2 ulp are four",
    r"peaked_distributions_keep_their_bits": "the tolerance has no room for an ex2 off by 2 ulp",
}


def _among(patterns: dict[str, str], item: pytest.Item) -> bool:
    return any(re.search(pattern, item.nodeid) for pattern in patterns)


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what the first table above names."""
    left_out = [
        item for item in items if item.get_closest_marker("emulated") and _among(CANNOT_APPLY, item)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(autouse=True)
def _approximations(request):
    if request.node.get_closest_marker("emulated") and _among(WITHOUT_NOISE, request.node):
        with emulated_cuda.emulator(noise=False):
            yield
    else:
        yield
