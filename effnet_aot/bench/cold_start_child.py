"""cold_start_child.py WAY STATE DEVICE [PACKAGE]: one forward pass in a process that has just imported torch. Run as a file."""

import json
import sys
import time

way, state, device, *package = sys.argv[1:]
if way != "ours":
    from effnet_aot.bench import ways  # the definitions of the peers, for nothing
    from effnet_aot.model import ModelNew, reference_network
import torch

begin = time.perf_counter()


def synchronize():
    if device != "cpu":
        torch.cuda.synchronize()


def ours(saved):
    import effnet_aot

    with torch.device("meta"):
        network = effnet_aot.ModelNew(saved["state"]["fc.bias"].numel())
    network.load_state_dict(saved["state"], assign=True)
    return network.eval().requires_grad_(False)


def plain(saved):
    with torch.device("meta"):
        network = reference_network(saved["state"]["fc.bias"].numel())
    network.load_state_dict(saved["state"], assign=True)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def compiled(saved):
    torch._inductor.config.freezing = True
    return torch.compile(plain(saved), dynamic=False)


def single_file(saved):
    with torch.device("meta"):
        network, names = (definition(saved["state"]["fc.bias"].numel()) for definition in (ways.load("examples/modelnew_single_file.py").ModelNew, ModelNew))
    names.load_state_dict(saved["state"], assign=True)
    network.load_state_dict(names.state_dict(), assign=True)
    return network.eval().requires_grad_(False)


def inductor(saved):
    return torch._inductor.aoti_load_package(package[0], run_single_threaded=True)


saved = torch.load(state, map_location=device, weights_only=True)
synchronize()
loaded = time.perf_counter()
x = saved["x"] if way in ("ours", "single-file") else saved["x"].contiguous(memory_format=torch.channels_last)
with torch.no_grad():
    network = {"ours": ours, "eager": plain, "compile": compiled, "single-file": single_file, "aoti": inductor}[way](saved)
    synchronize()
    ready = time.perf_counter()
    calls = []
    for _ in range(2):
        start = time.perf_counter()
        network(x)
        synchronize()
        calls.append(time.perf_counter() - start)
        if len(calls) == 1:
            total = time.perf_counter() - begin
first, second = calls
times = {"total_s": total, "load_s": loaded - begin, "build_network_s": ready - loaded, "first_s": first, "second_s": second, "extra_s": first - second}
print(json.dumps(times))
