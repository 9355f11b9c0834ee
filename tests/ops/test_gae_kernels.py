"""The registered ops of gae: torch.compile, opcheck, forks; and what is refused."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import textwrap

import pytest
import torch
from backend_cases import cases
from gae_cases import sample

from rlhf_fast.ops.gae import gae


@pytest.mark.parametrize("case", cases("gae", reference=False, interpreter=False))
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph(case, packed):
    rewards, values, mask, bootstrap = (x.to(case.device) for x in sample(3, 20, keep=0.7))
    options = {"bootstrap": bootstrap, "gamma": 0.9, "backend": case.backend}
    if packed:
        rewards, values, mask = rewards.flatten(), values.flatten(), mask.flatten()
        cu_seqlens = torch.tensor([0, 7, 30, 60], dtype=torch.int32, device=case.device)
        options["cu_seqlens"] = cu_seqlens

    def loss(rewards, values):
        advantages, returns = gae(rewards, values, mask, **options)
        return (advantages * 2 + returns).square().sum()

    def gradients(function):
        leaves = [rewards.clone().requires_grad_(), values.clone().requires_grad_()]
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for grad, expected in zip(gradients(compiled), gradients(loss), strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    "case", [c for c in cases("gae") if c.values[0].backend in ("cpp", "cuda")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_registered_ops_pass_opcheck(case, packed):
    rewards, values, mask, bootstrap = (x.to(case.device) for x in sample(3, 20, keep=0.7))
    gamma, lam = torch.full_like(bootstrap, 0.9), torch.full_like(bootstrap, 0.8)
    cu_seqlens = None
    if packed:
        rewards, values, mask = rewards.flatten(), values.flatten(), mask.flatten()
        cu_seqlens = torch.tensor([0, 7, 30, 60], dtype=torch.int32, device=case.device)
    ops = torch.ops.rlhf_fast
    for keep, last, each in ((mask, bootstrap, (gamma, lam)), (None, None, (None, None))):
        forward = (rewards, values, keep, *each, last, cu_seqlens, 0.9, 0.8)
        torch.library.opcheck(ops.gae_forward, forward)
        backward = (rewards, values, keep, *each, cu_seqlens, 0.9, 0.8)
        torch.library.opcheck(ops.gae_backward, backward)


@pytest.mark.parametrize("case", [c for c in cases("gae") if c.values[0].backend == "cpp"])
def test_survives_a_fork_after_threads_were_used(case):
    script = """
        import multiprocessing, sys
        import torch
        from rlhf_fast.ops.gae import gae

        def run():
            advantages, returns = gae(rewards, values, backend="cpp")
            return advantages.numpy().tobytes() + returns.numpy().tobytes()

        torch.set_num_threads(2)
        rewards, values = torch.randn(64, 4096), torch.randn(64, 4096)
        expected = run()
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=lambda: queue.put(run() == expected))
        child.start()
        child.join(60)
        sys.exit(0 if child.exitcode == 0 and queue.get() else 1)
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((ONES, torch.ones(2, 4)), {}, ValueError, r"values has shape \[2, 4\].*\[2, 3\]"),
        ((ONES, ONES, torch.ones(3)), {}, ValueError, r"mask has shape \[3\]"),
        ((ONES.long(), ONES), {}, TypeError, "rewards has dtype torch.int64"),
        ((ONES[0], ONES[0]), {}, ValueError, r"shape \[3\]; expected \[B, T\]"),
        ((ONES, ONES), {"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"\[B \+ 1\] and \[N\]"),
        ((ONES[0], ONES[0]), {"cu_seqlens": torch.tensor([0.0])}, TypeError, "cu_seqlens has"),
        ((ONES, ONES), {"gamma": 1.01}, ValueError, r"gamma=1.01; expected it in \[0, 1\]"),
        ((ONES, ONES), {"lam": -0.5}, ValueError, r"lam=-0.5; expected it in \[0, 1\]"),
        ((ONES, ONES), {"lam": torch.ones(3)}, ValueError, r"lam has shape \[3\].*\[2\]"),
        ((ONES, ONES), {"gamma": torch.ones(2).int()}, TypeError, "gamma has dtype"),
        (
            (ONES, ONES),
            {"gamma": torch.ones(2, requires_grad=True)},
            ValueError,
            r"gamma requires a gradient.*gamma.detach\(\)",
        ),
        ((ONES, ONES), {"bootstrap": torch.ones(2, 1)}, ValueError, "bootstrap has shape"),
        ((ONES, ONES), {"backend": "cpu"}, ValueError, "backend='cpu' is unknown"),
    ],
)
def test_errors_say_what_was_given_and_what_is_expected(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gae(*arguments, **options)


@pytest.mark.parametrize(
    "case", [c for c in cases("gae") if c.values[0].backend in ("reference", "cpp")]
)
@pytest.mark.parametrize("offsets", [[1, 6], [0, 5], [0, 7], [0, 4, 3, 6], [0, -1, 6]])
def test_offsets_that_do_not_cover_the_tokens_are_refused(case, offsets):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 6 packed tokens"):
        gae(
            torch.ones(6),
            torch.ones(6),
            cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
            backend=case.backend,
        )
