"""ModelNew's network on CUDA tensors in host memory, by a library with kernels for products that are made one and for whole blocks with
narrow maps, on a driver that executes PTX: as the library chooses by itself, and with every such kernel. Prints the errors of both against
float64, relative to the result, and for which ops such kernels were launched."""

import json
import sys

import torch
from op_cases import lay_out
from test_model import error, images, pair

from effnet_aot.aot.tables import NONE
from effnet_aot.tune.library import Library
from effnet_aot.tune.sequence import is_of_networks


def on_device(x, network, library):
    """(the result by the library's own choices, with the kernels of networks alone, whose those were)."""
    to_device, to_host = torch.ops.stub_cuda.to_device, torch.ops.stub_cuda.to_host
    x, number = to_device(x, 0), torch.ops.effnet._hold_network([to_device(w, 0) for w in network.weights], network.program)

    def run():
        return to_host(torch.ops.effnet._held_network(x, number)).clone()

    own = run()
    with library.assigned({}):
        assert torch.equal(run(), own)
        choices = [choice for choice in library.choices() if is_of_networks(choice.key)]
    assert all(choice.variant == NONE for choice in choices), "without a table there are none"
    wanted = {choice.key: max(choice.fitting, key=lambda v: v != NONE) for choice in choices}
    with library.assigned(wanted):
        merged = run()
        # A plan asks whether there is a kernel, and launches it.
        launched = [choice.op for choice in library.choices() if is_of_networks(choice.key) and choice.variant != NONE]
    torch.ops.effnet._release_network(number)
    return own, merged, launched[len(launched) // 2 :]


def main():
    torch.ops.load_library(sys.argv[1])
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    said = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        ours, reference = pair(dtype=dtype)
        for batch in (1, 3):
            x = lay_out(images(batch, dtype=dtype), "channels_last")
            with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
                exact = reference.double()(x.double())
                own, merged, launched = on_device(x, ours.fold(), Library())
            said[f"{dtype}, batch {batch}"] = [*(error(out, exact) for out in (own, merged)), launched]
    print(json.dumps(said))


main()
