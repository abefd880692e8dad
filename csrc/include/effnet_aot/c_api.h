/* The kernels of effnet_aot on raw device memory: plain C, no torch, no CUDA headers.
 *
 *     effnet_epilogue relu6 = {.struct_size = sizeof relu6, .bias = bias, .activation = EFFNET_RELU6};
 *     effnet_pointwise conv = {.struct_size = sizeof conv, .precision = EFFNET_FP16, .layout = EFFNET_NHWC,
 *                              .x = x, .weight = weight, .out = out,
 *                              .batch = 10, .height = 60, .width = 60, .in_channels = 24, .out_channels = 144,
 *                              .epilogue = &relu6};
 *     if (effnet_launch_pointwise(&conv, 0, stream) != EFFNET_OK) fprintf(stderr, "%s\n", effnet_last_error());
 *
 * Memory. Pointers named x, out, residual, workspace, bn_*, or with weight or bias in their names, are device addresses
 * of the given device. Nothing is allocated, copied or freed here: the caller owns all of it and keeps it alive until the
 * stream has passed the launch.
 * out and out_bias must not overlap an input, except that it may be the residual itself. Where every pointer is 16-byte aligned and
 * every channel count (for NCHW pointwise: in_channels and height * width) a multiple of 8, faster variants serve.
 * The structs themselves, and what they point to on the host, are read before the call returns.
 *
 * Layouts. Images are dense (N, C, H, W), as NCHW or as NHWC (torch's channels_last); weights are dense in torch's
 * order. Sizes and strides count elements, not bytes. No tensor may hold more than 2^31 - 1 elements.
 *
 * Launches are asynchronous, may come from any thread, need no current CUDA context, and can be captured in CUDA graphs.
 * The first use of a kernel loads it; effnet_preload() does that beforehand.
 *
 * Every function returns EFFNET_OK or another effnet_status; after a failure effnet_last_error() explains it, and
 * nothing was launched. Set unused members to zero, as designated initializers do. */
#ifndef EFFNET_AOT_C_API_H
#define EFFNET_AOT_C_API_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define EFFNET_API __attribute__((visibility("default")))
#else
#define EFFNET_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum effnet_status {
  EFFNET_OK = 0,
  EFFNET_INVALID_ARGUMENT = 1, /* a null pointer, a size, a device that does not exist, ... */
  EFFNET_NO_DRIVER = 2,        /* no libcuda.so.1, or one older than CUDA 12.0 */
  EFFNET_NO_IMAGE = 3,         /* nothing that was built serves this GPU */
  EFFNET_DRIVER_ERROR = 4,     /* a call of the CUDA driver failed */
  EFFNET_INTERNAL_ERROR = 5    /* out of host memory, or a mistake in the library */
} effnet_status;

/* The message of this thread's last failure; "" before any. Valid until this thread's next call that fails. */
EFFNET_API const char *effnet_last_error(void);

/* ---- what the library holds ---- */

enum { EFFNET_CUBIN = 0, EFFNET_PTX = 1 };

/* One embedded image of one kernel. Its pointers lead into the library and are never freed. */
typedef struct effnet_kernel {
  size_t struct_size;  /* sizeof(effnet_kernel), set by the caller */
  const char *op;      /* "pointwise" */
  const char *variant; /* "fp16_nhwc_aligned_64x64x32" */
  const char *symbol;  /* the kernel's name in the image, and in profilers */
  int32_t capability;  /* 89 for 8.9 */
  int32_t kind;        /* EFFNET_CUBIN or EFFNET_PTX */
  int32_t registers;   /* per thread */
  int32_t spills;      /* bytes per thread */
  int32_t shared;      /* bytes of dynamic shared memory per block */
  int32_t threads;     /* per block */
  const void *image;
  size_t image_size;  /* bytes */
  const char *sha256; /* of the image, as the build recorded it: 64 hexadecimal digits */
} effnet_kernel;

EFFNET_API size_t effnet_kernel_count(void);

/* Fills *kernel with image number `index`, 0 <= index < effnet_kernel_count(). */
EFFNET_API int effnet_kernel_info(size_t index, effnet_kernel *kernel);

