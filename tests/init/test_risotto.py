"""RISOTTO: exact isometry at depth, whatever the block, the width and alpha."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from featherweight import init
from featherweight.lab.models.residual import Variant
from featherweight.lab.models.residual_mlp import ResidualMlp
from tests.init.networks import UserBlock, basic_net, bottleneck_net, framed, without_eps
from tests.oracles import risotto as oracle

TIGHT = 1e-12


def residual_mlp(blocks, shortcut, width=24, inputs=10, scale="branch", norm="none"):
    return ResidualMlp(inputs, 4, width, blocks, Variant(shortcut, norm, scale)).double()


def image(channels=3, side=6, count=1):
    return torch.randn(count, channels, side, side, dtype=torch.float64)


def singular_values(model, x):
    return init.jacobian_spectrum(model, x, method="exact").values[0]


def last_state(model, x, depth=-1):
    """Return the state behind the last block of a lab perceptron."""
    return model.blocks(torch.relu(model.linear(x)))


def difference(state):
    plus, minus = state.chunk(2, dim=1)
    return plus - minus


def explicit(model):
    """Return the matrices of a lab perceptron as the oracle has them."""
    blocks = []
    for block in model.blocks:
        width = block.linear2.out_features
        skip = torch.eye(width) if block.shortcut is None else block.shortcut.weight
        alpha = block.scalars.branch.scale.item() if block.scalars.branch.state_dict() else 1.0
        matrices = [m.detach().numpy() for m in (block.linear1.weight, block.linear2.weight, skip)]
        blocks.append(oracle.Block(*matrices, alpha))
    return model.linear.weight.detach().numpy(), blocks


@pytest.mark.parametrize("alpha", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("shortcut", ["B", "C"])
def test_sixty_blocks_have_singular_values_one_by_an_independent_jacobian(shortcut, alpha):
    model = residual_mlp(60, shortcut)
    init.risotto_(model, alpha=alpha, seed=0)
    _, jacobian = oracle.run(*explicit(model), np.random.default_rng(0).normal(size=10))
    assert np.abs(np.linalg.svd(jacobian, compute_uv=False) - 1).max() < TIGHT


@pytest.mark.parametrize("shortcut", ["B", "C"])
@pytest.mark.parametrize("net", [basic_net, bottleneck_net])
def test_fifty_convolutional_blocks_have_singular_values_one(net, shortcut):
    model = net(50, shortcut).double()
    init.risotto_(model, alpha=0.5, seed=0)
    values = singular_values(model, image())
    assert values.shape == (108,)
    assert (values - 1).abs().max() < TIGHT


def test_widening_keeps_all_singular_values_one():
    model = without_eps(framed(UserBlock(8, 16), UserBlock(16, 16), inner=16)).double()
    init.risotto_(model, seed=0)
    assert (singular_values(model, image()) - 1).abs().max() < TIGHT


def test_stride_keeps_a_quarter_of_the_pixels_with_singular_value_one():
    model = without_eps(framed(UserBlock(8, 16, stride=2), UserBlock(16, 16), inner=16)).double()
    report = init.risotto_(model, seed=0)
    values = singular_values(model, image())
    kept = values > 1e-6
    assert kept.sum() == 3 * 6 * 6 / 4
    assert (values[kept] - 1).abs().max() < TIGHT
    assert values[~kept].max() < TIGHT
    assert report["3.conv1"].remark == "stride: reads 1 of 4 pixels"


@pytest.mark.parametrize("shortcut", ["B", "C"])
def test_norms_survive_two_hundred_blocks_in_single_precision(shortcut):
    model = residual_mlp(200, shortcut, width=64, inputs=32).float()
    init.risotto_(model, seed=0)
    x = torch.randn(20, 32)
    with torch.no_grad():
        ratio = last_state(model, x).norm(dim=1) / x.norm(dim=1)
    assert (ratio - 1).abs().max() <= 2e-6


@pytest.mark.parametrize("shortcut", ["B", "C"])
@torch.no_grad()
def test_the_map_of_differences_is_linear_and_keeps_inner_products(shortcut):
    model = residual_mlp(60, shortcut)
    init.risotto_(model, seed=0)
    x, y = torch.randn(2, 5, 10, dtype=torch.float64)
    dx, dy, mixed = (difference(last_state(model, z)) for z in (x, y, 2 * x - 3 * y))
    assert torch.allclose(mixed, 2 * dx - 3 * dy, atol=1e-13, rtol=0)
    assert torch.allclose((dx * dy).sum(1), (x * y).sum(1), atol=1e-12, rtol=0)
    raw = (last_state(model, x) * last_state(model, y)).sum(1)
    assert not torch.allclose(raw, (x * y).sum(1), atol=0.1)


@pytest.mark.parametrize("net", [basic_net, bottleneck_net])
@pytest.mark.parametrize("shortcut", ["B", "C"])
@torch.no_grad()
def test_partners_exclude_each_other_behind_every_block(net, shortcut):
    model = net(6, shortcut).double()
    init.risotto_(model, seed=0)
    state = model[1](model[0](image(count=4)))
    for block in model[2:8]:
        state = block(state)
        plus, minus = state.chunk(2, dim=1)
        assert (plus * minus == 0).all()
        assert (plus + minus).min() > 0


@torch.no_grad()
def test_what_enters_the_relu_of_a_block_is_a_vector_and_its_negative():
    model = residual_mlp(1, "C")
    init.risotto_(model, alpha=0.7, seed=0)
    block = model.blocks[0]
    x = torch.relu(model.linear(torch.randn(5, 10, dtype=torch.float64)))
    branch = block.linear2(torch.relu(block.linear1(x)))
    total = block.scalars(branch, block.shortcut(x))
    assert torch.allclose(total[:, :12], -total[:, 12:], atol=1e-13)


@pytest.mark.parametrize(("shortcut", "size"), [("C", {0.0, math.sqrt(2)}), ("B", None)])
def test_one_block_by_its_raw_state_is_no_isometry_and_by_differences_is(shortcut, size):
    model = residual_mlp(1, shortcut)
    init.risotto_(model, seed=0)
    d = torch.randn(12, dtype=torch.float64)

    def block(state):
        return model.blocks(state[None])[0]

    def through_pairs(d):
        state = block(torch.cat([torch.relu(d), torch.relu(-d)]))
        return state[:12] - state[12:]

    raw = torch.linalg.svdvals(torch.func.jacrev(block)(torch.cat([torch.relu(d), torch.relu(-d)])))
    assert (raw - 1).abs().max() > 0.4
    if size is not None:
        near = torch.tensor(sorted(size, reverse=True)).double().repeat_interleave(12)
        assert torch.allclose(raw, near, atol=1e-12)
    assert torch.allclose(
        torch.linalg.svdvals(torch.func.jacrev(through_pairs)(d)),
        torch.ones(12, dtype=torch.float64),
    )


def test_the_literal_reading_of_the_paper_is_rejected_by_the_check():
    model = residual_mlp(1, "B", width=32, inputs=16)
    init.risotto_(model, seed=0)
    x = torch.randn(1, 16, dtype=torch.float64)
    assert init.jacobian_spectrum(model, x).isometric(1e-10)
    rotation = init.haar(16, 16, seed=0).numpy()
    literal = oracle.literal_identity_block(rotation, 1.0)
    with torch.no_grad():
        model.blocks[0].linear2.weight.copy_(torch.from_numpy(literal.second))
    spectrum = init.jacobian_spectrum(model, x)
    assert not spectrum.isometric(0.1)
    assert spectrum.smallest < 0.8 < 1.3 < spectrum.largest


@pytest.mark.parametrize("net", [basic_net, bottleneck_net])
@pytest.mark.parametrize("shortcut", ["B", "C"])
@torch.no_grad()
def test_the_function_at_the_start_does_not_depend_on_alpha(net, shortcut):
    x, outputs = image(count=3), []
    for alpha in (0.25, 1.0, 3.0):
        model = net(5, shortcut).double()
        report = init.risotto_(model, alpha=alpha, seed=4)
        assert report["2.scalars.branch.scale"].what == f"{alpha:g}"
        assert model[2].scalars.branch.scale.item() == alpha
        outputs.append(model(x))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-12, rtol=0)
    assert torch.allclose(outputs[2], outputs[1], atol=1e-12, rtol=0)


def test_without_a_multiplier_alpha_is_one_and_the_report_says_so():
    model = residual_mlp(3, "C", scale="none")
    report = init.risotto_(model, alpha=0.5, seed=0)
    assert report["blocks.0.shortcut"].remark == "no multiplier: alpha=1, not 0.5"
    assert init.jacobian_spectrum(model, torch.randn(1, 10).double()).isometric(TIGHT)


def test_with_alpha_zero_a_projected_block_is_its_projection():
    model = residual_mlp(1, "C")
    init.risotto_(model, alpha=0.0, seed=0)
    weight = model.blocks[0].shortcut.weight.detach()
    rotation = weight[:12, :12]
    assert torch.equal(weight, init.looks_linear_matrix(rotation))
    assert torch.allclose(rotation @ rotation.T, torch.eye(12).double(), atol=1e-12)


@pytest.mark.parametrize("alpha", [0.25, 1.0, 2.0])
@torch.no_grad()
def test_branch_and_skip_share_the_energy_as_predicted(alpha):
    ratios = {}
    for shortcut in ("B", "C"):
        model = residual_mlp(1, shortcut, width=400, inputs=200)
        init.risotto_(model, alpha=alpha, seed=0)
        block = model.blocks[0]
        x = torch.relu(model.linear(torch.randn(50, 200, dtype=torch.float64)))
        skip = x if block.shortcut is None else block.shortcut(x)
        branch = alpha * block.linear2(torch.relu(block.linear1(x)))
        ratios[shortcut] = float(branch.square().sum() / skip.square().sum())
    assert ratios["B"] == pytest.approx(3, rel=0.05)
    assert ratios["C"] == pytest.approx(alpha**2 / (1 + alpha**2), rel=0.1)


@pytest.mark.parametrize("net", [basic_net, bottleneck_net])
@pytest.mark.parametrize("shortcut", ["B", "C"])
def test_gradient_reaches_every_weight_and_the_taps_around_the_middle(net, shortcut):
    model = net(4, shortcut)
    init.risotto_(model, seed=0)
    model(torch.randn(8, 3, 6, 6)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        if parameter.shape[2:] == (3, 3):
            around = parameter.grad.clone()
            around[:, :, 1, 1] = 0
            assert around.abs().max() > 0, name


@pytest.mark.parametrize("odd_width", [9, 13])
@pytest.mark.parametrize("shortcut", ["B", "C"])
def test_odd_widths_keep_isometry_when_isolated(shortcut, odd_width):
    model = basic_net(30, shortcut, width=odd_width).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"layer '0' has an odd number of outputs, {odd_width}"):
        init.risotto_(model, seed=0)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    init.risotto_(model, odd="isolate", seed=0)
    x = image()
    with torch.no_grad():
        state = model[:-3](x)
    keep = 2 * (odd_width // 2)
    assert state[:, keep:].abs().max() > 0  # alive
    spectrum = init.jacobian_spectrum(nn.Sequential(*model[:-3], Leading(keep)), x)
    assert (spectrum.values - 1).abs().max() < TIGHT


class Leading(nn.Module):
    """The first channels."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x):
        return x[:, : self.count]


