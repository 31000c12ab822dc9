"""Training: it learns, it repeats, it stops, it complains. A network of a few thousand weights, a second or two each."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from ichbench.augmentation.patches import TrainingCase, TrainingWarning
from ichbench.cases.labels import LabelRules, plain_rules
from ichbench.compute import Compute
from ichbench.errors import CaseError, InputError
from ichbench.inference.sliding import predict_logits
from ichbench.network.losses import LOSSES
from ichbench.network.unet import make_unet
from ichbench.network.weights import load_weights
from ichbench.recipe import AugmentRecipe, EarlyStopping, InferenceRecipe, NetworkRecipe, TrainingRecipe
from ichbench.training.folder import idle_settings
from ichbench.training.logs import MEASURED
from ichbench.training.parallel import Team
from ichbench.training.supervision import count_hits, dice_of
from ichbench.training.trainer import OPTIMIZERS, TrainResult, train

torch.set_num_threads(1)


@dataclass(frozen=True)
class Plan:
    dims: int
    patch_size: tuple[int, ...]
    features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    batch_size: int = 2
    in_channels: int = 1
    n_classes: int = 2
    batch_dice: bool = False
    family: str = "plain"
    convs_per_stage: tuple[int, ...] = (2, 2)
    decoder_convs: tuple[int, ...] = (2,)


SOLID = Plan(3, (4, 16, 16), (4, 8), ((1, 1, 1), (1, 2, 2)), ((1, 3, 3), (3, 3, 3)))
FLAT = Plan(2, (16, 16), (4, 8), ((1, 1), (2, 2)), ((3, 3), (3, 3)), batch_size=4, batch_dice=True)
QUICK = TrainingRecipe(
    epochs=2, iterations_per_epoch=3, validation_iterations=1, optimizer="adamw", learning_rate=0.01, augment=AugmentRecipe()
)


def blob_cases(count: int, first: int = 0) -> list[TrainingCase]:
    """Noise with a ball that is three standard deviations brighter."""
    made = []
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        z, y, x = np.ogrid[:6, :24, :24]
        cz, cy, cx = rng.uniform(2, 4), rng.uniform(8, 16), rng.uniform(8, 16)
        ball = ((z - cz) * 2) ** 2 + (y - cy) ** 2 + (x - cx) ** 2 < 25
        image = (rng.standard_normal((6, 24, 24)) + 3.0 * ball).astype(np.float32)
        made.append(TrainingCase(f"b{i}", image[None], ball.astype(np.int16), {1: np.argwhere(ball)}))
    return made


def quick(out: Path, plan: Plan = SOLID, seed: int = 0, **changes: Any) -> TrainResult:
    network = changes.pop("network", NetworkRecipe())
    cases = changes.pop("cases_", blob_cases(3))
    return train(cases, changes.pop("validation_", blob_cases(2, 50)), plan, network, QUICK.model_copy(update=changes), seed, out)


def lines(out: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("plan", "least"), [(SOLID, 0.75), (FLAT, 0.6)], ids=["3d", "2d"])
def test_learns_a_bright_ball(plan: Plan, least: float, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    recipe = QUICK.model_copy(update={"epochs": 6, "iterations_per_epoch": 15, "validation_iterations": 4, "moving_average": 0.0})
    result = train(blob_cases(6), blob_cases(4, 50), plan, NetworkRecipe(), recipe, 0, tmp_path, progress=heard.append)
    assert heard == lines(tmp_path)
    assert result.pseudo_dice[0] is not None
    assert result.pseudo_dice[0] > 0.8
    assert heard[-1]["train_loss"] < heard[0]["train_loss"] - 0.3
    assert heard[-1]["val_loss"] < heard[0]["val_loss"]
    # and through the sliding window, with the weights from the disk; in 2D a slice without the ball is mostly noise
    network = make_unet(plan, NetworkRecipe(), seed=9)
    load_weights(network, result.final)
    one = blob_cases(1, 99)[0]
    found = predict_logits(network, one.image_czyx, plan, InferenceRecipe(mirror=False)).argmax(0) == 1
    truth = one.labels_zyx == 1
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > least


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = quick(tmp_path / "a")
    torch.manual_seed(2)
    np.random.default_rng(3).random()
    two, other = quick(tmp_path / "b"), quick(tmp_path / "c", seed=1)
    assert (one.final_sha256, one.best_sha256) == (two.final_sha256, two.best_sha256)
    assert one.final_sha256 != other.final_sha256
    assert one.final.read_bytes() == two.final.read_bytes()
    assert [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(tmp_path / "a")] == [
        {k: v for k, v in line.items() if k not in MEASURED} for line in lines(tmp_path / "b")
    ]


def test_the_log(tmp_path: Path) -> None:
    result = quick(tmp_path, epochs=3)
    log = lines(tmp_path)
    assert [line["epoch"] for line in log] == [0, 1, 2]
    assert {line["epochs"] for line in log} == {3}
    assert [line["learning_rate"] for line in log] == pytest.approx([0.01 * (1 - e / 3) ** 0.9 for e in range(3)])
    assert all(len(line["pseudo_dice"]) == 1 and line["seconds"] >= 0 and line["steps_per_second"] > 0 for line in log)
    average = log[0]["pseudo_dice"][0]
    for line in log[1:]:
        average = 0.9 * average + 0.1 * line["pseudo_dice"][0]
        assert line["moving_average"] == pytest.approx(average)
    assert result.epochs == 3
    assert result.moving_average == pytest.approx(average)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.json",
        "best.safetensors",
        "checkpoints",
        "final.json",
        "final.safetensors",
        "log.jsonl",
        "training.json",
    ]


def test_best_is_the_epoch_with_the_highest_average(tmp_path: Path) -> None:
    result = quick(tmp_path, epochs=5, moving_average=0.0, learning_rate=0.05)
    averages = [line["moving_average"] for line in lines(tmp_path)]
    assert result.best_epoch == int(np.argmax(averages))
    assert json.loads((tmp_path / "best.json").read_text())["about"]["epoch"] == result.best_epoch
    assert (result.best_sha256 == result.final_sha256) == (result.best_epoch == 4)


@pytest.mark.parametrize("changes", [{"validation_iterations": 0}, {"validation_": []}])
def test_without_validation_best_is_final(changes: dict[str, Any], tmp_path: Path) -> None:
    result = quick(tmp_path, **changes)
    assert result.best_sha256 == result.final_sha256
    assert result.moving_average is None
    assert result.pseudo_dice == ()
    assert [line["val_loss"] for line in lines(tmp_path)] == [None, None]


def test_no_foreground_anywhere_gives_null_not_nan(tmp_path: Path) -> None:
    empty = [TrainingCase("e", np.zeros((1, 6, 24, 24), np.float32), np.zeros((6, 24, 24), np.int16), {})]
    quick(tmp_path, cases_=empty, validation_=empty, learning_rate=1e-9)
    assert all(line["pseudo_dice"][0] in (None, 0.0) for line in lines(tmp_path))


def test_early_stopping(tmp_path: Path) -> None:
    """A learning rate that changes nothing: the average of a fixed network rises once or twice by chance, then patience runs out."""
    result = quick(tmp_path, epochs=40, learning_rate=1e-12, iterations_per_epoch=1, early_stopping=EarlyStopping(patience_epochs=2))
    assert result.stopped_early
    assert result.epochs == len(lines(tmp_path)) == result.best_epoch + 3 < 40
    with pytest.raises(InputError, match="early_stopping needs validation"):
        quick(tmp_path, validation_iterations=0, early_stopping=EarlyStopping())


def test_nan_in_an_image_is_named(tmp_path: Path) -> None:
    bad = blob_cases(1)[0]
    bad.image_czyx[0, :, :, :] = np.nan
    with pytest.raises(CaseError, match="loss is nan in epoch 0, step 0"):
        quick(tmp_path, cases_=[bad])


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training case"):
        quick(tmp_path, cases_=[])
    with pytest.raises(InputError, match="seed is -1"):
        quick(tmp_path, seed=-1)
    with pytest.warns(TrainingWarning, match=r"training\.cases = 4, but there are 3"):
        quick(tmp_path / "few", cases=4)
    with pytest.warns(TrainingWarning, match="cannot act"):
        quick(tmp_path / "patient", early_stopping=EarlyStopping(patience_epochs=500))
    with pytest.raises(InputError, match="overwrite removes the training that extend"):
        train(blob_cases(1), [], SOLID, NetworkRecipe(), QUICK, 0, tmp_path / "both", overwrite=True, extend=True)
    with pytest.raises(InputError, match="the hardest tenth of a whole batch"):
        train(blob_cases(1), [], SOLID, NetworkRecipe(), QUICK.model_copy(update={"loss": "topk"}), 0, tmp_path, team=Team(0, 2))


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({"loss": "dice", "class_weights": (1.0, 2.0), "ce_weight": 2.0}, ["class_weights", "ce_weight"]),
        ({"loss": "ce", "dice_weight": 2.0, "batch_dice": True}, ["dice_weight", "batch_dice"]),
        ({"loss": "topk", "ce_weight": 3.0, "class_weights": (1.0, 2.0)}, ["ce_weight"]),
        ({"optimizer": "adamw", "momentum": 0.5}, ["momentum"]),
        ({"loss": "dice_topk", "ce_weight": 3.0, "dice_weight": 2.0, "class_weights": (1.0, 2.0), "batch_dice": True}, []),
        ({"optimizer": "sgd", "momentum": 0.5}, []),
    ],
)
def test_a_setting_that_cannot_act_is_said(changes: dict[str, Any], idle: list[str], tmp_path: Path) -> None:
    """What is said to do nothing does nothing: the weights are the same without it."""
    recipe = QUICK.model_copy(update={"early_stopping": "off"} | changes)
    said = idle_settings(recipe)
    assert [sentence.split(" ")[0] for sentence in said] == [f"training.{name}" for name in idle]
    if idle:
        without = {name: value for name, value in changes.items() if name not in idle}
        with pytest.warns(TrainingWarning, match="does nothing beside"):
            one = quick(tmp_path / "with", **changes)
        assert one.final_sha256 == quick(tmp_path / "without", **without).final_sha256


@pytest.mark.parametrize("validation", [0, 1])
def test_a_training_that_diverges_in_its_last_step_is_not_finished(validation: int, tmp_path: Path) -> None:
    changes = {"optimizer": "sgd", "learning_rate": 1e50, "epochs": 1, "iterations_per_epoch": 1, "gradient_clip": 1e9}
    with pytest.raises(CaseError, match="training diverged"):
        quick(tmp_path, validation_iterations=validation, **changes)
    assert not (tmp_path / "final.safetensors").exists()


def shells(cases: list[TrainingCase], ignore: int | None = None) -> list[TrainingCase]:
    """The ball's core (2) and rim (1); with `ignore`, a random half of each volume is not annotated."""
    made = []
    for number, case in enumerate(cases):
        ball = case.labels_zyx > 0
        labels = (ball.astype(np.int16) + ndimage.binary_erosion(ball, iterations=1)).astype(np.int16)
        places = {(1, 2): np.argwhere(labels > 0), (2,): np.argwhere(labels == 2)}
        if ignore is not None:
            labels[np.random.default_rng(number).random(labels.shape) < 0.5] = ignore
            places = {(1, 2): np.argwhere((labels > 0) & (labels != ignore)), (2,): np.argwhere(labels == 2)}
            places[-1, 0, 1, 2] = np.argwhere(labels != ignore)
        made.append(replace(case, image_czyx=case.image_czyx + 2 * (case.labels_zyx + ball)[None], labels_zyx=labels, foreground=places))
    return made


