"""PyTorch's side of the benchmark: sets up what a line on stdin asks for, runs steps of it, answers on stdout.

    {"case": …, "layers": …, "settings": …}  →  {"before_mib": …, "parameters": …, "quantizers": …}
    {"run": steps}                           →  {"seconds": …, "peak_mib": …}

A failure is answered with {"error": reason}. The first line, before anything is asked, says what is here:
{"version": …, "threads": …}. experiments/src/bench/worker.rs is the other end.
"""

import argparse
import json
import math
import os
import sys
import time
import warnings

warnings.filterwarnings("ignore")

# The output of libraries must not get between the answers.
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver, disable_observer

# The number of steps before the first timed one. They take the time of torch.compile and of
# choosing kernels, and allocate the memory that later steps use again.
WARM_UP = 3


class FakeQuantizer(FusedMovingAvgObsFakeQuantize):
    """PyTorch's own fused observer and fake quantizer, such that torch.compile does not cut the graph at it.

    The forward pass is the same call as the parent's, but torch.compile leaves all of torch.ao out.
    """

    def forward(self, x):
        observer = self.activation_post_process
        # The fused quantizer takes float32 only; under autocast x may be bfloat16.
        return torch.fused_moving_avg_obs_fake_quant(
            x.float(),
            self.observer_enabled,
            self.fake_quant_enabled,
            observer.min_val,
            observer.max_val,
            self.scale,
            self.zero_point,
            observer.averaging_constant,
            observer.quant_min,
            observer.quant_max,
            self.ch_axis,
            self.is_per_channel,
            self.is_symmetric_quant,
        ).to(x.dtype)


def quantizer(bits, momentum):
    """A fake quantizer of a whole tensor; none without bits."""
    if bits is None:
        return nn.Identity()
    return FakeQuantizer(
        MovingAverageMinMaxObserver,
        quant_min=0,
        quant_max=2**bits - 1,
        averaging_constant=momentum,
        dtype=torch.quint8,
        qscheme=torch.per_tensor_affine,
    )


def activation(name):
    return {"identity": nn.Identity, "relu": lambda: nn.ReLU(True), "relu6": lambda: nn.ReLU6(True)}[name]()


class QuantizedConv2d(nn.Conv2d):
    """A convolution without bias whose weights are those of a fake quantizer."""

    def __init__(self, bits, *args, **kwargs):
        super().__init__(*args, bias=False, **kwargs)
        # The range is that of the current weights: each step replaces it.
        self.weight_quantizer = quantizer(bits, 1.0)

    def forward(self, x):
        return self._conv_forward(x, self.weight_quantizer(self.weight), None)


class QuantizedLinear(nn.Linear):
    """A linear layer likewise."""

    def __init__(self, bits, *args):
        super().__init__(*args)
        self.weight_quantizer = quantizer(bits, 1.0)

    def forward(self, x):
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


def convolution(layer):
    """The convolution of a layer, its weights quantized where it says so."""
    size = layer["size"]
    groups = layer["inputs"] if layer["kind"] == "depthwise" else 1
    shape = (layer["inputs"], layer["outputs"], size, layer["stride"], size // 2)
    if layer["weight_bits"] is None:
        return nn.Conv2d(*shape, groups=groups, bias=False)
    return QuantizedConv2d(layer["weight_bits"], *shape, groups=groups)


class Network(nn.Module):
    """Convolutions with normalization and activation, residuals over them, pooling and a classifier.

    A unit's output is quantized after its activation; where a residual ends, once, the sum.
    """

    def __init__(self, layers, momentum):
        super().__init__()
        units = layers["units"]
        self.input_quantizer = quantizer(layers["input_bits"], momentum)
        self.units = nn.ModuleList(
            nn.Sequential(convolution(unit), nn.BatchNorm2d(unit["outputs"]), activation(unit["activation"]))
            for unit in units
        )
        self.quantizers = nn.ModuleList(quantizer(unit["output_bits"], momentum) for unit in units)
        self.begins = {begin for begin, _ in layers["residuals"]}
        self.ends = {end: begin for begin, end in layers["residuals"]}
        self.features_quantizer = quantizer(layers["features_bits"], momentum)
        shape = (units[-1]["outputs"], layers["classes"])
        bits = layers["classifier_bits"]
        self.classifier = nn.Linear(*shape) if bits is None else QuantizedLinear(bits, *shape)

    def forward(self, x):
        x = self.input_quantizer(x)
        kept = {}
        for index, (unit, quantize) in enumerate(zip(self.units, self.quantizers)):
            x = unit(x)
            if index in self.ends:
                # In place: nothing else reads the unit's output.
                x = x.add_(kept.pop(self.ends[index]))
            x = quantize(x)
            if index in self.begins:
                kept[index] = x
        features = self.features_quantizer(x.mean((2, 3)))
        return self.classifier(features)


def network_step(request, mode):
    """A training step or an evaluation of a network, and the network."""
    case, settings = request["case"], request["settings"]
    format = torch.channels_last if mode.channels_last else torch.contiguous_format
    height, width, channels = request["layers"]["image"]
    network = Network(request["layers"], settings["range_momentum"]).to(mode.device, memory_format=format)
    images = torch.randn(case["batch"], channels, height, width, device=mode.device)
    images = images.contiguous(memory_format=format)
    labels = torch.randint(request["layers"]["classes"], (case["batch"],), device=mode.device)
    if case["what"] == "train":
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=settings["rate"],
            momentum=settings["momentum"],
            weight_decay=settings["weight_decay"],
            fused=True,
        )

        def loss_of(images, labels):
            with mode.precision():
                return F.cross_entropy(network(images), labels)

        loss_of = mode.compiled(loss_of)

        def step():
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(images, labels)
            loss.backward()
            optimizer.step()
            return loss

    else:
        with torch.no_grad(), mode.precision():
            network(images[:2])  # sets the ranges
        network.eval()
        network.apply(disable_observer)
        forward = mode.compiled(network)

        def step():
            with torch.inference_mode(), mode.precision():
                return forward(images)

    return step, network