/* ---- devices ---- */

/* Which images serve a device, as text: "cubin sm_90", "ptx compute_89" or "none". `size` is the buffer's, in bytes; 32
 * are enough. */
EFFNET_API int effnet_device_image(int device, char *buffer, size_t size);

/* Loads every kernel onto a device, so that later calls only launch. */
EFFNET_API int effnet_preload(int device);

/* ---- computations ---- */

/* Storage and arithmetic. Sums are always float32; TF32 and FP32 store float32 and differ in how they multiply. */
enum { EFFNET_FP16 = 0, EFFNET_BF16 = 1, EFFNET_TF32 = 2, EFFNET_FP32 = 3 };
/* TF32 with a narrow map, which is float16 and holds values from 0 to 7.996, as they are behind ReLU6, times 8192: half of the
 * bytes, and no digit less than a TF32 product reads. Everything else is float32. For EFFNET_NHWC, stride_y = stride_x, a bias
 * or neither, and pointers and channel counts aligned as above. effnet_launch_mbconv uses them by itself. */
enum {
  EFFNET_NARROWING = 4, /* x float32, out narrow, no residual: pointwise, expand_depthwise */
  EFFNET_NARROW = 5,    /* both narrow: depthwise */
  EFFNET_WIDENING = 6,  /* x narrow, out float32: pointwise */
  EFFNET_WIDENING16 = 7 /* the same with a weight that effnet_launch_narrow_weight() made, for many pixels: pointwise */
};
enum { EFFNET_NCHW = 0, EFFNET_NHWC = 1 };
enum { EFFNET_LINEAR = 0, EFFNET_RELU = 1, EFFNET_RELU6 = 2 };

/* What follows the sum, for every output channel: either batch norm with running statistics,
 *   (sum - bn_mean) / sqrt(bn_var + bn_eps) * bn_weight + bn_bias,
 * or sum + bias, or neither; then the residual where there is one, then the activation. */
typedef struct effnet_epilogue {
  size_t struct_size; /* sizeof(effnet_epilogue) */
  const void *bias;   /* null or one value for each output channel */
  const void *bn_weight, *bn_bias, *bn_mean, *bn_var; /* all four, or all null */
  float bn_eps;
  int32_t vectors_are_fp32; /* 1: bias and bn_* are float32; 0: they are stored as x is */
  int32_t activation;       /* EFFNET_LINEAR, EFFNET_RELU or EFFNET_RELU6 */
} effnet_epilogue;

/* 1x1 convolution. x (batch, in_channels, height, width), weight (out_channels, in_channels),
 * out (batch, out_channels, height, width); x, out and residual in `layout`. */
typedef struct effnet_pointwise {
  size_t struct_size; /* sizeof(effnet_pointwise) */
  int32_t precision;  /* EFFNET_FP16, ... */
  int32_t layout;     /* EFFNET_NCHW or EFFNET_NHWC */
  const void *x, *weight;
  void *out;
  const void *residual; /* null or of out's shape; effnet_launch_pointwise_pool takes none */
  int64_t batch, height, width, in_channels, out_channels;
  const effnet_epilogue *epilogue; /* null: the bare sum */
  const char *variant; /* null: the library chooses; else the name of one, from effnet_kernel_info(), that fits the rest */
  const void *weight_scale; /* with EFFNET_WIDENING16, and for effnet_launch_merged_pool: its scale; else null */
} effnet_pointwise;

EFFNET_API int effnet_launch_pointwise(const effnet_pointwise *problem, int device, void *stream);

/* The same followed by the mean over each image: out (batch, out_channels). */
EFFNET_API int effnet_launch_pointwise_pool(const effnet_pointwise *problem, int device, void *stream);

/* A float32 weight (rows, depth) as EFFNET_WIDENING16 takes it: out, in float16, each row times a power of two and rounded, and
 * scale, a float32 a row. weight and out 16-byte aligned, depth a multiple of 8; with taps_first rows. */
