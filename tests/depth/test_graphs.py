"""Static shapes: one compiled graph for all inputs of a shape; export; ONNX where there is one."""

import pytest
import torch

from featherweight import depth
from tests.depth.factories import hugging_vit, images, logits, own


def test_one_graph_for_all_inputs():
    model = depth.a_mod(own(layers=2), 0.5)
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    with torch.no_grad():
        compiled(images(2))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(1, 4):
                x = images(2, seed)
                found, chosen = compiled(x), depth.convert.ledger_of(model).visited[1]
                assert torch.allclose(found, model(x), atol=1e-5)
                assert torch.equal(chosen, depth.convert.ledger_of(model).visited[1])
    assert (
        len({tuple(depth.visited(model, images(2, s))[1].flatten().tolist()) for s in (1, 2)}) == 2
    )


@pytest.mark.parametrize(
    ("make", "convert"),
    [
        (own, depth.a_mod),
        (hugging_vit, depth.a_mod),
        (own, depth.mod),
        (own, lambda model: depth.tome(model, 3)),
    ],
    ids=["a-mod own", "a-mod vit", "mod", "tome"],
)
def test_exported_program_is_the_model(make, convert):
    model, x = convert(make()), images(2)
    program = torch.export.export(model, (x,))
    for seed in (1, 2):
        x = images(2, seed)
        assert torch.allclose(logits(program.module()(x)), logits(model(x)), atol=1e-5)


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = depth.a_mod(own(), 0.5), images(2)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), model(x), atol=1e-4)


def test_timm():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    x = torch.randn(1, 3, 224, 224)
    expected = model(x)
    depth.a_mod(model, 1.0)
    assert torch.allclose(model(x), expected, atol=1e-4)
    depth.to_dense(model)
    assert depth.visited(depth.a_mod(model, 0.5), x)[1].sum() == 99
