"""The network timed beside its peers: python -m effnet_aot bench.

    workload.py     one network and its images in a dtype, batch and size, with the float64 answer
    ways.py         every way to compute it: ours, the peers, the examples
    timing.py       medians of CUDA-graph replays, host time, memory, and what the machine can do
    comparison.py   all ways on all workloads: a row of numbers for each
    kernels.py      our ops one by one, beside the bytes and the arithmetic that they cannot avoid
    cold_start.py   a fresh process for each way, up to its first result
    scaling.py      the time and memory of more images and of larger ones
    counters.py     what Nsight Compute counts in our kernels; projection.py: from that to the time on another GPU
    report.py       tables; plots.py: pictures
"""
