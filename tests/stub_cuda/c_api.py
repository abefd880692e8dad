"""csrc/include/effnet_aot/c_api.h in ctypes, for test processes that must not import torch. tests/test_c_api.py holds the
two against each other."""

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p

OK, INVALID_ARGUMENT, NO_DRIVER, NO_IMAGE, DRIVER_ERROR, INTERNAL_ERROR = range(6)
FP16, BF16, TF32, FP32, NARROWING, NARROW, WIDENING, WIDENING16 = range(8)
NCHW, NHWC = range(2)
LINEAR, RELU, RELU6 = range(3)


def struct(name, *fields):
    fields = [("struct_size", c_size_t), *((field, kind) for kind, names in fields for field in names.split())]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Kernel = struct(
    "effnet_kernel", (c_char_p, "op variant symbol"), (c_int32, "capability kind registers spills shared threads"),
    (c_void_p, "image"), (c_size_t, "image_size"), (c_char_p, "sha256"),
)  # fmt: skip
Epilogue = struct(
    "effnet_epilogue", (c_void_p, "bias bn_weight bn_bias bn_mean bn_var"), (c_float, "bn_eps"), (c_int32, "vectors_are_fp32 activation")
)
Pointwise = struct(
    "effnet_pointwise", (c_int32, "precision layout"), (c_void_p, "x weight out residual"),
    (c_int64, "batch height width in_channels out_channels"), (POINTER(Epilogue), "epilogue"), (c_char_p, "variant"), (c_void_p, "weight_scale"),
)  # fmt: skip
NarrowWeight = struct("effnet_narrow_weight", (c_void_p, "weight out scale"), (c_int64, "rows depth"), (c_char_p, "variant"), (c_int32, "taps_first"))
MergeWeights = struct(
    "effnet_merge_weights", (c_int32, "precision"), (c_void_p, "first first_bias second second_bias out out_bias"), (c_int64, "rows depth columns"), (c_char_p, "variant")
)
Depthwise = struct(
    "effnet_depthwise", (c_int32, "precision layout"), (c_void_p, "x weight out"),
    (c_int64, "batch channels height width kernel stride_y stride_x left right top bottom"), (POINTER(Epilogue), "epilogue"), (c_char_p, "variant"),
)  # fmt: skip
Conv = struct(
    "effnet_conv", (c_int32, "precision layout"), (c_void_p, "x weight out"),
    (c_int64, "batch in_channels height width out_channels kernel_y kernel_x stride_y stride_x left right top bottom"),
    (POINTER(c_int64), "x_strides weight_strides"), (POINTER(Epilogue), "epilogue"), (c_char_p, "variant"),
)  # fmt: skip
Linear = struct(
    "effnet_linear", (c_int32, "precision"), (c_void_p, "x weight out"), (c_int64, "rows in_features out_features"), (POINTER(Epilogue), "epilogue"), (c_char_p, "variant")
)
ExpandDepthwise = struct(
    "effnet_expand_depthwise", (c_int32, "precision layout"),
    (c_void_p, "x expand_weight expand_bias depthwise_weight depthwise_bias out workspace"),
    (c_int64, "batch in_channels hidden height width kernel stride_y stride_x left right top bottom"),
    (c_int32, "biases_are_fp32 depthwise_taps_first activation"), (c_char_p, "variant"), (c_void_p, "expand_scale"),
)  # fmt: skip
Mbconv = struct(
    "effnet_mbconv", (c_int32, "precision layout"),
    (c_void_p, "x expand_weight expand_bias depthwise_weight depthwise_bias project_weight project_bias residual out workspace"),
    (c_int64, "batch in_channels hidden out_channels height width kernel stride_y stride_x left right top bottom"),
    (c_int32, "biases_are_fp32 depthwise_taps_first activation"), (c_char_p, "variant"),
    (c_void_p, "narrow_depthwise_weight narrow_depthwise_scale narrow_project_weight narrow_project_scale"),
)  # fmt: skip
StemMbconv = struct("effnet_stem_mbconv", (POINTER(Conv), "stem"), (POINTER(Mbconv), "block"), (c_void_p, "workspace"), (c_char_p, "variant"))
FoldBatchNorm = struct(
    "effnet_fold_batch_norm", (c_int32, "precision out_precision"), (c_void_p, "weight out out_bias"),
    (c_int64, "out_channels in_channels kernel_y kernel_x"), (POINTER(c_int64), "weight_strides"), (POINTER(Epilogue), "epilogue"),
    (c_int32, "taps_first"), (c_char_p, "variant"),
)  # fmt: skip
STRUCTS = [Kernel, Epilogue, Pointwise, NarrowWeight, MergeWeights, Depthwise, Conv, Linear, FoldBatchNorm, ExpandDepthwise, Mbconv, StemMbconv]
PROBLEMS = {
    "narrow_weight": NarrowWeight, "merge_weights": MergeWeights, "merged_pool": Pointwise, "merged_depthwise": ExpandDepthwise, "pointwise": Pointwise, "pointwise_pool": Pointwise, "depthwise": Depthwise, "conv": Conv, "linear": Linear, "fold_batch_norm": FoldBatchNorm,
    "expand_depthwise": ExpandDepthwise, "mbconv": Mbconv, "stem_mbconv": StemMbconv,
}  # fmt: skip


