"""Writes golden.safetensors, the values of PyTorch that tests/golden.rs compares with.

    python3 -m venv venv && venv/bin/pip install torch==2.11.0 numpy safetensors
    venv/bin/python make_golden.py

A tiny network with everything that a MobileNet has, stated anew in PyTorch: NCHW, float64, autograd. Each case
takes three steps of SGD and then evaluates; written are the values that it began with, the logits and the loss
of every step, the gradients of the first step, and the state after the last one.

The crate computes in float32. Where a value lies within rounding of a kink of an activation or of the border
between two quantization levels, the two may differ by the whole jump and nothing can be compared. So the
seeds are tried in turn until no value of a case is that close (`KINK`, `BORDER`).

Tensors are written as the crate has them: images NHWC, weights with the output channels last.
"""

import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

assert torch.__version__.split("+")[0] == "2.11.0", torch.__version__
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

EPSILON = 1e-5
RANGE_MOMENTUM = 0.1
RATE, MOMENTUM, DECAY = 0.1, 0.9, 4e-3
SMOOTHING = 0.1
STEPS = 3
IMAGES, HEIGHT, WIDTH, CLASSES = 4, 7, 6, 7
# The smallest distance of a value from a kink, and from the border between two levels as a fraction
# of the step. The values are of order 1 (a few steps), so their float32 error is about 1e-6.
KINK, BORDER = 1e-5, 2e-5

# name, kind, stride, output channels, activation, unit whose output is added
UNITS = [
    ("stem", "full", 1, 8, "relu6", None),
    ("block.expand", "pointwise", 1, 12, "relu6", None),
    ("block.depthwise", "depthwise", 1, 12, "relu6", None),
    ("block.project", "pointwise", 1, 8, "identity", "stem"),
    ("down.depthwise", "depthwise", 2, 8, "relu", None),
    ("down.project", "pointwise", 1, 6, "identity", None),
    ("last", "pointwise", 1, 20, "relu6", None),
]

# activations, weights, first layer, last layer: bits, or None for float
FLOAT = (None, None, None, None)
CASES = {
    # bits, normalization under quantized weights, whether weight decay applies to γ, β and biases,
    # method ("channels": uniform, with a grid for each output channel of a weight)
    "float": (FLOAT, "unfolded", True, "uniform"),
    "activations": ((4, None, 5, 6), "unfolded", True, "uniform"),
    "unfolded": ((4, 4, 5, 6), "unfolded", False, "uniform"),
    "folded": ((4, 4, 5, 6), "batch_statistics", False, "uniform"),
    "frozen": ((4, 4, 5, 6), "frozen", False, "uniform"),
    "pact": ((4, 4, 5, 6), "unfolded", False, "pact"),
    "dsq": ((4, 4, 5, 6), "unfolded", True, "dsq"),
    "channels": ((4, 4, 5, 6), "unfolded", False, "channels"),
    "lsq": ((4, 4, 5, 6), "unfolded", True, "lsq"),
    "float_statistics": ((4, 4, 5, 6), "float_statistics", False, "uniform"),
}


class TooClose(Exception):
    pass


def check_margin(distance, least):
    if distance.numel() > 0 and distance.min() < least:
        raise TooClose


def activate(u, kind):
    if kind == "identity":
        return u
    check_margin(u.abs(), KINK)
    if kind == "relu":
        return F.relu(u)
    check_margin((u - 6).abs(), KINK)
    return F.relu6(u)


def fake_quantize(x, lo, hi, bits):
    """Uniform levels over [lo, hi], widened to hold zero, which is a level; straight-through gradient."""
    levels = 2**bits - 1
    lo, hi = min(float(lo), 0.0), max(float(hi), 0.0)
    step = (hi - lo) / levels
    zero_point = round(-lo / step)
    for value in (x.detach() / step, torch.tensor(-lo / step)):
        check_margin((value - value.floor() - 0.5).abs(), BORDER)
    return torch.fake_quantize_per_tensor_affine(x, step, zero_point, 0, levels)


