"""The Triton kernels compile for GPUs, plain and with every option."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from backend_cases import cases

CASES = [c for c in cases("full_kl") if c.values[0].backend == "triton"][:1]
CHECK = """
    import re
    import subprocess
    import tempfile

    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    FLOATS = {"temperature", "softcap", "logit_scale"}
    FLOATS |= {"normalizer", "lower", "upper", "dual_clip", "entropy_coef", "kl_coef"}

    def check(kernel, constants, warps, pointers={}, of="*fp32"):
        signature, attributes = {}, {}
        for i, parameter in enumerate(kernel.params):
            name = parameter.name
            if name in constants:
                signature[name] = "constexpr"
            elif name.isupper():
                signature[name] = pointers.get(name, of)
                attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                number = "fp32" if name in FLOATS else "i32"
                signature[name] = parameter.annotation_type or number
        source = ASTSource(kernel, signature, constants, attributes)
        target = GPUTarget("cuda", CAPABILITY, 32)
        return compile(source, target=target, options={"num_warps": warps}).asm

    def spilled(asm):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return int(re.search(r"STACK:([0-9]+)", usage)[1])
"""
ROWS = """
    from rlhf_fast.kernels import full_kl, token_logprobs

    POINTERS = dict.fromkeys(("LOGITS", "REF_LOGITS", "OUT", "REF_OUT"), "*bf16")
    POINTERS |= {"TOKENS": "*i64", "INDEX": "*i64"}
    PLAIN = {"ROW_TEMPERATURE": None, "softcap": None, "logit_scale": None}

    for plain in (PLAIN, {}):
        gradient = plain | {"VECTOR": 8, "INDEX": None}
        merged = {k: v for k, v in plain.items() if k == "ROW_TEMPERATURE"} | {"SLOTS": 128}
        check(token_logprobs._pieces_kernel, plain | {"VECTOR": 8}, 1, POINTERS)
        check(token_logprobs._merge_kernel, plain | {"SLOTS": 128}, 4, POINTERS)
        check(token_logprobs._backward_kernel, gradient, 1, POINTERS)
        check(full_kl._pieces_kernel, plain | {"VECTOR": 8}, 4, POINTERS)
        check(full_kl._merge_kernel, merged, 4, POINTERS)
        check(full_kl._backward_kernel, gradient, 1, POINTERS)
"""
LOSSES = """
    from rlhf_fast.kernels import _losses, gae, policy_loss, ppo_advantages, value_loss

    POINTERS = {"MASK": "*u8", "FINISHED": "*u8", "OFFSETS": "*i32", "TICKET": "*i32"}
    WIDE = POINTERS | {"MOMENTS": "*fp64"}

    def without(*names):
        return dict.fromkeys(names)

    def check_loss(kernel, constants, warps, pointers=POINTERS, of="*fp32"):
        asm = check(kernel, constants, warps, pointers, of)
        # A word or two are what ptxas gives for one more program at a time.
        assert spilled(asm) <= 32, (kernel, constants, of)
        # What other programs wrote is read after all have, and not out of L1.
        if "TICKET" in kernel.arg_names:
            assert "atom.global.gpu.acq_rel" in asm["ptx"] and "ld.global.cg" in asm["ptx"]

    plain = {"RATIO": 0, "AGGREGATION": 0, "KL_KIND": 1, "UNBIASED": False}
    plain |= {"TOKEN_ADVANTAGES": True, "TOKEN_WEIGHTS": True, "BY_SEQUENCE": False}
    least = without("WEIGHTS", "ENTROPY", "REF", "KL", "OFFSETS", "NORMALIZER", "SHARES")
    sequences = {"BY_SEQUENCE": True, "TOKEN_ADVANTAGES": False, "TOKEN_WEIGHTS": False}
    options = (
        least | without("dual_clip"),
        least | {"RATIO": 2},
        without("KL", "OFFSETS") | {"KL_KIND": 2},
        without("KL") | sequences | {"RATIO": 1, "AGGREGATION": 1, "KL_KIND": 2},
        without("KL") | sequences | {"RATIO": 1, "AGGREGATION": 2, "KL_KIND": 0, "UNBIASED": True},
        without("REF", "OFFSETS", "dual_clip") | sequences | {"RATIO": 3, "AGGREGATION": 2},
    )
    for tokens in (64, 256, 1024):
        launch = _losses.program(tokens)
        warps = launch.pop("num_warps")
        for some in options if tokens == 1024 else options[2:4]:
            check_loss(policy_loss._forward_kernel, plain | some | launch, warps)
        for of in ("*fp32", "*fp64"):
            check_loss(value_loss._forward_kernel, {"CLIP": True} | launch, warps, WIDE, of)

    least = without("REF", "GAMMA", "LAM", "VALUE_LAM", "FINISHED", "OFFSETS", "PARTIALS")
    every = {"ADAPTIVE": True, "OWN_VALUE_LAM": True, "BLOCK": 1024}
    backward = {"FORWARD": False, "BLOCK": 1024}
    for of in ("*fp32", "*fp64"):
        check_loss(_losses._gradient_kernel, {"AT": 9, "BLOCK": 1024}, 4, of=of)
        check_loss(ppo_advantages._whiten_kernel, {"BLOCK": 1024}, 4, WIDE, of)
        check_loss(ppo_advantages._forward_kernel, every, 8, WIDE | {"PARTIALS": "*fp64"}, of)
        one = least | without("TICKET") | {"ADAPTIVE": False, "OWN_VALUE_LAM": False, "BLOCK": 64}
        check(ppo_advantages._forward_kernel, one, 1, WIDE, of)
        check_loss(gae._gae_kernel, backward, 8, of=of)
        one = without("GAMMA", "LAM", "MASK", "BOOTSTRAP", "OFFSETS", "OUT_BOOTSTRAP")
        check_loss(gae._gae_kernel, one | {"FORWARD": True, "BLOCK": 64}, 1, of=of)
"""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernels", ["ROWS", "LOSSES"])
def test_kernels_compile_for_gpus(case, capability, kernels):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    script = (
        f"CAPABILITY = {capability}\n"
        + textwrap.dedent(CHECK)
        + textwrap.dedent(globals()[kernels])
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, env=environment)
