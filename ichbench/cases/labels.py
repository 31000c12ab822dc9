"""What the outputs of a network mean: plain labels, or regions that overlap, and the label that is not scored.

Plain labels have one head each, background included, and the highest head wins (softmax). A region is a set of labels
("whole tumour" = 1, 2, 3) with one head of its own (sigmoid); heads are painted in a declared order, so that a later one
overwrites an earlier one. Source: nnU-Net's `dataset.json`, facts/nnunet-v2.md section 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ichbench.errors import InputError

#: a label, or the labels of a region in the order they were declared
Target = int | tuple[int, ...]

#: the largest half-precision logit whose sigmoid, computed in float32, is not above 0.5: fp16's smallest number
ZERO_LOGIT = 2.0**-24


@dataclass(frozen=True)
class LabelRules:
    """How heads become labels.

    names                label or region names in the order of `targets`
    targets              foreground: one integer per label or, with regions, also a tuple of integers per region
    regions_class_order  per region the label that its voxels get, painted in this order; empty for plain labels
    ignore               voxels with this reference label are neither learnt from nor scored, and it is never predicted
    """

    names: tuple[str, ...]
    targets: tuple[Target, ...]
    regions_class_order: tuple[int, ...] = ()
    ignore: int | None = None

    @property
    def has_regions(self) -> bool:
        return bool(self.regions_class_order)

    @property
    def labels(self) -> tuple[int, ...]:
        """Every label that a mask may hold, background included, ascending, without the ignore label."""
        found = {0}
        for target in self.targets:
            found |= set(members(target))
        return tuple(sorted(found))

    @property
    def foreground_labels(self) -> tuple[int, ...]:
        """`labels` without background."""
        return tuple(label for label in self.labels if label)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of a network's outputs, in order."""
        return self.names if self.has_regions else ("background", *self.names)

    @property
    def n_heads(self) -> int:
        """Outputs of a network: one per region, or one per label with background."""
        return len(self.targets) if self.has_regions else len(self.labels)

    def from_scores(self, scores_czyx: NDArray[np.floating], middle: float) -> NDArray[np.int16]:
        """Heads (heads, *spatial) -> labels. Plain: the highest head, ties to the lower label.

        Regions: heads above `middle` (0.5 for probabilities, ZERO_LOGIT for logits) are painted in their order.
        """
        if len(scores_czyx) != self.n_heads:
            what = f"{len(self.targets)} regions" if self.has_regions else f"the labels {list(self.labels)}"
            raise InputError(f"{len(scores_czyx)} heads came, but {what} need {self.n_heads}; the network belongs to other labels")
        out = np.zeros(scores_czyx.shape[1:], dtype=np.int16)
        if self.has_regions:
            for head, label in zip(scores_czyx, self.regions_class_order, strict=True):
                out[head > middle] = label
            return out
        # one head after the other: argmax over a leading axis is slow, and its int64 result is large
        height = np.array(scores_czyx[0])
        for index, head in enumerate(scores_czyx[1:], start=1):
            higher = head > height
            out[higher] = self.labels[index]
            np.copyto(height, head, where=higher)
        return out

    def from_logits(self, logits_czyx: NDArray[np.floating]) -> NDArray[np.int16]:
        """Labels of logits (heads, *spatial)."""
        return self.from_scores(logits_czyx, ZERO_LOGIT)

    def from_probabilities(self, probabilities_czyx: NDArray[np.floating]) -> NDArray[np.int16]:
        """Labels of probabilities (heads, *spatial)."""
        return self.from_scores(probabilities_czyx, 0.5)

    def to_json(self) -> dict[str, Any]:
        """Lists and numbers, whose order survives where the keys of a table are sorted; `rules_from_json` reads them."""
        targets = [list(target) if isinstance(target, tuple) else target for target in self.targets]
        return {"names": list(self.names), "targets": targets, "order": list(self.regions_class_order), "ignore": self.ignore}

    def outside(self, head: int) -> float:
        """The probability of a head where the network saw nothing: background is certain."""
        return float(head == 0 and not self.has_regions)


def members(target: Target) -> tuple[int, ...]:
    """The labels of a label or region."""
    return target if isinstance(target, tuple) else (target,)


def mask_of(labels_zyx: NDArray[np.integer], target: Target) -> NDArray[np.bool_]:
    """Where a mask holds a label, or any label of a region."""
    if isinstance(target, int):
        return np.asarray(labels_zyx == target)
    mask = np.zeros(labels_zyx.shape, dtype=bool)
    for label in target:
        mask |= labels_zyx == label
    return mask


def plain_rules(n_heads: int, ignore: int | None = None) -> LabelRules:
    """Labels 0 to n_heads - 1 without names."""
    return LabelRules(tuple(f"label {value}" for value in range(1, n_heads)), tuple(range(1, n_heads)), (), ignore)