def fake_quantize_channels(weight, bits):
    """Each output channel over its own extremes."""
    return torch.stack([fake_quantize(w, w.detach().min(), w.detach().max(), bits) for w in weight])


class Activations(torch.nn.Module):
    """The quantizer of an activation tensor; in training the batch moves the range before it is used."""

    def __init__(self, bits):
        super().__init__()
        self.bits, self.range = bits, None

    def forward(self, x):
        if self.bits is None:
            return x
        if self.training:
            batch = torch.stack([x.detach().min(), x.detach().max()])
            self.range = batch if self.range is None else self.range + RANGE_MOMENTUM * (batch - self.range)
        return fake_quantize(x, *self.range, self.bits)


def check_apart(x, bound):
    """That no value but the bound itself, from which it may have been taken, is close to a bound."""
    distance = (x - bound).detach().abs()
    check_margin(distance[distance > 0], KINK)


def check_levels(position):
    position = position.detach()
    check_margin((position - position.floor() - 0.5).abs(), BORDER)


def through(hard, soft):
    """The value of one, the gradient of the other."""
    return soft + (hard - soft).detach()


class Pact(torch.nn.Module):
    """PACT's clip and levels; the first batch gives α."""

    def __init__(self, bits, signed):
        super().__init__()
        self.bits, self.signed, self.ready = bits, signed, False
        self.alpha = torch.nn.Parameter(torch.zeros(1))
        self.range = None

    def learned(self):
        return [("alpha", self.alpha, "weight")]

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.alpha.copy_(self.alpha.clamp(min=0) if self.ready else x.abs().max())
            self.ready = True
        alpha = self.alpha
        check_apart(x, alpha)
        if self.signed:
            check_apart(x, -alpha)
            clipped = torch.where(x >= alpha, alpha, torch.where(x <= -alpha, -alpha, x))
            steps = 2 ** (self.bits - 1) - 1
        else:
            clipped = torch.where(x >= alpha, alpha, F.relu(x))
            steps = 2**self.bits - 1
        check_levels(clipped / alpha * steps)
        return through(torch.round(clipped / alpha * steps) * alpha / steps, clipped)


class Dsq(torch.nn.Module):
    """DSQ's hard value with the gradient of its soft one; the first tensor gives the bounds."""

    def __init__(self, bits, prefix=""):
        super().__init__()
        self.bits, self.prefix, self.ready = bits, prefix, False
        self.bounds = torch.nn.Parameter(torch.zeros(2))
        self.softness = torch.nn.Parameter(torch.tensor([0.2]))
        self.range = None

    def learned(self):
        return [
            (f"{self.prefix}bounds", self.bounds, "never"),
            (f"{self.prefix}softness", self.softness, "never"),
        ]

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                if not self.ready:
                    self.bounds.copy_(torch.stack([x.min(), x.max()]))
                self.softness.clamp_(1e-4, 0.5)
            self.ready = True
        low, high = self.bounds
        alpha = self.softness.clamp(1e-4, 0.5)
        assert low < high
        steps = 2**self.bits - 1
        delta = (high - low) / steps
        check_apart(x, low)
        check_apart(x, high)
        check_levels((x - low) / delta)
        scale, k = 1 / (1 - alpha), torch.log(2 / alpha - 1) / delta
        i = ((x - low) / delta).floor().clamp(0, steps - 1).detach()
        phi = scale * torch.tanh(k * (x - low - (i + 0.5) * delta))

        def level(phi):
            return torch.where(x < low, low, torch.where(x > high, high, low + delta * (i + (phi + 1) / 2)))

        return through(level(torch.where(phi < 0, -1.0, 1.0)), level(phi))


