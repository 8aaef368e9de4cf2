"""Writes golden.safetensors, the values of PyTorch that tests/golden.rs compares with.

    python3 -m venv venv && venv/bin/pip install torch==2.11.0 numpy safetensors
    venv/bin/python make_golden.py

Feature maps are written as NHWC, weights of k×k convolutions as [k, k, C(, Cout)], as the crate has them.
"""

import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

assert torch.__version__.split("+")[0] == "2.11.0", torch.__version__
torch.manual_seed(20240607)
torch.set_num_threads(1)
out = {}


def put(name, tensor):
    assert name not in out
    out[name] = tensor.detach().clone().contiguous()


def nhwc(x):
    return x.permute(0, 2, 3, 1)


# The stem: a 3×3 convolution with padding 1.
for stride in (1, 2):
    x = torch.randn(2, 3, 7, 6)
    w = torch.randn(5, 3, 3, 3, requires_grad=True)
    y = F.conv2d(x, w, stride=stride, padding=1)
    gy = torch.randn_like(y)
    y.backward(gy)
    name = f"stem{stride}"
    put(f"{name}.x", nhwc(x))
    put(f"{name}.w", w.permute(2, 3, 1, 0).reshape(27, 5))
    put(f"{name}.y", nhwc(y))
    put(f"{name}.gy", nhwc(gy))
    put(f"{name}.gw", w.grad.permute(2, 3, 1, 0).reshape(27, 5))

# Depthwise convolutions.
for stride in (1, 2):
    x = torch.randn(2, 19, 7, 6, requires_grad=True)
    w = torch.randn(19, 1, 3, 3, requires_grad=True)
    y = F.conv2d(x, w, stride=stride, padding=1, groups=19)
    gy = torch.randn_like(y)
    y.backward(gy)
    name = f"depthwise{stride}"
    put(f"{name}.x", nhwc(x))
    put(f"{name}.w", w[:, 0].permute(1, 2, 0))
    put(f"{name}.y", nhwc(y))
    put(f"{name}.gy", nhwc(gy))
    put(f"{name}.gx", nhwc(x.grad))
    put(f"{name}.gw", w.grad[:, 0].permute(1, 2, 0))

# A 1×1 convolution.
x = torch.randn(2, 13, 4, 5, requires_grad=True)
w = torch.randn(9, 13, 1, 1, requires_grad=True)
y = F.conv2d(x, w)
gy = torch.randn_like(y)
y.backward(gy)
put("pointwise.x", nhwc(x))
put("pointwise.w", w[:, :, 0, 0].t())
put("pointwise.y", nhwc(y))
put("pointwise.gy", nhwc(gy))
put("pointwise.gx", nhwc(x.grad))
put("pointwise.gw", w.grad[:, :, 0, 0].t())

# Batch normalization in training, then ReLU6; channel 3 is constant, channel 4 nearly so.
norm = torch.nn.BatchNorm2d(11, eps=1e-5, momentum=0.1)
with torch.no_grad():
    norm.weight.copy_(torch.randn(11) * 2 + 3)
    norm.bias.copy_(torch.randn(11) + 2)
    z = torch.randn(4, 11, 5, 3) * torch.linspace(0.1, 3, 11)[None, :, None, None] + 0.5
    z[:, 3] = 0.7
    z[:, 4] = 0.7 + 1e-4 * z[:, 4]
put("norm.gamma", norm.weight)
put("norm.beta", norm.bias)
z.requires_grad_()
y = F.relu6(norm(z))
gy = torch.randn_like(y)
y.backward(gy)
put("norm.z", nhwc(z))
put("norm.y", nhwc(y))
put("norm.gy", nhwc(gy))
put("norm.gz", nhwc(z.grad))
put("norm.ggamma", norm.weight.grad)
put("norm.gbeta", norm.bias.grad)
put("norm.running_mean", norm.running_mean)
put("norm.running_var", norm.running_var)

# Fake quantization, unsigned and affine. PyTorch takes the step and the zero point.
for name, lo, hi, bits in (("unsigned", 0.0, 6.0, 4), ("affine", -1.3, 2.9, 5)):
    levels = 2**bits - 1
    step = (torch.tensor(hi) - torch.tensor(lo)) / levels
    zero_point = int(torch.round(-torch.tensor(lo) / step))
    x = (torch.rand(1000) * 1.6 - 0.3) * (hi - lo) + lo
    x.requires_grad_()
    y = torch.fake_quantize_per_tensor_affine(x, float(step), zero_point, 0, levels)
    gy = torch.randn_like(y)
    y.backward(gy)
    put(f"{name}.range", torch.tensor([lo, hi]))
    put(f"{name}.x", x)
    put(f"{name}.y", y)
    put(f"{name}.gy", gy)
    put(f"{name}.gx", x.grad)

# Cross-entropy.
for name, smoothing in (("hard", 0.0), ("smooth", 0.1)):
    logits = (torch.randn(6, 20) * 3).requires_grad_()
    labels = torch.randint(0, 20, (6,))
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    loss.backward()
    put(f"{name}.logits", logits)
    put(f"{name}.labels", labels)
    put(f"{name}.loss", loss)
    put(f"{name}.grad", logits.grad)

# Some steps of SGD with changing gradients.
param = torch.randn(5, 7, requires_grad=True)
put("sgd.start", param)
optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9, weight_decay=4e-3)
for step in range(4):
    param.grad = torch.randn_like(param)
    put(f"sgd.grad{step}", param.grad)
    optimizer.step()
    put(f"sgd.param{step}", param)

save_file(out, pathlib.Path(__file__).with_name("golden.safetensors"), {"torch": torch.__version__})
