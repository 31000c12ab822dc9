"""Weights survive the disk bit for bit; anything else is an InputError and never unpickled."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from ichbench.errors import InputError
from ichbench.network.weights import load_weights, manifest_path, save_weights


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, width, 3), nn.Conv3d(width, 2, 1)).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def test_round_trip(tmp_path: Path) -> None:
    ours, other = network(), network()
    sha = save_weights(ours, tmp_path / "deep" / "final.safetensors", {"epoch": 3})
    assert load_weights(other, tmp_path / "deep" / "final.safetensors") == {"epoch": 3}
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), other.state_dict().values(), strict=True))
    assert json.loads((tmp_path / "deep" / "final.json").read_text())["sha256"] == sha
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["final.json", "final.safetensors"]
    assert save_weights(other, tmp_path / "again.safetensors", {"epoch": 4}) == sha


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "final.safetensors"
    save_weights(network(), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="sha256"):
        load_weights(network(), path)


def test_weights_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "final.safetensors"
    save_weights(network(), path)
    with pytest.raises(InputError, match=r"has shape \(4.*\), but the plan's network has \(6"):
        load_weights(network(6), path)
    with pytest.raises(InputError, match="another network"):
        load_weights(nn.Sequential(nn.Conv3d(1, 4, 3)), path)


@pytest.mark.parametrize("manifest", [None, "{", "[]", "{}"])
def test_missing_or_broken_manifest(tmp_path: Path, manifest: str | None) -> None:
    path = tmp_path / "final.safetensors"
    save_weights(network(), path)
    manifest_path(path).unlink()
    if manifest is not None:
        manifest_path(path).write_text(manifest)
    with pytest.raises(InputError, match="final"):
        load_weights(network(), path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_weights(network(), tmp_path / "none.safetensors")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    """Even with a matching digest: the bytes go to the safetensors parser, which refuses them."""
    import hashlib

    path, data = tmp_path / "final.safetensors", pickle.dumps({"weight": [1.0] * 100})
    path.write_bytes(data)
    manifest_path(path).write_text(json.dumps({"sha256": hashlib.sha256(data).hexdigest(), "about": {}}))
    with pytest.raises(InputError, match="not a safetensors file"):
        load_weights(network(), path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "final.safetensors"
    sha = save_weights(network(), path)

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        save_weights(network(), path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final.json", "final.safetensors"]
    assert json.loads(manifest_path(path).read_text())["sha256"] == sha
    load_weights(network(), path)