@pytest.mark.parametrize("ignore", [None, 3])
def test_learns_regions_that_overlap_with_and_without_an_ignore_label(ignore: int | None, tmp_path: Path) -> None:
    rules = LabelRules(("whole", "core"), ((1, 2), (2,)), (1, 2), ignore)
    recipe = QUICK.model_copy(update={"epochs": 6, "iterations_per_epoch": 15, "validation_iterations": 4, "moving_average": 0.0})
    cases, validation = shells(blob_cases(6), ignore), shells(blob_cases(4, 50), ignore)
    result = train(cases, validation, SOLID, NetworkRecipe(), recipe, 0, tmp_path, rules=rules)
    whole, core = (value or 0.0 for value in result.pseudo_dice)
    assert whole > 0.85
    assert core > 0.6
    # the two heads are two answers: each region against the voxels of a case that training never saw
    network = make_unet(SOLID, NetworkRecipe(), seed=9)
    load_weights(network, result.final)
    one = shells(blob_cases(1, 99))[0]
    found = predict_logits(network, one.image_czyx, SOLID, InferenceRecipe(mirror=False)) > 0
    for head, labels in enumerate(((1, 2), (2,))):
        truth = np.isin(one.labels_zyx, labels)
        assert 2 * (found[head] & truth).sum() / (found[head].sum() + truth.sum()) > 0.5


