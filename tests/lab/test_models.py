"""Models: sizes of record, seeds, options, published weights, and models from elsewhere."""

import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from featherweight.common import prunable_weights
from featherweight.lab.data.cifar import read_strips
from featherweight.lab.models import MODELS, build

CIFAR = {"classes": 10, "shape": (3, 32, 32), "seed": 0}
OWN = [name for name in MODELS if name != "hf"]


def prunable(model: nn.Module) -> tuple[int, int]:
    weights = prunable_weights(model)
    return sum(weight.numel() for weight in weights.values()), len(weights)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "weights", "tensors"),
    [("resnet20", 270_896, 22), ("resnet18", 11_164_352, 21), ("vgg16", 14_715_584, 14)],
)
def test_prunable_weights_of_record(name: str, weights: int, tensors: int):
    assert prunable(build(name, **CIFAR)) == (weights, tensors)


@pytest.mark.parametrize(
    ("name", "total"), [("resnet20", 269_722), ("resnet32", 464_154), ("resnet56", 853_018)]
)
def test_parameters_of_the_cifar_networks_with_free_shortcuts(name: str, total: int):
    assert parameters(build(name, **CIFAR, shortcut="A")) == total


@pytest.mark.parametrize(("name", "total"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_parameters_of_the_imagenet_networks(name: str, total: int):
    model = build(name, classes=1000, shape=(3, 224, 224), seed=0, stem="imagenet")
    assert parameters(model) == total
    names = set(model.state_dict())
    assert {"conv1.weight", "layer2.0.downsample.1.running_var", "fc.bias"} <= names


def test_resnet18_prunable_weights_come_in_the_order_of_the_network():
    names = list(prunable_weights(build("resnet18", **CIFAR)))
    assert names[0] == "conv1.weight"
    assert names[5:8] == [
        "layer2.0.conv1.weight",
        "layer2.0.conv2.weight",
        "layer2.0.downsample.0.weight",
    ]
    assert names[-1] == "fc.weight"


def test_mlp_of_the_digits():
    model = build("mlp", classes=10, shape=(1, 8, 8), seed=0)
    assert prunable(model) == (64 * 300 + 300 * 300 + 300 * 10, 3)
    assert parameters(model) == prunable(model)[0] + 300 + 300 + 10 + 4 * 300


def test_vit_parameters_follow_its_equations():
    width, depth, tokens = 24, 3, 1 + 8 * 8
    model = build("vit", **CIFAR, width=width, depth=depth, heads=2)
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 4 * width
    patches = 3 * 4 * 4 * width + width
    head = 2 * width + 10 * width + 10
    assert parameters(model) == patches + width + tokens * width + depth * block + head


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 40, 32)])
def test_logits_have_one_column_a_class(name: str, shape: tuple[int, int, int]):
    model = build(name, classes=7, shape=shape, seed=0, **small(name)).eval()
    assert model(torch.randn(2, *shape)).shape == (2, 7)


def small(name: str) -> dict[str, int]:
    return {"width": 12}


@pytest.mark.parametrize("name", OWN)
def test_weights_depend_on_the_seed_alone(name: str):
    torch.manual_seed(1)
    first = build(name, **CIFAR, **small(name)).state_dict()
    torch.manual_seed(2)
    again = build(name, **CIFAR, **small(name)).state_dict()
    other = build(name, **CIFAR | {"seed": 1}, **small(name)).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if is_drawn(first[key]))


def is_drawn(tensor: torch.Tensor) -> bool:
    return tensor.ndim > 1


@pytest.mark.parametrize("name", OWN)
def test_global_generator_is_left_alone(name: str):
    before = torch.get_rng_state()
    build(name, **CIFAR, **small(name))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", [name for name in OWN if name != "vit"])
def test_weights_have_the_variance_of_he(name: str):
    model = build(name, **CIFAR)
    for weight in prunable_weights(model).values():
        expected = math.sqrt(2 / weight[0].numel())
        tolerance = 5 / math.sqrt(2 * weight.numel())  # five standard errors
        assert weight.std().item() == pytest.approx(expected, rel=tolerance)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert (module.eps, module.momentum) == (1e-5, 0.1)


def test_vit_attends_as_torchs_own_attention():
    block = build("vit", **CIFAR, width=12, heads=3).blocks[0].attention
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": block.qkv.weight,
            "in_proj_bias": block.qkv.bias,
            "out_proj.weight": block.projection.weight,
            "out_proj.bias": block.projection.bias,
        }
    )
    x = torch.randn(2, 5, 12)
    assert torch.allclose(block(x), theirs(x, x, x)[0], atol=1e-6)


