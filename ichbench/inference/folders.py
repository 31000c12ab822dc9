"""Post-processing, model choice and ensembles on folders: what `ichbench postprocess`, `ichbench select` and `ichbench ensemble` do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ichbench.cases.files import check_writable, read_table
from ichbench.cases.images import read_grid, read_labels, write_labels
from ichbench.cases.labels import LabelRules, Target, plain_rules, read_rules
from ichbench.errors import CaseError, InputError
from ichbench.inference.archives import archived_rules, read_probabilities, same_heads, taken_by
from ichbench.inference.postprocess import Labels, Postprocessing, find_postprocessing
from ichbench.inference.select import Candidate, Selection, find_best
from ichbench.scoring.layouts import SUFFIXES, case_id, elsewhere, files_by_case, find_pairs, references_in, rules_in


def find_in_folders(
    reference: Path, predictions: Path, dataset_json: Path | None = None, compatibility: str = "ichbench"
) -> Postprocessing:
    """The rule for a folder of cross-validated predictions; every reference needs its prediction, on its own grid."""
    pairing = find_pairs(reference, predictions, dataset_json)
    missing = [pair.case for pair in pairing.pairs if pair.prediction is None]
    if missing:
        used = Path(str(pairing.pairs[0].reference)).parent
        raise InputError(
            f"{predictions} holds no prediction of {len(missing)} cases ({', '.join(missing[:5])}); the rule is found on all of {used}"
            + elsewhere(reference, used, files_by_case(predictions))
        )
    files = {pair.case: (Path(str(pair.reference)), Path(str(pair.prediction))) for pair in pairing.pairs}

    declared = [value for values in (pairing.labels or {}).values() for value in (values if isinstance(values, tuple) else (values,))]
    known = {0, *declared} if declared else None

    def load(case: str) -> tuple[Labels, Labels]:
        return _reference(files[case][0], pairing.label_map, known), _on_grid_of(files[case][0], files[case][1])

    targets: Sequence[Target]
    if pairing.labels is None:
        values = {int(value) for case in files for side in load(case) for value in np.unique(side)} - {0}
        targets, ignore = sorted(values), None
    else:
        kept = {name: value for name, value in pairing.labels.items() if name != "ignore"}
        targets = [value for value in kept.values() if value not in (0, (0,))]
        # one label in a list is that label, as in nnU-Net
        targets = [value[0] if isinstance(value, tuple) and len(value) == 1 else value for value in targets]
        if all(isinstance(target, int) for target in targets):
            targets = sorted(target for target in targets if isinstance(target, int))
        found = pairing.labels.get("ignore")
        ignore = found if isinstance(found, int) else None
    return find_postprocessing(list(files), load, targets, ignore, compatibility)


def apply_to_folder(rule: Postprocessing, predictions: Path, out: Path) -> Iterator[tuple[Path, int]]:
    """Write every mask of a file or folder with the rule applied; yields the new file and how many voxels were removed.

    `out` is a folder or, for a single mask, also a file name that ends in .nii.gz or .nii.
    """
    single = predictions.is_file() and out.name.endswith(SUFFIXES) and not out.is_dir()
    if single:
        check_writable(out.parent)
    else:
        _check_folder(out)
    sources = list(files_by_case(predictions).values()) if predictions.is_dir() else [predictions]
    if not sources or not all(source.is_file() for source in sources):
        raise InputError(f"{predictions} holds no mask (.nii.gz or .nii)")
    targets = [out if single else out / source.name for source in sources]
    there = [old for target in targets for old in ((target,) if target.exists() else taken_by(target))]
    if there:
        raise InputError(f"{there[0]} exists already; give another --out, nothing is overwritten")
    for source, target in zip(sources, targets, strict=True):
        labels, grid = read_labels(source)
        kept = rule.apply(labels).astype(np.int16)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_labels(target, kept, grid)
        yield target, int(np.count_nonzero(labels) - np.count_nonzero(kept))


def select_folders(
    reference: Path,
    models: Mapping[str, Path],
    dataset_json: Path | None = None,
    pairs: bool = True,
    compatibility: str = "ichbench",
    postprocess: bool = False,
) -> Selection:
    """The best of several models by their folders of cross-validated masks; for pairs also `<case>.npz` with `probabilities`.

    The arrays (heads, z, y, x) are float and in file order, as nnUNetv2_predict --save_probabilities writes them.
    """
    references, (_, label_map) = references_in(reference, dataset_json)
    rules = rules_in(reference) if dataset_json is None else _rules(dataset_json)
    if rules is None:
        highest = max(int(read_labels(file)[0].max()) for file in references.values())
        rules = plain_rules(max(highest, 1) + 1)
    candidates = []
    for name, folder in models.items():
        masks = files_by_case(folder)
        missing = sorted(references.keys() - masks.keys())
        if missing:
            used = references[missing[0]].parent
            raise InputError(
                f"{folder} holds no mask of {len(missing)} cases ({', '.join(missing[:5])}); models are compared on all masks in {used}"
                + elsewhere(reference, used, masks)
            )

        def mask(case: str, masks: Mapping[str, Path] = masks) -> Labels:
            return _on_grid_of(references[case], masks[case])

        def probabilities(case: str, folder: Path = folder) -> NDArray[np.floating]:
            return read_probabilities(folder / f"{case}.npz", rules)

        every = all((folder / f"{case}.npz").is_file() for case in references)
        candidates.append(Candidate(name, mask, probabilities if every else None))

    def truth(case: str) -> Labels:
        return _reference(references[case], label_map, {*rules.labels, *(() if rules.ignore is None else (rules.ignore,))})

    return find_best(candidates, list(references), truth, rules, pairs, compatibility, postprocess)


def average_folders(
    folders: Sequence[Path], out: Path, dataset_json: Path | None = None, rule: Postprocessing | None = None, overwrite: bool = False
) -> Iterator[Path]:
    """The masks of the mean of several models' probabilities, case by case, as `ichbench predict --probabilities` left them.

    Every folder holds `<case>.npz` and `<case>.nii.gz` (or .nii) of the same cases; masks lie on the grid of the first folder's.
    What the outputs mean is what `dataset_json` declares, else what the archives say (or a `dataset.json` beside them), else plain
    labels. Nothing is computed when a target exists already.
    """
    # imported here: what only finds a rule for masks needs no torch
    from ichbench.inference.ensemble import check_heads, mean_probabilities

    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise InputError(f"an ensemble needs two folders or more, each once, but got {', '.join(map(str, folders))}")
    _check_folder(out)
    masks = [files_by_case(folder) for folder in folders]
    cases = sorted({case for found in masks for case in found} | {path.stem for folder in folders for path in folder.glob("*.npz")})
    if not cases:
        raise InputError(f"{folders[0]} holds no masks with probabilities; write them with ichbench predict --probabilities")
    for folder, found in zip(folders, masks, strict=True):
        lacking = [case for case in cases if case not in found or not (folder / f"{case}.npz").is_file()]
        if lacking:
            raise InputError(
                f"{folder} lacks the mask or <case>.npz of {len(lacking)} cases ({', '.join(lacking[:5])}); every folder needs both for "
                "the same cases: ichbench predict --probabilities"
            )
    targets = {case: out / masks[0][case].name for case in cases}
    there = [old for target in targets.values() for old in ((target,) if target.exists() else taken_by(target))]
    # a source is never replaced, not even with `overwrite`
    if any(out.resolve() == folder.resolve() for folder in folders):
        raise InputError(f"--out {out} is one of the folders to average; give another")
    if there and not overwrite:
        raise InputError(f"{there[0]} exists already; give a new folder with --out, or --overwrite")
    archives = [folder / f"{case}.npz" for case in cases for folder in folders]
    rules = _rules_of(archives) if dataset_json is None else _rules(dataset_json)
    for case in cases:
        for found in masks[1:]:
            _on_grid_of(masks[0][case], found[case])
        grid = read_grid(masks[0][case], keep_file_order=True)
        mean = mean_probabilities(read_probabilities(folder / f"{case}.npz", rules) for folder in folders)
        if mean.shape[1:] != grid.shape_zyx:
            raise InputError(f"case {case}: probabilities of shape {mean.shape} do not fit the mask {masks[0][case]} of {grid.shape_zyx}")
        meaning = plain_rules(len(mean)) if rules is None else rules
        check_heads(len(mean), meaning)
        labels = meaning.from_probabilities(mean)
        labels = labels if rule is None else rule.apply(labels).astype(np.int16)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for old in reversed(taken_by(targets[case])):
                # an archive of another model's, or a mask with the other suffix
                old.unlink(missing_ok=True)
            write_labels(targets[case], labels, grid)
        except OSError as error:
            raise CaseError(f"case {case}: {error.filename or targets[case]}: {error.strerror or error}; see to it and run again") from None
        yield targets[case]


def _check_folder(out: Path) -> None:
    check_writable(out)
    if not out.is_dir() and (out.exists() or out.name.endswith(SUFFIXES)):
        raise InputError(f"--out {out} is a file or named like one; give a folder for the masks")


def _rules_of(archives: Sequence[Path]) -> LabelRules | None:
    """What the archives say of their heads, in which all that say something must agree."""
    found: tuple[Path, LabelRules] | None = None
    for path in archives:
        said = archived_rules(path)
        if found is None:
            found = None if said is None else (path, said)
        elif said is not None and not same_heads(found[1], said):
            raise InputError(f"{found[0]} and {path} are of models with other labels or regions; only models of one task can be averaged")
    return None if found is None else found[1]


def _rules(path: Path) -> LabelRules:
    table = read_table(path, "give nnU-Net's dataset.json")
    if "labels" not in table:
        raise InputError(f"{path} declares no labels; give nnU-Net's dataset.json")
    return read_rules(table["labels"], table.get("regions_class_order"), path)


def _on_grid_of(reference: Path, prediction: Path) -> Labels:
    predicted, grid = read_labels(prediction, keep_file_order=True)
    its = read_grid(reference, keep_file_order=True)
    if not grid.same_place(its):
        raise InputError(
            f"{prediction} does not lie on the grid of {reference} (case {case_id(reference)}): shape {grid.shape_zyx} and spacing "
            f"{grid.spacing_zyx_mm} mm, the reference has {its.shape_zyx} and {its.spacing_zyx_mm} mm"
        )
    return predicted


def _reference(path: Path, label_map: Mapping[int, int] | None, known: set[int] | None) -> Labels:
    """A reference mask, its values mapped; InputError for a value that is not `known`, which no score would count."""
    labels = read_labels(path, keep_file_order=True)[0]
    mapped = labels.copy()
    for old, new in (label_map or {}).items():
        mapped[labels == old] = new
    # background is most of a mask, and sorting it is slow
    unknown = sorted({int(value) for value in np.unique(mapped[mapped != 0])} - known) if known is not None else []
    if unknown and known is not None:
        raise InputError(f"{path}: holds the label values {unknown}, but declared are {sorted(known)}; correct the mask or declare them")
    return mapped
