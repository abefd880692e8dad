"""Plans ModelNew's network on the stub's CUDA tensors under assignments of variants, and settles its choices by a clock that
counts what is launched. Prints what was launched and chosen. With "numbers" behind the stub's library, on a driver that
computes: whether the results are right."""

import json
import os
import sys
from pathlib import Path

import torch
from stub_cuda import c_api

import effnet_aot  # noqa: F401
from effnet_aot import _library
from effnet_aot.aot.tables import NONE
from effnet_aot.tune import networks
from effnet_aot.tune.choose import Measured
from effnet_aot.tune.library import Library
from effnet_aot.tune.sequence import Trials, check, settle

LOG = Path(os.environ["STUB_CUDA_LOG"])


class Launched:
    """The variants and the early-launch flags of what a function launches."""

    def __init__(self):
        self._names = {kernel.image: kernel.variant.decode() for kernel in c_api.Library(str(_library.PATH)).kernels()}
        self._read = 0

    def __call__(self, function):
        self._news()
        function()
        return [self._names[record["image"]] for record in self._news() if record["call"] == "cuLaunchKernelEx"]

    def _news(self):
        if not LOG.exists():
            return []
        lines = LOG.read_text().splitlines()
        self._read, news = len(lines), lines[self._read :]
        return list(map(json.loads, news))


class CountingClock:
    """Five microseconds a launch, two where its variant is one of `fast`."""

    def __init__(self, launched, fast):
        self.launched, self.fast = launched, fast

    def pool(self):
        return None

    def passes(self, seconds):
        return 1

    def sequence(self, function, passes, pool):
        seconds = sum(2e-6 if name in self.fast else 5e-6 for name in self.launched(function))
        return lambda: seconds


def other_variants(choices):
    return {key: next((v for v in choice.fitting if v != choice.variant), choice.variant) for key, choice in choices.items()}


def on_device(arguments):
    to_device = torch.ops.stub_cuda.to_device
    return networks.Arguments(to_device(arguments.x, 0), [to_device(weight, 0) for weight in arguments.weights], arguments.program)


class OnDevice:
    """A chain on tensors of the CPU that goes to the device and back."""

    @staticmethod
    def run(arguments):
        return torch.ops.stub_cuda.to_host(networks.Chain.run(on_device(arguments))).clone()


def numbers():
    (chain,), library, said = networks.chains("modelnew", 32), Library(), {}
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    for dtype in (torch.float16, torch.float32):
        arguments = chain.make(3, dtype, "cpu")
        with torch.no_grad():
            with library.assigned({}):
                own = OnDevice.run(arguments)
                choices = {choice.key: choice for choice in library.choices()}
            with library.assigned(other_variants(choices)):
                other = OnDevice.run(arguments)
            said[str(dtype)] = [check(library, OnDevice, arguments, other_variants(choices)), (own - other).abs().max().item(), len(choices)]
    print(json.dumps(said))


def main():
    (chain,) = networks.chains("modelnew", 64)
    launched, library = Launched(), Library()

    def runner(batch):
        arguments = on_device(chain.make(batch, torch.float16, "cpu"))
        assert arguments.number  # what is made of the weights, when they are held, is launched here
        return lambda: chain.run(arguments)

    # As much work as ten large images: the tables merge no products there.
    batch, next_batch = 140, 160
    said, run = {}, runner(batch)
    said["plain"] = launched(run)
    with library.assigned({}):
        said["free"] = launched(run)
        choices = {choice.key: choice for choice in library.choices()}
    wanted = other_variants(choices)
    with library.assigned(wanted):
        said["forced"] = launched(run)
        taken = {choice.key: choice.variant for choice in library.choices()}
    said["asked"] = [[key[0], choice.variant, wanted[key], taken[key]] for key, choice in choices.items() if key in taken]
    said["plain again"] = launched(run)
    other = runner(next_batch)  # its plan is first made under an assignment
    with library.assigned({(*key[:3], next_batch): variant for key, variant in wanted.items()}, tell=False):
        said["forced first"] = launched(other)
        said["untold"] = len(library.choices())
    said["plain then"] = launched(other)
    with library.assigned({}):
        said["free then"] = launched(other)

    block = next(key for key, choice in choices.items() if choice.variant != NONE and NONE in choice.fitting)
    with library.assigned({block: NONE}):
        run()
        choices |= {choice.key: choice for choice in library.choices() if choice.key not in choices}
    fast = {name for key in choices if key[0] in ("depthwise", "pointwise") for name in choices[key].fitting}
    measured = {key: Measured(*key, choice.variant, dict.fromkeys(choice.fitting, 10.0)) for key, choice in choices.items()}
    settled = settle(Trials(library, CountingClock(launched, fast - set(said["plain"])), run), measured, {})
    said["settled"] = [[change.key[0], change.before, change.after] for change in settled.changes]
    said["seconds"] = [settled.before, settled.after]
    with library.assigned(settled.variants):
        said["settled launches"] = launched(run)
    said["fast"], said["end"] = sorted(fast - set(said["plain"])), launched(run)
    print(json.dumps(said))


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    numbers() if sys.argv[2:] == ["numbers"] else main()
