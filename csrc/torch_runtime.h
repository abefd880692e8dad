// What the ops ask of the torch that they run in and that its stable ABI does not link: found by name at run time.
#pragma once

namespace effnet {

// torch's current CUDA stream of a device (a CUstream).
void* current_stream(int device);

// torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32 (and their newer fp32_precision forms). Where
// a torch does not tell, its defaults: TF32 for convolutions, not for matrix products.
bool tf32_for_convolutions();
bool tf32_for_matmul();

}  // namespace effnet
