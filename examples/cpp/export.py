"""Exports ModelNew through AOTInductor, for aoti.cpp:  python export.py FOLDER [cpu|cuda]

Writes FOLDER/model.pt2, and FOLDER/example.pt with an input and the output that Python computes."""

import sys
from pathlib import Path

import torch

import effnet_aot
from effnet_aot.model import calibrate_batch_norm

folder = Path(sys.argv[1])
device = sys.argv[2] if len(sys.argv) > 2 else "cuda" if torch.cuda.is_available() else "cpu"

torch.manual_seed(0)
# TF32 would round the folded and the unfolded weights differently. A program that runs the package has switches of its own.
torch.backends.cudnn.allow_tf32 = False
x = torch.rand(4, 3, 64, 64, device=device)
model = calibrate_batch_norm(effnet_aot.ModelNew(num_classes=10).to(device), x).eval()

with torch.no_grad():
    program = torch.export.export(model, (x,))
package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))

y = torch._inductor.aoti_load_package(package)(x)
with torch.inference_mode():  # ModelNew itself folds the batch norms, so that it rounds differently
    torch.testing.assert_close(y, model(x), atol=1e-4, rtol=0)
torch.save([x, y], folder / "example.pt")