@torch.no_grad()
def test_an_isolated_unit_reads_and_is_not_read():
    model = residual_mlp(2, "C", width=13)
    init.risotto_(model, odd="isolate", seed=0)
    for layer in (model.blocks[0].linear1, model.blocks[1].shortcut):
        assert layer.weight[-1, :-1].std() == pytest.approx(math.sqrt(2 / 13), rel=0.6)
        assert not layer.weight[:, -1].any()
    assert not model.classifier.weight[:, -1].any()


@pytest.mark.parametrize("hidden", [20, 10, 4])
def test_a_branch_of_another_width_than_the_state(hidden):
    def block():
        return Narrow(16, hidden)

    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), block(), block(), nn.Linear(16, 3)).double()
    report = init.risotto_(model, seed=0)
    assert (singular_values(model, torch.randn(1, 6).double()) - 1).abs().max() < TIGHT
    turned = "" if hidden >= 16 else f"rotates {hidden // 2} of 8 pairs"
    assert report["2.second"].remark == turned
    if hidden > 16:
        spare = model[2].first.weight[16:], model[2].second.weight[:, 16:]
        assert spare[0].abs().min() > 0
        assert not spare[1].any()


class Narrow(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def test_norms_are_set_to_their_start_and_keep_the_isometry_up_to_eps():
    model = basic_net(10, "C", norm="batch").double()
    model(image(count=8))  # moves the running statistics
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    report = init.risotto_(model, seed=0)
    norm = model[2].bn1
    assert norm.num_batches_tracked == 0
    assert report["2.bn1"].what == "norm: weight 1, bias 0, statistics 0 and 1"
    for tensor, start in zip(
        (norm.weight, norm.bias, norm.running_mean, norm.running_var), (1, 0, 0, 1), strict=True
    ):
        assert (tensor == start).all()
    assert (singular_values(model, image()) - 1).abs().max() < 10 * 3 * 1e-5
    assert (singular_values(without_eps(model), image()) - 1).abs().max() < TIGHT


@pytest.mark.parametrize("head", ["looks_linear", "torch", "zero"])
@torch.no_grad()
def test_heads(head):
    model = residual_mlp(3, "B")
    init.risotto_(model, head=head, seed=0)
    x = torch.randn(7, 10, dtype=torch.float64)
    weight, bias = model.classifier.weight, model.classifier.bias
    if head == "looks_linear":
        u = weight[:, :12]
        assert torch.equal(weight[:, 12:], -u)
        assert torch.allclose(u @ u.T, torch.eye(4).double(), atol=1e-12)
        assert torch.allclose(model(x), difference(last_state(model, x)) @ u.T, atol=1e-12)
        assert not bias.any()
    if head == "torch":
        assert weight.abs().max() <= 24**-0.5
        assert weight.std() == pytest.approx(24**-0.5 / math.sqrt(3), rel=0.2)
        assert 0 < bias.abs().max() <= 24**-0.5
    if head == "zero":
        assert not model(x).any()


def test_same_seed_same_weights_on_any_dtype_and_biases_are_zero():
    models = [residual_mlp(3, "C").to(dtype) for dtype in (torch.float64, torch.float32)]
    for model in models:
        nn.init.ones_(model.blocks[0].linear1.bias)
        init.risotto_(model, generator=torch.Generator().manual_seed(3))
    other = residual_mlp(3, "C")
    init.risotto_(other, seed=4)
    for name, parameter in models[0].named_parameters():
        single = models[1].get_parameter(name)
        assert single.dtype == torch.float32
        assert torch.equal(parameter.float(), single)
        if "bias" in name:
            assert not parameter.any()
        elif "scale" not in name:
            assert not torch.equal(parameter, other.get_parameter(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must not be 0: block 'blocks.0' has an identity skip"),
        ({"alpha": math.nan}, "alpha must be finite, got nan"),
        ({"head": "looks-linear"}, "unknown head 'looks-linear': did you mean 'looks_linear'"),
        ({"odd": "ignore"}, "unknown odd 'ignore'"),
        ({"seed": None}, "exactly one of seed= and generator="),
        ({"generator": torch.Generator()}, "exactly one of seed= and generator="),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(options, message):
    model = residual_mlp(2, "B")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        init.risotto_(model, **{"seed": 0} | options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
