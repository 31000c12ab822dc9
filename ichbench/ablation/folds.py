"""Which cases train, validate and are scored in a fold of a study."""

from __future__ import annotations

from dataclasses import dataclass

from ichbench.cases.cohort import Cohort
from ichbench.cases.splits import Split, check_splits, five_folds, fold_of, read_splits
from ichbench.errors import InputError

N_FOLDS = 5


@dataclass(frozen=True)
class Part:
    """The cases of one fold. With `full`, training and validation are all training cases, as nnU-Net's fold `all`."""

    train: tuple[str, ...]
    validate: tuple[str, ...]
    evaluate: tuple[str, ...]


def parse_folds(text: str) -> tuple[str, ...]:
    """`full`, `cv` (five folds) or numbers such as `0,1`, as a tuple of fold names."""
    if text == "full":
        return ("full",)
    if text == "cv":
        return tuple(str(number) for number in range(N_FOLDS))
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(name.isdecimal() for name in names):
        raise InputError(
            f"--folds {text!r} is not understood; give full (train on all training cases), cv (five folds) or numbers such as 0,1"
        )
    return names


def default_folds(cohort: Cohort) -> str:
    """`full` where there are labelled test cases, else `cv`."""
    return "full" if labelled_test_ids(cohort) else "cv"


def labelled_test_ids(cohort: Cohort) -> tuple[str, ...]:
    """Test cases that can be scored."""
    return tuple(name for name in cohort.test_ids if cohort.record(name).label is not None)


def make_part(cohort: Cohort, fold: str) -> Part:
    """The cases of fold `full` or of a numbered fold; `splits_final.json` in the cohort's folder wins over nnU-Net's own folds."""
    train = tuple(name for name in cohort.train_ids if cohort.record(name).label is not None)
    if not train:
        raise InputError(f"cohort {cohort.name} at {cohort.root} has no labelled training case; a study needs some to train on")
    if fold == "full":
        evaluate = labelled_test_ids(cohort)
        if not evaluate:
            raise InputError(
                f"cohort {cohort.name} has no labelled test cases (imagesTs with labelsTs), so --folds full has nothing to score; "
                "use --folds cv"
            )
        return Part(train, train, evaluate)
    chosen = used_split(cohort, fold)
    return Part(tuple(chosen["train"]), tuple(chosen["val"]), tuple(chosen["val"]))


def training_part(cohort: Cohort, fold: str) -> Part:
    """The same for a single training: `full` needs no labelled test cases, there is just nothing to score then."""
    if fold != "full" and not fold.isdecimal():
        raise InputError(f"--fold {fold!r} is not understood; give full (train on all training cases) or a number such as 0")
    train = tuple(name for name in cohort.train_ids if cohort.record(name).label is not None)
    if fold == "full" and train and not labelled_test_ids(cohort):
        return Part(train, train, ())
    return make_part(cohort, fold)


def used_split(cohort: Cohort, fold: str) -> Split:
    """The numbered fold of the cohort's `splits_final.json`, else of nnU-Net's own folds; a patient on both sides is an error."""
    train = tuple(name for name in cohort.train_ids if cohort.record(name).label is not None)
    path = cohort.root / "splits_final.json"
    splits: list[Split] = read_splits(path, train) if path.is_file() else five_folds(train, cohort.groups, N_FOLDS)
    leaks = [note for note in check_splits(splits, train, cohort.groups) if "both in train and in val" in note]
    if leaks:
        raise InputError(f"{path}: {leaks[0]}; keep all cases of a patient on one side, or remove the file to get grouped folds")
    return fold_of(splits, int(fold), train, cohort.groups)
