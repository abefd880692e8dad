"""How a kernel begins.

On 9.0 and later the launcher may start a kernel of a network before the one in front of it has ended ("programmatic dependent
launch"). A kernel lets the next one start at once, then does what needs nothing of its predecessors (indices, weights and
biases, which are older than the network's first kernel), and waits before it reads or writes a map. It waits for the whole of
its predecessor, which has waited for its own: all that was launched before is seen.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LET_NEXT = tl.constexpr("griddepcontrol.launch_dependents; // $0")
WAIT = tl.constexpr("griddepcontrol.wait; // $0")


@triton.jit
def let_next_start(DEPENDENT_LAUNCH: tl.constexpr):
    """First thing in every Triton kernel. DEPENDENT_LAUNCH: set by the build where the architecture has it."""
    if DEPENDENT_LAUNCH:
        tl.inline_asm_elementwise(LET_NEXT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_for_maps(DEPENDENT_LAUNCH: tl.constexpr):
    """Before the first access to anything that another kernel of the network writes or reads."""
    if DEPENDENT_LAUNCH:
        tl.inline_asm_elementwise(WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_start_gluon(DEPENDENT_LAUNCH: gl.constexpr):
    """The same in a Gluon kernel."""
    if DEPENDENT_LAUNCH:
        gl.inline_asm_elementwise(LET_NEXT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_maps_gluon(DEPENDENT_LAUNCH: gl.constexpr):
    if DEPENDENT_LAUNCH:
        gl.inline_asm_elementwise(WAIT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