typedef struct effnet_narrow_weight {
  size_t struct_size; /* sizeof(effnet_narrow_weight) */
  const void *weight;
  void *out, *scale;
  int64_t rows, depth;
  const char *variant;
  int32_t taps_first; /* 1: weight and out lie as (depth, rows), as the taps of a depthwise weight may */
} effnet_narrow_weight;

EFFNET_API int effnet_launch_narrow_weight(const effnet_narrow_weight *problem, int device, void *stream);

/* Two 1x1 convolutions with nothing between them as one: out = second * first, out_bias = second * first_bias + second_bias.
 * second (rows, depth) and first (depth, columns) as `precision` says, EFFNET_FP16 or EFFNET_FP32; out (rows, columns) and the biases,
 * first_bias (depth,), second_bias and out_bias (rows,), float32. effnet_launch_narrow_weight() makes of out what the functions named
 * "merged" take: a block's projection and what is behind it in one kernel, which for few pixels is faster. */
typedef struct effnet_merge_weights {
  size_t struct_size; /* sizeof(effnet_merge_weights) */
  int32_t precision;
  const void *first, *first_bias, *second, *second_bias;
  void *out, *out_bias;
  int64_t rows, depth, columns;
  const char *variant;
} effnet_merge_weights;

EFFNET_API int effnet_launch_merge_weights(const effnet_merge_weights *problem, int device, void *stream);

/* effnet_launch_pointwise_pool() by such a weight. EFFNET_FP16, or EFFNET_TF32 with a narrow x and a float32 out; EFFNET_NHWC, a
 * float32 bias and no batch norm. EFFNET_NO_IMAGE where no kernel was measured to be faster than two products. */
EFFNET_API int effnet_launch_merged_pool(const effnet_pointwise *problem, int device, void *stream);

/* Depthwise convolution. x (batch, channels, height, width), weight (channels, kernel, kernel),
 * out (batch, channels, out_height, out_width) with
 *   out_height = (height + top + bottom - kernel) / stride_y + 1, and so for the width. Outside the image x is 0. */
typedef struct effnet_depthwise {
  size_t struct_size; /* sizeof(effnet_depthwise) */
  int32_t precision;
  int32_t layout;
  const void *x, *weight;
  void *out;
  int64_t batch, channels, height, width;
  int64_t kernel;             /* 3 or 5 */
  int64_t stride_y, stride_x; /* 1 or 2 */
  int64_t left, right, top, bottom; /* padding, at least 0 */
  const effnet_epilogue *epilogue;
  const char *variant;
} effnet_depthwise;

EFFNET_API int effnet_launch_depthwise(const effnet_depthwise *problem, int device, void *stream);

/* Dense convolution with few input channels (a network's first layer). x (batch, in_channels, height, width),
 * weight (out_channels, in_channels, kernel_y, kernel_x), out as above, in `layout`. x and weight are read through
 * strides, so x may lie otherwise than out, or be part of a larger picture. */
typedef struct effnet_conv {
  size_t struct_size; /* sizeof(effnet_conv) */
  int32_t precision;
  int32_t layout; /* of out */
  const void *x, *weight;
  void *out;
  int64_t batch, in_channels, height, width, out_channels;
  int64_t kernel_y, kernel_x;
  int64_t stride_y, stride_x; /* at least 1 */
  int64_t left, right, top, bottom;
  const int64_t *x_strides;      /* of the batch, channels, rows and columns, in elements, at least 0; null: x is dense in `layout` */
  const int64_t *weight_strides; /* of the output channels, input channels, rows and columns; null: dense in this order */
  const effnet_epilogue *epilogue;
  const char *variant;
} effnet_conv;

EFFNET_API int effnet_launch_conv(const effnet_conv *problem, int device, void *stream);

/* Linear layer. x (rows, in_features), weight (out_features, in_features), out (rows, out_features), all row-major. */
typedef struct effnet_linear {
  size_t struct_size; /* sizeof(effnet_linear) */
  int32_t precision;
  const void *x, *weight;
  void *out;
  int64_t rows, in_features, out_features;
  const effnet_epilogue *epilogue;
  const char *variant;
} effnet_linear;

EFFNET_API int effnet_launch_linear(const effnet_linear *problem, int device, void *stream);

