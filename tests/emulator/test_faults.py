"""The emulator finds planted faults: tests/emulator/faults.cu has the kernels."""

from __future__ import annotations

import ctypes
import re
import signal
import subprocess
import sys

import emulated_cuda
import pytest
import torch
from emulated_cuda import emulator


def run(fault, data, *, ticket=None, blocks=1, threads=64, cluster=1):
    """What the launch of the kernel with that fault threw, or ""."""
    ticket = torch.zeros(1, dtype=torch.int32) if ticket is None else ticket
    function = emulated_cuda.library("faults").run_fault
    function.restype = ctypes.c_char_p
    pointers = ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(ticket.data_ptr())
    return function(fault.encode(), *pointers, blocks, threads, cluster).decode()


def data(n=4096):
    return torch.zeros(n)


def test_a_kernel_without_fault_runs():
    x = data()
    assert run("none", x, blocks=8) == ""
    assert x[8] == 8


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("barrier of some threads", r"a thread returned while others wait at a barrier"),
        ("two barriers", r"__syncthreads is divergent: threads are at .*\d and at .*\d"),
        ("barrier against shuffle", "deadlock: some threads wait at .*faults.cu"),
        ("shuffle of some lanes", "a thread returned while others wait at a warp operation"),
        ("shuffle with a partial mask", "without the whole warp: its mask names 16 lanes"),
        ("misaligned vector", r"misaligned access at .*: .*float4' .*no multiple of 16"),
        ("shared memory of no block", "shared memory of block 8 of a cluster of 1"),
    ],
)
def test_what_a_gpu_would_not_survive_is_an_error(fault, message):
    found = run(fault, data())
    assert re.search(message, found), found
    assert run("none", data()) == "", "the next launch is none the worse"


def test_a_warp_that_is_not_full_has_no_shuffles():
    assert "lanes of 16" in run("shuffle of some lanes", data(), threads=16)


def test_blocks_missing_at_a_clusters_barrier_are_an_error():
    found = run("cluster without some blocks", data(), blocks=4, cluster=2)
    assert "which not all blocks reach" in found


@pytest.mark.parametrize(
    "launch",
    [{"blocks": 0}, {"threads": 0}, {"threads": 1025}, {"blocks": 3, "cluster": 2},
     {"blocks": 16, "cluster": 16}],
)  # fmt: skip
def test_bad_launches_are_refused_as_on_a_gpu(launch):
    assert "launching the kernel: invalid configuration argument" in run("none", data(), **launch)


def test_clusters_need_a_machine_that_has_them():
    with emulator("faults", clusters=False):
        assert "operation not supported" in run("none", data(), blocks=2, cluster=2)


def test_another_order_of_threads_shows_a_missing_barrier():
    found = set()
    for order in emulated_cuda.ORDERS:
        x = data(64)
        with emulator("faults", order=order, seed=1):
            assert run("missing barrier", x) == ""
        found.add(tuple(x.tolist()))
    assert len(found) > 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing barrier", "nobody has written the shared memory read at .*faults.cu"),
        (
            "shuffle for a barrier",
            r"shared memory: written at .*faults.cu:\d+ by thread \d+ of block 0, "
            r"read at .*faults.cu:\d+ by thread \d+ of block 0, and nothing orders",
        ),
        ("barrier on one side", r"shared memory: written at .*:(\d+) by .*, read at .*:(?!\1\b)"),
        ("one word for all", "race for memory: written at .*thread 0 of block 0, written"),
        ("what nobody wrote", "nobody has written the shared memory read at .*faults.cu"),
        ("struct without a barrier", "race for shared memory: .*nothing orders"),
    ],
)
def test_accesses_of_a_block_that_no_barrier_orders_are_races(fault, message):
    with emulator("faults", races=True):
        found = run(fault, data())
    assert re.search(message, found), found
    assert run(fault, data()) == "", "it is only looked for where it is asked for"


