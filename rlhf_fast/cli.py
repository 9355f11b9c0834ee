"""The command `rlhf-fast`: the stages on run files, the demo, and the doctor.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

    from rlhf_fast._runfile import Stage

app = typer.Typer(
    name="rlhf-fast",
    help="SFT, reward models and PPO for language models.",
    epilog="A stage takes a run file and overrides: rlhf-fast ppo RUN.yaml kl_coef=0.1",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN.yaml key=value",
        help="A run file and overrides, which win over it; values are YAML.",
        show_default=False,
    ),
]
Keys = Annotated[
    bool, typer.Option("--keys", help="Print every key with its default and meaning, as YAML.")
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved run file and stop.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def sft(
    arguments: Arguments = None,
    keys: Keys = False,
    print_config: PrintConfig = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model on examples. `rlhf-fast sft --keys` lists the keys."""
    _stage("sft", arguments, keys, print_config, debug)


@app.command()
def reward(
    arguments: Arguments = None,
    keys: Keys = False,
    print_config: PrintConfig = False,
    debug: Debug = False,
) -> None:
    """Train a reward model on preferences. `rlhf-fast reward --keys` lists the keys."""
    _stage("reward", arguments, keys, print_config, debug)


@app.command()
def ppo(
    arguments: Arguments = None,
    keys: Keys = False,
    print_config: PrintConfig = False,
    debug: Debug = False,
) -> None:
    """Train a policy on a reward with PPO. `rlhf-fast ppo --keys` lists the keys."""
    _stage("ppo", arguments, keys, print_config, debug)


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="The adapter of a policy or a reward model.")],
    into: Annotated[Path, typer.Argument(help="Folder for the model.")],
    debug: Debug = False,
) -> None:
    """Merge a LoRA adapter into its base model."""
    with _one_line_errors(debug):
        from rlhf_fast import api

        api.merge(folder, into)
        typer.echo(f"merge: done, see {into}")


@app.command()
def demo(
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder for results.", show_default="runs/demo-<time>")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, training and sampling.")] = 0,
    rollout: Annotated[
        str, typer.Option(help="Engine of the rollouts: auto, hf or vllm.")
    ] = "auto",
    debug: Debug = False,
) -> None:
    """Run SFT, a reward model and PPO on embedded data, in minutes on a CPU."""
    with _one_line_errors(debug):
        import rlhf_fast.demo

        rlhf_fast.demo.main(run_dir=run_dir, seed=seed, rollout=rollout)


@app.command()
def doctor() -> None:
    """Say which backends there are, and why others are missing."""
    import rlhf_fast.doctor

    rlhf_fast.doctor.main()


def main() -> None:
    """The entry point of the console script."""
    app()


def _stage(
    name: str, arguments: list[str] | None, keys: bool, print_config: bool, debug: bool
) -> None:
    with _one_line_errors(debug):
        stage = _find_stage(name)
        if keys:
            typer.echo(stage.template())
            return
        values = stage.resolve(arguments or [])
        if print_config:
            from rlhf_fast._runfile import dump

            typer.echo(dump(values), nl=False)
            return
        stage.function(**values)
        typer.echo(f"{name}: done, see {values['run_dir']}")


def _find_stage(name: str) -> Stage:
    from rlhf_fast import api, config
    from rlhf_fast._runfile import Stage

    configs: dict[str, type[BaseModel]] = {
        "sft": config.SFTConfig,
        "reward": config.RewardConfig,
        "ppo": config.PPOConfig,
    }
    return Stage(name, getattr(api, name), configs[name])


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Errors that a user can mend end the program in one line on stderr, with exit code 2.

    They are ValueErrors (ours and those of checks), rewards and backends that cannot be had, and
    files or models that cannot be read.
    """
    try:
        yield
    except Exception as error:
        from rlhf_fast.backends import BackendUnavailable
        from rlhf_fast.rewards import RewardError
        from rlhf_fast.rollout import RolloutMismatch

        mendable = isinstance(
            error,
            ValueError
            | OSError
            | FloatingPointError
            | RewardError
            | BackendUnavailable
            | RolloutMismatch,
        )
        if debug or not mendable:
            raise
        line = " ".join(part.strip() for part in str(error).splitlines() if part.strip())
        typer.secho(f"error: {line}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