def test_the_second_stage_of_a_cascade_learns_from_the_first_ones_labels(tmp_path: Path) -> None:
    """The image is noise and says nothing; the first stage's labels say nearly everything."""
    cases = []
    for case in blob_cases(6):
        rng = np.random.default_rng(len(cases))
        noise = rng.standard_normal(case.image_czyx.shape).astype(np.float32)
        cases.append(replace(case, image_czyx=noise, previous_zyx=(case.labels_zyx > 0).astype(np.uint8)))
    recipe = QUICK.model_copy(update={"epochs": 4, "iterations_per_epoch": 15, "validation_iterations": 4, "moving_average": 0.0})
    result = train(cases, cases[:2], replace(SOLID, in_channels=2), NetworkRecipe(), recipe, 0, tmp_path / "both")
    assert (result.pseudo_dice[0] or 0.0) > 0.85
    alone = [replace(case, previous_zyx=None) for case in cases]
    result = train(alone, alone[:2], SOLID, NetworkRecipe(), recipe, 0, tmp_path / "alone")
    assert (result.pseudo_dice[0] or 0.0) < 0.6
    with pytest.raises(InputError, match="the cases have 1 channels and 1 labels of a first stage; the plan takes 1"):
        train(cases, [], SOLID, NetworkRecipe(), recipe, 0, tmp_path / "wrong")


