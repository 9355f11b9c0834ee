"""What the emulator alone shows of the CUDA kernels: results do not depend on the order of blocks
and threads, no access races, tickets return to 0, nothing out of bounds is touched."""

from __future__ import annotations

import subprocess
import sys

import emulated_cuda
import pytest
import torch
from emulated_cuda import emulator
from emulator_calls import CALLS, MORE_THAN_BLOCKS, SHAPES, results

from rlhf_fast.compiled import _rows

ELSEWHERE = [
    {"order": "reversed"},
    {"order": "shuffled", "seed": 1},
    {"order": "shuffled", "seed": 2, "workers": 4},
    {"order": "shuffled", "seed": 3, "workers": 4},
]


def same_bits(a, b):
    def bits(x):
        return x.reshape(-1).view(torch.uint8)

    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CALLS)
def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(name, shape):
    """Launchers, too: `emulated_cuda` checks the ticket after each of them."""
    before = emulated_cuda.launches()
    expected = results(name, shape)
    assert emulated_cuda.launches() > before
    assert not any(x.isnan().any() for x in expected), "an element that nobody wrote"
    for schedule in ELSEWHERE:
        with emulator(**schedule):
            assert same_bits(results(name, shape), expected), schedule


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, shape) for name in CALLS for shape in SHAPES),
        ("policy_loss", MORE_THAN_BLOCKS),
        ("value_loss", MORE_THAN_BLOCKS),
    ],
)
def test_no_accesses_race(name, shape):
    with emulator(races=True):
        results(name, shape)


@pytest.mark.parametrize("op", ["token_logprobs", "full_kl"])
def test_no_accesses_of_clusters_race(op):
    with emulator(races=True):
        results(op, (2, 8 * 16384 + 3))


@pytest.mark.parametrize("op", ["token_logprobs", "full_kl"])
def test_clusters_agree_with_single_blocks(op):
    # 8 blocks a row, and with one block fewer columns than a multiple of anything.
    shape = (2, 8 * 16384 + 3)
    shared = results(op, shape)
    with emulator(clusters=False):
        alone = results(op, shape)
    for x, y in zip(shared, alone, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6 * max(1, y.abs().max().item()))
    assert not same_bits(shared, alone), "no cluster was there"
    for schedule in ELSEWHERE[1:3]:
        with emulator(**schedule):
            assert same_bits(results(op, shape), shared), schedule


@pytest.mark.parametrize("name", CALLS)
def test_kernels_run_on_the_device_of_their_tensors_and_leave_the_current_one(name, monkeypatch):
    results(name, SHAPES[1])
    assert emulated_cuda.devices() == (0, 0)
    runner = _rows.runner
    monkeypatch.setattr(_rows, "runner", lambda x: (3, *runner(x)[1:]))
    results(name, SHAPES[1])
    assert emulated_cuda.devices() == (0, 3)


@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_out_of_bounds_is_touched(at_end):
    """All buffers lie between guard pages: an access beyond them ends the process."""
    places = [path for path in sys.path if path]
    code = (
        f"import sys; sys.path[:0] = {places!r};"
        "import emulated_cuda; emulated_cuda.install();"
        f"from emulator_calls import within_guards; within_guards({at_end})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert int(ended.stdout) > 0, "no kernel ran"