@pytest.mark.parametrize("fault", ["arrival before the work", "no wait before the next"])
def test_accesses_of_a_cluster_that_its_barriers_do_not_order_are_races(fault):
    for order in emulated_cuda.ORDERS:
        with emulator("faults", races=True, order=order, seed=1):
            found = run(fault, data(), blocks=2, cluster=2)
        assert re.search("race for shared memory: .*of block [01], .*of block [01], and", found)


def test_a_block_that_ends_while_its_shared_memory_is_in_use_is_an_error():
    for order in emulated_cuda.ORDERS:
        with emulator("faults", races=True, order=order, seed=1):
            found = run("no wait before the end", data(), blocks=2, cluster=2)
        assert re.search("a block that has ended is used at|may end before .* is used at", found)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ticket without a fence", "written at .*thread 1 of block 0, read .*thread 0 of block 7,"),
        ("no fence after the ticket", "thread 1 of block 0, read at .*thread 0 of block 7,"),
        ("fence in another thread", "thread 1 of block 0, read at .*thread 1 of block 7,"),
        ("no barrier before the ticket", "thread 1 of block 0, read at .*thread 0 of block 7,"),
        ("ticket before the work", "thread 0 of block 0, read at .*thread 0 of block 7,"),
        ("ticket that is not atomic", "of block 0, .* by thread 0 of block 1,"),
        ("plain read of the ticket", "changed by an atomic operation at .*0, read .* of block 1,"),
        ("third read", "read at .*thread 0 of block 1, written .*thread 0 of block 2,"),
    ],
)
def test_accesses_of_blocks_that_no_ticket_orders_are_races(fault, message):
    """Run one after the other, so that nothing goes wrong."""
    with emulator("faults", races=True):
        found = run(fault, data(), blocks=3 if fault == "third read" else 8)
    assert re.search("race for memory: .*" + message, found), found


@pytest.mark.parametrize(
    "launch",
    [
        ("none", {"blocks": 8}),
        ("barriers on both sides", {"blocks": 3}),
        ("halves of a word", {}),
        ("struct", {}),
        ("bytes of a word", {}),
        ("cluster", {"blocks": 8, "cluster": 2}),
        ("over two tickets", {"blocks": 3}),
        ("ticket after a cluster's barrier", {"blocks": 4, "cluster": 2}),
    ],
)
def test_ordered_accesses_are_no_races(launch):
    fault, grid = launch
    for order in emulated_cuda.ORDERS:
        for workers in (1, 4):
            with emulator("faults", races=True, order=order, seed=2, workers=workers):
                tickets = torch.zeros(2, dtype=torch.int32)
                assert run(fault, data(), ticket=tickets, **grid) == ""


def test_several_workers_show_a_ticket_that_does_not_count_what_comes_after():
    # In order, one block after the other, nothing is wrong to be seen.
    x = data()
    assert run("ticket before the work", x, blocks=64) == "" and x[64] == 64

    def sum_of_all(seed):
        x = data()
        with emulator("faults", order="shuffled", seed=seed, workers=8):
            assert run("ticket before the work", x, blocks=8) == ""
        return x[8]

    assert any(sum_of_all(seed) != 8 for seed in range(200))


def test_several_workers_show_a_ticket_that_is_not_atomic():
    def count(seed):
        ticket = torch.zeros(1, dtype=torch.int32)
        with emulator("faults", order="shuffled", seed=seed, workers=8):
            assert run("ticket that is not atomic", data(), ticket=ticket, blocks=64) == ""
        return ticket

    assert any(count(seed) != 64 for seed in range(200))


def test_an_access_out_of_bounds_hits_a_guard_page():
    code = (
        "import torch, test_faults as t, guard;"
        "print(t.run('out of bounds', guard.guarded(torch.zeros(64))))"
    )
    places = [path for path in sys.path if path]
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {places!r}; {code}"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == -signal.SIGSEGV, ended