class Lsq(torch.nn.Module):
    """LSQ of weights (signed levels) and of activations, LSQ+ where these have an offset; the first tensor sets both."""

    def __init__(self, bits, of_weights, has_offset):
        super().__init__()
        self.of_weights, self.ready, self.range = of_weights, False, None
        self.low, self.high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if of_weights else (0, 2**bits - 1)
        self.step = torch.nn.Parameter(torch.zeros(1))
        self.offset = torch.nn.Parameter(torch.zeros(1)) if has_offset else None

    def learned(self):
        prefix = "weight_" if self.of_weights else ""
        own = [(f"{prefix}step", self.step, "never"), (f"{prefix}offset", self.offset, "never")]
        return own if self.offset is not None else own[:1]

    def forward(self, x):
        if self.training and not self.ready:
            with torch.no_grad():
                if self.offset is None:
                    self.step.fill_(2 * x.abs().mean() / self.high**0.5)
                else:
                    # The extremes are inside by 1/1024 of a step.
                    self.step.fill_((x.max() - x.min()) / (self.high - 2 / 1024))
                    self.offset.fill_(x.min() - self.step.item() / 1024)
            self.ready = True
        assert self.step > 1e-3
        # The gradients are scaled by the number of weights, or of one image's features.
        g = 1 / ((x.numel() if self.of_weights else x[0].numel()) * self.high) ** 0.5
        step = through(self.step, self.step * g)
        offset = 0.0 if self.offset is None else through(self.offset, self.offset * g)
        position = (x - offset) / step
        for end in (self.low, self.high):
            distance = (position - end).detach().abs()
            check_margin(distance[distance > 0], BORDER)
        below, above = position <= self.low, position >= self.high
        check_levels(position[~(below | above)])
        ends = torch.tensor([float(self.low), float(self.high)])
        clipped = torch.where(below, ends[0], torch.where(above, ends[1], position))
        return through(torch.round(clipped), clipped) * step + offset


def dorefa(weight, bits):
    """DoReFa's weights; the maximum is a constant."""
    t, steps = weight.tanh(), 2**bits - 1
    t = t / (2 * t.detach().abs().max()) + 0.5
    check_levels(t * steps)
    return 2 * through(torch.round(t * steps) / steps, t) - 1


