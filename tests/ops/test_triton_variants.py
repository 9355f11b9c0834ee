"""What makes Triton compile another variant of the log-prob and KL kernels, and what does not.

Launches are recorded, not run, and their cache keys are made as Triton makes them, for an H100: no
GPU is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from backend_cases import cases

CASES = [c for c in cases("full_kl") if c.values[0].backend == "triton"][:1]
SCRIPT = """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from rlhf_fast.kernels import full_kl, token_logprobs

    BACKEND = make_backend(GPUTarget("cuda", 90, 32))
    launches, keys = [], set()

    def record(self, *args, grid, warmup, **options):
        bind = create_function_from_signature(self.signature, self.params, BACKEND)
        _, specialization, _ = bind(*args, **options)
        launches.append(self.__name__)
        constants = repr(sorted(options.items()))
        keys.add((self.__module__, self.__name__, repr(specialization), constants))

    JITFunction.run = record

    def run(rows, columns, temperature=1.0, by_row=False):
        x, ids = torch.empty(rows, columns), torch.empty(rows, dtype=torch.int64)
        upstream = torch.empty(rows)
        scaling = (torch.empty(rows) if by_row else None, temperature, 30.0, 0.5)
        tokens = (*scaling, -100, 0, None)
        *_, stats = token_logprobs.forward(x, ids, *tokens)
        token_logprobs.backward(x, ids, stats, upstream, upstream, *tokens, torch.empty_like(x))
        _, stats = full_kl.forward(x, x, *scaling, None)
        outs = torch.empty_like(x), torch.empty_like(x)
        full_kl.backward(x, x, stats, upstream, *scaling, None, *outs)

    def variants(calls):
        keys.clear()
        for call in calls:
            run(*call)
        return len(keys)

    assert variants([(3, 64)]) == 6 and len(set(launches)) == 3, launches
    assert variants([(rows, 64) for rows in (1, 2, 3, 16, 17, 1000, 70_000)]) == 6
    assert variants([(3, 64, t) for t in (1.0, 0.5, 0.7, 2.0, 16.0)]) == 6
    assert variants([(3, columns) for columns in (8, 16, 64, 1000, 32_000, 151_936)]) <= 8
    assert variants([(3, columns) for columns in (1, 7, 9, 50_257, 131_071)]) <= 8
    assert variants([(3, 64), (3, 64, 1.0, True)]) == 12  # a pointer more: the count sees it
"""


@pytest.mark.parametrize("case", CASES)
def test_no_number_of_rows_and_no_temperature_costs_a_compilation(case):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    script = textwrap.dedent(SCRIPT)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, env=environment)
