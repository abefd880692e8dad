"""A model's forward pass as a CUDA graph: one launch a call, whatever the host does meanwhile."""

import torch


def graphed(model, example):
    """A callable that computes `model(x)` by replaying a CUDA graph, for inputs like `example`.

    model:    anything callable with one tensor, in eval mode where it has one: a graph cannot count batches.
    example:  a tensor on the GPU; inputs must have its shape, dtype and device, and may have any strides.

    The callable copies x into the graph's own input, replays, and returns a copy of the result that is the caller's to
    keep. Without the two copies: fill `.input` in place, call `.replay()`, and read the tensor that it returns, which the
    next replay overwrites. No gradients. Calls may come from any stream, but not from two at a time. The capture
    allocates outputs and workspaces in memory that is the graph's for as long as the callable lives.

    The graph holds addresses, and the callable holds the model. What a forward pass reads where it lies may change in place
    and the replays follow, as with plain torch.nn. ModelNew and FusedMBConvBlock read folded copies of their weights: the
    graph goes on with the weights of the moment of capture, whatever becomes of the model's. After a change of weights, of
    autocast or of the TF32 switches, call graphed() again.

    Raises TypeError or ValueError, naming what was expected and what came, from here and from the callable.
    """
    return Graphed(model, example)


class Graphed:
    def __init__(self, model, example):
        if not isinstance(example, torch.Tensor):
            raise TypeError(f"effnet_aot.graphed: example must be a tensor, got {type(example).__name__}")
        if not example.is_cuda:
            raise ValueError(f"effnet_aot.graphed: example must be on a CUDA device, got {example.device}")
        if getattr(model, "training", False):
            raise ValueError("effnet_aot.graphed: the model must be in eval mode, got training mode")
        self._device = example.device
        self._model = model  # owns what the graph reads
        # Ordinary tensors, even under inference_mode: those made there could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self._device):
            self.input = torch.empty_like(example).copy_(example)
            self._graph = torch.cuda.CUDAGraph()
            # Folding, loading and tuning happen before the capture, which would record or refuse them.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    model(self.input)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph):
                self.output = model(self.input)
        if not isinstance(self.output, torch.Tensor):
            raise TypeError(f"effnet_aot.graphed: the model must return a tensor, got {type(self.output).__name__}")

    def __call__(self, x):
        check_input(x, self.input)
        with torch.no_grad(), torch.cuda.device(self._device):
            self.input.copy_(x)
            self._graph.replay()
            return self.output.clone()

    def replay(self):
        """Computes from what `.input` holds; returns `.output`, which the next replay overwrites."""
        self._graph.replay()
        return self.output


def check_input(x, expected):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"effnet_aot.graphed: x must be a tensor, got {type(x).__name__}")
    for name in ("shape", "dtype", "device"):
        want, got = getattr(expected, name), getattr(x, name)
        if want != got:
            want, got = (tuple(value) if name == "shape" else value for value in (want, got))
            raise ValueError(f"effnet_aot.graphed: x must have the captured {name} {want}, got {got}")
