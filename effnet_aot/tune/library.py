"""The library, told which variant to take: csrc/tuning.h through ctypes, which any Python can call."""

import ctypes
import json
from contextlib import contextmanager
from dataclasses import dataclass

from .. import _library
from ..aot.tables import NONE


@dataclass(frozen=True)
class Choice:
    """What the library did for one launch: the variant that it took and all that fit."""

    op: str
    batch: int
    shape: tuple[tuple[str, int], ...]
    variant: str
    fitting: tuple[str, ...]

    @property
    def precision(self):
        return next((name for name in self.fitting if name != NONE), NONE).split("_")[0]

    @property
    def key(self):
        return self.op, self.precision, self.shape, self.batch


def written(op, precision, shape, batch):
    """A key as csrc/tuning.h has it."""
    return f"{op}/{precision}/{batch}/" + ",".join(f"{name}={value}" for name, value in shape)


class Library:
    def __init__(self):
        _library.require()
        self._c = ctypes.CDLL(str(_library.PATH))
        self._c.tune_effnet.argtypes = [ctypes.c_int, ctypes.c_char_p]
        self._c.tune_effnet.restype = None
        self._c.tune_effnet_choices.restype = ctypes.c_char_p
        self._c.effnet_last_error.restype = ctypes.c_char_p

    @contextmanager
    def taking(self, op=None, variant=None):
        """Inside, `op` takes `variant` wherever it fits; without names the library chooses by itself, and tells."""
        with self.assigned({op: variant} if op and variant else {}):
            yield self

    @contextmanager
    def assigned(self, variants, tell=True):
        """Inside, every problem takes the variant that `variants` has for its key, or for its op's name, where that fits; and a
        network's plan is made anew and not kept. Telling, which choices() needs, takes the host longer than all else."""
        lines = (f"{what if isinstance(what, str) else written(*what)} {variant}" for what, variant in variants.items())
        self._c.tune_effnet(1 if tell else 2, "\n".join(lines).encode())
        self.choices()
        try:
            yield self
        finally:
            self._c.tune_effnet(0, None)

    def choices(self):
        """The launches of this thread since the last call."""
        lines = self._c.tune_effnet_choices().decode().splitlines()
        found = map(json.loads, lines)
        return [Choice(c["op"], c["batch"], tuple(c["shape"].items()), c["variant"], tuple(c["fitting"])) for c in found]

    def image(self, device=0):
        """What serves a device: "cubin sm_90", "ptx compute_89"."""
        buffer = ctypes.create_string_buffer(64)
        if self._c.effnet_device_image(ctypes.c_int(device), buffer, ctypes.c_size_t(len(buffer))):
            raise RuntimeError(self._c.effnet_last_error().decode())
        return buffer.value.decode()
