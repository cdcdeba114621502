"""Experts: every one is a matrix with inputs of its own."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from featherweight.quant.evaluate import layer_errors
from featherweight.quant.experts import expert_sizes
from featherweight.quant.export.directory import save
from featherweight.quant.gptq import gptq_matrix
from featherweight.quant.grid import Grid
from featherweight.quant.quantize import QUANTIZERS, gptq, quantized_matrices, rtn
from featherweight.quant.rotate import draw_rotation, rotate
from featherweight.quant.rtn import round_to_nearest
from tests.quant import tiny
from tests.quant.tiny import transformers

SPARSE = ("mixtral", "qwen2-moe", "qwen3-moe")
NOISE = "ignore:You passed `quantization_config`:UserWarning"


def ids(seed=1):
    return tiny.ids(48, 32, seed)


def quantised(method, model, **options):
    options = {"calibration": ids()} | options if method == "gptq" else options
    return QUANTIZERS[method].method(model, **options)


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("kind", SPARSE)
def test_all_experts_and_linear_layers_but_routers(kind, method):
    model = tiny.build(kind)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    errors = layer_errors(quantised(method, model, bits=4))
    experts = [name for name in errors if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    dense = {"qwen2-moe": 4 + 3}.get(kind, 4)
    assert len(errors) - len(experts) == 2 * dense
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert not any(n.endswith(("gate.weight", "norm.weight")) for n in changed)
    assert not any("embed" in n or "lm_head" in n or "shared_expert_gate" in n for n in changed)
    assert "model.layers.1.mlp.experts.down_proj" in changed
    for row in model.model.layers[1].mlp.experts.gate_up_proj[2]:
        assert len(row.unique()) <= 16


def test_rounding_is_that_of_each_matrix():
    model = tiny.build("qwen3-moe")
    weight = model.model.layers[0].mlp.experts.gate_up_proj[3].detach().clone()
    rtn(model, bits=3, group_size=16)
    found = quantized_matrices(model)["model.layers.0.mlp.experts.3.up_proj"].quantized
    assert torch.equal(found.codes, round_to_nearest(weight[32:], Grid(3, 16)).codes)
    assert torch.equal(found.dequantize(), model.model.layers[0].mlp.experts.gate_up_proj[3][32:])


def routed(model, index, expert):
    """Return what reaches an expert of a layer, and what its down projection sees."""
    seen = []
    experts = model.model.layers[index].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    tiny.logits(model, ids())
    handle.remove()
    rows = torch.cat([x[(chosen == expert).any(-1)] for x, chosen, _ in seen])
    gate, up = (rows @ experts.gate_up_proj[expert].T).chunk(2, -1)
    return rows, torch.nn.functional.silu(gate) * up


def test_each_expert_is_quantised_on_its_own_tokens():
    model = tiny.build("mixtral")
    weights = model.model.layers[1].mlp.experts
    read, write = (t[2].detach().clone() for t in (weights.gate_up_proj, weights.down_proj))
    gptq(model, ids(), bits=2)
    rows, inner = routed(model, 1, 2)
    found = quantized_matrices(model)
    for inputs, weight, names in (
        (rows, read, ("gate_proj", "up_proj")),
        (inner, write, ("down_proj",)),
    ):
        hessian = (inputs.T @ inputs / len(inputs)).detach()
        expected = gptq_matrix(weight, hessian, Grid(2)).quantized.codes
        codes = torch.cat(
            [found[f"model.layers.1.mlp.experts.2.{n}"].quantized.codes for n in names]
        )
        assert (codes != expected).float().mean() < 0.01


def test_experts_that_no_token_reaches_are_rounded():
    model = tiny.build("qwen3-moe")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # equal logits: the same two experts for every token
    dense = copy.deepcopy(model)
    gptq(model, ids(), bits=3)
    found = quantized_matrices(model)
    names = [n for n in found if ".experts." in n]
    idle = {n.split(".")[5] for n in names if found[n].damping is None}
    busy = {n.split(".")[5] for n in names if found[n].damping is not None}
    assert len(idle) == len(busy) == 2
    one = min(idle)
    weight = dense.model.layers[1].mlp.experts.down_proj[int(one)]
    codes = found[f"model.layers.1.mlp.experts.{one}.down_proj"].quantized.codes
    assert torch.equal(codes, round_to_nearest(weight.detach(), Grid(3)).codes)


@pytest.mark.parametrize("kind", SPARSE)
def test_gptq_loses_less_than_rounding(kind):
    model = tiny.build(kind)
    reference = tiny.logits(model, ids(2))

    def loss(method):
        found = quantised(method, copy.deepcopy(model), bits=4, clip=False)
        return (tiny.logits(found, ids(2)) - reference).pow(2).mean().item()

    assert loss("gptq") < loss("rtn")


@pytest.mark.filterwarnings(NOISE)
@pytest.mark.parametrize(
    ("kind", "bits", "group_size"),
    [("mixtral", 4, 32), ("qwen2-moe", 3, 16), ("qwen3-moe", 4, None)],
)
def test_stock_transformers_reads_them_dequantised(tmp_path, kind, bits, group_size):
    pytest.importorskip("compressed_tensors")
    model = tiny.build(kind)
    rotate(model, draw_rotation(model, "hadamard", seed=0))
    gptq(model, ids(), bits=bits, group_size=group_size)
    save(model, tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors")
    first = "block_sparse_moe.experts.0.w1" if kind == "mixtral" else "mlp.experts.0.gate_proj"
    assert f"model.layers.0.{first}.weight_packed" in names
    read = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
        experts_implementation="eager",
    )
    assert torch.equal(tiny.logits(read, tiny.ids()), tiny.logits(model, tiny.ids()))


def test_what_no_loader_reads_is_refused(tmp_path):
    model = rtn(tiny.build("qwen3-moe"), bits=4)
    with pytest.raises(ValueError, match="experts can be written as 'compressed-tensors' on a sym"):
        save(model, tmp_path / "out", format="gptq")
    model = rtn(tiny.build("qwen3-moe"), bits=4, symmetric=False)
    with pytest.raises(ValueError, match="on a symmetric grid"):
        save(model, tmp_path / "out")
    with pytest.warns(UserWarning, match="group_size 64 does not divide"):
        model = rtn(tiny.build("qwen3-moe"), bits=4, group_size=64)
    with pytest.raises(ValueError, match="experts can be written with one group size"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_layouts_of_experts_are_refused():
    experts = tiny.build("mixtral").model.layers[0].mlp.experts
    assert expert_sizes(experts) == {"gate_up_proj": 64, "down_proj": 96}
    experts.is_transposed = True
    with pytest.raises(ValueError, match="MixtralExperts stores its experts transposed"):
        expert_sizes(experts)
    experts.down_proj = None
    with pytest.raises(ValueError, match="has no tensor down_proj of all experts"):
        expert_sizes(experts)
