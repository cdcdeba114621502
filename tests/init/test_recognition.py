"""Which models are recognised, in whose code, and which are refused before they are touched."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featherweight import init
from featherweight.init.structure import Block, read
from featherweight.lab.models import build
from featherweight.lab.models.residual import Variant
from featherweight.lab.models.residual_mlp import ResidualMlp
from tests.init import networks
from tests.init.networks import UserBlock, framed, without_eps


class UserResNet(nn.Module):
    """A ResNet with the attributes that torchvision's has."""

    def __init__(self, large):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, *((7, 2, 3) if large else (3, 1, 1)), bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.layer1 = nn.Sequential(UserBlock(8, 8), UserBlock(8, 8))
        self.layer2 = nn.Sequential(UserBlock(8, 16), UserBlock(16, 16))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_shaped_as_torchvisions():
    model = without_eps(UserResNet(large=False)).double()
    report = init.risotto_(model, seed=0)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    assert init.jacobian_spectrum(model, x).isometric(1e-12)
    assert report["layer1.0.conv2"].what == "(LL(M) - 1) / a"
    assert report["layer2.0.downsample.0"].what == "LL(M - a U...U)"
    names = [row.name for row in report]
    assert names.index("conv1") < names.index("bn1") < names.index("layer1.0.conv1")
    assert names[-1] == "fc"


def test_max_pooling_behind_the_first_layer_is_remarked():
    model = UserResNet(large=True)
    report = init.risotto_(model, seed=0)
    assert "no isometry across it" in str(report)
    assert report["conv1"].remark == "stride: reads 1 of 4 pixels"


def hugging_face(layer_type, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=3,
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[2, 2],
        layer_type=layer_type,
        num_labels=5,
        **options,
    )
    return transformers.ResNetForImageClassification(config)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_hugging_face_resnets_are_isometric_behind_their_max_pooling(layer_type, early):
    model = without_eps(hugging_face(layer_type, downsample_in_bottleneck=early)).double().eval()
    report = init.risotto_(model, seed=0)
    assert len(read(model).blocks) == 4
    assert report["classifier.1"].what == "[U, -U]"
    d = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():  # the stage without a stride, on a state of pairs
        out = model.resnet.encoder.stages[0](torch.cat([d.relu(), (-d).relu()], 1))
    difference = out[:, :8] - out[:, 8:]
    assert difference.norm() == pytest.approx(d.norm().item(), rel=1e-12)