def test_shortcut_a_is_strided_with_channels_between_zeros():
    block = build("resnet20", **CIFAR, shortcut="A").layer2[0]
    x = torch.randn(2, 16, 6, 6)
    out = block.shortcut(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def residual_names() -> list[str]:
    return [name for name in MODELS if name.startswith(("resnet", "residual"))]


@pytest.mark.parametrize("name", residual_names())
def test_a_projection_around_every_block_where_asked(name: str):
    options = {"width": 4} | ({"blocks": 3} if name in ("resnet-deep", "residual-mlp") else {})
    model = build(name, **CIFAR, **options, shortcut="C").eval()
    kinds = ("CifarBlock", "BasicBlock", "Bottleneck", "LinearBlock")
    blocks = [m for m in model.modules() if type(m).__name__ in kinds]
    assert blocks
    for block in blocks:
        way = getattr(block, "downsample", None) or block.shortcut
        assert prunable(way)[1] == 1


@pytest.mark.parametrize("name", residual_names())
def test_networks_without_norms_have_biases_and_scalars_where_asked(name: str):
    options = {"width": 4} | ({"blocks": 3} if name in ("resnet-deep", "residual-mlp") else {})
    counts = {}
    for norm, scale in (("batch", "none"), ("none", "none"), ("none", "both"), ("fixup", "none")):
        model = build(name, **CIFAR, **options, norm=norm, scale=scale)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert bool(norms) == (norm == "batch")
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][:-1]
        assert all((layer.bias is not None) == (norm == "none") for layer in layers)
        scalars = [p for p in model.parameters() if p.numel() == 1]
        counts[norm, scale] = len(scalars)
    blocks = counts["none", "both"] // 2
    inner = 3 if name == "resnet50" else 2
    assert counts["batch", "none"] == counts["none", "none"] == 0
    # before and behind each layer of a branch, and its multiplier; one each at stem and head
    assert counts["fixup", "none"] == blocks * (2 * inner + 1) + 2


@torch.no_grad()
def test_a_fixup_block_adds_and_multiplies_where_the_paper_does():
    block = build("resnet20", **CIFAR, width=4, shortcut="C", norm="fixup").layer1[0]
    scalars = [p for p in block.parameters() if p.numel() == 1]
    for number, parameter in enumerate(scalars, 1):
        parameter.fill_(0.1 * number)
    first, second = (shift.bias for shift in block.scalars.before)
    x = torch.randn(2, 4, 6, 6)
    out = (block.conv1(x + first) + block.bn1.bias).relu()
    out = block.conv2(out + second) * block.scalars.branch.scale + block.scalars.after.bias
    assert torch.allclose(block(x), (out + block.shortcut(x + first)).relu())
    assert len(scalars) == 5


