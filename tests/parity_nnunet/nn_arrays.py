"""One case through nnunetv2's own preprocessor and back, and random cases to send through it. Not a test."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy import ndimage

from ichbench.cases.case import Case, Grid
from ichbench.prepare.fingerprint import Fingerprint
from ichbench.prepare.locations import Location, location_classes
from ichbench.prepare.pipeline import Prepared, prepare_case
from ichbench.prepare.plan import Plan, make_plan
from ichbench.recipe import PlanRecipe, PrepareRecipe

FILE_ORDER = PrepareRecipe(compatibility="nnunet")
SCHEMES = ("CTNormalization", "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")
RESAMPLING = "resample_data_or_seg_to_shape"


@dataclass(frozen=True)
class Labels:
    """What a dataset.json says about labels: name -> value or region, ignore among them, and the order in which regions write."""

    table: dict[str, Any]
    regions_class_order: tuple[int, ...] | None = None

    @property
    def classes(self) -> tuple[Location, ...]:
        given = [tuple(value) if isinstance(value, list) else value for name, value in self.table.items() if name != "ignore"]
        values = {label for one in given for label in (one if isinstance(one, tuple) else (one,))}
        regions = [one for one in given if one != 0] if self.regions_class_order is not None else []
        return location_classes(values, self.table.get("ignore"), regions)


def a_plan(
    spacing: Sequence[float],
    forward: Sequence[int] = (0, 1, 2),
    schemes: Sequence[str] = ("CTNormalization",),
    masked: Sequence[bool] = (False,),
    facts: dict[str, dict[str, float]] | None = None,
) -> Plan:
    """Our plan with these values; everything about the network is what comes out and is not looked at."""
    names = {"CTNormalization": "CT"}
    channels = tuple(names.get(scheme, f"c{index}") for index, scheme in enumerate(schemes))
    intensities = facts or {str(i): {"mean": 1.0, "std": 1.0, "percentile_00_5": 0.0, "percentile_99_5": 1.0} for i in range(len(schemes))}
    fingerprint = Fingerprint(((1.0, 1.0, 1.0),), ((32, 32, 32),), intensities, 1.0)
    plan = make_plan(fingerprint, PlanRecipe(), channels, 2, 1)
    backward = tuple(int(axis) for axis in np.argsort(forward))
    return replace(
        plan,
        dims=len(spacing),
        spacing=tuple(float(value) for value in spacing),
        transpose_forward=tuple(int(axis) for axis in forward),
        transpose_backward=backward,
        normalization=tuple(schemes),
        use_mask_for_norm=tuple(bool(value) for value in masked),
    )


def managers(plan: Plan, reader: str = "SimpleITKIO") -> tuple[PlansManager, Any]:
    """nnU-Net's view of our plan."""
    configuration: dict[str, Any] = {
        "data_identifier": "x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [8] * plan.dims,
        "spacing": list(plan.spacing),
        "normalization_schemes": list(plan.normalization),
        "use_mask_for_norm": list(plan.use_mask_for_norm),
        "architecture": {},
    }
    for name, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        configuration[f"resampling_fn_{name}"] = RESAMPLING
        configuration[f"resampling_fn_{name}_kwargs"] = {"is_seg": name == "seg", "order": order, "order_z": 0, "force_separate_z": None}
    plans = {
        "dataset_name": "Dataset001_x",
        "plans_name": "x",
        "image_reader_writer": reader,
        "transpose_forward": list(plan.transpose_forward),
        "transpose_backward": list(plan.transpose_backward),
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {key: dict(value) for key, value in plan.intensities.items()},
        "configurations": {"it": configuration},
    }
    manager = PlansManager(plans)
    return manager, manager.get_configuration("it")


def dataset_json(labels: Labels, n_channels: int = 1) -> dict[str, Any]:
    table: dict[str, Any] = {"channel_names": {str(i): "c" for i in range(n_channels)}, "labels": labels.table, "file_ending": ".nii.gz"}
    return table | ({} if labels.regions_class_order is None else {"regions_class_order": list(labels.regions_class_order)})