def operation_step(request, mode):
    """Forward and backward of one operation, and its module."""
    case = request["case"]
    layer = case["what"]["operation"]
    format = torch.channels_last if mode.channels_last else torch.contiguous_format

    def tensor(channels, height, width):
        x = torch.randn(case["batch"], channels, height, width, device=mode.device)
        return x.contiguous(memory_format=format)

    if layer["kind"] == "norm":
        module = nn.Sequential(
            nn.BatchNorm2d(layer["outputs"]),
            nn.ReLU6(True),
            quantizer(layer["output_bits"], request["settings"]["range_momentum"]),
        )
    else:
        module = convolution(layer)
    module = module.to(mode.device, memory_format=format)
    x = tensor(layer["inputs"], *layer["input_size"])
    gradient = tensor(layer["outputs"], *layer["output_size"])
    # The stem reads the image, which needs no gradient.
    wanted = list(module.parameters())
    if layer["kind"] != "stem":
        wanted.append(x.requires_grad_())
    module = mode.compiled(module)

    def step():
        with mode.precision():
            y = module(x)
        return torch.autograd.grad(y, wanted, gradient.to(y.dtype))[-1]

    return step, module


def resident(field):
    """A line of this process's memory use, in MiB; none where the system does not tell."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) / 1024
    except OSError:
        return None


def reset_peak():
    """Lets the peak begin anew at what is resident now."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


class Mode:
    """How PyTorch runs, from the flags."""

    def __init__(self, flags):
        self.device = torch.device(flags.device)
        self.on_gpu = self.device.type == "cuda"
        self.channels_last, self.compile, self.autocast = flags.channels_last, flags.compile, flags.autocast
        # Whether the case asks for bfloat16; on a GPU the flags decide.
        self.half = False
        if self.on_gpu:
            self.device = torch.device("cuda", self.device.index or 0)
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it by default

    def precision(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast or self.half)

    def compiled(self, function):
        if not self.compile:
            return function
        # On a GPU this uses CUDA graphs if it can: small kernels are bound by their launches.
        return torch.compile(function, mode="reduce-overhead") if self.on_gpu else torch.compile(function)

    def wait(self):
        """Until all that was begun is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def resident(self, field):
        """Of the process; on a GPU that says nothing."""
        return None if self.on_gpu else resident(field)


def set_up(request, mode):
    mode.half = not mode.on_gpu and request["case"].get("arithmetic") == "bf16"
    before = mode.resident("VmRSS")
    torch.manual_seed(0)
    make = network_step if isinstance(request["case"]["what"], str) else operation_step
    step, module = make(request, mode)
    for _ in range(WARM_UP):
        step()
    reset_peak()
    quantizers = [m for m in module.modules() if isinstance(m, FakeQuantizer)]
    parameters = sum(p.numel() for p in module.parameters())
    return step, {"before_mib": before, "parameters": parameters, "quantizers": len(quantizers)}


def run(step, count, mode):
    mode.wait()
    started = time.perf_counter()
    for _ in range(count):
        result = step()
    mode.wait()
    seconds = time.perf_counter() - started
    if not math.isfinite(float(result.detach().double().sum())):
        raise ArithmeticError("the result is not finite")
    return {"seconds": seconds, "peak_mib": mode.resident("VmHWM")}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--autocast", action="store_true", help="to bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, required=True)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    mode = Mode(flags)

    def answer(value):
        print(json.dumps(value), file=answers)

    answer({"version": torch.__version__, "threads": torch.get_num_threads()})
    step = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                step, facts = set_up(request, mode)
                answer(facts)
            else:
                answer(run(step, request["run"], mode))
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            answer({"error": reason[:300]})


main()
