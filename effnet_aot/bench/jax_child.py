"""The network in JAX. Reads a request a line, as JSON, from stdin and answers each: to compile for a workload, or to time what was
compiled. Run as a file: there is no torch in this process."""

import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def network(x, parameters, layers):
    """x (N, H, W, 3); weights HWIO, batch norm folded in."""
    *convolutions, (fc_weight, fc_bias) = parameters
    for (weight, bias), layer in zip(convolutions, layers, strict=True):
        pad = (layer["padding"],) * 2
        x = lax.conv_general_dilated(
            x, weight, (layer["stride"],) * 2, (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=layer["groups"]
        )
        x = x + bias
        if layer["activation"] != "none":
            x = jnp.clip(x, 0, 6) if layer["activation"] == "relu6" else jnp.maximum(x, 0)
    return x.mean((1, 2)) @ fc_weight + fc_bias


def prepare(request):
    """The jitted call, its logits, and the seconds that the first one took."""
    if request["cuda"] and jax.default_backend() != "gpu":
        raise RuntimeError(f"JAX sees no GPU: its backend is {jax.default_backend()}")
    jax.config.update("jax_default_matmul_precision", "default" if request["tf32"] else "highest")
    device = jax.devices()[0] if request["cuda"] else jax.devices("cpu")[0]
    arrays = np.load(request["arrays"])

    def put(name):
        return jax.device_put(jnp.asarray(arrays[name], request["dtype"]), device)

    names = [str(i) for i in range(len(request["layers"]))]
    parameters = [(put(f"weight{i}"), put(f"bias{i}")) for i in names] + [(put("fc_weight"), put("fc_bias"))]
    x = put("images")
    function = jax.jit(lambda x, parameters: network(x, parameters, request["layers"]))
    start = time.perf_counter()
    logits = function(x, parameters).block_until_ready()
    return lambda: function(x, parameters), logits, time.perf_counter() - start


def measure(function, logits, first, budget):
    """Calls follow each other on the device; the host is ahead where it can be."""
    function().block_until_ready()
    start = time.perf_counter()
    function().block_until_ready()
    calls = int(min(max(budget / (time.perf_counter() - start) / 5, 1), 200))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(calls):
            result = function()
        result.block_until_ready()
        times.append((time.perf_counter() - start) / calls)
    return {"seconds": statistics.median(times), "first_call_s": first, "logits": np.asarray(logits[:8].astype(jnp.float32)).tolist()}


prepared = {}
for line in sys.stdin:
    request = json.loads(line)
    try:
        if "arrays" in request:
            prepared[request["point"]] = prepare(request)
            answer = {}
        else:
            answer = measure(*prepared[request["point"]], request["budget"])
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
