"""A training step under Sign-In, as a ratio to plain SGD: optimizer form and parametrised form.

MLP 784-1024-1024-10 (1.9 million weights), batch 128, cross entropy. The base is torch's SGD with
the same momentum and weight decay, its foreach or its fused form, whichever has the lower median.
Every figure is the median over rounds of the ratio to the base's step of the same round.
"compiled" is ``torch.compile(optimizer.step)``, which fuses the passes over memory into one.
"""

import copy
from statistics import median

import torch
from torch import nn

from benchmarks.timing import alternate, ratios
from featherweight.sparse import reparam

ROUNDS = 60
KINDS = ("foreach", "fused", "optimizer", "compiled", "factors")
SETTINGS = {
    "no momentum": {"lr": 1e-3},
    "momentum": {"lr": 1e-3, "momentum": 0.9},
    "momentum, weight decay": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4},
}


def measure() -> str:
    torch.manual_seed(0)
    rows = [
        "| setting | SGD step | SignInSGD | compiled | factors m, w |",
        "|---|---|---|---|---|",
    ]
    for name, options in SETTINGS.items():
        times = alternate(_candidates(options), ROUNDS)
        base = min(("foreach", "fused"), key=lambda kind: median(times[kind]))
        found = ratios(times, base)
        step = f"{1e3 * median(times[base]):.1f} ms ({base})"
        figures = [f"{found[kind]:.3f}" for kind in ("optimizer", "compiled", "factors")]
        rows.append(f"| {name} | {step} | {' | '.join(figures)} |")
    return "\n".join(rows)


def _candidates(options):
    model = nn.Sequential(
        *(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    )
    models = {n: copy.deepcopy(model) for n in KINDS}
    reparam.sign_in(models["factors"])
    optimizers = {
        "foreach": torch.optim.SGD(models["foreach"].parameters(), foreach=True, **options),
        "fused": torch.optim.SGD(models["fused"].parameters(), fused=True, **options),
        "optimizer": reparam.SignInSGD(reparam.sign_in_groups(models["optimizer"]), **options),
        "compiled": reparam.SignInSGD(reparam.sign_in_groups(models["compiled"]), **options),
        "factors": torch.optim.SGD(models["factors"].parameters(), fused=True, **options),
    }
    torch.compiler.reset()
    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    steps["compiled"] = torch.compile(steps["compiled"])
    inputs, labels = torch.randn(128, 784), torch.randint(10, (128,))
    return {name: _step(models[name], steps[name], inputs, labels) for name in models}


def _step(model, update, inputs, labels):
    def step():
        nn.functional.cross_entropy(model(inputs), labels).backward()
        update()
        model.zero_grad()

    return step
