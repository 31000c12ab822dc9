"""Commands about training: one fold by hand, and what this machine can do."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

INTERRUPTED = 75


def train(
    cohort: Annotated[str, typer.Argument(help="a cohort folder or cohort.csv, or phantom")],
    out: Annotated[Path, typer.Option(help="folder for everything that is written; afterwards a model folder for ichbench predict")],
    recipe: Annotated[str, typer.Option(help="an arm: the name of a shipped one, or a TOML file")] = "base",
    fold: Annotated[str, typer.Option(help="a number, or full: train on all training cases")] = "0",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    preset: Annotated[str, typer.Option(help="how much is computed: smoke, small, full")] = "full",
    pretrained: Annotated[Path | None, typer.Option(help="fine-tune: weights (.safetensors) or a model folder; all but the heads")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="remove the training that --out holds and begin anew")] = False,
    extend_to: Annotated[int | None, typer.Option(min=1, metavar="EPOCHS", help="give a finished training more epochs")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; the last digits of the weights depend on it")] = 1,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="the same bits every time on a GPU, too; slower")] = False,
    compiled: Annotated[str, typer.Option("--compile", help="auto (GPUs), yes or no: train a compiled network")] = "auto",
    protocol: Annotated[str, typer.Option(help="scoring protocol of the validation cases")] = "instance2022",
    log: Annotated[list[str] | None, typer.Option(help="also log to: tensorboard, mlflow")] = None,
    save_every: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="between checkpoints; changes no result")] = 10.0,
) -> None:
    """Train one fold, then segment and score its validation cases.

    Killed or interrupted, the same command goes on from the last checkpoint and ends with the same bits as an unbroken run.
    A finished training is left as it is; other settings on its folder are refused. Several GPUs (or CPU processes) share one
    training when torchrun starts the command: torchrun --nproc-per-node 2 -m ichbench.cli train COHORT --out DIR.
    """
    from ichbench.ablation.single import Wanted, plan_fold, train_fold
    from ichbench.compute import Compute, parse_compiled, resolve_device
    from ichbench.scoring.protocol import get_protocol
    from ichbench.training.folder import Saving
    from ichbench.training.logs import curves_sink, draw_curves, live, read_log, trackers
    from ichbench.training.parallel import team_of_torchrun

    rules, place = get_protocol(protocol).name, resolve_device(device)
    with team_of_torchrun(place) as (team, place), warnings.catch_warnings():
        compute = Compute(place, threads, deterministic, parse_compiled(compiled))
        wanted = Wanted(cohort, out, recipe, preset, fold, seed, compute, rules, pretrained, overwrite, extend_to)
        if not team.leads:
            warnings.simplefilter("ignore")
            # the leading process may have a phantom to write first
            team.wait()
            try:
                train_fold(plan_fold(wanted), team=team)
            except KeyboardInterrupt:
                raise typer.Exit(INTERRUPTED) from None
            return
        warnings.showwarning = _say_warning
        try:
            job = plan_fold(wanted)
            names = job.cohort.rules.names
            team.wait()
            typer.echo(f"{job.arm.name}, fold {fold}, seed {seed}: {len(job.part.train)} training cases, {len(job.part.evaluate)} to score")
            with trackers(log or [], out, f"{job.arm.name}-fold{fold}-seed{seed}") as tracking, live(sys.stdout) as (show, tick):
                curves = out / "curves.png"
                sinks = [show, *tracking, curves_sink(curves, out / "log.jsonl", names)]
                done = train_fold(job, sinks, tick=tick, say=typer.echo, team=team, saving=Saving(out / "checkpoints", save_every))
        except KeyboardInterrupt:
            todo = "run the same command again to go on from the last checkpoint"
            if overwrite:
                todo = (
                    "before its first step nothing was replaced; after it the command without --overwrite goes on from the last checkpoint"
                )
            typer.echo(f"\ninterrupted; {todo}", err=True)
            raise typer.Exit(INTERRUPTED) from None
    not_drawn = draw_curves(read_log(out / "log.jsonl"), curves, names)
    _print_done(done, out, curves, not_drawn)


def _print_done(done: Any, out: Path, curves: Path, not_drawn: str | None) -> None:
    from ichbench.board.render import board_text, build_board

    about = done.training
    early = ", stopped early" if about["stopped_early"] else ""
    typer.echo(f"\n{about['epochs']} epochs{early}; best epoch {about['best_epoch'] + 1}")
    if done.rows:
        typer.echo("\n" + board_text(build_board(list(done.rows), base=None)))
        typer.echo(f"  {out / 'scores.csv'}")
    typer.echo(f"  {curves}" if not_drawn is None else f"  {not_drawn}")
    typer.echo(f"  {out / 'final.safetensors'}; use it with: ichbench predict {out} IMAGE --out MASK")


def _say_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    # only what is ours is the user's business
    if category.__module__.split(".")[0] == "ichbench":
        typer.echo(f"warning: {message}", err=True)


def doctor(
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads to measure with (default: every available core)")] = None,
) -> None:
    """What this machine can do: cores, memory, GPU, bf16, extras, and which preset fits. Measures for a few seconds."""
    from ichbench.training.machine import advice, examine, machine_lines

    machine = examine(threads)
    typer.echo("\n".join([*machine_lines(machine), "", *advice(machine)]))
