class BuildError(RuntimeError):
    """The kernels cannot be built; the message names the architecture or the kernel and what to do."""
