"""Rewards: what counts as one, what it is called with, and what it may return."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_fast.rewards import RewardError, as_reward, evaluate

PROMPTS = ["one", "two", "three"]
COMPLETIONS = ["a", "bb", "cccc"]
IDS = [[1], [2, 3], [4, 5, 6, 7]]


def run(spec: Any, **columns: list[Any]) -> tuple[Tensor, dict[str, float]]:
    return evaluate(as_reward(spec), PROMPTS, COMPLETIONS, completion_ids=IDS, columns=columns)


def refusal(spec: Any, **columns: list[Any]) -> str:
    with pytest.raises(RewardError) as caught:
        run(spec, **columns)
    return str(caught.value)


def length(prompts: list[str], completions: list[str]) -> list[int]:
    return [len(text) for text in completions]


class Judge:
    """A judge that is not callable itself."""

    def score(self, prompts: list[str], completions: list[str]) -> Tensor:
        return torch.tensor([len(p) - len(c) for p, c in zip(prompts, completions, strict=True)])


def returning(result: Any) -> Callable[..., Any]:
    def fixed(prompts: list[str], completions: list[str]) -> Any:
        return result

    return fixed


@pytest.mark.parametrize(
    "result",
    [
        [1, 2.5, -3],
        (1.0, 2.5, -3.0),
        torch.tensor([1, 2.5, -3], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([1, 2.5, -3], dtype=torch.float64),
        np.array([1, 2.5, -3]),
        [torch.tensor(1), np.float32(2.5), -3],
        {"score": [1, 2.5, -3]},
    ],
    ids=["list", "tuple", "bf16", "fp64", "numpy", "scalars", "dict"],
)
def test_what_a_reward_returns_becomes_fp32_on_the_cpu(result: Any) -> None:
    scores, metrics = run(returning(result))
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    assert not scores.requires_grad
    assert scores.tolist() == [1, 2.5, -3]
    assert metrics == {}


def test_further_columns_of_a_dict_become_their_means() -> None:
    result = {"score": torch.zeros(3), "length": [1, 2, 6], "polite": np.array([True, False, True])}
    scores, metrics = run(returning(result))
    assert scores.tolist() == [0, 0, 0]
    assert metrics == pytest.approx({"reward/length": 3.0, "reward/polite": 2 / 3})


def test_a_function_gets_what_its_signature_names() -> None:
    def only_answers(completions: list[str], answer: list[str]) -> list[bool]:
        return [a == b for a, b in zip(completions, answer, strict=True)]

    def by_position(completions: list[str], prompts: list[str], /) -> list[int]:
        return [len(c) * 10 + len(p) for c, p in zip(completions, prompts, strict=True)]

    def with_default(completion_ids: list[list[int]], scale: int = 2) -> list[int]:
        return [sum(ids) * scale for ids in completion_ids]

    assert run(only_answers, answer=["a", "b", "cccc"], other=[0, 0, 0])[0].tolist() == [1, 0, 1]
    assert run(by_position)[0].tolist() == [13, 23, 45]
    assert run(with_default)[0].tolist() == [2, 10, 44]


def test_a_function_with_keyword_arguments_gets_everything() -> None:
    seen = {}

    def greedy(**everything: Any) -> list[float]:
        seen.update(everything)
        return [0.0] * 3

    run(greedy, answer=[1, 2, 3])
    assert seen == {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "completion_ids": IDS,
        "answer": [1, 2, 3],
    }


def test_a_function_cannot_change_what_the_next_one_gets() -> None:
    def vandal(completions: list[str]) -> list[float]:
        completions.clear()
        return [0.0] * 3

    assert run([vandal, length])[0].tolist() == [1, 2, 4]
    assert COMPLETIONS == ["a", "bb", "cccc"]


def test_no_graph_is_kept_of_a_differentiable_reward() -> None:
    weight = torch.ones(3, requires_grad=True)

    def differentiable(completions: list[str]) -> Tensor:
        assert not torch.is_grad_enabled()
        return weight * 2

    assert run(differentiable)[0].tolist() == [2, 2, 2]


def test_an_object_with_score_is_a_reward() -> None:
    assert run(Judge())[0].tolist() == [2, 1, 1]
    assert as_reward(Judge()).parts[0].name == "Judge"


def test_a_reward_of_a_reward_is_itself() -> None:
    reward = as_reward(length)
    assert as_reward(reward) is reward


def test_a_list_is_the_weighted_sum_and_logs_each_part() -> None:
    scores, metrics = run([length, (Judge(), -0.5), [lambda completions: [1, 1, 4], 2]])
    assert scores.tolist() == [1 - 1 + 2, 2 - 0.5 + 2, 4 - 0.5 + 8]
    assert metrics == pytest.approx(
        {"reward/length": 7 / 3, "reward/Judge": 4 / 3, "reward/lambda": 2.0}
    )


def test_parts_of_one_name_are_numbered_and_keep_their_columns_apart() -> None:
    first = returning({"score": [0, 0, 3], "x": [1, 1, 1]})
    second = functools.partial(returning({"score": [3, 3, 3], "x": [2, 2, 2]}))
    scores, metrics = run([first, (second, 10)])
    assert scores.tolist() == [30, 30, 33]
    assert metrics == {
        "reward/fixed": 1,
        "reward/fixed/x": 1,
        "reward/fixed_2": 3,
        "reward/fixed_2/x": 2,
    }


def test_functions_are_found_by_module_and_by_file(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Brevity:\n"
        "    goal: int\n"
        "    def score(self, completions):\n"
        "        return [-abs(len(c) - self.goal) for c in completions]\n"
        "class Shelf:\n"
        "    brevity = Brevity(2)\n"
        "def words(completions): return [len(c.split()) for c in completions]\n"
    )
    file = tmp_path / "my_rewards.py"
    assert run(f"{file}:words")[0].tolist() == [1, 1, 1]
    assert run(f"{file}:Shelf.brevity")[0].tolist() == [-1, 0, -2]
    assert run([[f"{file}:words", 2], length])[0].tolist() == [3, 4, 6]
    sys.path.insert(0, str(tmp_path))
    try:
        assert run("my_rewards:words")[0].tolist() == [1, 1, 1]
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["my_rewards"]


def test_a_name_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def words(completions): ...\n_hidden = 1\n")
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    cases = [
        ("words", ["'words' is no folder", "'file.py:function'"]),
        (f"{tmp_path}/no.py:words", ["there is no file", "no.py"]),
        (f"{file}:word", ["has no 'word'", "it has words"]),
        (f"{broken}:words", ["broken.py", "ZeroDivisionError: division by zero"]),
        ("no_such_module:words", ["ModuleNotFoundError", "'path/to/file.py:function'"]),
        (str(tmp_path), [str(tmp_path), "no reward_model.json", "rlhf-fast reward"]),
    ]
    for spec, parts in cases:
        text = refusal(spec)
        assert all(part in text for part in parts), text


def test_the_folder_of_a_reward_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_fast.scalar_models import RewardModel

    def load(folder: Path) -> Judge:
        assert folder == tmp_path
        return Judge()

    monkeypatch.setattr(RewardModel, "from_pretrained", load)
    (tmp_path / "reward_model.json").write_text("{}")
    assert run(tmp_path)[0].tolist() == run(str(tmp_path))[0].tolist() == [2, 1, 1]
    assert as_reward(tmp_path).parts[0].name == tmp_path.name


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        (3, ["3 of type int is no reward", "give a function"]),
        (Judge, ["Judge is a class", "give an instance"]),
        ([], ["empty", "at least one"]),
        ([(length, "2")], ["weight", "'2'", "(reward, number)"]),
        ([(length, True)], ["weight", "True"]),
        ([(length, float("nan"))], ["weight", "nan", "finite"]),
        ((length, 0.5), ["0.5 of type float is no reward", "list of (reward, weight)"]),
        ([[length, length, length]], ["of type list is no reward"]),
    ],
)
def test_what_is_no_reward_is_refused(spec: Any, parts: list[str]) -> None:
    text = refusal(spec)
    assert all(part in text for part in parts), text


def test_an_error_in_the_function_names_function_batch_and_prompt() -> None:
    def faulty(completions: list[str]) -> list[float]:
        return [1 / (len(text) - 2) for text in completions]

    with pytest.raises(RewardError) as caught:
        run(faulty)
    text = str(caught.value)
    line = faulty.__code__.co_firstlineno + 1
    assert text == (
        f"reward 'faulty' raised ZeroDivisionError: division by zero (test_rewards.py:{line}) on a "
        "batch of 3, whose first prompt is 'one'; correct the function"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("result", "parts"),
    [
        ([1, float("nan"), 3], ["nan at index 1", "(1 of 3 ", "'two'", "'bb'", "finite number"]),
        (torch.tensor([1, 2, -torch.inf]), ["-inf at index 2", "'three'", "'cccc'"]),
        ([1e39, 1, 1], ["1e+39 at index 0", "not finite in fp32"]),
        ([1, 2], ["2 values for 3 completions", "expected 3 numbers"]),
        (torch.zeros(4), ["4 values for 3 completions"]),
        (torch.zeros(3, 1), ["shape [3, 1]", "shape [3]"]),
        (torch.tensor(1.0), ["shape []", "shape [3]"]),
        (1.0, ["1.0 of type float", "expected 3 numbers"]),
        (None, ["None of type NoneType", "expected 3 numbers"]),
        ("abc", ["'abc' of type str"]),
        ([1, None, 2], ["None of type NoneType at index 1", "'two'", "expected a number"]),
        ([1, 2, "3"], ["'3' of type str at index 2", "'three'", "expected a number"]),
        ([1, 2, [3]], ["[3] of type list at index 2"]),
        ({"reward": [1, 2, 3]}, ["keys {reward}", "under 'score'"]),
        ({"score": [1, 2, 3], "x": [1]}, ["returned under 'x' 1 values for 3 completions"]),
    ],
)
def test_what_is_not_one_finite_number_a_completion_is_refused(
    result: Any, parts: list[str]
) -> None:
    text = refusal(returning(result))
    assert text.startswith("reward 'fixed' returned")
    assert all(part in text for part in parts), text


def test_a_parameter_that_nothing_fills_is_refused() -> None:
    def by_other_names(texts: list[str], completions: list[str], goal: list[str]) -> None: ...

    text = refusal(by_other_names, answer=[1, 2, 3])
    assert "'by_other_names' asks for texts, goal" in text
    assert "offered are prompts, completions, completion_ids, answer" in text
    assert "add the column" in text


def test_a_column_with_a_reserved_name_or_another_length_is_refused() -> None:
    assert "a column 'completions', a reserved name" in refusal(length, completions=[1, 2, 3])
    assert "answer has 2 values for 3 prompts" in refusal(length, answer=[1, 2])


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(RewardError, match="nothing to score; give at least one completion"):
        evaluate(as_reward(length), [], [], completion_ids=[], columns={})
