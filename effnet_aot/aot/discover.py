"""Finds the ops in triton_src/ and asks each for its variants."""

import importlib
import pkgutil
import sys

from .errors import BuildError


def discover(source_dir, candidates=False):
    """All variants that ship by default, ordered by op and by the order in which the op lists them; or what tuning tries
    besides. `source_dir` is .../triton_src."""
    sys.path.insert(0, str(source_dir.parent))
    try:
        package = importlib.import_module(source_dir.name)
        found = []
        for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")):
            op = importlib.import_module(f"{package.__name__}.{module}")
            found += op.variants() if not candidates else getattr(op, "candidates", list)()
    finally:
        sys.path.remove(str(source_dir.parent))
    if not found and not candidates:
        raise BuildError(f"no kernels: {source_dir} has no op with variants()")
    names = [str(v) for v in found]
    repeated = {n for n in names if names.count(n) > 1}
    if repeated:
        raise BuildError(f"two variants have the same name: {', '.join(sorted(repeated))}")
    return found
