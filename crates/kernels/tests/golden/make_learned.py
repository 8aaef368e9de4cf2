"""Writes learned.safetensors, the values of PyTorch that tests/learned.rs compares with.

    python3 -m venv venv && venv/bin/pip install torch==2.11.0 numpy safetensors
    venv/bin/python make_learned.py

PACT, DoReFa, DSQ and LSQ(+), stated anew from their papers' formulas in float64, differentiated by autograd. Values that lie
within rounding of the border between two levels, or of a bound, are drawn again: float32 may see them on the other
side.
"""

import math
import pathlib

import torch
from safetensors.torch import save_file

assert torch.__version__.split("+")[0] == "2.11.0", torch.__version__
torch.manual_seed(20261124)
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
out = {}
# The least distance from a border, as a share of the step.
BORDER = 1e-4


def put(name, tensor):
    assert name not in out
    out[name] = tensor.detach().clone().to(torch.float32).contiguous()


def draw(count, low, high, clear):
    """float32 numbers between low and high that are all clear of what rounding could take them across."""
    x = (torch.rand(count) * (high - low) + low).float().double()
    while not (fine := clear(x)).all():
        again = (torch.rand(count) * (high - low) + low).float().double()
        x = torch.where(fine, x, again)
    return x


def clear_of_halves(position):
    return (position - position.floor() - 0.5).abs() > BORDER


def through(hard, soft):
    """The value of one, the gradient of the other."""
    return soft + (hard - soft).detach()


# PACT: the clip by absolute values, then the linear quantization; the symmetric clip for both signs.
for name, alpha, bits, signed in (("pact", 1.7, 4, False), ("pact3", 0.6, 3, False), ("signed", 0.9, 4, True)):
    alpha = torch.tensor([alpha]).float().double().requires_grad_()
    steps = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    with torch.no_grad():
        clear = lambda x: clear_of_halves(x / alpha * steps) & ((x.abs() - alpha).abs() > 1e-4) & (x.abs() > 1e-4)
        x = draw(1000, -2.0, 2.5, clear)
    x.requires_grad_()
    if signed:
        y = torch.minimum(torch.maximum(x, -alpha), alpha)
    else:
        y = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    y = through(torch.round(y * steps / alpha) * alpha / steps, y)
    gy = torch.randn(1000).float().double()
    y.backward(gy)
    for what, tensor in (("x", x), ("alpha", alpha), ("y", y), ("gy", gy), ("gx", x.grad), ("galpha", alpha.grad)):
        put(f"{name}.{what}", tensor)

# DoReFa, the maximum taken as a constant.
for name, scale, bits in (("dorefa", 0.8, 4), ("dorefa2", 3.0, 2)):
    steps = 2**bits - 1
    w = (torch.randn(9, 11, 7) * scale).float().double()
    largest = w.tanh().abs().max()
    # Those that are not clear move a little; the largest stays.
    for _ in range(100):
        fine = clear_of_halves((w.tanh() / (2 * largest) + 0.5) * steps) | (w.tanh().abs() == largest)
        w = torch.where(fine, w, (w * 0.99).float().double())
    assert fine.all()
    w.requires_grad_()
    t = w.tanh() / (2 * largest.detach()) + 0.5
    y = 2 * through(torch.round(t * steps) / steps, t) - 1
    gy = torch.randn_like(w).float().double()
    y.backward(gy)
    for what, tensor in (("w", w), ("y", y), ("gy", gy), ("gw", w.grad)):
        put(f"{name}.{what}", tensor)

# DSQ: the soft function is differentiated, the hard one is the value.
for name, low, high, alpha, bits in (
    ("dsq", 0.0, 1.5, 0.2, 4),
    ("dsq3", -0.7, 0.9, 0.45, 3),
    ("dsq2", 0.3, 1.1, 0.03, 2),
):
    low, high, alpha = (torch.tensor([v]).float().double().requires_grad_() for v in (low, high, alpha))
    steps = 2**bits - 1
    delta = (high - low) / steps
    with torch.no_grad():
        clear = lambda x: (
            clear_of_halves((x - low) / delta) & ((x - low).abs() > 1e-4) & ((x - high).abs() > 1e-4)
        )
        x = draw(1000, -1.2, 2.0, clear)
    x.requires_grad_()
    scale = 1 / (1 - alpha)
    k = torch.log(2 / alpha - 1) / delta
    assert abs(scale.item() - 1 / math.tanh((k * delta).item() / 2)) < 1e-12
    i = ((x - low) / delta).floor().clamp(0, steps - 1).detach()
    middle = low + (i + 0.5) * delta
    phi = scale * torch.tanh(k * (x - middle))
    level = lambda phi: low + delta * (i + (phi + 1) / 2)
    outside = lambda inside: torch.where(x < low, low, torch.where(x > high, high, inside))
    soft, hard = outside(level(phi)), outside(level(torch.sign(phi)))
    gy = torch.randn(1000).float().double()
    soft.backward(gy)
    put(f"{name}.bounds", torch.cat([low, high]))
    put(f"{name}.gbounds", torch.cat([low.grad, high.grad]))
    put(f"{name}.softness", alpha)
    put(f"{name}.gsoftness", alpha.grad)
    for what, tensor in (("x", x), ("y", hard), ("gy", gy), ("gx", x.grad)):
        put(f"{name}.{what}", tensor)

# LSQ, and LSQ+ where there is an offset: division, clip and rounding as they stand in the papers, with the gradients of
# the step and the offset scaled on their way.
for name, step, offset, bits, signed, items in (
    ("lsq", 0.09, None, 4, False, 250),
    ("lsq8", 0.006, None, 8, False, 1000),
    ("lsqw", 0.21, None, 3, True, 1000),
    ("lsqw2", 0.55, None, 2, True, 1000),
    ("lsqplus", 0.14, -0.9, 4, False, 125),
    ("lsqplus3", 0.2, 0.15, 3, False, 500),
):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    learned = {"step": torch.tensor([step]), "offset": torch.tensor([0.0 if offset is None else offset])}
    learned = {what: tensor.float().double().requires_grad_() for what, tensor in learned.items()}
    g = 1 / math.sqrt(items * high)
    step, offset_ = (through(tensor, tensor * g) for tensor in learned.values())
    with torch.no_grad():
        position = lambda x: (x - offset_) / step
        clear = lambda x: (
            clear_of_halves(position(x))
            & ((position(x) - low).abs() > BORDER)
            & ((position(x) - high).abs() > BORDER)
        )
        x = draw(500, -1.8, 2.1, clear)
    x.requires_grad_()
    clipped = torch.clamp((x - offset_) / step, low, high)
    y = through(torch.round(clipped), clipped) * step + offset_
    gy = torch.randn(500).float().double()
    y.backward(gy)
    put(f"{name}.begin", 2 * x.abs().mean().reshape(1) / math.sqrt(high))
    for what, tensor in learned.items():
        put(f"{name}.{what}", tensor)
        put(f"{name}.g{what}", tensor.grad)
    for what, tensor in (("x", x), ("y", y), ("gy", gy), ("gx", x.grad)):
        put(f"{name}.{what}", tensor)

path = pathlib.Path(__file__).with_name("learned.safetensors")
save_file(out, path, {"torch": torch.__version__})
print(f"{path.name}: {path.stat().st_size} bytes")