def test_the_labs_wrapper_of_a_hugging_face_model(tmp_path):
    hugging_face("basic").save_pretrained(tmp_path)
    model = build("hf", classes=5, shape=(3, 32, 32), seed=0, path=str(tmp_path))
    assert len(init.risotto_(model, seed=0)) > 10


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("shortcut", ["B", "C"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_wide_networks_of_the_lab(name, shortcut, stem):
    options = {"width": 8, "stem": stem, "shortcut": shortcut}
    model = build(name, classes=10, shape=(3, 32, 32), seed=0, **options)
    init.risotto_(model, seed=0)
    network = read(model)
    assert len(network.blocks) == {"resnet18": 8, "resnet50": 16}[name]
    projected = sum(bool(block.skip.layers) for block in network.blocks)
    assert projected == (
        len(network.blocks) if shortcut == "C" else {"resnet18": 3, "resnet50": 4}[name]
    )
    assert network.blocks[0].name == "layer1.0"


@pytest.mark.parametrize("norm", ["batch", "none", "fixup"])
@pytest.mark.parametrize("scale", ["none", "branch", "both"])
@pytest.mark.parametrize("shortcut", ["B", "C"])
def test_every_variant_of_the_labs_blocks_is_isometric(shortcut, scale, norm):
    model = ResidualMlp(6, 3, 16, 4, Variant(shortcut, norm, scale)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    init.risotto_(without_eps(model), alpha=0.5, seed=0)
    x = torch.randn(1, 6, dtype=torch.float64)
    assert init.jacobian_spectrum(model, x).isometric(1e-12)
    found = [isinstance(part, Block) for part in read(model).body]
    assert found == [True] * 4


def test_padding_modes_and_dilation_do_not_move_the_middle():
    model = without_eps(
        framed(UserBlock(8, 8, mode="reflect"), UserBlock(8, 16, mode="circular"), inner=16)
    )
    model[3].conv1.dilation, model[3].conv1.padding_mode = (2, 2), "zeros"
    model[3].conv1.padding = (2, 2)
    init.risotto_(model.double(), seed=0)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    assert init.jacobian_spectrum(model, x).isometric(1e-12)


def test_compiled_and_wrapped_models_are_treated_as_the_users_own():
    model = without_eps(framed(UserBlock(8, 8))).double()
    init.risotto_(nn.DataParallel(model), seed=0)
    wrapped = state_of(model)
    init.risotto_(torch.compile(model), seed=0)
    assert unchanged(model, wrapped)


def test_training_modes_gradients_and_random_state_are_left_alone():
    model = framed(UserBlock(8, 8))
    model[3].eval()
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    modes = [module.training for module in model.modules()]
    gradients = [p.grad.clone() for p in model.parameters()]
    before = torch.get_rng_state()
    init.risotto_(model, seed=0)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_needs_another_input_asks_for_it():
    flat = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 4)
    ).double()
    with pytest.raises(ValueError, match="give example=, an input: one of shape"):
        init.risotto_(flat, seed=0)
    x = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    init.risotto_(flat, seed=0, example=x)
    assert init.jacobian_spectrum(flat, x).isometric(1e-12)
    head = flat[3].weight.detach()
    assert torch.equal(head[:, :100], -head[:, 100:])  # pairs of images, flattened


class WithSpare(nn.Module):
    """Has a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.body, self.spare = framed(UserBlock(8, 8)), nn.Linear(3, 3)

    def forward(self, x):
        return self.body(x)


def test_a_layer_that_does_not_run_is_reported_as_left():
    model = WithSpare()
    before = state_of(model.spare)
    report = init.risotto_(model, seed=0)
    assert report["spare.weight"].what == "left as it was"
    assert unchanged(model.spare, before)
    with pytest.raises(KeyError, match="nothing"):
        report["nothing"]


REFUSED = {
    "pre-activation": (lambda: framed(networks.PreActivation(8)), "without a ReLU right behind it"),
    "pre-activation inside": (
        lambda: framed(networks.PreActivation(8), nn.ReLU()),
        r"block '3' begins with 'relu', not a layer \(pre-activation order\)",
    ),
    "no ReLU inside": (lambda: framed(networks.NoActivation(8)), "no ReLU between each two layers"),
    "constant factor": (
        lambda: framed(networks.Halved(8)),
        "'3.conv1'.*does not come from one state",
    ),
    "other activation": (lambda: framed(networks.Gelu(8)), "does not come from one state"),
    "tied": (lambda: framed(networks.Tied(8)), "layer '3.conv1' runs more than once"),
    "concatenation": (lambda: framed(networks.Dense(8)), "'cat' before a ReLU"),
    "groups": (lambda: framed(UserBlock(8, 8, groups=2)), "layer '3.conv1' has 2 groups"),
    "depthwise": (lambda: framed(UserBlock(8, 8, groups=8)), "layer '3.conv1' has 8 groups"),
    "even kernel": (lambda: framed(Even(8)), r"layer '3.conv' has an even kernel \(2, 2\)"),
    "moved middle": (
        lambda: framed(nn.Conv2d(8, 8, 3), nn.ReLU()),
        r"layer '3' has padding \(0, 0\), \(1, 1\) keeps",
    ),
    "no ReLU behind": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
        "layer '0' is not followed by a ReLU",
    ),
    "tanh": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)),
        "layer '0': 'tanh' behind",
    ),
    "ends in ReLU": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
        "must end in a linear layer",
    ),
    "one layer": (lambda: nn.Sequential(nn.Linear(4, 8)), "must begin with a layer and a ReLU"),
    "no layer": (lambda: nn.Sequential(nn.ReLU()), "no linear layer and no convolution"),
    "parametrised": (lambda: parametrised(), "computed weight"),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)),
        "'layer_norm' before a ReLU can't be treated",
    ),
    "shortcut A": (
        lambda: build("resnet20", classes=5, shape=(3, 8, 8), seed=0, width=8, shortcut="A"),
        "does not come from one state by two ways",
    ),
    "transformer": (lambda: build("vit", classes=5, shape=(3, 32, 32), seed=0, width=12), "layer"),
}


class Even(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 2, padding="same")

    def forward(self, x):
        return F.relu(self.conv(x) + x)


def parametrised():
    model = networks.perceptron(4, 8, 8, 2)
    nn.utils.parametrizations.weight_norm(model[2])
    return model


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_other_models_are_refused_in_one_line_and_left_alone(case):
    make, message = REFUSED[case]
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        init.risotto_(model, seed=0)
    assert "\n" not in str(caught.value)
    assert unchanged(model, before)


def test_transformers_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    init.risotto_(framed(UserBlock(8, 8)), seed=0)
