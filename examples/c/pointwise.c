/* A 1x1 convolution with bias and ReLU6 on raw device memory, from plain C: no torch, no CUDA toolkit.
 *
 *   out[p, o] = min(max(sum_c x[p, c] weight[o, c] + bias[o], 0), 6)
 *
 * Build and run with the Makefile beside this file: make run */
#include <dlfcn.h>
#include <effnet_aot/c_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { BATCH = 2, HEIGHT = 28, WIDTH = 28, IN = 24, OUT = 144, PIXELS = BATCH * HEIGHT * WIDTH };

/* The few driver calls that a program needs to own device memory. One with the CUDA toolkit includes <cuda.h> instead. */
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
static struct {
  int (*init)(unsigned);
  int (*retain_context)(CUcontext *, int);
  int (*set_context)(CUcontext);
  int (*synchronize)(void);
  int (*allocate)(CUdeviceptr *, size_t);
  int (*release)(CUdeviceptr);
  int (*upload)(CUdeviceptr, const void *, size_t);
  int (*download)(void *, CUdeviceptr, size_t);
} cuda;

static void check(int result, const char *what) {
  if (result == 0) return;
  fprintf(stderr, "%s: CUDA error %d\n", what, result);
  exit(1);
}

static void check_effnet(int status) {
  if (status == EFFNET_OK) return;
  fprintf(stderr, "%s\n", effnet_last_error());
  exit(1);
}

static void open_cuda(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
  const char *names[] = {"cuInit",          "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent",  "cuCtxSynchronize",
                         "cuMemAlloc_v2", "cuMemFree_v2",             "cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2"};
  CUcontext context;
  size_t i;
  for (i = 0; i < sizeof names / sizeof *names; ++i) {
    void *function = library ? dlsym(library, names[i]) : NULL;
    if (!function) {
      fprintf(stderr, "no CUDA driver: %s\n", dlerror());
      exit(1);
    }
    ((void **)&cuda)[i] = function;
  }
  check(cuda.init(0), "cuInit");
  check(cuda.retain_context(&context, 0), "cuDevicePrimaryCtxRetain");
  check(cuda.set_context(context), "cuCtxSetCurrent");
}

static float uniform(void) { return (float)rand() / (float)RAND_MAX * 2 - 1; }

static CUdeviceptr upload(const float *data, size_t count) {
  CUdeviceptr pointer;
  check(cuda.allocate(&pointer, count * sizeof *data), "cuMemAlloc");
  check(cuda.upload(pointer, data, count * sizeof *data), "cuMemcpyHtoD");
  return pointer;
}

int main(void) {
  static float x[PIXELS * IN], weight[OUT * IN], bias[OUT], out[PIXELS * OUT];
  CUdeviceptr device_x, device_weight, device_bias, device_out;
  char image[32];
  double largest = 0;
  int p, o, c;

  for (p = 0; p < PIXELS * IN; ++p) x[p] = uniform();
  for (p = 0; p < OUT * IN; ++p) weight[p] = uniform();
  for (p = 0; p < OUT; ++p) bias[p] = uniform();
  for (p = 0; p < PIXELS * OUT; ++p) out[p] = NAN;

  open_cuda();
  device_x = upload(x, PIXELS * IN);
  device_weight = upload(weight, OUT * IN);
  device_bias = upload(bias, OUT);
  device_out = upload(out, PIXELS * OUT);

  check_effnet(effnet_device_image(0, image, sizeof image));
  printf("%zu images in the library; device 0 is served by %s\n", effnet_kernel_count(), image);

  effnet_epilogue relu6 = {.struct_size = sizeof relu6, .bias = (void *)device_bias, .activation = EFFNET_RELU6};
  effnet_pointwise conv = {.struct_size = sizeof conv,
                           .precision = EFFNET_FP32,
                           .layout = EFFNET_NHWC,
                           .x = (void *)device_x,
                           .weight = (void *)device_weight,
                           .out = (void *)device_out,
                           .batch = BATCH,
                           .height = HEIGHT,
                           .width = WIDTH,
                           .in_channels = IN,
                           .out_channels = OUT,
                           .epilogue = &relu6};
  check_effnet(effnet_launch_pointwise(&conv, 0, NULL));
  check(cuda.synchronize(), "cuCtxSynchronize");
  check(cuda.download(out, device_out, sizeof out), "cuMemcpyDtoH");

  for (p = 0; p < PIXELS; ++p)
    for (o = 0; o < OUT; ++o) {
      double expected = bias[o], error;
      for (c = 0; c < IN; ++c) expected += (double)x[p * IN + c] * weight[o * IN + c];
      expected = expected < 0 ? 0 : expected > 6 ? 6 : expected;
      error = fabs(out[p * OUT + o] - expected);
      if (error > largest || error != error) largest = error; /* a NaN stays */
    }
  printf("largest error %.2g\n", largest);

  cuda.release(device_x);
  cuda.release(device_weight);
  cuda.release(device_bias);
  cuda.release(device_out);
  return largest < 1e-5 ? 0 : 1;
}