def test_what_does_not_fit_the_labels_is_refused(tmp_path: Path) -> None:
    three = LabelRules(("a", "b"), (1, 2))
    regions = LabelRules(("whole", "core"), ((1, 2), (2,)), (1, 2))
    weights = QUICK.model_copy(update={"class_weights": (1.0, 2.0, 3.0)})
    for rules, recipe, said in (
        (three, QUICK, "2 outputs, the cohort's labels need 3"),
        (regions, QUICK.model_copy(update={"loss": "dice_topk"}), "exclude each other"),
        (None, weights, "3 numbers, but the network has 2 outputs: background, label 1"),
        (regions, weights, "2 outputs: whole, core"),
    ):
        with pytest.raises(InputError, match=said):
            train(blob_cases(2), [], SOLID, NetworkRecipe(), recipe, 0, tmp_path, rules=rules)
        assert not list(tmp_path.iterdir())


def test_batch_norm_learns_and_validation_leaves_its_averages_alone(tmp_path: Path) -> None:
    network = NetworkRecipe(norm="batch")
    recipe = {"epochs": 6, "iterations_per_epoch": 15, "moving_average": 0.0}
    seen = quick(tmp_path / "seen", cases_=blob_cases(6), network=network, validation_iterations=4, **recipe)
    unseen = quick(tmp_path / "unseen", cases_=blob_cases(6), network=network, validation_iterations=0, **recipe)
    assert seen.final_sha256 == unseen.final_sha256
    assert (seen.pseudo_dice[0] or 0.0) > 0.7
    trained = make_unet(SOLID, network, seed=9)
    load_weights(trained, seen.final)
    one = blob_cases(1, 99)[0]
    for convolution in ("direct", "winograd"):
        settings = InferenceRecipe(mirror=False, convolution=convolution)  # type: ignore[arg-type]
        found = predict_logits(trained, one.image_czyx, SOLID, settings).argmax(0) == 1
        assert 2 * (found & (one.labels_zyx == 1)).sum() / (found.sum() + (one.labels_zyx == 1).sum()) > 0.7
    # a stored mean takes no constant away, so the biases must be there whichever way is taken
    with torch.no_grad():
        for name, value in trained.named_parameters():
            if name.endswith("conv.bias"):
                value += 0.5
    answers = [
        predict_logits(trained, one.image_czyx, SOLID, InferenceRecipe(mirror=False, convolution=way))  # type: ignore[arg-type]
        for way in ("direct", "winograd")
    ]
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-4)
    # what batch norm is for: a sample's answer in training depends on the others of its batch, at prediction it does not
    image = torch.from_numpy(np.stack([one.image_czyx[:, 1:5, :16, :16], blob_cases(1, 5)[0].image_czyx[:, 1:5, :16, :16] * 3]))
    trained.eval()
    torch.testing.assert_close(trained(image)[:1], trained(image[:1]))
    trained.train()
    assert float((trained(image)[0][:1] - trained(image[:1])[0]).detach().abs().max()) > 0.01


