"""NanoAdam in the field's frameworks, and on two ranks."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from tests.optim.test_nanoadam_state import loss, network, of_network, steps

# Frameworks


class WithLoss(nn.Module):
    """What a Trainer takes: a module that returns its loss."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, inputs, labels):
        outputs = self.body(inputs)
        return {"loss": nn.functional.cross_entropy(outputs, labels), "logits": outputs}


def test_a_hugging_face_trainer_resumes_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    rows = [{"inputs": torch.randn(16, generator=generator), "labels": i % 4} for i in range(24)]

    def trainer(epochs, folder):
        model = WithLoss()
        optimizer = of_network(model, density=0.2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, max_grad_norm=0.5, report_to=[], use_cpu=True,
            save_strategy="epoch", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        return transformers.Trainer(
            model, arguments, train_dataset=rows, optimizers=(optimizer, schedule)
        )

    whole = trainer(3, tmp_path / "whole")
    whole.train()
    trainer(1, tmp_path / "parts").train()
    resumed = trainer(3, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    states = resumed.optimizer.state_dict()["state"].values()
    assert any(s.get("index", torch.empty(0)).dtype == torch.int32 for s in states)


def test_accelerate_prepares_it():
    accelerate = pytest.importorskip("accelerate")
    model, twin = network(), network()
    optimizer, reference = of_network(model), of_network(twin)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    for step in range(6):
        wrapped.zero_grad()
        accelerator.backward(loss(prepared, step))
        wrapped.step()
    expected = steps(twin, reference, 6)
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), expected)


SCRIPT = """
    import os
    import copy
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from featherweight.optim.during_backward import update_during_backward
    from featherweight.optim.nanoadam import NanoAdam

    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def make(bias=True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 33, bias), nn.ReLU(), nn.Linear(33, 5, bias))
        with torch.no_grad():
            model[0].weight[:, :4] = 0.0  # many ties
        return model

    def nano(model, **options):
        return NanoAdam(model.named_parameters(), 1e-2, min_size=100, mask_interval=3, **options)

    def train(model, optimizer, inputs):
        for batch in inputs:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

    whole = torch.randn(9, 8, 16, generator=torch.Generator().manual_seed(1))

    # DDP: ranks agree bit by bit
    model = nn.parallel.DistributedDataParallel(make())
    train(model, nano(model.module, chunk=50), whole[:, rank::2])
    for p in model.module.parameters():
        both = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(both, p.detach())
        assert torch.equal(*both)
    oracle = make()
    train(oracle, nano(oracle, chunk=50), whole)
    for a, b in zip(model.module.parameters(), oracle.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    try:
        update_during_backward(nano(model.module))
    except ValueError as error:
        assert "are not sharded" in str(error)
    else:
        raise AssertionError

    # FSDP2: each rank selects from its own rows, as an optimizer over the rows alone would
    def sharded():
        model = make()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        return model

    model = sharded()
    optimizer = nano(model)
    oracle = make()
    shards = [nn.Parameter(q.detach().clone())
              for p in oracle.parameters() for q in p.chunk(2)]
    selective = [p.numel() >= 100 for p in oracle.parameters() for q in p.chunk(2)]
    reference = NanoAdam([
        {"params": [s for s, yes in zip(shards, selective) if yes], "min_size": 0},
        {"params": [s for s, yes in zip(shards, selective) if not yes], "density": 1.0},
    ], 1e-2, mask_interval=3)
    for batch in whole:
        train(model, optimizer, [batch[rank::2]])
        oracle.zero_grad()
        oracle(batch).square().mean().backward()
        for s, g in zip(shards, [q for p in oracle.parameters() for q in p.grad.chunk(2)]):
            s.grad = g.clone()
        reference.step()
        with torch.no_grad():
            for p, pair in zip(oracle.parameters(), zip(shards[::2], shards[1::2])):
                p.copy_(torch.cat(pair))
    for a, b in zip(model.parameters(), oracle.parameters()):
        torch.testing.assert_close(a.full_tensor(), b, rtol=1e-4, atol=1e-5)
    state = optimizer.state[model[0].weight]
    assert len(state["index"]) == -(-model[0].weight.to_local().numel() // 10)

    # FSDP2: each rank's state, saved and loaded, goes on bit by bit
    twin = sharded()
    twin.load_state_dict(model.state_dict())
    other = nano(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, whole[:, rank::2])
    for a, b in zip(model.parameters(), twin.parameters()):
        assert torch.equal(a.to_local(), b.to_local())

    # FSDP2 and updates during backward
    one, two = sharded(), sharded()
    plain, early = nano(one), nano(two)
    train(one, plain, whole[:, rank::2])
    with update_during_backward(early):
        for batch in whole[:, rank::2]:
            two(batch).square().mean().backward()
            assert all(p.grad is None for p in two.parameters())
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.equal(a.to_local(), b.to_local())
    dist.barrier()
    print("rank", rank, "ok", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may crash an interpreter that is being torn down
"""


def test_two_ranks_of_data_parallel_and_sharded_training(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 2  # lines of two ranks may mix