def turned_round(declared: object) -> object:
    """Labels as nnU-Net 2 declares them, name -> value, also where they come as value -> name (nnU-Net 1, the Decathlon)."""
    if isinstance(declared, Mapping) and declared and all(str(key).isdigit() and isinstance(name, str) for key, name in declared.items()):
        return {name: int(key) for key, name in declared.items()}
    return declared


def read_rules(declared: object, regions_class_order: object = None, source: object = "dataset.json") -> LabelRules:
    """Rules of `labels` and `regions_class_order` as a `dataset.json` has them; raises InputError for what nnU-Net refuses too.

    declared             {"background": 0, "name": 1 or [1, 2, ...], ..., "ignore": highest}; the order of regions counts
    regions_class_order  one label per region, if any value is a list of several labels
    """
    if not isinstance(declared, Mapping) or not declared:
        raise InputError(f'{source}: "labels" is {declared!r}; it must be {{"background": 0, "name": 1, ...}}')
    values: dict[str, Target] = {str(name): _value(source, str(name), value) for name, value in declared.items()}
    if values.get("background") != 0:
        raise InputError(f'{source}: labels are {dict(declared)}; needed is "background": 0')
    ignore = values.pop("ignore", None)
    if isinstance(ignore, tuple):
        raise InputError(f'{source}: "ignore" is the list {list(ignore)}; it must be one integer, the highest label')
    regions = any(isinstance(value, tuple) and len(value) > 1 for value in values.values())
    foreground = {name: value for name, value in values.items() if set(members(value)) != {0}}
    if not regions:
        # a list of one label is that label
        single = {name: members(value)[0] for name, value in foreground.items()}
        foreground = dict(sorted(single.items(), key=lambda item: item[1]))
    known = sorted({label for value in values.values() for label in members(value)})
    if ignore is not None and ignore != len(known):
        raise InputError(f'{source}: "ignore" is {ignore}; it must be the highest label, {len(known)}')
    # two names of one label, 0 included, are refused; a region that is all background is dropped, as in nnU-Net
    distinct = len(set(foreground.values())) == len(foreground) == len(values) - 1
    if not foreground or known != list(range(len(known))) or (not regions and not distinct):
        raise InputError(
            f'{source}: labels are {dict(declared)}; needed are "background": 0, at least one more, and values without gaps '
            '(renumber other values with "label_map")'
        )
    order = _order(source, regions_class_order, list(foreground), known) if regions else ()
    return LabelRules(tuple(foreground), tuple(foreground.values()), order, ignore)


def rules_from_json(table: Mapping[str, Any]) -> LabelRules:
    """The rules of `LabelRules.to_json`."""
    targets = tuple(tuple(target) if isinstance(target, list) else target for target in table["targets"])
    return LabelRules(tuple(table["names"]), targets, tuple(table["order"]), table["ignore"])


def declared(rules: LabelRules) -> dict[str, Any]:
    """`labels` (and `regions_class_order`) as a `dataset.json` has them: `read_rules` of it gives the rules again."""
    labels = {"background": 0, **dict(zip(rules.names, rules.to_json()["targets"], strict=True))}
    if rules.ignore is not None:
        labels["ignore"] = rules.ignore
    return {"labels": labels} | ({"regions_class_order": list(rules.regions_class_order)} if rules.has_regions else {})


def scored_labels(rules: LabelRules) -> dict[str, Target]:
    """What a scorer tells apart, by name: labels or regions, background and the ignore label."""
    ignore: dict[str, Target] = {} if rules.ignore is None else {"ignore": rules.ignore}
    return {"background": 0, **dict(zip(rules.names, rules.targets, strict=True)), **ignore}


def _value(source: object, name: str, value: object) -> Target:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    items: list[Any] = list(value) if isinstance(value, (list, tuple)) else []
    if not items or not all(isinstance(item, int) and not isinstance(item, bool) for item in items) or len(set(items)) != len(items):
        raise InputError(f"{source}: label {name!r} is {value!r}; every label must be one integer, or a list of integers (a region)")
    return tuple(items)


def _order(source: object, given: object, names: list[str], known: list[int]) -> tuple[int, ...]:
    order = list(given) if isinstance(given, (list, tuple)) else []
    whole = all(isinstance(label, int) and not isinstance(label, bool) for label in order)
    if len(order) != len(names) or not whole or not set(order) <= set(known):
        raise InputError(
            f'{source}: "regions_class_order" is {given!r}; it must name one of the labels {known[1:]} for each of the '
            f"{len(names)} regions ({', '.join(names)}), in their order"
        )
    return tuple(order)
