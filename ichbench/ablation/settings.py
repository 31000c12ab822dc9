"""How a study is run: command line, then ICHBENCH_* variables, then the study file, then defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ichbench.ablation.study import RunDefaults
from ichbench.arms import shipped
from ichbench.compute import Compute, parse_compiled, resolve_device
from ichbench.errors import InputError
from ichbench.scoring.protocol import get_protocol

DEFAULT_STUDY = "preprocessing"
PHANTOM = "phantom"


@dataclass(frozen=True)
class Settings:
    """Everything about a run that is not a recipe; `sources` says where each value came from."""

    study: str
    cohort: str
    out: Path
    preset: str
    seeds: tuple[int, ...]
    #: None: decided by the cohort (full where there are labelled test cases, else cv)
    folds: str | None
    workers: int
    compute: Compute
    protocol: str
    sources: dict[str, str]

    def lines(self) -> list[str]:
        """`name = value   (where it came from)`, for --dry-run."""
        shown = {
            "study": self.study,
            "cohort": self.cohort,
            "out": str(self.out),
            "preset": self.preset,
            "seeds": ",".join(map(str, self.seeds)),
            "folds": self.folds or "by cohort",
            "workers": str(self.workers),
            "device": self.compute.device,
            "threads": str(self.compute.threads),
            "deterministic": "yes" if self.compute.deterministic else "no",
            "compile": self.compute.compiled,
            "protocol": self.protocol,
        }
        return [f"{name:13} = {value}   ({self.sources[name]})" for name, value in shown.items()]


def settle(given: Mapping[str, str | None], study_defaults: RunDefaults, environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from what the command line gave (None: nothing), the environment and the study file.

    The study itself is settled before its file is read; see `settle_study`.
    """
    env = os.environ if environment is None else environment
    sources: dict[str, str] = {}

    def pick(name: str, from_study: str | None, default: str) -> str:
        value = given.get(name)
        variable = f"ICHBENCH_{name.upper()}"
        candidates = [(value, "command line"), (env.get(variable), variable), (from_study, "study file"), (default, "default")]
        chosen, sources[name] = next((text, source) for text, source in candidates if text is not None and text != "")
        return chosen

    study = pick("study", None, DEFAULT_STUDY)
    cohort = pick("cohort", study_defaults.cohort, PHANTOM)
    preset = pick("preset", study_defaults.preset, "smoke")
    if preset not in (known := shipped("presets")) and not preset.endswith(".toml"):
        raise InputError(f"--preset {preset!r} is not known; give one of {', '.join(known)}, or the path of a .toml file")
    seeds_text = pick("seeds", ",".join(map(str, study_defaults.seeds)) if study_defaults.seeds else None, "0")
    folds = pick("folds", study_defaults.folds, "by cohort")
    default_out = Path("runs") / f"{Path(study).stem}-{Path(cohort).resolve().name if cohort != PHANTOM else PHANTOM}-{Path(preset).stem}"
    out = Path(pick("out", None, str(default_out)))
    workers = _whole(pick("workers", None, str(_cores())), "workers", 1)
    threads = _whole(pick("threads", None, "1"), "threads", 1)
    device = resolve_device(pick("device", None, "auto"))
    deterministic = _yes_or_no(pick("deterministic", None, "no"), "deterministic")
    compiled = parse_compiled(pick("compile", None, "auto"))
    protocol = get_protocol(pick("protocol", None, "instance2022")).name
    return Settings(
        study,
        cohort,
        out,
        preset,
        parse_seeds(seeds_text),
        None if folds == "by cohort" else folds,
        workers,
        Compute(device, threads, deterministic, compiled),
        protocol,
        sources,
    )


def settle_study(given: str | None, environment: Mapping[str, str] | None = None) -> str:
    """Which study is meant, by the same precedence."""
    env = os.environ if environment is None else environment
    return given or env.get("ICHBENCH_STUDY") or DEFAULT_STUDY


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` -> (0, 1, 2)."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < 2**32 for part in parts) or len({int(part) for part in parts if part.isdecimal()}) != len(
        parts
    ):
        raise InputError(f"--seeds {text!r} is not understood; give different whole numbers below 2**32, such as 0,1,2")
    return tuple(int(part) for part in parts)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _yes_or_no(text: str, name: str) -> bool:
    if text.lower() not in ("yes", "no", "1", "0", "true", "false"):
        raise InputError(f"{name} = {text!r} is not understood; give yes or no")
    return text.lower() in ("yes", "1", "true")


def _whole(text: str, name: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"--{name} {text!r} is not understood; give a whole number from {least}")
    return int(text)
