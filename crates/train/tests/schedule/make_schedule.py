"""Writes schedule.json, the learning rates of PyTorch that tests/schedule.rs compares with.

    python3 -m venv venv && venv/bin/pip install torch==2.11.0 numpy
    venv/bin/python make_schedule.py

The paper's (19), put together from PyTorch's own schedulers: LinearLR, then CosineAnnealingLR. They count steps; with
S steps an epoch the rate after k steps belongs to the time k/S. A LinearLR can't begin at 0, so it begins with
k = 1.
"""

import json
import pathlib

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

assert torch.__version__.split("+")[0] == "2.11.0", torch.__version__


def rates(rate, warmup, cosine, steps):
    """[[time in epochs, rate]] from k = 1 to the end."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    rise, fall = warmup * steps, cosine * steps
    if warmup > 0:
        linear = LinearLR(optimizer, start_factor=1 / rise, end_factor=1.0, total_iters=rise - 1)
        scheduler = SequentialLR(optimizer, [linear, CosineAnnealingLR(optimizer, fall)], [rise - 1])
        first = 1
    else:
        scheduler = CosineAnnealingLR(optimizer, fall)
        first = 0
    found = []
    for k in range(first, rise + fall + 1):
        found.append([k / steps, optimizer.param_groups[0]["lr"]])
        optimizer.step()
        scheduler.step()
    return found


cases = [
    # The paper's pre-training, at whole and half epochs.
    {"learning_rate": 0.256, "warmup_epochs": 16, "cosine_epochs": 104, "steps": 2},
    # Short, in many steps; and without warm-up.
    {"learning_rate": 0.01, "warmup_epochs": 1, "cosine_epochs": 3, "steps": 10},
    {"learning_rate": 0.0001, "warmup_epochs": 0, "cosine_epochs": 5, "steps": 4},
]
for case in cases:
    case["rates"] = rates(case["learning_rate"], case["warmup_epochs"], case["cosine_epochs"], case["steps"])
lines = ",\n".join(json.dumps(case) for case in cases)
pathlib.Path(__file__).with_name("schedule.json").write_text(f"[\n{lines}\n]\n")