class Unit(torch.nn.Module):
    def __init__(self, channels_in, kind, stride, channels, activation):
        super().__init__()
        self.kind, self.activation = kind, activation
        size, groups = (1, 1) if kind == "pointwise" else (3, channels if kind == "depthwise" else 1)
        self.conv = torch.nn.Conv2d(
            channels_in, channels, size, stride, padding=size // 2, groups=groups, bias=False
        )
        self.norm = torch.nn.BatchNorm2d(channels, eps=EPSILON, momentum=0.1)
        self.bits, self.fold, self.method, self.soft = None, "unfolded", "uniform", None
        # In addition to ordinary filters, one has a negative γ and one has γ = 0.
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.weight[1], self.norm.weight[2] = -0.8, 0.0
            self.norm.bias.uniform_(-0.5, 1.5)
            self.norm.running_mean.uniform_(-0.2, 0.2)
            self.norm.running_var.uniform_(0.2, 1.5)

    def scale(self):
        return (self.norm.weight / (self.norm.running_var + EPSILON).sqrt()).detach()

    def freeze(self):
        """Folds the normalization away; leaves the bias."""
        scale = self.scale()
        with torch.no_grad():
            self.conv.weight.mul_(scale[:, None, None, None])
            bias = self.norm.bias - self.norm.running_mean * scale
        self.norm = None
        self.bias = torch.nn.Parameter(bias.detach())

    def weight(self):
        weight = self.conv.weight
        if self.bits is None:
            return weight
        if self.method == "pact":
            return dorefa(weight, self.bits)
        if self.soft is not None:
            return self.soft(weight)
        if self.channels:
            return fake_quantize_channels(weight, self.bits)
        scale = torch.ones(len(weight))
        if self.fold in ("batch_statistics", "float_statistics") and self.norm is not None:
            scale = self.scale()
        folded = weight * scale[:, None, None, None]
        quantized = fake_quantize(folded, folded.detach().min(), folded.detach().max(), self.bits)
        return quantized / torch.where(scale == 0, 1.0, scale)[:, None, None, None]

    def convolve(self, x, weight):
        return F.conv2d(x, weight, None, self.conv.stride, self.conv.padding, 1, self.conv.groups)

    def folded_with_float_statistics(self, x):
        """A training step's output before the activation."""
        z, norm = self.convolve(x, self.conv.weight), self.norm
        norm(z)  # moves the running statistics
        variance, mean = torch.var_mean(z, (0, 2, 3), correction=0)
        scale = norm.weight / (variance + EPSILON).sqrt()
        folded = self.conv.weight * scale[:, None, None, None]
        weight = fake_quantize(folded, folded.detach().min(), folded.detach().max(), self.bits)
        return self.convolve(x, weight) + (norm.bias - mean * scale)[:, None, None]

    def forward(self, x):
        if self.fold == "float_statistics" and self.training and self.norm is not None:
            return activate(self.folded_with_float_statistics(x), self.activation)
        z = self.convolve(x, self.weight())
        u = z + self.bias[:, None, None] if self.norm is None else self.norm(z)
        return activate(u, self.activation)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.units = torch.nn.ModuleList()
        channels = 3
        for _, kind, stride, width, activation, _ in UNITS:
            self.units.append(Unit(channels, kind, stride, width, activation))
            channels = width
        self.head = torch.nn.Linear(channels, CLASSES)
        self.head_bits = None
        self.quantize(FLOAT, "unfolded", "uniform")

    def quantize(self, bits, fold, method):
        activations, weights, first, last = bits
        if fold == "frozen":
            for unit in self.units:
                unit.freeze()
        for i, unit in enumerate(self.units):
            unit.bits = weights and (first if i == 0 else weights)
            unit.fold, unit.channels = fold, method == "channels"
            if i > 0:
                unit.method = method
                unit.soft = {
                    "dsq": lambda: Dsq(weights, "weight_"),
                    "lsq": lambda: Lsq(weights, of_weights=True, has_offset=False),
                }.get(method, lambda: None)()
        self.head_bits, self.channels = weights and last, method == "channels"
        self.image_quantizer = Activations(activations and first)
        kinds = {
            "uniform": lambda activation: Activations(activations),
            "channels": lambda activation: Activations(activations),
            "pact": lambda activation: Pact(activations, activation == "identity"),
            "dsq": lambda activation: Dsq(activations),
            "lsq": lambda activation: Lsq(activations, False, has_offset=activation == "identity"),
        }
        self.quantizers = torch.nn.ModuleList([kinds[method](activation) for *_, activation, _ in UNITS])
        self.head_quantizer = Activations(activations and last)

    def forward(self, images):
        x = self.image_quantizer(images)
        outputs = {}
        for (name, *_, shortcut), unit, quantizer in zip(UNITS, self.units, self.quantizers):
            x = unit(x)
            if shortcut is not None:
                x = x + outputs[shortcut]
            x = outputs[name] = quantizer(x)
        features = self.head_quantizer(x.mean((2, 3)))
        weight = self.head.weight
        if self.head_bits is not None and self.channels:
            weight = fake_quantize_channels(weight, self.head_bits)
        elif self.head_bits is not None:
            weight = fake_quantize(weight, weight.detach().min(), weight.detach().max(), self.head_bits)
        return F.linear(features, weight, self.head.bias)

    def learned(self):
        """Name, tensor and the kind of weight decay, for every parameter."""
        for (name, *_), unit, quantizer in zip(UNITS, self.units, self.quantizers):
            yield f"{name}.weight", unit.conv.weight, "weight"
            if unit.norm is None:
                yield f"{name}.bias", unit.bias, "norm"
            else:
                yield f"{name}.gamma", unit.norm.weight, "norm"
                yield f"{name}.beta", unit.norm.bias, "norm"
            for module in (unit.soft, quantizer):
                if hasattr(module, "learned"):
                    yield from ((f"{name}.{field}", tensor, decay) for field, tensor, decay in module.learned())
        yield "head.weight", self.head.weight, "weight"
        yield "head.bias", self.head.bias, "norm"

    def state(self):
        """Name and tensor of everything that training changes."""
        yield from ((name, tensor) for name, tensor, _ in self.learned())
        quantizers = [("input", self.image_quantizer), ("head", self.head_quantizer)]
        for (name, *_), unit, quantizer in zip(UNITS, self.units, self.quantizers):
            if unit.norm is not None:
                yield f"{name}.mean", unit.norm.running_mean
                yield f"{name}.variance", unit.norm.running_var
            quantizers.append((name, quantizer))
        yield from ((f"{name}.range", q.range) for name, q in quantizers if q.range is not None)


