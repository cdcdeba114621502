"""NanoAdam and AdamW fine-tune a pretrained network: accuracy, state, and what is kept of before.

ResNet-20, trained on CIFAR-10, learns ten classes of Tiny-ImageNet at 32x32 with a fresh output
layer: 4500 images, 3 epochs, batch 64, cosine, no weight decay. NanoAdam selects a tenth of each
large tensor. Each optimizer takes the learning rate of the best mean accuracy on 500 further
training images; the table shows test accuracy at that rate, then accuracy on 1000 images of
CIFAR-10 with the old output layer. State is the optimizer's, as a share of AdamW's.

Run with: python -m benchmarks.finetune DATA WEIGHTS, the folders of the data sets and of the
pretrained networks. Writes docs/results/finetune.md.
"""

import copy
import math
import sys
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from benchmarks.provenance import provenance
from featherweight.common import write_text
from featherweight.lab import data, models
from featherweight.lab.statistics import interval, judge
from featherweight.optim import NanoAdam, groups
from featherweight.optim.analysis import state_bytes

SEEDS, EPOCHS, BATCH, HELD_OUT = (0, 1, 2), 3, 64, 500
RATES = {"AdamW": (1e-3, 3e-3, 1e-2, 3e-2), "NanoAdam": (3e-3, 1e-2, 3e-2, 1e-1)}


def main() -> None:
    folder, weights = map(Path, sys.argv[1:3])
    pretrained = models.build("resnet20", classes=10, shape=(3, 32, 32), seed=0, shortcut="A")
    pretrained.load_state_dict(load_file(weights / "cifar10-resnet" / "resnet20.safetensors"))
    cifar = data.load("cifar10", folder / "cifar10", validation=0)
    scale = (cifar.mean.view(-1, 1, 1), cifar.std.view(-1, 1, 1))
    tiny = data.load("image-folder", folder / "tiny-imagenet-10", validation=0)
    new, test = (_prepared(split, scale, 32) for split in (tiny.train, tiny.test))
    old = tuple(part[:1000] for part in _prepared(cifar.test, scale, 32))
    text = measure(pretrained, new, test, old)
    print(text)
    page = Path(__file__).resolve().parent.parent / "docs" / "results" / "finetune.md"
    head = f"# Benchmark: finetune\n\n{__doc__.strip()}\n\n{provenance()}\n\n"
    write_text(page, f"{head}{text}\n")


def _prepared(split, scale, side):
    images = split.images.float() / (255 if split.images.dtype == torch.uint8 else 1)
    images = F.adaptive_avg_pool2d(images, side)
    return ((images - scale[0]) / scale[1]).contiguous(
        memory_format=torch.channels_last
    ), split.labels


def measure(pretrained, new, test, old):
    runs = {
        name: {
            rate: [_run(name, rate, s, pretrained, new, test, old) for s in SEEDS] for rate in rs
        }
        for name, rs in RATES.items()
    }
    best = {
        name: max(found, key=lambda rate, found=found: fmean(r["validation"] for r in found[rate]))
        for name, found in runs.items()
    }
    adamw, nano = runs["AdamW"][best["AdamW"]], runs["NanoAdam"][best["NanoAdam"]]
    gain = [a["test"] - b["test"] for a, b in zip(nano, adamw, strict=True)]
    low, high = interval(gain)
    rows = [
        "| optimizer | learning rate | test accuracy | CIFAR-10 afterwards | state |",
        "|---|---|---|---|---|",
    ]
    for name, found in (("AdamW", adamw), ("NanoAdam", nano)):
        test_, kept = (fmean(r[key] for r in found) for key in ("test", "old"))
        share = found[0]["state"] / adamw[0]["state"]
        rows.append(
            f"| {name} | {best[name]:g} | {100 * test_:.1f} % | {100 * kept:.1f} % "
            f"| {100 * share:.1f} % |"
        )
    verdict = judge(gain, (-0.01, math.inf))
    return "\n".join(
        [
            *rows,
            "",
            f"NanoAdam minus AdamW: {100 * fmean(gain):+.1f} points of test accuracy, interval "
            f"{100 * low:+.1f} .. {100 * high:+.1f}, {len(SEEDS)} seeds. At least as good "
            f"(here: at most one point behind): {verdict}.",
            "",
            "Validation accuracy by learning rate, mean over seeds: "
            + "; ".join(
                f"{name} "
                + ", ".join(
                    f"{rate:g}: {100 * fmean(r['validation'] for r in found):.1f} %"
                    for rate, found in runs[name].items()
                )
                for name in runs
            )
            + ".",
        ]
    )


def _run(name, rate, seed, pretrained, new, test, old):
    torch.manual_seed(seed)
    model = copy.deepcopy(pretrained).to(memory_format=torch.channels_last)
    before, model.linear = model.linear, nn.Linear(64, 10)
    if name == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0, fused=True)
    else:
        optimizer = NanoAdam(groups(model), rate, density=0.1, mask_interval=20)
    images, labels = new
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held, taken = order[:HELD_OUT], order[HELD_OUT:]
    steps = EPOCHS * math.ceil(len(taken) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for batch in taken[torch.randperm(len(taken))].split(BATCH):
            F.cross_entropy(model.train()(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    found = {"validation": _accuracy(model, images[held], labels[held])}
    found |= {"test": _accuracy(model, *test), "state": state_bytes(optimizer)}
    model.linear = before
    print(name, rate, seed, found, flush=True)
    return found | {"old": _accuracy(model, *old)}


@torch.no_grad()
def _accuracy(model, images, labels):
    return float((model.eval()(images).argmax(1) == labels).double().mean())


if __name__ == "__main__":
    main()