def theirs(case: Case, plan: Plan, labels: Labels) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """nnU-Net's arrays and properties for a case, which goes in as its reader would have read it: in file order."""
    order = [case.grid.file_axes.index(axis) for axis in (2, 1, 0)]
    image = np.ascontiguousarray(case.image_czyx.transpose(0, *(axis + 1 for axis in order)))
    seg = None if case.labels_zyx is None else np.ascontiguousarray(case.labels_zyx.transpose(order)).astype(np.float32)[None]
    properties: dict[str, Any] = {"spacing": [case.grid.spacing_zyx_mm[axis] for axis in order]}
    manager, configuration = managers(plan)
    with contextlib.redirect_stdout(io.StringIO()):
        preprocessor = DefaultPreprocessor(verbose=False)
        table = dataset_json(labels, len(image))
        return preprocessor.run_case_npy(image, seg, properties, manager, configuration, table)  # type: ignore[no-any-return]


def ours(case: Case, plan: Plan, labels: Labels) -> Prepared:
    return prepare_case(case, FILE_ORDER, plan, labels.classes)


def their_way_back(logits: Any, plan: Plan, labels: Labels, properties: dict[str, Any]) -> np.ndarray:
    manager, configuration = managers(plan)
    label_manager = manager.get_label_manager(dataset_json(labels))
    return convert_predicted_logits_to_segmentation_with_correct_shape(  # type: ignore[no-any-return]
        logits, manager, configuration, label_manager, properties, num_threads_torch=1
    )


def check(case: Case, plan: Plan, labels: Labels, tolerance: float = 1e-4) -> tuple[float, dict[str, Any], Prepared]:
    """Raise where the two differ; returns the largest difference of the images."""
    data, seg, properties = theirs(case, plan, labels)
    prepared = ours(case, plan, labels)
    geometry = prepared.geometry
    assert geometry.shape_before_crop == tuple(properties["shape_before_cropping"])
    assert [list(span) for span in geometry.box] == [list(span) for span in properties["bbox_used_for_cropping"]]
    assert geometry.cropped_shape == tuple(properties["shape_after_cropping_and_before_resampling"])
    assert prepared.image_czyx.shape == data.shape
    worst = float(np.abs(prepared.image_czyx - data).max())
    assert worst <= tolerance, f"images differ by {worst}"
    if prepared.labels_zyx is not None:
        np.testing.assert_array_equal(prepared.labels_zyx, seg[0])
        locations = properties["class_locations"]
        assert list(prepared.foreground) == list(locations)
        for key, found in locations.items():
            np.testing.assert_array_equal(prepared.foreground[key], np.reshape(found, (-1, 4))[:, 1:], err_msg=str(key))
    return worst, properties, prepared


def random_case(rng: np.random.Generator) -> tuple[Case, Plan, Labels, str]:
    """A small case of any kind, and a plan and labels for it."""
    kind = str(rng.choice(["any", "large", "tiny", "slice", "thin", "native 2D"]))
    shape = rng.integers(2, 26, 3)
    if kind == "tiny":
        shape = rng.integers(1, 5, 3)
    elif kind == "large":
        shape = rng.integers(15, 70, 3)
    elif kind in ("slice", "native 2D"):
        shape[0] = 1
    elif kind == "thin":
        shape[rng.integers(3)] = rng.integers(1, 3)
    spacing, target = (_spacing(rng) for _ in range(2))
    if rng.random() < 0.2:
        target[rng.integers(3)] = spacing[0]
    if kind == "native 2D":
        spacing[0] = 999 * max(spacing[1:])
        target[0] = spacing[0]
    spacing = spacing.astype(np.float32).astype(np.float64)
    forward = [0, 1, 2] if kind == "native 2D" else [int(axis) for axis in rng.permutation(3)]
    file_axes = (2, 1, 0) if kind == "native 2D" else tuple(int(axis) for axis in rng.permutation(3))
    order = [file_axes.index(axis) for axis in (2, 1, 0)]  # the plan speaks of file order
    target = np.array([target[order[axis]] for axis in forward])
    # a target must leave at least one voxel, or nnU-Net makes arrays without any
    small = [order[axis] for axis in forward]
    for axis, k in enumerate(small):
        target[axis] = min(target[axis], spacing[k] * 1.6) if shape[k] < 6 else min(target[axis], spacing[k] * shape[k] / 2)
    dims = 2 if kind == "native 2D" else int(rng.choice([2, 3]))
    n_channels = int(rng.integers(1, 4))
    schemes = [str(rng.choice(SCHEMES)) for _ in range(n_channels)]
    image = _image(rng, shape, n_channels)
    for index, scheme in enumerate(schemes):
        if scheme == "RGBTo01Normalization":
            image[index] = np.abs(image[index]) % 255
    labels, values = _labels(rng, shape)
    facts = {
        str(i): {"mean": float(rng.normal(30, 9)), "std": float(rng.uniform(0.5, 60)), "percentile_00_5": -40.5, "percentile_99_5": 131.25}
        for i in range(n_channels)
    }
    masked = [scheme == "ZScoreNormalization" and bool(rng.random() < 0.5) for scheme in schemes]
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * spacing
    z, y, x = (float(value) for value in spacing)
    grid = Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine, None, file_axes, (z, y, x))  # type: ignore[arg-type]
    with_labels = labels if rng.random() < 0.9 else None
    case = Case("random", image, with_labels, grid)
    plan = a_plan(target[3 - dims :], forward, schemes, masked, facts)
    return case, plan, values, f"{kind} {shape.tolist()} {dims}D {spacing.tolist()} -> {target.tolist()} {schemes} {masked} {values}"