def layout(name, tensor):
    """As the crate has it."""
    if name == "head.weight":
        return tensor.t()
    if not name.endswith(".weight"):
        return tensor  # this includes "weight_bounds"
    kind = next(kind for unit, kind, *_ in UNITS if name == f"{unit}.weight")
    if kind == "depthwise":
        return tensor[:, 0].permute(1, 2, 0)
    if kind == "pointwise":
        return tensor[:, :, 0, 0].t()
    return tensor.permute(2, 3, 1, 0).reshape(-1, tensor.shape[0])


def run(case, seed):
    bits, fold, decay_norm, method = CASES[case]
    torch.manual_seed(seed)
    out = {}

    def put(name, tensor):
        key = f"{case}.{name}"
        assert key not in out
        tensor = tensor.detach().clone().contiguous()
        out[key] = tensor.to(torch.float32) if tensor.is_floating_point() else tensor

    network = Network()
    # Both sides start from the same float32 numbers.
    with torch.no_grad():
        for _, tensor in network.state():
            tensor.copy_(tensor.float())
    for name, tensor in network.state():
        put(f"start.{name}", layout(name, tensor))
    network.quantize(bits, fold, method)
    decays = {"weight": DECAY, "norm": DECAY if decay_norm else 0.0, "never": 0.0}
    groups = [
        {"params": params, "weight_decay": decay}
        for kind, decay in decays.items()
        if (params := [tensor for _, tensor, of in network.learned() if of == kind])
    ]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM)
    for step in range(STEPS):
        images = torch.randn(IMAGES, 3, HEIGHT, WIDTH).float().double()
        labels = torch.randint(0, CLASSES, (IMAGES,))
        put(f"images{step}", images.permute(0, 2, 3, 1))
        put(f"labels{step}", labels)
        optimizer.zero_grad()
        logits = network(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        loss.backward()
        put(f"logits{step}", logits)
        put(f"loss{step}", loss)
        if step == 0:
            for name, tensor, _ in network.learned():
                put(f"gradient.{name}", layout(name, tensor.grad))
        optimizer.step()
    for name, tensor in network.state():
        put(f"end.{name}", layout(name, tensor))
    network.eval()
    put("evaluated", network(images))
    return out


golden = {}
for index, case in enumerate(CASES):
    for attempt in range(10_000):
        try:
            golden |= run(case, 1000 * index + attempt)
        except TooClose:
            continue
        print(f"{case}: seed {1000 * index + attempt}")
        break
    else:
        raise SystemExit(f"{case}: no seed keeps its distance; loosen KINK or BORDER")
path = pathlib.Path(__file__).with_name("golden.safetensors")
save_file(golden, path, {"torch": torch.__version__})
print(f"{path.name}: {path.stat().st_size} bytes")
