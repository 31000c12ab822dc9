"""Masks by what `ichbench select` chose: one model, or the mean probabilities of two, and then the rule that was found for them.

The masks are those of the separate commands: `ichbench predict --probabilities`, `ensemble` and `postprocess apply`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ichbench.cases.images import read_grid
from ichbench.cases.labels import LabelRules
from ichbench.errors import InputError
from ichbench.inference.archives import archive_of, in_file_order, same_heads, write_probabilities
from ichbench.inference.ensemble import mean_probabilities
from ichbench.inference.inputs import find_images, read_case
from ichbench.inference.model import Model, Predicted, load_model, predict_each, predict_files, write_mask
from ichbench.inference.postprocess import Postprocessing
from ichbench.inference.predictors import predict_with_probabilities
from ichbench.inference.select import read_selection
from ichbench.recipe import check_precision


@dataclass(frozen=True)
class Choice:
    """The chosen models, one or two, which read the same images and mean the same by their outputs, and the rule for their masks."""

    members: tuple[Model, ...]
    rule: Postprocessing


def load_choice(path: Path, device: str = "cpu", settings: Sequence[str] = ()) -> Choice:
    """Read what `ichbench select` wrote, and the models that it names, each with the `settings` of `load_model`.

    InputError for another or damaged file, for a model that is not where the file says, and for models that do not go together.
    """
    found = read_selection(path)
    for name in found.members:
        if name not in found.models:
            raise InputError(
                f"{path} does not say where the model {name!r} is; choose again with ichbench select --model {name}=FOLDER, "
                'or add it to "models" in that file'
            )
        if not found.models[name].is_dir():
            raise InputError(
                f"{path}: the model {name!r} should be in {found.models[name]}, but there is no such folder; bring it back, "
                'or correct "models" in that file'
            )
    members = tuple(load_model(found.models[name], device, settings) for name in found.members)
    first = members[0]
    for name, other in zip(found.members[1:], members[1:], strict=True):
        if not same_heads(_rules(first), _rules(other)):
            raise InputError(f"{path}: the models {found.members[0]!r} and {name!r} know other labels or regions; they cannot be averaged")
        if [channel.lower() for channel in first.channel_names] != [channel.lower() for channel in other.channel_names]:
            raise InputError(
                f"{path}: the models {found.members[0]!r} and {name!r} take other images: the channels {', '.join(first.channel_names)} "
                f"and {', '.join(other.channel_names)}; predict with each, then average with ichbench ensemble"
            )
    return Choice(members, found.postprocessing or Postprocessing(()))


def predict_choice(choice: Choice, image: Path, out: Path, probabilities: bool = False, overwrite: bool = False) -> Iterator[Predicted]:
    """Segment one image, or every image of a folder, as `model.predict_path` does with one model.

    With `probabilities` the archive beside a mask holds the mean that the mask was made of, before the rule.
    """
    for model in choice.members:
        check_precision(model.tools.inference, model.tools.device)

    def one(case_id: str, files: Sequence[Path], target: Path) -> Predicted:
        if len(choice.members) == 1:
            return predict_files(choice.members[0], case_id, files, target, probabilities, choice.rule)
        return _two_models(choice, case_id, files, target, probabilities)

    yield from predict_each(find_images(image, choice.members[0].channel_names), image, out, one, overwrite)


def _rules(model: Model) -> LabelRules:
    if model.tools.rules is None:
        raise InputError("a model that does not say what its outputs mean cannot be averaged; load it with `load_model`")
    return model.tools.rules


def _two_models(choice: Choice, case_id: str, files: Sequence[Path], target: Path, probabilities: bool) -> Predicted:
    # the models may have turned the image each its own way; they meet in the file's order
    tables, notes = [], []
    for model in choice.members:
        case, said = read_case(case_id, files, model.tools.prepare, model.axes_zyx)
        prediction, table = predict_with_probabilities(case, model.tools)
        tables.append(in_file_order(table, case.grid))
        notes += [*said, *prediction.notes]
    grid, rules = read_grid(files[0], keep_file_order=True), _rules(choice.members[0])
    mean = mean_probabilities(tables)
    if probabilities:
        write_probabilities(archive_of(target), mean, grid, rules)
    labels = choice.rule.apply(rules.from_probabilities(mean)).astype(np.int16)
    return write_mask(target, labels, grid, tuple(dict.fromkeys(notes)))
