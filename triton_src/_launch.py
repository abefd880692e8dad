"""How a kernel begins.

On 9.0 and later the launcher may start a kernel of a network before the one in front of it has ended ("programmatic dependent
launch"). A kernel first does what needs nothing of its predecessors: indices, weights and biases, which are older than the
network's first kernel. It waits before it reads or writes a map: for the whole of its predecessor, which has waited for its
own, so all that was launched before is seen. Then it lets the next one start. Not earlier: kernels that wait would pile up, and
the blocks of the later ones would share the few multiprocessors that have room for them.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WAIT = tl.constexpr("griddepcontrol.wait; // $0")
LET_NEXT = tl.constexpr("griddepcontrol.launch_dependents; // $0")


@triton.jit
def wait_for_maps(DEPENDENT_LAUNCH: tl.constexpr):
    """In every Triton kernel, before the first access to anything that another kernel of a network writes or reads.
    DEPENDENT_LAUNCH: set by the build where the architecture has it."""
    if DEPENDENT_LAUNCH:
        tl.inline_asm_elementwise(WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise(LET_NEXT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_maps_gluon(DEPENDENT_LAUNCH: gl.constexpr):
    """The same in a Gluon kernel."""
    if DEPENDENT_LAUNCH:
        gl.inline_asm_elementwise(WAIT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise(LET_NEXT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
