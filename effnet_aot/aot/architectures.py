"""Which GPUs to compile for.

EFFNET_AOT_ARCHS is a list of compute capabilities ("8.9 9.0", separated by spaces, commas or semicolons) or "all".
Beside the cubins one PTX of an 8.x capability is always built: the driver can compile it for any later GPU, while PTX
of 9.0 and up may be tied to its architecture.
"""

import re
from dataclasses import dataclass

from .errors import BuildError

SUPPORTED = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
DEFAULT = ("8.9",)
FALLBACK_PTX = "8.9"


@dataclass(frozen=True, order=True)
class Target:
    """One image to build: a cubin for a capability, or PTX that starts at one. `capability` is 89 for 8.9."""

    capability: int
    kind: str  # "cubin" or "ptx"

    @property
    def arch(self):
        return f"{self.capability // 10}.{self.capability % 10}"

    def __str__(self):
        return f"{'sm' if self.kind == 'cubin' else 'compute'}_{self.capability} {self.kind}"


def default_archs():
    """The default list: 8.9 and the capabilities of the GPUs in this machine, as far as the installed torch sees them."""
    archs = list(DEFAULT)
    try:
        import torch

        for device in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(device)
            arch = f"{major}.{minor}"
            if arch in SUPPORTED and arch not in archs:
                archs.append(arch)
    except Exception:  # no torch, or a driver that cannot start: the default list stands
        pass
    return archs


def parse_archs(text):
    """Targets for the value of EFFNET_AOT_ARCHS; None or an empty string is the default list."""
    names = [name for name in re.split(r"[\s,;]+", text or "") if name] or default_archs()
    if names == ["all"]:
        names = list(SUPPORTED)
    for name in names:
        if name not in SUPPORTED:
            raise BuildError(f"EFFNET_AOT_ARCHS: unknown architecture '{name}'; expected 'all' or a list of {', '.join(SUPPORTED)}")
    capabilities = sorted({int(name.replace(".", "")) for name in names})
    ptx = max((c for c in capabilities if c // 10 == 8), default=int(FALLBACK_PTX.replace(".", "")))
    return [Target(c, "cubin") for c in capabilities] + [Target(ptx, "ptx")]
