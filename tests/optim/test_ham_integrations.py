"""HAM in other people's hands: Accelerate, Hugging Face's Trainer, masks held by a sparse model."""

import pytest
import torch
from torch import nn

from featherweight import optim, sparse
from tests.optim.factories import loss_of, network, train
from tests.optim.test_ham import fed, native, wrapped

HAM = {"alpha": 10.0, "beta": 0.05}
FORMS = {
    "wrapped": lambda model: optim.ham(
        torch.optim.AdamW(model.parameters(), 1e-2, fused=True), weights=model, **HAM
    ),
    "native": lambda model: optim.HamAdamW(model.parameters(), 1e-2, weights=model, **HAM),
}


@pytest.mark.parametrize("form", FORMS)
def test_accelerate_prepares_accumulates_saves_and_loads(form, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain = network()
    optimizer = FORMS[form](plain)
    for step in range(6):
        loss_of(plain, step).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    model = network()
    accelerator = accelerate.Accelerator(cpu=True)
    schedule = None
    for part in (range(3), range(3, 6)):
        if part.start:
            model = network()
        raw = FORMS[form](model)
        schedule = torch.optim.lr_scheduler.ConstantLR(raw, 1.0)
        model, optimizer, schedule = accelerator.prepare(model, raw, schedule)
        if part.start:
            optimizer.load_state_dict(saved[1])  # noqa: F821
            model.load_state_dict(saved[0])  # noqa: F821
        for step in part:
            accelerator.backward(loss_of(model, step))
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        saved = model.state_dict(), optimizer.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(saved[0][key], value), key


class Classifier(torch.nn.Module):
    """A network as the Trainer wants it."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, images, labels):
        logits = self.network(images)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("form", FORMS)
def test_a_hugging_face_trainer_resumes_to_the_bit(form, tmp_path):
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"images": torch.randn(2, 6, 6, generator=generator), "labels": i % 3} for i in range(16)
    ]

    def trained(resume=None):
        model = Classifier()
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=4,
                save_steps=2,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                lr_scheduler_type="constant",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            optimizers=(FORMS[form](model), None),
        )
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    straight = trained()
    assert not torch.equal(straight, torch.cat([p.flatten() for p in Classifier().parameters()]))
    assert torch.equal(trained(str(tmp_path / "checkpoint-2")), straight)


@pytest.mark.parametrize("form", FORMS)
def test_held_masks_stay(form):
    model = network()
    masks = sparse.random(model, 0.3, seed=0)
    optimizer = FORMS[form](model)
    with sparse.hold(model, optimizer, masks):
        before = model[4].weight.detach().clone()
        train(model, optimizer, range(4))
        assert sparse.Masks.nonzero(model) <= masks
        assert not torch.equal(model[4].weight, before)


def test_the_checkpoints_of_wrapped_native_and_plain_form_are_interchangeable():
    gradients, start = torch.randn(6, 30), torch.randn(30)

    def at_three(make):
        weight = nn.Parameter(start.clone())
        optimizer = make(weight)
        return fed(optimizer, weight, gradients[:3]), optimizer.state_dict()

    makers = {
        "wrapped": lambda w: wrapped(torch.optim.AdamW, [w], 0.01, 9.0, 0.1, fused=True),
        "native": lambda w: native(
            torch.optim.AdamW, [w], 0.01, 9.0, 0.1, fused=True, backend="torch"
        ),
    }
    ends = []
    for source in makers.values():
        for target in makers.values():
            middle, state = at_three(source)
            weight = nn.Parameter(middle.clone())
            optimizer = target(weight)
            optimizer.load_state_dict(state)
            ends.append(fed(optimizer, weight, gradients[3:]))
    assert all(torch.equal(end, ends[0]) for end in ends)
    _, plain = at_three(lambda w: torch.optim.AdamW([w], 0.02))
    for make in makers.values():
        optimizer = make(nn.Parameter(start.clone()))
        optimizer.load_state_dict(plain)
        assert optimizer.param_groups[0]["ham_alpha"] == 9.0
        assert optimizer.param_groups[0]["lr"] == 0.02