def test_class_weights_and_the_weights_of_the_terms_reach_the_loss(tmp_path: Path) -> None:
    base = quick(tmp_path / "base")
    for changes in ({"class_weights": (1.0, 5.0)}, {"dice_weight": 2.0}, {"ce_weight": 2.0}):
        assert quick(tmp_path / next(iter(changes)), **changes).final_sha256 != base.final_sha256


def test_pseudo_dice_of_plain_labels_counts_voxels() -> None:
    """Against numpy, and the ignored voxels on neither side."""
    rng = np.random.default_rng(3)
    logits, labels = torch.from_numpy(rng.standard_normal((2, 3, 4, 5, 6))), torch.from_numpy(rng.integers(0, 4, (2, 4, 5, 6)))
    counts = count_hits(logits, labels, plain_rules(3, 3))
    found, truth = logits.numpy().argmax(1), labels.numpy()
    for label in (1, 2):
        kept = truth != 3
        shared, both = ((found == label) & (truth == label)).sum(), ((found == label) & kept).sum() + (truth == label).sum()
        assert counts[label - 1].tolist() == [shared, both]
        assert dice_of(counts)[label - 1] == pytest.approx(2 * shared / both)
    assert math.isnan(dice_of(np.zeros((1, 2)))[0])


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_runs(name: str, tmp_path: Path) -> None:
    assert math.isfinite(lines_after(tmp_path, loss=name)[-1]["train_loss"])


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.0}, {"precision": "bf16"}, {"cases": 1}, {"gradient_clip": 0.01},
        {"weight_decay": 0.5}, {"poly_exponent": 3.0}, {"foreground_position": "anywhere"}, {"foreground_share": 1.0},
    ],
)  # fmt: skip
def test_every_other_setting_changes_the_weights(changes: dict[str, Any], tmp_path: Path) -> None:
    assert quick(tmp_path / "a", **changes).final_sha256 != quick(tmp_path / "b").final_sha256


def test_batch_dice_follows_the_plan_unless_set(tmp_path: Path) -> None:
    pooled = replace(SOLID, batch_dice=True)
    auto, on, off = quick(tmp_path / "a", plan=pooled), quick(tmp_path / "b", batch_dice=True), quick(tmp_path / "c")
    assert auto.final_sha256 == on.final_sha256 != off.final_sha256


def test_without_deep_supervision(tmp_path: Path) -> None:
    assert math.isfinite(lines_after(tmp_path, network=NetworkRecipe(deep_supervision=False))[-1]["train_loss"])


def test_sgd_is_nesterov_and_the_thread_count_is_given_back(tmp_path: Path) -> None:
    group = OPTIMIZERS["sgd"](iter([torch.nn.Parameter(torch.zeros(1))]), TrainingRecipe()).param_groups[0]
    assert (group["nesterov"], group["momentum"], group["weight_decay"], group["lr"]) == (True, 0.99, 3e-5, 0.01)
    before = torch.get_num_threads()
    train(blob_cases(1), [], SOLID, NetworkRecipe(), QUICK.model_copy(update={"epochs": 1}), 0, tmp_path, Compute(threads=before + 1))
    assert torch.get_num_threads() == before
    assert set(OPTIMIZERS) == set(TrainingRecipe.model_fields["optimizer"].annotation.__args__)  # type: ignore[union-attr]


def lines_after(out: Path, **changes: Any) -> list[dict[str, Any]]:
    quick(out, **changes)
    return lines(out)


def test_losses_in_bf16_are_those_in_fp32_within_the_noise(tmp_path: Path) -> None:
    """Fifty steps: what bf16 changes is a small part of what another seed does (3 % of it when this was written)."""
    long = {"epochs": 10, "iterations_per_epoch": 5, "validation_iterations": 0}
    runs = {"fp32": (0, {}), "bf16": (0, {"precision": "bf16"}), "another seed": (1, {})}
    curves = {}
    for name, (seed, changes) in runs.items():
        quick(tmp_path / name, FLAT, seed, **long, **changes)
        curves[name] = np.array([line["train_loss"] for line in lines(tmp_path / name)])
    assert curves["fp32"][-1] < curves["fp32"][0] - 0.5, "nothing was learnt, so nothing was compared"
    moved, noise = (np.abs(curves[name] - curves["fp32"]).max() for name in ("bf16", "another seed"))
    assert 0 < moved < 0.2 * noise
