"""docs/drop_in.md keeps its word: its modules, as they stand there, inside the projects."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import MethodType

import pytest
import torch
from _peers import batch, load

from rlhf_fast.scratch import tiny_llama, train_tokenizer

ROOT = Path(__file__).parents[2]
MODULES = {
    name: code
    for code, name in re.findall(
        r'```python\n("""(\w+)\.py""".*?)```', (ROOT / "docs/drop_in.md").read_text(), re.DOTALL
    )
}
WORDS = ["the sea is wide and blue", "a bee eats honey", "who was there"]


def places_of(project: str) -> list[tuple[object, str]]:
    """What the project's module on the page replaces."""
    if project == "trl":
        return [(load("trl.trainer.utils"), "_ChunkedLogProbFunction")]
    if project == "verl":
        return [
            (load("verl.utils.kernel.linear_cross_entropy"), "linear_cross_entropy"),
            (load("verl.trainer.ppo.core_algos"), "compute_gae_advantage_return"),
        ]
    actor = load("openrlhf.models.actor")
    maker = load("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    return [
        (actor, "log_probs_from_logits"),
        (actor, "compute_entropy"),
        (maker, "get_advantages_and_returns"),
    ]


def put_in(monkeypatch: pytest.MonkeyPatch, project: str) -> dict:
    """Runs the project's module of the page, for the time of a test; returns its names."""
    places = places_of(project)
    before = [getattr(*place) for place in places]
    for place, theirs in zip(places, before, strict=True):
        monkeypatch.setattr(*place, theirs)  # so that it is restored
    names: dict = {}
    exec(MODULES[f"{project}_on_rlhf_fast"], names)
    if "install" in names:
        names["install"]()
    assert all(getattr(*p) is not theirs for p, theirs in zip(places, before, strict=True))
    return names


def count_calls(monkeypatch: pytest.MonkeyPatch, names: dict, op: str) -> list[int]:
    """The sizes that `op` is called with from a module's `names`, as they come."""
    sizes, ours = [], names[op]

    def counting(x, *args, **options):
        sizes.append(x.numel())
        return ours(x, *args, **options)

    monkeypatch.setitem(names, op, counting)
    return sizes


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS, 300)


def ragged(tokenizer):
    """Token ids [3, T] and the attention mask of right-padded texts."""
    text = tokenizer(WORDS, padding=True, padding_side="right", return_tensors="pt")
    return text["input_ids"], text["attention_mask"]


def train_grpo(tokenizer, folder: Path) -> tuple[list[dict], list[torch.Tensor]]:
    """Two steps of TRL's GRPO with its KL; the log, and the weights that they end with."""
    import datasets  # which only the environment of `make test-peers` has

    grpo = load("trl.trainer.grpo_trainer")
    # By name, as TRL loads the reference again.
    tiny_llama(tokenizer, hidden_size=16).save_pretrained(folder / "model")
    trainer = grpo.GRPOTrainer(
        model=str(folder / "model"),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        train_dataset=datasets.Dataset.from_dict({"prompt": WORDS * 4}),
        args=load("trl.trainer.grpo_config").GRPOConfig(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=8,
            max_steps=2,
            num_iterations=2,
            beta=0.1,
            temperature=0.7,
            learning_rate=1e-2,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            seed=0,
        ),
    )
    trainer.train()
    return trainer.state.log_history, [p.detach().clone() for p in trainer.model.parameters()]


