"""The Triton row kernels compile for GPUs, plain and with every option."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from backend_cases import cases

CASES = [c for c in cases("full_kl") if c.values[0].backend == "triton"][:1]
SCRIPT = """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from rlhf_fast.kernels import full_kl, token_logprobs

    POINTERS = dict.fromkeys(("LOGITS", "REF_LOGITS", "OUT", "REF_OUT"), "*bf16")
    POINTERS |= {"TOKENS": "*i64", "INDEX": "*i64"}
    FLOATS = ("temperature", "softcap", "logit_scale")
    PLAIN = {"ROW_TEMPERATURE": None, "softcap": None, "logit_scale": None}

    def check(kernel, constants, warps):
        signature, attributes = {}, {}
        for i, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
            elif name.isupper():
                signature[name] = POINTERS.get(name, "*fp32")
                attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if name in FLOATS else "i32"
        source = ASTSource(kernel, signature, constants, attributes)
        compile(source, target=GPUTarget("cuda", %d, 32), options={"num_warps": warps})

    for plain in (PLAIN, {}):
        gradient = plain | {"VECTOR": 8, "INDEX": None}
        merged = {k: v for k, v in plain.items() if k == "ROW_TEMPERATURE"} | {"SLOTS": 128}
        check(token_logprobs._pieces_kernel, plain | {"VECTOR": 8}, 1)
        check(token_logprobs._merge_kernel, plain | {"SLOTS": 128}, 4)
        check(token_logprobs._backward_kernel, gradient, 1)
        check(full_kl._pieces_kernel, plain | {"VECTOR": 8}, 4)
        check(full_kl._merge_kernel, merged, 4)
        check(full_kl._backward_kernel, gradient, 1)
"""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("capability", [80, 90])
def test_row_kernels_compile_for_gpus(case, capability):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT) % capability]
    subprocess.run(command, check=True, timeout=300, env=environment)
