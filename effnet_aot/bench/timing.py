"""Times in seconds: medians of single calls between two events, host time, memory, and what the machine can do at best."""

import statistics
import time

import torch

from ..cuda_graph import graphed

AHEAD = 2_000_000  # GPU cycles, about a millisecond, in which the host queues what is timed next
CHUNK = 20  # calls in the queue at a time: less than a millisecond of host time


class Timer:
    """Times calls on one device. `quick` takes few samples, for a first look and for tests."""

    def __init__(self, device, quick=False):
        self.cuda = torch.device(device).type == "cuda"
        self.device, self.quick = device, quick
        self.budget = 0.02 if quick else 0.15  # seconds of samples a median
        self.fewest, self.most = (3, 20) if quick else (10, 200)
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(4 * cache, dtype=torch.int8, device=device)

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def once(self, function):
        """(result, seconds) of a call up to the result's arrival."""
        self.synchronize()
        start = time.perf_counter()
        result = function()
        self.synchronize()
        return result, time.perf_counter() - start

    def capture(self, function, x):
        """A call without arguments that returns function(x): as a CUDA graph, where there is one."""
        return graphed(function, x).replay if self.cuda else lambda: function(x)

    def median(self, function, *, flush=False, ahead=True, budget=None):
        """Median time of a call on the device.

        flush:  with an L2 cache that holds nothing of the call's data.
        ahead:  the host has queued the call before the device comes to it, so that only the device's time counts. Without
                it, the time is the host's where the host is slower; the device waits for the host before every call, so
                that the flushing does not hide it.
        budget: seconds that the samples may take.
        """
        estimate = min(self.once(function)[1] for _ in range(2))
        samples = int(min(max((budget or self.budget) / max(estimate, 1e-7), self.fewest), self.most))
        if not self.cuda:
            return statistics.median(self.once(function)[1] for _ in range(samples))
        times = []
        while len(times) < samples:
            events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(min(CHUNK, samples - len(times)))]
            if ahead:
                torch.cuda._sleep(AHEAD)
            for start, end in events:
                if flush:
                    self._flush.zero_()
                if not ahead:
                    torch.cuda.synchronize()
                start.record()
                function()
                end.record()
            torch.cuda.synchronize()
            times += [start.elapsed_time(end) / 1e3 for start, end in events]
        return statistics.median(times)

    def host(self, function, rounds=15, calls=4):
        """Median host time of a call that nothing makes wait: the device's queue is empty before every few of them."""
        times = []
        for _ in range(rounds):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times.append((time.perf_counter() - start) / calls)
        self.synchronize()
        return statistics.median(times)

    def memory(self, function):
        """Most bytes that a call holds beyond what was there before it, or None where torch does not count them."""
        if not self.cuda:
            return None
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = function()
        self.synchronize()
        del result
        return torch.cuda.max_memory_allocated(self.device) - before

    def copy_bandwidth(self):
        """Bytes read and written per second by a copy far larger than the caches."""
        numel = 2**30 if self.cuda else 2**24
        source = torch.zeros(numel, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * numel / self.median(lambda: target.copy_(source))

    def matmul_rate(self, dtype):
        """Floating-point operations per second of a large matrix product in `dtype`, by the present TF32 switches."""
        n = 8192 if self.cuda else 256
        a = torch.randn(n, n, device=self.device).to(getattr(torch, dtype))
        return 2 * n**3 / self.median(lambda: a @ a)