/* Batch norm folded into the convolution before it, for the functions above:
 *   scale = bn_weight / sqrt(bn_var + bn_eps), out = weight * scale, out_bias = bn_bias - bn_mean * scale.
 * weight and out (out_channels, in_channels, kernel_y, kernel_x), a matrix with kernels of 1; out_bias (out_channels,). */
typedef struct effnet_fold_batch_norm {
  size_t struct_size;    /* sizeof(effnet_fold_batch_norm) */
  int32_t precision;     /* of weight; TF32 and FP32 are the same here */
  int32_t out_precision; /* of out: weight's, or any where that is FP32 */
  const void *weight;
  void *out;
  void *out_bias; /* float32 */
  int64_t out_channels, in_channels;
  int64_t kernel_y, kernel_x;
  const int64_t *weight_strides;   /* as effnet_conv has them */
  const effnet_epilogue *epilogue; /* the batch norm, and no activation */
  int32_t taps_first;              /* 1: out lies as (kernel_y, kernel_x, out_channels), and in_channels is 1 */
  const char *variant;
} effnet_fold_batch_norm;

EFFNET_API int effnet_launch_fold_batch_norm(const effnet_fold_batch_norm *problem, int device, void *stream);

/* The first two steps of an MBConv block, batch norm folded: activation(depthwise(activation(expand(x)))).
 * x (batch, in_channels, height, width), expand_weight (hidden, in_channels), depthwise_weight (hidden, kernel, kernel),
 * out (batch, hidden, out_height, out_width) with out_height as above.
 *
 * One kernel computes it for FP16, BF16 or TF32, EFFNET_NHWC, the kernels and strides of the variants named
 * "expand_depthwise", stride_y = stride_x, both biases present and biases_are_fp32, depthwise_taps_first, and every pointer
 * 16-byte aligned, where the map is small enough for that to be faster. Otherwise two kernels run, with the map between them
 * in the workspace. */
typedef struct effnet_expand_depthwise {
  size_t struct_size; /* sizeof(effnet_expand_depthwise) */
  int32_t precision;
  int32_t layout;
  const void *x;
  const void *expand_weight, *expand_bias;
  const void *depthwise_weight, *depthwise_bias; /* any bias may be null */
  void *out;
  void *workspace; /* as many bytes as effnet_expand_depthwise_workspace() says, 16-byte aligned, in use until the stream has passed the launch */
  int64_t batch, in_channels, hidden, height, width;
  int64_t kernel;             /* 3 or 5 */
  int64_t stride_y, stride_x; /* 1 or 2 */
  int64_t left, right, top, bottom;
  int32_t biases_are_fp32;      /* 1: biases are float32; 0: they are stored as x is */
  int32_t depthwise_taps_first; /* 1: depthwise_weight lies as (kernel, kernel, hidden) */
  int32_t activation;
  const char *variant; /* null: the library chooses, two kernels included; else the name of a variant of "expand_depthwise" */
  const void *expand_scale; /* for effnet_launch_merged_depthwise: the scale of expand_weight; else null */
} effnet_expand_depthwise;

/* How large the workspace of a problem must be, in bytes: 0 where one kernel does it all. Of the addresses only their
 * alignment and which are null counts; the workspace itself is not looked at. */
EFFNET_API int effnet_expand_depthwise_workspace(const effnet_expand_depthwise *problem, int device, size_t *bytes);

EFFNET_API int effnet_launch_expand_depthwise(const effnet_expand_depthwise *problem, int device, void *stream);

/* The same by a weight of effnet_launch_merge_weights() and effnet_launch_narrow_weight(), without a workspace. EFFNET_FP16, or EFFNET_TF32
 * with narrow maps on both sides; EFFNET_NHWC and all else that one kernel wants. EFFNET_NO_IMAGE where no kernel was measured to be faster
 * than two products. */
EFFNET_API int effnet_launch_merged_depthwise(const effnet_expand_depthwise *problem, int device, void *stream);

