"""Fingerprint and plans in words and as a table, for a user who asks why."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ichbench.prepare.configuration import Plan
from ichbench.prepare.fingerprint import Fingerprint
from ichbench.prepare.plan import SMALLEST_BATCH, Lowres, Planned, Sized
from ichbench.prepare.resample import ANISOTROPY
from ichbench.prepare.target import Target
from ichbench.prepare.topology import REFERENCE_BATCH, Family

AXES = "zyx"


def explain_fingerprint(found: Fingerprint, channels: Sequence[str]) -> list[str]:
    """What was measured: spacings, shapes, the crop, and each channel's foreground."""
    spacings, shapes = np.asarray(found.spacings), np.asarray(found.shapes_after_crop)
    size = found.median_relative_size
    crop = "nothing is cut off" if size == 1 else f"the median case keeps {size:.1%} of its voxels"
    lines = [
        f"Spacing in mm and shape in voxels over {len(spacings)} cases (least, median, most):",
        *(
            f"  {AXES[axis]}: {_three(spacings[:, axis])} mm; {_three(shapes[:, axis])} voxels{' after the crop' if size != 1 else ''}"
            for axis in range(3)
        ),
        f"Cropping to what is not 0: {crop}.",
        "Grey values where a label is above 0 (the ignore label too), every case with foreground weighing the same:",
    ]
    for index, facts in found.intensities.items():
        name = channels[int(index)] if int(index) < len(channels) else "?"
        lines.append(
            f"  channel {index} ({name}): mean {facts['mean']:.5g}, sd {facts['std']:.5g}, median {facts['median']:.5g}; "
            f"0.5 % lie below {facts['percentile_00_5']:.5g}, 0.5 % above {facts['percentile_99_5']:.5g}; "
            f"from {facts['min']:.5g} to {facts['max']:.5g}"
        )
    return lines


def explain_planned(planned: Planned, family: Family, n_labels: int, n_cases: int) -> list[str]:
    """Every decision and its reason: spacing, patch, batch, low-resolution stage, grey values."""
    lines = ["Spacing", *_indented(_spacing(planned.target))]
    for name, sized in planned.configurations.items():
        if name != "3d_cascade_fullres":
            lines += ["", f"{name}: why this patch and batch", *_indented(_size(sized, planned.target, family, n_labels, n_cases))]
    lines += ["", "Low resolution and cascade", *_indented(_lowres(planned.lowres, planned.target))]
    plan = planned.configurations["2d"].plan
    return [*lines, "", "Grey values", *_indented(plan.explain_norm())]