class Library:
    def __init__(self, path):
        self._c = ctypes.CDLL(path)
        self._c.effnet_last_error.restype = c_char_p
        self._c.effnet_kernel_count.restype = c_size_t

    def _result(self, status, value=None):
        return {"status": status, "error": self._c.effnet_last_error().decode() if status else "", "value": value}

    def kernels(self):
        for index in range(self._c.effnet_kernel_count()):
            kernel = Kernel(struct_size=ctypes.sizeof(Kernel))
            assert self._c.effnet_kernel_info(c_size_t(index), ctypes.byref(kernel)) == OK
            yield kernel

    def preload(self, device):
        return self._result(self._c.effnet_preload(c_int(device)))

    def device_image(self, device, size=64):
        buffer = ctypes.create_string_buffer(size or 1)
        return self._result(self._c.effnet_device_image(c_int(device), buffer, c_size_t(size)), buffer.value.decode())

    def last_error(self):
        return {"status": OK, "error": "", "value": self._c.effnet_last_error().decode()}

    def kernel_info(self, index, struct_size=ctypes.sizeof(Kernel), null=False):
        kernel = Kernel(struct_size=struct_size)
        return self._result(self._c.effnet_kernel_info(c_size_t(index), None if null else ctypes.byref(kernel)))

    def tune(self, on, wanted=""):
        """See csrc/tuning.h."""
        self._c.tune_effnet(c_int(on), wanted.encode())
        return self._result(OK)

    def choices(self):
        self._c.tune_effnet_choices.restype = c_char_p
        return self._result(OK, self._c.tune_effnet_choices().decode())

    def sequence(self, lanes, *grids):
        """few_images.cpp's: a network of one kernel, with so many blocks each time; in lanes that do all of it each."""
        self._c.stub_sequence((c_int64 * len(grids))(*grids), c_int(len(grids)), c_int(lanes))
        return self._result(OK)

    def launch(self, op, members, device=0, stream=0):
        """`members` of the struct, with the epilogue as a dict and strides as lists; None is a null problem. "beyond" are
        bytes that follow the struct, as of a newer version."""
        return self._result(getattr(self._c, f"effnet_launch_{op}")(problem(op, members), c_int(device), c_void_p(stream)))

    def workspace(self, op, members, device=0, null=False):
        size = c_size_t(2**40)
        status = getattr(self._c, f"effnet_{op}_workspace")(problem(op, members), c_int(device), None if null else ctypes.byref(size))
        return self._result(status, size.value)


def problem(op, members):
    if members is None:
        return None
    members = dict(members)
    beyond = bytes(members.pop("beyond", []))
    members = {"struct_size": ctypes.sizeof(PROBLEMS[op]) + len(beyond), **members}
    if members.get("epilogue") is not None:
        members["epilogue"] = ctypes.pointer(Epilogue(**{"struct_size": ctypes.sizeof(Epilogue), **members["epilogue"]}))
    for name, part in (("stem", "conv"), ("block", "mbconv")):
        if members.get(name) is not None:
            members[name] = ctypes.cast(problem(part, members[name]), POINTER(PROBLEMS[part]))
    for name in ("x_strides", "weight_strides"):
        if members.get(name) is not None:
            members[name] = (c_int64 * 4)(*members[name])
    if members.get("variant") is not None:
        members["variant"] = members["variant"].encode()
    buffer = ctypes.create_string_buffer(bytes(given := PROBLEMS[op](**members)) + beyond)
    buffer.given = given  # keeps alive what it points to
    return buffer
