"""What training minimises; the loop itself is tested through runs."""

import torch
from torch import nn

from featherweight.lab.fit import Loss
from featherweight.lab.parse import load
from featherweight.lab.runs import run

LOGITS = torch.tensor([[1.0, -0.5, 2.0], [0.3, 0.2, -1.0]])
LABELS = torch.tensor([2, 1])


class Fixed(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits


def test_without_a_teacher_it_is_cross_entropy():
    oracle = sum(
        float(-row.softmax(0)[label].log()) for row, label in zip(LOGITS, LABELS, strict=True)
    )
    assert abs(float(Loss()(None, LOGITS, LABELS)) - oracle) < 1e-6
    smooth = Loss(label_smoothing=0.3)(None, LOGITS, LABELS)
    mean = float(-LOGITS.log_softmax(1).mean(1).sum())
    assert abs(float(smooth) - (0.7 * oracle + 0.3 * mean)) < 1e-6


def test_distillation_by_its_formula():
    teacher = Fixed(torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.5]]))
    alpha, temperature = 0.95, 6.0
    found = Loss(0.0, alpha, temperature, teacher)(None, LOGITS, LABELS)
    soft = 0.0
    for row, target in zip(LOGITS, teacher.logits, strict=True):
        p, q = (target / temperature).softmax(0), (row / temperature).softmax(0)
        soft += float((p * (p / q).log()).sum()) * temperature**2
    hard = float(Loss()(None, LOGITS, LABELS))
    assert abs(float(found) - ((1 - alpha) * hard + alpha * soft)) < 1e-5


def test_a_student_that_is_its_teacher_has_no_soft_loss():
    found = Loss(0.0, 1.0, 3.0, Fixed(LOGITS))(None, LOGITS.clone(), LABELS)
    assert abs(float(found)) < 1e-6


def test_later_levels_learn_from_the_dense_network(tmp_path):
    changes = ["seeds=[0]", "fit.length=2ep", "sparse.levels=1", "data.limit=200"]
    plain, taught = (
        run(load("lrr-digits", [*changes, f"fit.distillation={alpha}"])[0], 0, tmp_path)
        for alpha in (0.0, 0.9)
    )
    rows = [(d / "metrics.jsonl").read_text().splitlines() for d in (plain, taught)]
    assert rows[0][:2] == rows[1][:2]  # level 0 has no teacher
    assert rows[0][2:] != rows[1][2:]