/* A whole MBConv block, batch norm folded: project(activation(depthwise(activation(expand(x))))) + residual.
 * x (batch, in_channels, height, width), expand_weight (hidden, in_channels), depthwise_weight (hidden, kernel, kernel),
 * project_weight (out_channels, hidden), out (batch, out_channels, out_height, out_width) with out_height as above.
 *
 * One kernel computes it for FP16, BF16 or TF32, EFFNET_NHWC, EFFNET_RELU6, kernel 3, stride_y = stride_x, all biases present and
 * biases_are_fp32, depthwise_taps_first, the widths and strides of the variants named "mbconv", and every pointer 16-byte
 * aligned, where it was measured or guessed to be faster. Where there is no expansion that kernel takes an infinite x for the
 * largest finite number. Otherwise two to four kernels run, with their maps in the workspace: narrow ones in TF32 with
 * EFFNET_RELU6, where everything is aligned. */
typedef struct effnet_mbconv {
  size_t struct_size; /* sizeof(effnet_mbconv) */
  int32_t precision;
  int32_t layout;
  const void *x;
  const void *expand_weight, *expand_bias; /* both null: no expansion, and hidden = in_channels */
  const void *depthwise_weight, *depthwise_bias;
  const void *project_weight, *project_bias; /* any bias may be null */
  const void *residual; /* null or of out's shape, in `layout` */
  void *out;
  void *workspace; /* as many bytes as effnet_mbconv_workspace() says, 16-byte aligned, in use until the stream has passed the launch */
  int64_t batch, in_channels, hidden, out_channels, height, width;
  int64_t kernel;             /* 3 or 5 */
  int64_t stride_y, stride_x; /* 1 or 2 */
  int64_t left, right, top, bottom;
  int32_t biases_are_fp32;      /* 1: biases are float32; 0: they are stored as x is */
  int32_t depthwise_taps_first; /* 1: depthwise_weight lies as (kernel, kernel, hidden) */
  int32_t activation;
  const char *variant; /* null: the library chooses, several kernels included; else the name of a variant of "mbconv" */
  /* Null, or what effnet_launch_narrow_weight() makes of depthwise_weight, with taps_first, and of project_weight, 16-byte aligned: in TF32
   * one kernel may then keep the maps between the steps narrow, which an activation of at most 7.99 allows. */
  const void *narrow_depthwise_weight, *narrow_depthwise_scale;
  const void *narrow_project_weight, *narrow_project_scale;
} effnet_mbconv;

/* How large the workspace of a problem must be, in bytes: 0 where one kernel does it all. Of the addresses only their
 * alignment and which are null counts; the workspace itself is not looked at. */
EFFNET_API int effnet_mbconv_workspace(const effnet_mbconv *problem, int device, size_t *bytes);

EFFNET_API int effnet_launch_mbconv(const effnet_mbconv *problem, int device, void *stream);

/* A network's first convolution and the block that follows it, in one call. The stem's map lies between them: stem->out,
 * block->x and block->workspace are not used. The block's x is the stem's out: batch, precision, layout and sizes agree.
 *
 * One kernel computes both for all precisions but FP32, EFFNET_NHWC, a 3x3 stem of stride 2 with up to 3 input and 32 output
 * channels and ReLU or ReLU6, a block of kernel 3 and stride 1 without expansion, residual and EFFNET_LINEAR, all biases
 * present and float32, depthwise_taps_first, and every pointer but the stem's x and weight 16-byte aligned. In FP16 and BF16
 * it takes an infinite value of the stem's map for the largest finite number. */
typedef struct effnet_stem_mbconv {
  size_t struct_size; /* sizeof(effnet_stem_mbconv) */
  const effnet_conv *stem;
  const effnet_mbconv *block;
  void *workspace; /* as many bytes as effnet_stem_mbconv_workspace() says */
  const char *variant; /* null: the library chooses; else the name of a variant of "stem_mbconv" */
} effnet_stem_mbconv;

EFFNET_API int effnet_stem_mbconv_workspace(const effnet_stem_mbconv *problem, int device, size_t *bytes);

EFFNET_API int effnet_launch_stem_mbconv(const effnet_stem_mbconv *problem, int device, void *stream);

#ifdef __cplusplus
}
#endif

#endif
