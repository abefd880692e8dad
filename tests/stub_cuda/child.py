"""Makes the calls that stdin names against the library, and prints results and the library's kernels: a process of its
own, because what serves a GPU is decided once a process. JSON in, JSON out."""

import ctypes
import hashlib
import json
import os
import sys
import threading

from c_api import Library


def run(library, call):
    name, *arguments = call
    if name == "threads":  # [number, calls]: so many threads make all calls, starting together
        number, calls = arguments
        barrier, results = threading.Barrier(number), [None] * number

        def work(i):
            barrier.wait()
            results[i] = [run(library, c) for c in calls]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
    if name == "fork":  # [calls]: a forked child makes them
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, json.dumps([run(library, c) for c in arguments[0]]).encode())
            os._exit(0)
        os.close(write)
        results = json.loads(os.fdopen(read).read())
        os.wait()
        return results
    if name == "use_device":  # [device]: makes its context current, as a program that works with it would
        driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
        driver.cuInit(0)
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), arguments[0])
        driver.cuCtxSetCurrent(context)
        return {"status": 0, "error": ""}
    return getattr(library, name)(*arguments)


def main():
    job = json.load(sys.stdin)
    for path in job["dependencies"]:
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    library = Library(job["library"])
    results = [run(library, call) for call in job["calls"]]
    kernels = {
        kernel.image: {
            "op": kernel.op.decode(), "variant": kernel.variant.decode(), "symbol": kernel.symbol.decode(),
            "capability": kernel.capability, "kind": ("cubin", "ptx")[kernel.kind], "shared": kernel.shared, "threads": kernel.threads,
            "bytes": kernel.image_size, "sha256": kernel.sha256.decode(),
            "actual_sha256": hashlib.sha256(ctypes.string_at(kernel.image, kernel.image_size)).hexdigest() if job["hash"] else None,
        }
        for kernel in library.kernels()
    }  # fmt: skip
    print(json.dumps({"results": results, "kernels": kernels}))


main()
