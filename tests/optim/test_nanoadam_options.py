"""What NanoAdam refuses, and says."""

import math

import pytest
import torch

from featherweight.optim import compiled
from featherweight.optim.nanoadam import NanoAdam
from tests.optim.test_nanoadam import train, weight

# Options


@pytest.mark.parametrize(("options", "message"), [
    ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
    ({"lr": math.nan}, "lr must be"),
    ({"betas": (0.9, 1.0)}, "betas must be two in"),
    ({"betas": (0.9,)}, "betas must be two in"),
    ({"eps": -1e-8}, "eps must be"),
    ({"weight_decay": -0.1}, "weight_decay must be"),
    ({"min_size": -1}, "min_size must be"),
    ({"density": 0.0}, r"density must be a number in \(0, 1\], got 0.0"),
    ({"density": 10}, "density must be"),
    ({"final_density": 1.5, "total_steps": 1, "density_interval": 1}, "final_density must be"),
    ({"final_density": 0.05, "density_interval": 3}, "total_steps must be .*needed with"),
    ({"final_density": 0.05, "total_steps": 3}, "density_interval must be .*needed with"),
    ({"mask_interval": 0}, "mask_interval must be an integer >= 1, got 0"),
    ({"mask_interval": None}, "mask_interval must be"),
    ({"mask_interval": True}, "mask_interval must be"),
    ({"chunk": 0}, "chunk must be"),
    ({"chunk": 2.5}, "chunk must be"),
    ({"on_refresh": "carry_on"}, "unknown on_refresh 'carry_on': did you mean 'carry'"),
    ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ({"state_dtype": torch.int8}, "state_dtype must be"),
    ({"foreach": True, "fused": True}, "foreach must be None or False with fused=True, got True"),
])  # fmt: skip
def test_bad_options_are_refused_everywhere(options, message):
    with pytest.raises(ValueError, match=message):
        NanoAdam([weight(3)], **options)
    optimizer = NanoAdam([weight(3)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [weight(3)]} | options)
    assert len(optimizer.param_groups) == 1


def test_numba_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda: False)
    with pytest.raises(ValueError, match="backend 'numba' needs numba"):
        NanoAdam([weight(3)], backend="numba")


def test_sparse_gradients_are_refused_before_anything_moves():
    first, second = (weight(30, 30, dtype=torch.float32) for _ in range(2))
    optimizer = NanoAdam([{"params": [first]}, {"params": [second]}], min_size=0)
    before = first.detach().clone()
    first.grad, second.grad = torch.ones(30, 30), torch.ones(30, 30).to_sparse()
    with pytest.raises(ValueError, match="a sparse one"):
        optimizer.step()
    assert torch.equal(before, first)
    assert not optimizer.state


def test_rank_is_never_asked():
    parameter = weight(5000)
    optimizer = NanoAdam([parameter], 1e-2)
    train(parameter, optimizer, 1)
    assert len(optimizer.state[parameter]["index"]) == 500
