"""Packed files: the format by hand, round trips, damage."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from featherweight.sparse import Masks, load_packed, packed, random
from featherweight.sparse.masks import unpack_bits
from tests.models import ConvNet, mlp


def header_size(path) -> int:
    """The format: eight bytes that say how long the header is, the header, the tensors."""
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    json.loads(path.read_bytes()[8 : 8 + length])
    return 8 + length


class TestPacked:
    @pytest.mark.parametrize("density", [1.0, 0.5, 0.05])
    def test_size_is_four_bytes_a_kept_weight_and_a_bit_an_entry(self, density, tmp_path):
        model = mlp(30)
        masks = random(model, density, "uniform", seed=0)
        size = packed.save_packed(tmp_path / "packed", model.state_dict(), masks)
        assert size == (tmp_path / "packed").stat().st_size
        rest = sum(
            t.numel() * t.element_size() for n, t in model.state_dict().items() if n not in masks
        )
        bits = sum(-(-mask.numel() // 8) for mask in masks.values())
        assert size - header_size(tmp_path / "packed") == 4 * masks.nonzeros + bits + rest

    def test_unpacked_by_hand_it_is_the_model(self, tmp_path):
        model = ConvNet()
        masks = random(model, 0.3, "uniform", seed=0)
        masks.apply_(model)
        packed.save_packed(tmp_path / "packed", model.state_dict(), masks)
        stored = load_file(tmp_path / "packed")
        for name, tensor in model.state_dict().items():
            if name not in masks:
                assert torch.equal(stored.pop(name), tensor)
                continue
            dense = torch.zeros_like(tensor)
            kept = unpack_bits(stored.pop(f"{name}.mask"), tensor.shape)
            dense[kept] = stored.pop(f"{name}.values")
            assert torch.equal(kept, masks[name])
            assert torch.equal(dense, tensor)
        assert stored == {}

    def test_dtypes_stay(self, tmp_path):
        model = nn.Linear(8, 4).to(torch.bfloat16)
        size = packed.save_packed(tmp_path / "packed", model.state_dict(), Masks.dense(model))
        assert load_file(tmp_path / "packed")["weight.values"].dtype == torch.bfloat16
        assert size - header_size(tmp_path / "packed") == 2 * 32 + 4 + 2 * 4

    def test_an_error_leaves_the_old_file(self, tmp_path, monkeypatch):
        def fail(*_: object) -> None:
            raise OSError("disk full")

        (tmp_path / "packed").write_text("old")
        monkeypatch.setattr(packed, "save_file", fail)
        model = nn.Linear(2, 2)
        with pytest.raises(OSError, match="disk full"):
            packed.save_packed(tmp_path / "packed", model.state_dict(), Masks.dense(model))
        assert [path.name for path in tmp_path.iterdir()] == ["packed"]
        assert (tmp_path / "packed").read_text() == "old"

    @pytest.mark.parametrize("density", [1.0, 0.3, 0.01])
    def test_loading_brings_back_model_and_masks(self, density, tmp_path):
        model = ConvNet()
        masks = random(model, density, "global", seed=0)
        masks.apply_(model)
        packed.save_packed(tmp_path / "packed", model.state_dict(), masks)
        state, found = load_packed(tmp_path / "packed")
        assert found == masks
        other = ConvNet()
        other.load_state_dict(state)
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in other.state_dict().items())

    def test_masks_of_another_model_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="masks do not fit"):
            packed.save_packed(tmp_path / "packed", mlp().state_dict(), Masks.dense(ConvNet()))
        assert not list(tmp_path.iterdir())

    def test_damage(self, tmp_path):
        path = tmp_path / "packed"
        with pytest.raises(FileNotFoundError, match="no packed file"):
            load_packed(path)
        model = mlp()
        masks = random(model, 0.3, seed=0)
        packed.save_packed(path, model.state_dict(), masks)
        whole = path.read_bytes()
        path.write_bytes(whole[:-3])
        with pytest.raises(ValueError, match="damaged or no safetensors"):
            load_packed(path)
        path.write_bytes(whole)
        tensors = load_file(path)
        header = {"format": "featherweight-packed", "version": 1, "shapes": {"0.weight": [24, 16]}}
        damaged = [
            ("values", torch.zeros(3)),
            ("values", torch.zeros(500)),
            ("mask", torch.zeros(3, dtype=torch.uint8)),
        ]
        for key, value in damaged:
            save_file(
                tensors | {f"0.weight.{key}": value}, path, {"featherweight": json.dumps(header)}
            )
            with pytest.raises(ValueError, match=r"damaged at '0\.weight'"):
                load_packed(path)
        save_file(tensors, path)
        with pytest.raises(ValueError, match="no packed model"):
            load_packed(path)
