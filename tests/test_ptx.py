"""The driver that executes PTX finds what a GPU would pass over in silence: its own errors, on kernels written by hand."""

import json
import re
import struct
import subprocess
import sys

import pytest

pytestmark = pytest.mark.xdist_group("stub_cuda")

THREADS = 64
KERNEL = """.version 8.0
.target sm_80
.extern .shared .align 16 .b8 global_smem[];
.visible .entry by_hand(
  .param .u64 by_hand_param_0,
  .param .u32 by_hand_param_1
)
{
  .reg .pred %p<9>;
  ld.param.b64 %rd1, [by_hand_param_0];
  ld.param.b32 %r9, [by_hand_param_1];
  mov.u32 %r1, %tid.x;
  shl.b32 %r2, %r1, 2;               // this thread's four bytes of shared memory
  mad.wide.u32 %rd2, %r1, 4, %rd1;   // and of global memory
  xor.b32 %r3, %r2, 128;             // those of the same lane of the other warp
  setp.lt.s32 %p1, %r1, %r9;
BODY
  st.global.b32 [ %rd2 + 0 ], { %r8 };
  ret;
}
"""
CHILD = """
import ctypes, json, sys
driver, results = ctypes.CDLL("libcuda.so.1"), []
context, library, kernel, function = (ctypes.c_void_p() for _ in range(4))
driver.cuInit(0)
driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
driver.cuCtxSetCurrent(context)
class Config(ctypes.Structure):
    _fields_ = [("sizes", ctypes.c_uint * 7), ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]
out, number = (ctypes.c_uint * 64)(), ctypes.c_int(40)
address = ctypes.c_void_p(ctypes.addressof(out))
parameters = (ctypes.c_void_p * 2)(ctypes.addressof(address), ctypes.addressof(number))
image = ctypes.create_string_buffer(sys.stdin.read().encode())
assert driver.cuLibraryLoadData(ctypes.byref(library), image, None, None, 0, None, None, 0) == 0
assert driver.cuLibraryGetKernel(ctypes.byref(kernel), library, b"by_hand") == 0
assert driver.cuKernelGetFunction(ctypes.byref(function), kernel) == 0
config = Config((1, 1, 1, 64, 1, 1, 512))
print(json.dumps([driver.cuLaunchKernelEx(ctypes.byref(config), function, parameters, None), list(out)]))
"""


def execute(stub, body):
    done = subprocess.run([sys.executable, "-c", CHILD], input=KERNEL.replace("BODY", body), env=stub.executing(stub.new_log()), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    status, out = json.loads(done.stdout)
    return status, out, done.stderr


STORE, LOAD = "st.shared.b32 [ %r2 + 0 ], %r1;", "ld.shared.b32 %r8, [%r3];"
RIGHT = {
    "other warp": (f"{STORE} bar.sync 0; {LOAD}", lambda t: t ^ 32),
    "loop": ("mov.b32 %r8, 0; $L1: add.s32 %r8, %r8, 3; setp.lt.s32 %p2, %r8, %r1; @%p2 bra $L1;", lambda t: max(3, (t + 2) // 3 * 3)),
    "two ways": ("@%p1 bra $L1; mov.b32 %r8, 7; bra.uni $L2; $L1: mov.b32 %r8, 5; $L2: add.s32 %r8, %r8, 1;", lambda t: 6 if t < 40 else 8),
    "predicate": ("mov.b32 %r8, 1; @!%p1 mov.b32 %r8, 2;", lambda t: 1 if t < 40 else 2),
    "copy": (f"st.global.b32 [ %rd2 + 0 ], {{ %r1 }}; cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x4, 0x4; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0; {LOAD}", lambda t: t ^ 32),
    "nothing copied": ("cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x4, 0x0; cp.async.commit_group; cp.async.wait_group 0; ld.shared.b32 %r8, [%r2];", lambda t: 0),
    "same number from two warps": ("st.shared.b32 [ 0 + 0 ], 9; bar.sync 0; ld.shared.b32 %r8, [ 0 ];", lambda t: 9),
    "butterfly": ("shfl.sync.bfly.b32 %r8, %r1, 1, 31, -1;", lambda t: t ^ 1),
    "signed": ("sub.s32 %r4, %r1, 50; div.s32 %r5, %r4, 7; rem.s32 %r6, %r4, 7; mad.lo.s32 %r8, %r5, 7, %r6; shr.s32 %r8, %r8, 1; mul.hi.s32 %r7, %r4, 65536; sub.s32 %r8, %r8, %r7;",
               lambda t: (((t - 50) >> 1) - (((t - 50) * 65536) >> 32)) % 2**32),
    "half": ("cvt.rn.f32.s32 %r4, %r1; cvt.rn.f16.f32 %rs1, %r4; cvt.f32.f16 %r5, %rs1; fma.rn.f32 %r6, %r5, 0f40000000, 0f3F800000; mov.b32 %r8, %r6;", None),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_computes(stub, name):
    body, expected = RIGHT[name]
    expected = expected or (lambda t: struct.unpack("<I", struct.pack("<f", 2.0 * t + 1))[0])
    status, out, stderr = execute(stub, body)
    assert status == 0, stderr
    assert out == [expected(t) for t in range(THREADS)]


WRONG = {
    "shared memory: .* is read before it is written": LOAD,
    "shared memory: .* is read by warp 1 and written by another with no barrier between": f"{STORE} and.b32 %r7, %r2, 127; ld.shared.b32 %r8, [%r7];",
    "shared memory: .* is written by warp 1 and used by another with no barrier between": "and.b32 %r7, %r2, 127; st.shared.b32 [ %r7 + 0 ], %r1;",
    "shared memory: .* is read while a copy to it is under way": "cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x4, 0x4; cp.async.commit_group; ld.shared.b32 %r8, [%r2];",
    "shared memory: 512 is out of bounds, 512 bytes": "st.shared.b32 [ %r2 + 512 ], %r1;",
    "shared memory: 2 is not aligned to 4": "st.shared.b32 [ %r2 + 2 ], %r1;",
    "a misaligned address": "st.global.b32 [ %rd2 + 2 ], { %r1 };",
    "a barrier in divergent code": "@%p1 bar.sync 0;",
    "a warp's lanes are not together": "@%p1 shfl.sync.bfly.b32 %r8, %r1, 1, 31, -1;",
    "an instruction that is not known here: popc.b32": "popc.b32 %r8, %r1;",
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_refuses(stub, message):
    status, _, stderr = execute(stub, WRONG[message])
    assert status == 719
    assert re.match(f"by_hand: .*{message}", stderr), stderr