def planned_table(planned: Planned) -> list[str]:
    """One row a configuration, in columns."""
    head = ("configuration", "spacing (mm)", "median case", "patch", "batch", "stages", "features", "strides", "batch Dice")
    rows = [head, *(_row(sized.plan) for sized in planned.configurations.values())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _spacing(target: Target) -> list[str]:
    names = ", ".join(AXES)
    lines = [f"The median spacing of the cases is {_x(target.median_zyx_mm)} mm ({names}), their median shape {_x(target.typical_shape)}."]
    if target.chosen:
        lines.append(f"The recipe fixes the working spacing: {_x(target.spacing_zyx_mm)} mm ({names}).")
    else:
        lines.append(_rule(target))
    first = AXES[target.transpose_forward[0]]
    order = ", ".join(AXES[axis] for axis in target.transpose_forward)
    coarsest = "has the coarsest working spacing" if len(set(target.spacing_zyx_mm)) > 1 else "is the first of three equal ones"
    lines.append(f"Axis {first} {coarsest} and comes first; all numbers below are in the order {order}.")
    lines.append(f"At the working spacing the median case has {_x(target.median_shape)} voxels.")
    return lines


def _rule(target: Target) -> str:
    """Which axis is coarsest, by how much, and what nnU-Net makes of it."""
    worst = int(np.argmax(target.median_zyx_mm))
    others = [axis for axis in range(3) if axis != worst]
    widest, fewest = max(target.median_zyx_mm[axis] for axis in others), min(target.typical_shape[axis] for axis in others)
    if target.median_shape[0] == 1 and target.typical_shape[worst] == 1:
        plane = [target.spacing_zyx_mm[axis] for axis in others]
        return f"The cases have one voxel along {AXES[worst]}, so only the other axes matter; they take their median: {_x(plane)} mm."
    if target.median_zyx_mm[worst] == widest:
        return f"No axis is coarser than all others, so every axis takes its median: {_x(target.spacing_zyx_mm)} mm."
    name, ratio, fewer = AXES[worst], target.median_zyx_mm[worst] / widest, fewest / target.typical_shape[worst]
    voxels = f"{fewer:,.1f} times fewer voxels" if fewer > 1 else "no fewer voxels"
    facts = f"{name} is {ratio:.3g} times coarser than the next axis and has {voxels}"
    if target.refined_axis is None:
        both = f"only where both are above {ANISOTROPY} does nnU-Net leave the median"
        return f"{facts}; {both}, so every axis takes its median: {_x(target.spacing_zyx_mm)} mm."
    taken = target.spacing_zyx_mm[worst]
    if taken == widest + 1e-5:
        tenth = f"10th percentile of the cases, but not less than the other axes: {taken:g} mm"
    else:
        tenth = f"10th percentile of the cases, {taken:g} mm{' (which is the median, too)' if taken == target.median_zyx_mm[worst] else ''}"
    return f"{facts}. Both are above {ANISOTROPY}: to keep the detail of thin slices, {name} takes the {tenth}."


def _size(sized: Sized, target: Target, family: Family, n_labels: int, n_cases: int) -> list[str]:
    plan, fit = sized.plan, sized.fit
    names = [AXES[axis] for axis in target.transpose_forward[3 - plan.dims :]]
    if fit is None:
        lines = [f"The recipe chose the patch; cut to the median case and padded to whole bottleneck voxels it is {_x(plan.patch_size)}."]
    else:
        shape = "cube of 256^3" if plan.dims == 3 else "square of 2048^2"
        lines = [
            f"It starts from a {shape} voxels that is equally long in mm, {_x(fit.isotropic)}; cut to the median case and padded "
            f"to whole bottleneck voxels that is {_x(fit.first)}.",
            f"A sample of it needs {_m(fit.first_estimate)} feature-map elements with {n_labels} labels, and may take {_m(fit.budget)}: "
            f"a batch of {REFERENCE_BATCH[plan.dims] if family.fill_batch else 2} has to fit.",
        ]
        if fit.shrinks:
            counts = {axis: sum(step.axis == axis for step in fit.shrinks) for axis in dict.fromkeys(step.axis for step in fit.shrinks)}
            times = ", ".join(f"{names[axis]} {_times(count)}" for axis, count in counts.items())
            path = " -> ".join(_x(step.patch) for step in fit.shrinks[-3:])
            shown = f"{'... -> ' if len(fit.shrinks) > 3 else ''}{path}"
            lines.append(
                f"Too much, so the axis that covers most of the median case was cut, {_times(len(fit.shrinks))} in all ({times}): {shown}, "
                f"which needs {_m(fit.estimate)}."
            )
        else:
            lines.append("That fits, so nothing is cut.")
    memory = f"The memory holds {sized.fitting} such samples"
    most = f"{family.batch_share:.0%} of the cohort's voxels ({n_cases} median cases), the most that a batch may show, are {sized.share}"
    chosen = max(min(sized.fitting, sized.share), SMALLEST_BATCH)
    if plan.batch_size != chosen:
        lines.append(f"{memory}; the recipe chose the batch: {plan.batch_size}.")
    else:
        least = f", and a batch has at least {SMALLEST_BATCH}" if chosen > min(sized.fitting, sized.share) else ""
        lines.append(f"{memory}{', but' if sized.share < sized.fitting else ';'} {most}{least}: batch {plan.batch_size}.")
    halved = "at each but the first, the axes with less than twice the finest spacing are halved, down to 4 voxels at the least"
    lines.append(f"{plan.n_stages} stages: {halved}." if plan.n_stages > 1 else "One stage: the patch is too small to be halved.")
    return lines


def _lowres(lowres: Lowres | None, target: Target) -> list[str]:
    if lowres is None:
        return [
            f"The median case has a single voxel along {AXES[target.transpose_forward[0]]}: 2D data, so no 3D configuration is planned."
        ]
    if lowres.threshold == 0:
        return ["The recipe asks for none (lowres_coverage = 0)."]
    seen = f"The 3d_fullres patch shows {lowres.coverage:.1%} of the median case"
    limit = f"{lowres.threshold:.1%}, below which a low-resolution stage is looked for"
    if lowres.steps == 0:
        return [f"{seen}, not less than {limit}: none is needed."]
    few = f"{seen}, less than {limit}."
    if lowres.sized is None:
        return [
            f"{few} The spacing was made coarser {_times(lowres.steps)}, by 3 % each, until the patch showed enough; the case then has "
            f"only {lowres.gain:.3g} times fewer voxels, and less than 2 is not worth a stage: there is none."
        ]
    plan = lowres.sized.plan
    return [
        f"{few} The spacing was made coarser {_times(lowres.steps)}, by 3 % each, until the patch showed enough: "
        f"{' x '.join(f'{value:.4g}' for value in plan.spacing)} mm, patch {_x(plan.patch_size)}, {lowres.gain:.3g} times fewer voxels.",
        "So 3d_lowres is planned, and 3d_cascade_fullres, which refines its masks at full resolution.",
    ]


def _row(plan: Plan) -> tuple[str, ...]:
    strides = " ".join("".join(map(str, stride)) for stride in plan.strides)
    features = f"{plan.features[0]}-{plan.features[-1]}"
    spacing, median = " x ".join(f"{value:.4g}" for value in plan.spacing), _x(plan.median_shape)
    pooled = "yes" if plan.batch_dice else "no"
    name = plan.configuration
    return name, spacing, median, _x(plan.patch_size), str(plan.batch_size), str(plan.n_stages), features, strides, pooled


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _three(values: np.ndarray) -> str:
    return f"{values.min():.4g}, {np.median(values):.4g}, {values.max():.4g}"


def _x(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _m(elements: float) -> str:
    return f"{elements / 1e6:,.1f} million" if elements >= 1e5 else f"{elements:,.0f}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