def test_trl_trains_to_the_same_weights(tokenizer, tmp_path, monkeypatch):
    their_log, their_weights = train_grpo(tokenizer, tmp_path)
    names = put_in(monkeypatch, "trl")
    calls = count_calls(monkeypatch, names, "linear_logprobs")
    our_log, our_weights = train_grpo(tokenizer, tmp_path)
    assert len(calls) >= 4
    for theirs, ours in zip(their_log[:2], our_log[:2], strict=True):
        for name in ("loss", "kl", "entropy", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6)
    assert their_log[1]["grad_norm"] > 0
    for theirs, ours in zip(their_weights, our_weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_trl_gets_the_same_numbers(softcap, monkeypatch):
    """With a bias, a scale and a temperature; what is not computed here is computed there."""
    theirs = load("trl.trainer.utils")._ChunkedLogProbFunction
    names = put_in(monkeypatch, "trl")
    calls = count_calls(monkeypatch, names, "linear_logprobs")
    tensors = [torch.randn(9, 4), torch.randn(20, 4), torch.randn(20)]
    tokens = torch.randint(20, (9,))

    def run(function, outputs):
        leaves = [x.clone().requires_grad_() for x in tensors]
        found = function.apply(*leaves, tokens, 0.7, 32_768, softcap, 1.5, outputs)
        (found[0] * torch.arange(9)).sum().add(found[1].square().sum()).backward()
        return [*found, *(x.grad for x in leaves)]

    for outputs in (("log_probs", "entropy"), ("log_probs", "entropy", "is_top1")):
        for ours, other in zip(run(names["LogProbs"], outputs), run(theirs, outputs), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
    assert names["LogProbs"].apply(*tensors, tokens, 1.0, 9, None, 1.0, ("log_probs",))[1] is None


def test_verl_scores_with_ours(tokenizer, monkeypatch):
    """verl's forward for its fused kernels, against the one that it has in PyTorch."""
    dense = load("verl.models.transformers.dense_common")
    names = put_in(monkeypatch, "verl")
    calls = count_calls(monkeypatch, names, "linear_logprobs")
    model = tiny_llama(tokenizer, hidden_size=16)
    ids, mask = ragged(tokenizer)
    results = []
    for forward in (dense.forward_with_triton_backend, dense.forward_with_torch_backend):
        model.zero_grad()
        bound = MethodType(forward, model)
        output = bound(input_ids=ids, attention_mask=mask, temperature=0.7, return_dict=True)
        assert output.log_probs.shape == output.entropy.shape == ids.shape
        weights = torch.linspace(-1, 1, ids.numel()).view_as(output.log_probs)
        ((output.log_probs + 0.3 * output.entropy) * weights).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        results.append([output.log_probs.detach(), output.entropy.detach(), *gradients])
    assert len(calls) == 1
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_verls_advantages(monkeypatch):
    algos = load("verl.trainer.ppo.core_algos")
    b = batch(gaps=True)
    theirs = algos.compute_gae_advantage_return(b.rewards, b.values, b.ones, 0.99, 0.9)
    put_in(monkeypatch, "verl")
    ours = algos.compute_gae_advantage_return(b.rewards, b.values, b.ones, 0.99, 0.9)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x[b.mask], y[b.mask], rtol=1e-6, atol=1e-7)


def test_verl_imports_the_module_by_its_environment_variable(tmp_path):
    (tmp_path / "verl_on_rlhf_fast.py").write_text(MODULES["verl_on_rlhf_fast"])
    code = (
        "from _peers import load\n"
        "load('verl')\n"
        "print(load('verl.utils.kernel.linear_cross_entropy').linear_cross_entropy.__module__)\n"
        "print(load('verl.trainer.ppo.core_algos').compute_gae_advantage_return.__module__)\n"
    )
    paths = [tmp_path, Path(__file__).parent, ROOT]
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "VERL_USE_EXTERNAL_MODULES": "verl_on_rlhf_fast",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["verl_on_rlhf_fast"] * 2


def test_openrlhfs_actor_scores_with_ours(tokenizer, monkeypatch):
    """Its log-probs, entropy and gradients, at a temperature."""
    actor = load("openrlhf.models.actor")
    ids, mask = ragged(tokenizer)
    results = []
    for ours in (False, True):
        if ours:
            names = put_in(monkeypatch, "openrlhf")
            calls = count_calls(monkeypatch, names, "token_logprobs")
        model = tiny_llama(tokenizer, hidden_size=16)
        policy = actor.Actor(model, temperature=0.7)
        policy.packing_samples = False  # a model that is loaded elsewhere leaves it out
        logprobs, output = policy(ids, mask[:, 1:], mask, return_output=True, return_entropy=True)
        loss = (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum()
        (loss + 0.3 * (output.entropy * mask[:, 1:]).square().sum()).backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([logprobs.detach(), output.entropy.detach(), *gradients])
    assert len(calls) == 2
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_openrlhfs_advantages(monkeypatch):
    maker = load("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    b, made = batch(), object.__new__(maker)
    theirs = made.get_advantages_and_returns(b.values, b.rewards, b.mask, 0.99, 0.9)
    put_in(monkeypatch, "openrlhf")
    ours = made.get_advantages_and_returns(b.values, b.rewards, b.mask, 0.99, 0.9)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x[b.mask], y[b.mask])
