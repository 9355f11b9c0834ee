"""The command line: run files, overrides, and errors in one line. Nothing is trained here."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

import rlhf_fast
from rlhf_fast import cli
from rlhf_fast._runfile import ARGUMENTS
from rlhf_fast.config import ConfigError, PPOConfig
from rlhf_fast.loading import DataError
from rlhf_fast.presets import PRESETS
from rlhf_fast.rewards import RewardError

REQUIRED = ["model=tiny", "reward=r.py:f", "prompts=p.jsonl", "run_dir=out"]
Calls = list[tuple[str, dict[str, Any]]]


class Api(types.ModuleType):
    """`rlhf_fast.api` whose one-liners note their arguments, or raise what they are told to."""

    def __init__(self) -> None:
        super().__init__("rlhf_fast.api")
        self.calls: Calls = []
        self.error: Exception | None = None

        def note(name: str, arguments: dict[str, Any]) -> None:
            config = arguments.pop("config")
            del arguments["note"]
            self.calls.append((name, {**arguments, **config}))
            if self.error is not None:
                raise self.error

        def sft(
            model, data, *, tokenizer=None, eval_data=None, lora=None, run_dir=None, resume=False,
            pad_token=None, bad_rows="error", **config,
        ):  # fmt: skip
            note("sft", dict(locals()))

        def reward(
            model, data, *, tokenizer=None, eval_data=None, reference_data=None, lora=None,
            run_dir=None, resume=False, pad_token=None, bad_rows="error", **config,
        ):  # fmt: skip
            note("reward", dict(locals()))

        def ppo(
            model, *, reward, prompts, tokenizer=None, ref=None, critic="auto", lora=None,
            rollout="auto", run_dir=None, resume=False, pad_token=None, bad_rows="error", **config,
        ):  # fmt: skip
            note("ppo", dict(locals()))

        self.sft, self.reward, self.ppo = sft, reward, ppo


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Api:
    module = Api()
    monkeypatch.setitem(sys.modules, "rlhf_fast.api", module)
    monkeypatch.setattr(rlhf_fast, "api", module, raising=False)
    monkeypatch.chdir(tmp_path)
    return module


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def refusal(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    return result.stderr.strip()


def test_a_run_file_and_overrides_reach_the_one_liner_and_overrides_win(api: Api) -> None:
    Path("run.yaml").write_text(
        "model: tiny\nreward: [[r.py:f, 2], m:g]\nprompts: p.jsonl\nrun_dir: out\n"
        "learning_rate: 1e-5\nkl_coef: 0.3\nresume: true\n"
    )
    result = run("ppo", "run.yaml", "kl_coef=0.2", "lam=.9", "kl_coef=1E-1", "max_grad_norm=null")
    assert result.exit_code == 0, result.output
    ((name, values),) = api.calls
    assert name == "ppo"
    given = {
        "model": "tiny",
        "reward": [["r.py:f", 2], "m:g"],
        "prompts": "p.jsonl",
        "run_dir": "out",
        "resume": True,
        "learning_rate": 1e-5,
        "kl_coef": 0.1,
        "lam": 0.9,
        "max_grad_norm": None,
    }
    defaults = {"tokenizer": None, "ref": None, "critic": "auto", "pad_token": None}
    defaults |= {"bad_rows": "error", "rollout": "auto", "lora": None}
    assert values == {**defaults, **PPOConfig().model_dump(), **given}
    assert "out" in result.stdout


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_other_stages_are_reached_by_their_names(api: Api, stage: str) -> None:
    assert run(stage, "model=m", "data=d.jsonl", "run_dir=o", "epochs=2").exit_code == 0
    ((name, values),) = api.calls
    assert name == stage
    assert (values["data"], values["epochs"], values["eval_data"]) == ("d.jsonl", 2, None)


def test_values_are_read_as_yaml_of_version_1_2(api: Api) -> None:
    overrides = ["mixed_precision=no", "learning_rate=1e-5", "whiten_rewards=True", "ref=1e"]
    assert run("ppo", *REQUIRED, *overrides).exit_code == 0
    values = api.calls[0][1]
    assert [values[override.partition("=")[0]] for override in overrides] == [
        "no",
        1e-5,
        True,
        "1e",
    ]


def test_dotted_overrides_reach_into_mappings(api: Api) -> None:
    Path("run.yaml").write_text("prompts: {path: p.jsonl, rows: 5}\n")
    assert run("ppo", "run.yaml", *REQUIRED[:2], "run_dir=o", "prompts.rows=7").exit_code == 0
    assert api.calls[0][1]["prompts"] == {"path": "p.jsonl", "rows": 7}
    text = refusal("ppo", *REQUIRED, "model.name=x")
    assert "override 'model.name=x': model is 'tiny', which holds no keys" in text


def test_an_unknown_key_names_its_place_and_the_nearest_key(api: Api) -> None:
    Path("run.yaml").write_text("model: tiny\n\nlerning_rate: 1\n")
    text = refusal("ppo", "run.yaml")
    assert text == (
        "error: run.yaml:3: unknown key 'lerning_rate'; did you mean 'learning_rate'? "
        "`rlhf-fast ppo --keys` lists all keys"
    )
    text = refusal("sft", "dataa=x")
    assert "override 'dataa=x': unknown key 'dataa'; did you mean 'data'?" in text
    text = refusal("sft", "zzz=x")
    assert "unknown key 'zzz'; `rlhf-fast sft --keys`" in text
    assert api.calls == []


def test_missing_keys_are_named_with_their_meaning(api: Api) -> None:
    Path("run.yaml").write_text("model: tiny\nreward: r.py:f\nprompts:\n")
    text = refusal("ppo", "run.yaml")
    assert f"missing 'prompts' ({ARGUMENTS['prompts']}); 'run_dir'" in text
    assert "give prompts in run.yaml, or prompts=VALUE on the command line" in text
    assert "missing 'model'" in refusal("sft")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["lam=2"], ["lam", "2", "less than or equal to 1"]),
        (["batch_size=x"], ["batch_size", "'x'", "integer"]),
        (["micro_batch_size=7"], ["64", "multiple", "7"]),
        (["kl_estimator=k3"], ["'kl_estimator'", "wrong optimum", "kl_loss_coef"]),
        (["pad_token=[PAD]"], ["pad_token is ['PAD']", "expected text"]),
        (["model=3"], ["model is 3", "expected text"]),
        (["resume=maybe"], ["resume is 'maybe'", "true or false"]),
        (["ref={"], ["override 'ref={'", "not YAML", "quotes"]),
    ],
)
def test_a_value_that_cannot_be_is_refused(
    api: Api, overrides: list[str], parts: list[str]
) -> None:
    text = refusal("ppo", *REQUIRED, *overrides)
    assert all(part in text for part in parts), text
    assert api.calls == []


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"model: tiny\nreward: a: b\n", ["run.yaml:2: not YAML", "quotes"]),
        (b"model: a\nlam: 1\nmodel: b\n", ["run.yaml:3: not YAML", "'model' is given twice"]),
        (b"- model\n", ["run.yaml holds list", "key: value"]),
        (b"model: \xff\n", ["run.yaml is not UTF-8"]),
        (b"model: \x00\n", ["run.yaml: not YAML"]),
    ],
)
def test_a_broken_run_file_is_refused(api: Api, content: bytes, parts: list[str]) -> None:
    Path("run.yaml").write_bytes(content)
    text = refusal("ppo", "run.yaml")
    assert all(part in text for part in parts), text


def test_a_run_file_that_is_none_is_refused(api: Api) -> None:
    text = refusal("ppo", "no.yaml")
    assert "'no.yaml' cannot be read (No such file" in text and "key=value" in text
    Path("a.yaml").touch()
    assert "'b.yaml' is a second run file after 'a.yaml'" in refusal("ppo", "a.yaml", "b.yaml")


def test_the_printed_configuration_is_a_run_file_that_gives_the_same_run(api: Api) -> None:
    printed = run("ppo", *REQUIRED, "learning_rate=3e-7", "pad_token='[PAD]'", "--print-config")
    assert printed.exit_code == 0 and api.calls == []
    assert yaml.safe_load(printed.stdout)["lam"] == 0.95
    Path("run.yaml").write_text(printed.stdout)
    assert run("ppo", "run.yaml").exit_code == 0
    assert run("ppo", *REQUIRED, "learning_rate=3e-7", "pad_token='[PAD]'").exit_code == 0
    assert api.calls[0] == api.calls[1]
    assert api.calls[0][1]["learning_rate"] == 3e-7


@pytest.mark.parametrize("loss", PRESETS)
def test_a_loss_brings_its_defaults_from_the_command_line_too(api: Api, loss: str) -> None:
    assert run("ppo", *REQUIRED, f"loss={loss}", "seed=3").exit_code == 0
    (_, arguments) = api.calls[0]
    expected = PPOConfig(loss=loss, seed=3).model_dump()
    assert {key: arguments[key] for key in expected} == expected


def test_the_list_of_keys_is_a_run_file_of_defaults(api: Api) -> None:
    listed = run("ppo", "--keys")
    assert listed.exit_code == 0
    assert "# clip the global norm; null: no clip\nmax_grad_norm: 1.0" in listed.stdout
    assert f"# {ARGUMENTS['prompts']}\n# prompts:   # required" in listed.stdout
    defaults = yaml.safe_load(listed.stdout)
    assert defaults["critic"] == "auto"
    # What a loss may bring along is listed, but not set.
    fields = PPOConfig().model_dump()
    assert {key: defaults[key] for key in fields if key not in PPOConfig.by_loss} == {
        key: value for key, value in fields.items() if key not in PPOConfig.by_loss
    }
    assert "# clip_high: 0.2" in listed.stdout
    Path("run.yaml").write_text(listed.stdout)
    assert run("ppo", "run.yaml", *REQUIRED).exit_code == 0
    assert "--keys" in run("ppo", "--help").stdout


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("a\n  b"),
        DataError("a b"),
        RewardError("a b"),
        ValueError("a b"),
        OSError("a b"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_a_user_can_mend_is_one_line(api: Api, error: Exception) -> None:
    api.error = error
    assert refusal("ppo", *REQUIRED) == "error: a b"
    shown = run("ppo", *REQUIRED, "--debug")
    assert shown.exit_code == 1 and shown.exception is error


def test_an_unavailable_backend_is_one_line(api: Api) -> None:
    from rlhf_fast.backends import BackendUnavailable

    api.error = BackendUnavailable("gae: no nvcc")
    assert refusal("ppo", *REQUIRED) == "error: gae: no nvcc"


def test_an_error_of_the_program_keeps_its_traceback(api: Api) -> None:
    api.error = KeyError("bug")
    result = run("ppo", *REQUIRED)
    assert result.exit_code == 1 and result.exception is api.error


def fake(monkeypatch: pytest.MonkeyPatch, name: str, main: Callable[..., None]) -> None:
    module = types.ModuleType(f"rlhf_fast.{name}")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(rlhf_fast, name, module, raising=False)


def test_the_demo_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    fake(monkeypatch, "demo", lambda **options: calls.append(options))
    assert run("demo").exit_code == 0
    assert run("demo", "--run-dir", "there", "--seed", "3", "--rollout", "vllm").exit_code == 0
    assert calls == [
        {"run_dir": None, "seed": 0, "rollout": "auto"},
        {"run_dir": Path("there"), "seed": 3, "rollout": "vllm"},
    ]


def test_the_doctor_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fake(monkeypatch, "doctor", lambda: calls.append("doctor"))
    assert run("doctor").exit_code == 0
    assert calls == ["doctor"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from rlhf_fast.cli import main\n"
        "sys.argv = ['rlhf-fast', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'pyarrow'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_argument_of_the_one_liners_is_described() -> None:
    from rlhf_fast import api

    stubs = Api()
    for name in ("sft", "reward", "ppo"):
        parameters = inspect.signature(getattr(api, name)).parameters
        assert [(p.name, p.default) for p in parameters.values()] == [
            (p.name, p.default) for p in inspect.signature(getattr(stubs, name)).parameters.values()
        ]
        assert set(parameters) - {"config"} <= ARGUMENTS.keys()