def leaves_nothing(case: Case, plan: Plan) -> bool:
    """Does nnU-Net round an axis of this case to no voxel at all? (It then fails; ours keeps one.)"""
    geometry = prepare_case(replace(case, labels_zyx=None), FILE_ORDER, plan).geometry
    return any(round(a / b * n) < 1 for a, b, n in zip(geometry.spacing_mm, geometry.new_spacing_mm, geometry.cropped_shape, strict=True))


def random_logits(rng: np.random.Generator, n: int, shape: Sequence[int], half: bool) -> np.ndarray:
    """Logits with ties and near ties: coarse steps on some voxels, smooth on others."""
    smooth = ndimage.gaussian_filter(rng.normal(size=(n, *shape)), (0, 1, 1, 1)) * 20
    logits = np.where(rng.random((1, *shape)) < 0.5, np.round(smooth), smooth) * rng.choice([1.0, 1e-4, 30.0])
    return logits.astype(np.float16 if half else np.float32)


def _spacing(rng: np.random.Generator) -> np.ndarray:
    spacing = np.exp(rng.uniform(np.log(0.4), np.log(1.2), 3))
    how = rng.integers(5)
    if how == 0:
        spacing[rng.integers(3)] *= rng.uniform(3, 12)
    elif how == 1:
        spacing[:] = spacing[0]
        spacing[rng.integers(3)] *= rng.choice([1, 3, 3.01, 4])
    elif how == 2:
        spacing *= 5
        spacing[rng.integers(3)] /= 9
    return spacing


def _image(rng: np.random.Generator, shape: np.ndarray, n_channels: int) -> np.ndarray:
    image = ndimage.gaussian_filter(rng.normal(size=(n_channels, *shape)), (0, 1, 1, 1)) * rng.choice([40, 400]) + rng.choice([0, 50, 900])
    image = np.round(image) if rng.random() < 0.5 else image
    how = rng.integers(4)
    if how == 0:
        image[:, rng.random(tuple(shape)) < 0.1] = 0  # holes
    elif how == 1:
        centre = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
        image[:, (centre**2).sum(0) > rng.uniform(0.2, 1.5)] = 0
    elif how == 2 and rng.random() < 0.3:
        image[:] = rng.choice([0, 0, 7])
    return image.astype(np.float32)


def _labels(rng: np.random.Generator, shape: np.ndarray) -> tuple[np.ndarray, Labels]:
    n = int(rng.choice([1, 2, 3, 7]))
    field = ndimage.gaussian_filter(rng.normal(size=tuple(shape)), rng.uniform(0.0, 1.5))
    steps = np.quantile(field, np.linspace(0.4, 0.95, n))
    labels = np.digitize(field, steps).astype(np.int16)
    table: dict[str, Any] = {"background": 0, **{f"label{i}": i for i in range(1, n + 1)}}
    order = None
    if n >= 2 and rng.random() < 0.4:
        values = list(range(1, n + 1))
        table = {"background": 0, "whole": values, "core": values[1:], "last": n}
        order = (1, 2, n)
    if rng.random() < 0.3:
        table["ignore"] = n + 1
        labels[rng.random(tuple(shape)) < 0.2] = n + 1
    if rng.random() < 0.1:
        labels[:] = 0
    return labels, Labels(table, order)
