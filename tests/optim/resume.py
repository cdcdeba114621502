"""A process of its own that goes on with every optimizer from its checkpoint.

``python -m tests.optim.resume FOLDER``: reads ``before.pt``, writes ``after.pt``.
"""

import sys
from pathlib import Path

import torch

from tests.optim.factories import ROWS, network, schedule_of, train


def main() -> None:
    folder = Path(sys.argv[1])
    after = {}
    for key, saved in torch.load(folder / "before.pt", weights_only=True).items():
        name, step = key
        model = network()
        model.load_state_dict(saved["model"])
        optimizer = ROWS[name].make(model.parameters())
        if step % 2:  # both orders are used in the field
            optimizer.load_state_dict(saved["optimizer"])
            schedule = schedule_of(optimizer)
        else:
            schedule = schedule_of(optimizer)
            optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        for group, rate in zip(optimizer.param_groups, saved["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate  # a schedule made after loading has written its own
        dtypes = {
            k: v.dtype
            for s in optimizer.state.values()
            for k, v in s.items()
            if isinstance(v, torch.Tensor)
        }
        train(model, optimizer, range(step, step + 5), schedule)
        after[key] = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "dtypes": {k: str(v) for k, v in dtypes.items()},
        }
    torch.save(after, folder / "after.pt")


if __name__ == "__main__":
    main()
