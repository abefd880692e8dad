"""Every way to compute the network's logits, by the name that it has on the command line."""

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..model import ModelNew
from .workload import fold_batch_norm, layers

SOURCES = Path(__file__).parents[2]  # the source tree, where benchmarks/ and examples/ are


@dataclass(frozen=True)
class Way:
    """`build(workload)` returns a function of the images; the rest says how it is called and what it is compared with."""

    name: str
    title: str
    build: Callable | None = None  # None: built or run by other processes
    role: str = "peer"  # or "ours", or "example", which is neither
    channels_last: bool = False
    graph: bool = False  # its time is that of a CUDA graph's replay
    slow: bool = False  # takes seconds a workload to build
    missing: Callable = lambda device: None  # why it cannot be had

    def images(self, workload):
        return workload.x.contiguous(memory_format=torch.channels_last) if self.channels_last else workload.x


def ours(workload):
    return ModelNew.from_reference(workload.network)


def plain(memory_format, workload):
    return copy.deepcopy(workload.network).to(memory_format=memory_format)


def folded(memory_format, workload):
    """The plain network with every batch norm folded into the convolution before it."""
    network = copy.deepcopy(workload.network)
    for conv, bn, _ in layers(network):
        weight, bias = fold_batch_norm(conv, bn)
        conv.weight = nn.Parameter(weight, requires_grad=False)
        conv.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    network.bn1 = network.bn2 = nn.Identity()
    for i in range(1, 8):
        block = getattr(network, f"mbconv{i}")
        setattr(network, f"mbconv{i}", nn.Sequential(*(layer for layer in block if not isinstance(layer, nn.BatchNorm2d))))
    return network.to(memory_format=memory_format)


def compiled(workload):
    """torch.compile with frozen weights, compiled for these images."""
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = 256  # each workload compiles the same code again
    torch._inductor.config.freezing = True
    function = torch.compile(plain(torch.channels_last, workload), dynamic=False)
    with torch.no_grad():  # or nothing is frozen
        function(workload.x.contiguous(memory_format=torch.channels_last))
    return function


def baseline(workload):
    network = plain(torch.channels_last, workload)
    return functools.partial(load("benchmarks/baseline.py").forward, network)


def single_file(workload):
    network = load("examples/modelnew_single_file.py").ModelNew(workload.network.fc.out_features)
    network.to(workload.x.device, workload.x.dtype)
    network.load_state_dict(ours(workload).state_dict())
    return network.eval().requires_grad_(False)


@functools.cache
def load(path):
    path = SOURCES / path
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def not_installed(package):
    return lambda device: None if importlib.util.find_spec(package) else f"{package} is not installed"


def jit_file(path):
    def missing(device):
        if not (SOURCES / path).exists():
            return f"{path} is in the source tree only"
        if torch.device(device).type != "cuda":
            return "Triton's JIT needs a GPU"
        return not_installed("triton")(device)

    return missing


LAST, FIRST = torch.channels_last, torch.contiguous_format

WAYS = {
    way.name: way
    for way in [
        Way("ours-eager", "effnet_aot", ours, "ours"),
        Way("ours", "effnet_aot", ours, "ours", graph=True),
        Way("eager", "torch eager, NCHW", functools.partial(plain, FIRST)),
        Way("eager-channels-last", "torch eager, channels_last", functools.partial(plain, LAST), channels_last=True),
        Way("folded", "torch, BN folded, NCHW", functools.partial(folded, FIRST), graph=True),
        Way("folded-channels-last", "torch, BN folded, channels_last", functools.partial(folded, LAST), channels_last=True, graph=True),
        Way("compile", "torch.compile, freezing", compiled, channels_last=True, graph=True, slow=True),
        Way("aoti", "AOTInductor, BN folded", channels_last=True, graph=True, slow=True),
        Way("jax", "JAX/XLA jit", slow=True, missing=not_installed("jax")),
        Way("baseline", "two JIT kernels + torch", baseline, channels_last=True, graph=True, missing=jit_file("benchmarks/baseline.py")),
        Way("single-file", "single Triton file", single_file, "example", graph=True, missing=jit_file("examples/modelnew_single_file.py")),
    ]
}  # fmt: skip
OURS = [name for name, way in WAYS.items() if way.role == "ours"]
PEERS = [name for name, way in WAYS.items() if way.role != "ours"]
QUICK = [name for name in PEERS if not WAYS[name].slow]
