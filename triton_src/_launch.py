"""How a kernel begins."""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# On 9.0 and later the launcher may start a kernel before the one in front of it on the stream has ended ("programmatic
# dependent launch"): it then waits here, before it reads or writes anything, and lets the next one start likewise. A kernel
# waits for the whole of its predecessor, which has waited for its own: all that was launched before is seen.
WAIT = tl.constexpr("griddepcontrol.wait; // $0")
LET_NEXT = tl.constexpr("griddepcontrol.launch_dependents; // $0")


@triton.jit
def begin(DEPENDENT_LAUNCH: tl.constexpr):
    """First thing in every Triton kernel. DEPENDENT_LAUNCH: set by the build where the architecture has it."""
    if DEPENDENT_LAUNCH:
        tl.inline_asm_elementwise(WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise(LET_NEXT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@gluon.jit
def begin_gluon(DEPENDENT_LAUNCH: gl.constexpr):
    """The same in a Gluon kernel."""
    if DEPENDENT_LAUNCH:
        gl.inline_asm_elementwise(WAIT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        gl.inline_asm_elementwise(LET_NEXT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
