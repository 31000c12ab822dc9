"""Checkpoints: nnU-Net's own are read to the last number; hostile ones are refused, and nothing they ask for happens."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ichbench.errors import InputError
from ichbench.network.checkpoint import MOST_BYTES, SCALARS, read_checkpoint


def benign() -> dict[str, Any]:
    """What a checkpoint of nnunetv2 2.8.1 holds (seen on one that was trained for this purpose), in small."""
    weight = torch.randn(3, 2, 1, 1)
    return {
        "network_weights": {"encoder.a": weight, "decoder.encoder.a": weight},
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.01, "params": [0]}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float32(0.25)], "dice_per_class_or_region": [[np.float64(0.5)]], "lrs": [0.01]},
        "_best_ema": np.float32(0.125),
        "current_epoch": 2,
        "init_args": {"plans": {"a": [1, 2.5, None]}, "configuration": "3d_fullres", "fold": "all", "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }


def test_a_checkpoint_as_nnunet_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_final.pth"
    torch.save(benign(), path)
    found = read_checkpoint(path)
    assert found["_best_ema"] == 0.125
    assert found["logging"] == {"mean_fg_dice": [0.25], "dice_per_class_or_region": [[0.5]], "lrs": [0.01]}
    assert found["inference_allowed_mirroring_axes"] == (0, 1, 2)
    first, second = found["network_weights"].values()
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("name", sorted(SCALARS))
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_numpy_scalar(tmp_path: Path, name: str, order: str) -> None:
    for value in (0, 1, 7, 100):
        number = np.array(value, dtype=order + name)[()]
        torch.save({"x": number}, tmp_path / "c.pth")
        assert read_checkpoint(tmp_path / "c.pth")["x"] == number


def test_scalars_of_numpy_1(tmp_path: Path) -> None:
    """numpy 1 spelled the module `numpy.core`."""
    path = tmp_path / "c.pth"
    torch.save({"x": np.float64(0.375)}, path)
    rewrite(path, lambda data: data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_checkpoint(path) == {"x": 0.375}


def rewrite(path: Path, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def attacks(target: Path) -> dict[str, Any]:
    """Objects whose unpickling would make the file `target`."""
    touch = Calls(os.system, f"touch {target}")
    evaluated = Calls(eval, f"open({str(target)!r}, 'w')")
    array = np.empty(1, dtype=object)
    array[0] = evaluated
    objects = (1, (1,), np.dtype("O"), False, [touch])
    return {
        "os.system": touch,
        "eval": evaluated,
        "exec": Calls(exec, f"open({str(target)!r}, 'w')"),
        "open": Calls(open, str(target), "w"),
        "subprocess": Calls(subprocess.Popen, ["touch", str(target)]),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "path": Calls(Path.touch, target),
        "in an object array": array,
        "numpy's reconstruct": Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=objects),
        "an object scalar": Calls(np._core.multiarray.scalar, np.dtype("O"), touch),
        "numpy's load": Calls(np.load, str(target)),
        "copyreg": Calls(copyreg._reconstructor, Path, object, None, state=touch),  # type: ignore[attr-defined]
        "a tensor's rebuild": Calls(torch._utils._rebuild_tensor_v2, touch, 0, (1,), (1,), False, {}),
        "a subclass' rebuild": Calls(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {target}",), {}),
        "a parameter's rebuild": Calls(torch._utils._rebuild_parameter, evaluated, False, {}),
        "torch.load": Calls(torch.load, str(target)),
        "a storage from a file": Calls(torch.UntypedStorage.from_file, str(target), True, 16),
        "state": Calls(dict, state={"x": touch}),
    }


NAMES = sorted(attacks(Path("x")))
PLACES: dict[str, Callable[[Any], Any]] = {
    "alone": lambda attack: attack,
    "weights": lambda attack: benign() | {"network_weights": {"encoder.a": attack}},
    "optimizer": lambda attack: benign() | {"optimizer_state": {"state": {0: {"momentum_buffer": [torch.ones(2), (attack,)]}}}},
    "key": lambda attack: benign() | {"logging": {"lrs": [{"a": {"b": attack}}]}},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_checkpoint_is_refused_and_creates_nothing(tmp_path: Path, name: str, place: str, protocol: int) -> None:
    target = tmp_path / "created"
    path = tmp_path / "checkpoint_final.pth"
    torch.save(PLACES[place](attacks(target)[name]), path, pickle_protocol=protocol)
    with pytest.raises(InputError, match="nothing in it was executed") as refused:
        read_checkpoint(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["checkpoint_final.pth"]


@pytest.mark.parametrize("kind", ["pickle 0", "pickle 2", "pickle 5", "torch before 1.6", "tar", "zip of pickles", "torchscript"])
def test_other_encodings_of_an_attack(tmp_path: Path, kind: str) -> None:
    target, path = tmp_path / "created", tmp_path / "checkpoint_final.pth"
    content = benign() | {"optimizer_state": Calls(os.system, f"touch {target}")}
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(Calls(os.system, f"touch {target}"), protocol=int(kind[-1])))
    elif kind == "torch before 1.6":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif kind == "tar":
        import tarfile

        # the layout of torch before 0.4, which once got around weights_only (CVE-2025-32434)
        with tarfile.open(path, "w") as archive:
            for name in ("storages", "tensors", "pickle", "sys_info"):
                data = pickle.dumps(Calls(os.system, f"touch {target}"), protocol=2)
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        data = pickle.dumps(Calls(os.system, f"touch {target}"), protocol=2)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
            if kind == "torchscript":
                archive.writestr("archive/constants.pkl", data)
    with pytest.raises(InputError, match=r"executed|damaged or no checkpoint"):
        read_checkpoint(path)
    assert not target.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """An ordinary unpickler falls for the first of them, so the tests above prove something."""
    target = tmp_path / "created"
    pickle.loads(pickle.dumps(attacks(target)["os.system"]))  # noqa: S301
    assert target.exists()


@pytest.mark.parametrize("kept", [0, 10, 200, 0.5, 0.99])
def test_a_truncated_file(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "checkpoint_final.pth"
    torch.save(benign(), path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(InputError, match="copy the file again"):
        read_checkpoint(path)


def test_every_flipped_bit_of_a_weight_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    weight = torch.rand(64)
    torch.save({"a": weight}, path)
    data = path.read_bytes()
    start = data.index(weight.numpy().tobytes())
    for at in (start, start + 100, start + 255):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(InputError, match="check sum"):
            read_checkpoint(path)


def test_a_storage_that_claims_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"a": torch.arange(4.0)}, path)
    rewrite(
        path,
        lambda data: data.replace(b"K\x04t", b"J" + struct.pack("<i", 1 << 28) + b"t").replace(
            b"K\x04\x85", b"J" + struct.pack("<i", 1 << 28) + b"\x85"
        ),
    )
    with pytest.raises(InputError, match="damaged or no checkpoint"):
        read_checkpoint(path)


def test_an_archive_that_would_unpack_to_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"a": torch.zeros(100_000)}, path)
    rewrite(path, lambda data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="compressed"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), "text"])
def test_what_is_no_checkpoint(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(InputError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "c.pth")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(InputError, match="cannot read"):
        read_checkpoint(tmp_path)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe would be waited for, /dev/zero read until the memory is full; the child process bounds both."""
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    (tmp_path / "link.pth").symlink_to(tmp_path / "real.pth")
    torch.save({"x": 1}, tmp_path / "real.pth")
    assert read_checkpoint(tmp_path / "link.pth") == {"x": 1}
    code = f"""
from pathlib import Path
from ichbench.errors import InputError
from ichbench.network.checkpoint import read_checkpoint
for name in ("pipe", "zero"):
    try:
        read_checkpoint(Path({str(tmp_path)!r}) / f"{{name}}.pth")
    except InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("it is no file") == 2


def test_a_file_beyond_any_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    path.touch()
    os.truncate(path, MOST_BYTES + 1)
    with pytest.raises(InputError, match="at most 17,179,869,184 are read"):
        read_checkpoint(path)


def test_entries_that_share_their_bytes(tmp_path: Path) -> None:
    """A directory that names one entry a hundred times makes a hundred times the memory of one file."""
    path = tmp_path / "c.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", bytes(10_000))
        archive.filelist *= 100
    with pytest.raises(InputError, match="entries claim 1,000,000 bytes"):
        read_checkpoint(path)


def test_a_tensor_that_is_made_of_nothing_but_its_size(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"a": Calls(torch.Tensor, 2**30, 2**20)}, path)
    with pytest.raises(InputError, match="not enough memory"):
        read_checkpoint(path)