@torch.no_grad()
def test_a_block_of_the_residual_perceptron_by_hand():
    model = build(
        "residual-mlp", classes=3, shape=(1, 2, 2), seed=0, width=5, blocks=1, scale="both"
    )
    block, x = model.blocks[0], torch.rand(7, 5)
    block.scalars.branch.scale.fill_(0.3)
    block.scalars.skip.scale.fill_(0.7)
    branch = block.linear2(block.linear1(x).relu())
    assert torch.allclose(block(x), (0.3 * branch + 0.7 * x).relu())
    first = model.linear(x[:, :4]).relu()
    assert torch.equal(model(x[:, :4].view(7, 1, 2, 2)), model.classifier(block(first)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {"shortcuts": "A"}, "'shortcuts': did you mean 'shortcut'"),
        ("resnet20", {"shortcut": "D"}, "unknown shortcut 'D'"),
        ("resnet18", {"shortcut": "A"}, "unknown shortcut 'A'"),
        ("resnet56", {"norm": "layer"}, "unknown norm 'layer'"),
        ("resnet50", {"scale": "skip"}, "unknown scale 'skip'"),
        ("resnet-deep", {"blocks": 0}, "blocks must be a whole number of at least 1, got 0"),
        ("residual-mlp", {"shortcut": "A"}, "unknown shortcut 'A'"),
        ("residual-mlp", {"width": 0}, "width must be a whole number of at least 1, got 0"),
        ("resnet18", {"stem": "imagnet"}, "did you mean 'imagenet'"),
        ("resnet18", {"width": 0}, "width must be a whole number of at least 1, got 0"),
        ("mlp", {"depth": 1.5}, r"depth must be a whole number of at least 1, got 1\.5"),
        ("mlp", {"norm": "layer"}, "unknown norm 'layer'"),
        ("vit", {"patch": 5}, "patch must divide height and width"),
        ("vit", {"heads": 5}, "heads must divide width=192, got 5"),
        ("vgg16", {"shape": (3, 16, 32)}, "at least 32x32"),
        ("mlp", {"classes": 0}, "classes must be"),
        ("mlp", {"shape": (8, 8)}, r"\(channels, height, width\)"),
        ("resnet-20", {}, "did you mean 'resnet20'"),
        ("hf", {}, "path of model 'hf' must be an existing folder, got ''"),
    ],
)
def test_bad_arguments_are_one_line(name: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        build(name, **CIFAR | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet32", "resnet56"])
def test_published_weights_load_strictly(name: str, shared_weights):
    model = build(name, **CIFAR, shortcut="A")
    model.load_state_dict(load_file(shared_weights / "cifar10-resnet" / f"{name}.safetensors"))


def test_published_resnet20_names_9173_of_10000_test_images(shared_data, shared_weights):
    model = build("resnet20", **CIFAR, shortcut="A").eval()
    model.load_state_dict(load_file(shared_weights / "cifar10-resnet" / "resnet20.safetensors"))
    test = read_strips(shared_data / "cifar10" / "test.zip")
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        guesses = [model((x / 255 - mean) / std).argmax(1) for x in test.images.split(50)]
    assert int((torch.cat(guesses) == test.labels).sum()) == 9173


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "lab_test_models.py").write_text(
        "import torch\n"
        "def net(classes, shape, scale=1.0):\n"
        "    layer = torch.nn.Linear(shape[0] * shape[1] * shape[2], classes)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), layer)\n"
        "def broken(classes, shape):\n"
        "    raise RuntimeError('two\\nlines')\n"
        "def number(classes, shape):\n"
        "    return 3\n"
    )
    (tmp_path / "lab_test_broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("lab_test_models", "lab_test_broken"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("own_module")
def test_a_function_of_your_own_is_called_and_seeded():
    before = torch.get_rng_state()
    first, again = (build("lab_test_models:net", **CIFAR, scale=2.0) for _ in range(2))
    assert torch.equal(first[1].weight, again[1].weight)
    assert first(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("lab_test_nothing:net", {}, ValueError, "cannot import 'lab_test_nothing'.*PYTHONPATH"),
        ("lab_test_broken:net", {}, ValueError, "No module named 'nothing_of_that_name'"),
        ("lab_test_models:nett", {}, ValueError, "has no function 'nett'"),
        (":net", {}, ValueError, "cannot import ''"),
        ("lab_test_models:", {}, ValueError, "has no function ''"),
        ("lab_test_models:net", {"size": 1}, ValueError, "unexpected keyword argument 'size'"),
        ("lab_test_models:broken", {}, ValueError, "RuntimeError: two lines"),
        ("lab_test_models:number", {}, TypeError, "returned a int, not an nn.Module"),
    ],
)
def test_errors_of_your_own_function_are_one_line(name, options, error, message):
    with pytest.raises(error, match=message) as caught:
        build(name, **CIFAR, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=5,
    )
    folder = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def test_a_hugging_face_classifier_is_loaded_from_its_folder(vit_folder):
    from transformers import ViTForImageClassification

    original = ViTForImageClassification.from_pretrained(vit_folder).eval()
    model = build("hf", classes=5, shape=(1, 8, 8), seed=0, path=str(vit_folder))
    assert model.model.training
    x = torch.randn(2, 1, 8, 8)
    assert torch.allclose(model.eval()(x), original(x).logits, atol=1e-6)


def test_a_new_head_of_a_hugging_face_classifier_comes_from_the_seed(vit_folder):
    before = torch.get_rng_state()
    heads = [
        build("hf", classes=10, shape=(1, 8, 8), seed=seed, path=str(vit_folder)).model.classifier
        for seed in (0, 0, 1)
    ]
    assert heads[0].weight.shape == (10, 16)
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert torch.equal(before, torch.get_rng_state())


def test_a_hugging_face_classifier_for_other_channels_is_refused(vit_folder):
    with pytest.raises(ValueError, match="wants 1 channels, images have 3"):
        build("hf", **CIFAR, path=str(vit_folder))


def test_a_folder_without_a_classifier_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot read") as caught:
        build("hf", **CIFAR, path=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_transformers_names_the_extra(vit_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'featherweight\[hf\]'"):
        build("hf", classes=5, shape=(1, 8, 8), seed=0, path=str(vit_folder))
