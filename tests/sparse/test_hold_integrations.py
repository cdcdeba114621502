"""Holding under other people's trainers: Hugging Face, data-parallel and sharded training."""

import subprocess
import sys
import textwrap

import pytest
import torch

from featherweight import sparse
from featherweight.sparse import Masks, hold


def test_a_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )
    keys = list(model.state_dict())
    masks = sparse.random(model, 0.3, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    hold(model, optimizer, masks)
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 3}
        for i in range(24)
    ]
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        optimizers=(optimizer, None),
    )
    before = model.vit.embeddings.patch_embeddings.projection.weight.detach().clone()
    trainer.train()
    after = model.vit.embeddings.patch_embeddings.projection.weight
    assert not torch.equal(before, after)
    assert Masks.nonzero(model) <= masks
    assert list(model.state_dict()) == keys
    trainer.save_model(str(tmp_path / "saved"))
    saved = transformers.ViTForImageClassification.from_pretrained(tmp_path / "saved")
    assert Masks.nonzero(saved) == Masks.nonzero(model)


SCRIPT = """
    import os
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from featherweight import sparse
    from featherweight.sparse import Masks, hold

    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def train(model, optimizer, inputs):
        for batch in inputs:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()

    masks = sparse.random(make(), 0.3, seed=0)
    whole = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(1))

    oracle = make()
    optimizer = torch.optim.AdamW(oracle.parameters(), 1e-2)
    hold(oracle, optimizer, masks)
    train(oracle, optimizer, whole)

    model = nn.parallel.DistributedDataParallel(make())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    hold(model, optimizer, masks)
    train(model, optimizer, whole[:, rank::2])
    assert Masks.nonzero(model) == Masks.nonzero(oracle) == masks
    for a, b in zip(model.module.parameters(), oracle.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    sharded = make()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(sharded.parameters(), 1e-2)
    hold(sharded, optimizer, masks)
    train(sharded, optimizer, whole[:, rank::2])
    for (name, a), b in zip(sharded.named_parameters(), oracle.parameters()):
        full = a.full_tensor()
        torch.testing.assert_close(full, b, rtol=1e-5, atol=1e-6)
        if name in masks:
            assert torch.equal(full != 0, masks[name])
            moment = optimizer.state[a]["exp_avg"].full_tensor()
            assert (moment[~masks[name]] == 0).all()
    dist.barrier()
    print("rank", rank, "ok", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may abort an interpreter that is being torn down
"""


def test_two_ranks_of_data_parallel_and_sharded_training(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 2  # lines of two ranks may mix
