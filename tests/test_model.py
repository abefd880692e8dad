"""ModelNew and its blocks against plain torch.nn: in training, in eval with gradients, in inference with folded weights."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import random_unstructured
from torch.utils._python_dispatch import TorchDispatchMode

import effnet_aot.fold
from effnet_aot import FusedMBConvBlock, ModelNew
from effnet_aot.model import BLOCKS, batch_norms, calibrate_batch_norm, reference_block, reference_network

CLASSES = 101


def images(batch=2, height=48, width=48, device="cpu", dtype=torch.float32, seed=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@torch.no_grad()
def randomize_batch_norm(model, generator):
    """Weights and biases away from 1 and 0: a BN that is left out, or applied twice, shows."""
    for bn in batch_norms(model):
        bn.weight.copy_(torch.rand(bn.weight.shape, generator=generator) + 0.5)
        bn.bias.copy_(torch.randn(bn.bias.shape, generator=generator) * 0.5)
    return model


@functools.cache
def _network(unit_expand):
    torch.manual_seed(0)
    network = randomize_batch_norm(reference_network(CLASSES, unit_expand), torch.Generator().manual_seed(2))
    return calibrate_batch_norm(network, images(8, 64, 64, seed=3)).eval()


def network(device="cpu", dtype=torch.float32, unit_expand=False):
    """The plain network in eval mode, with batch norms through which the signal passes."""
    return copy.deepcopy(_network(unit_expand)).to(device, dtype)


def pair(device="cpu", dtype=torch.float32, unit_expand=False):
    reference = network(device, dtype, unit_expand)
    return ModelNew.from_reference(reference), reference


def block_pair(index, device="cpu", dtype=torch.float32, unit_expand=False):
    """A block out of the calibrated network, and an input as the network would give it."""
    model, reference = pair(device, dtype, unit_expand)
    x = torch.randn(2, BLOCKS[index][0], 17, 14, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    return model.blocks[index], getattr(reference, f"mbconv{index + 1}"), x


def error(out, exact):
    return ((out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


def assert_no_worse(out, eager, exact):
    """The error against float64 is at most 1.25 times plain PyTorch's in the same dtype."""
    assert out.dtype == eager.dtype and out.shape == eager.shape
    assert error(out, exact) <= 1.25 * error(eager, exact) + torch.finfo(torch.float64).eps * 100


def assert_equal_up_to_rounding(out, want):
    assert out.shape == want.shape
    assert error(out, want.double()) <= {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.1}[out.dtype]


# ---- the seed's errors: what is right, and that the test would notice ----


def seed_pointwise(x, weight):
    """The seed's reading of an NCHW tensor as (N * H * W, C)."""
    n, c, h, w = x.shape
    return (x.reshape(-1, c) @ weight.flatten(1).T).reshape(n, -1, h, w)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channels_and_pixels_stay_in_place(device, memory_format):
    block, reference, x = block_pair(1, device)
    x = x.to(memory_format=memory_format)
    with torch.no_grad():
        out, want = block(x), reference(x)
        assert_equal_up_to_rounding(out, want)
        assert out.is_contiguous(memory_format=memory_format)
        weight = block.expand_conv.weight
        assert error(seed_pointwise(x.contiguous(), weight), F.conv2d(x, weight).double()) > 0.5

        model, reference = pair(device)
        x = images(device=device)
        assert_equal_up_to_rounding(model(x.to(memory_format=memory_format)), reference(x))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("unit_expand", [False, True])
def test_training_is_plain_torch(device, unit_expand, momentum):
    model, reference = pair(device, unit_expand=unit_expand)
    for bn in batch_norms(model) + batch_norms(reference):
        bn.momentum = momentum
    model.train(), reference.train()
    for step in range(2):
        ours, theirs = images(device=device, seed=step).requires_grad_(), images(device=device, seed=step).requires_grad_()
        out, want = model(ours), reference(theirs)
        torch.testing.assert_close(out, want)
        out.square().sum().backward(), want.square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)

    expected = ModelNew(CLASSES, unit_expand=unit_expand).to(device)
    expected.load_state_dict({name: parameter.grad for name, parameter in reference.named_parameters()}, strict=False)
    for (name, parameter), grad in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(parameter.grad, grad.detach(), rtol=1e-3, atol=1e-4 * grad.abs().max().item(), msg=lambda m: f"{name}: {m}")
    for ours, theirs in zip(batch_norms(model), batch_norms(reference), strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        assert ours.num_batches_tracked == 3  # calibration, and two steps


def test_training_mixes_no_running_statistics():
    block, reference, x = block_pair(1)
    block.train(), reference.train()
    bn = copy.deepcopy(block.expand_bn).eval()  # the seed's expand layer in training
    mixed = F.relu6(bn(block.expand_conv(x)))
    mixed = block.project_bn(block.project_conv(F.relu6(block.depthwise_bn(block.depthwise_conv(mixed)))))
    want = reference(x)
    torch.testing.assert_close(block(x), want)
    assert error(mixed, want.double()) > 0.01


@pytest.mark.parametrize("unit_expand", [False, True])
def test_same_seed_same_network(unit_expand):
    torch.manual_seed(0)
    model, after = ModelNew(CLASSES, unit_expand=unit_expand), torch.rand(1)
    torch.manual_seed(0)
    reference, after_reference = reference_network(CLASSES, unit_expand), torch.rand(1)
    assert after == after_reference
    same = ModelNew.from_reference(reference).state_dict()
    assert model.state_dict().keys() == same.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())
    # The seed's randn has a deviation of 1.
    assert model.fc_weight.std() < 0.05 and model.fc_bias.std() < 0.05


def test_expand_at_ratio_1_is_optional():
    assert ModelNew().mbconv1.expand_conv is None and ModelNew().mbconv1.expand_bn is None
    assert ModelNew(unit_expand=True).mbconv1.expand_conv.weight.shape == (32, 32, 1, 1)
    parameters = [sum(p.numel() for p in ModelNew(unit_expand=e).parameters()) for e in (False, True)]
    assert parameters[1] - parameters[0] == 32 * 32 + 2 * 32
    model, reference = pair(unit_expand=True)
    x = images()
    with torch.no_grad():
        assert_equal_up_to_rounding(model(x), reference(x))
        assert error(pair()[0](x), reference(x).double()) > 0.1  # the network without it is another one


def test_comparisons_see_a_signal():
    """A network that returned the linear layer's bias would pass for a freshly initialised one, but not for ours."""
    x = images()
    with torch.no_grad():
        torch.manual_seed(0)
        fresh = reference_network(CLASSES).eval()
        assert (fresh(x) - fresh.fc.bias).abs().max() < 1e-5
        reference = network()
        assert error(reference.fc.bias.expand(len(x), -1), reference(x).double()) > 0.5
        logits = reference(x)
        assert (logits - logits.mean(0)).std() > 0.05 * logits.std()  # and they depend on the image


def test_padding_is_zero_after_the_activation(device):
    block, reference, x = block_pair(1, device)
    with torch.no_grad():
        block.expand_bn.bias.fill_(8), reference[1].bias.fill_(8)
        want = reference(x)
        assert_equal_up_to_rounding(block(x), want)
        # Padding the input instead makes the border relu6(bias) = 6.
        hidden = F.relu6(reference[1](reference[0](F.pad(x, (1, 1, 1, 1)))))
        wrong = reference[6:](reference[4:6](F.conv2d(hidden, reference[3].weight, stride=2, groups=hidden.shape[1])))
        assert wrong.shape == want.shape and error(wrong, want.double()) > 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_propagate(device, value):
    block, reference, x = block_pair(1, device)
    x[0, 3, 5, 6] = value
    with torch.no_grad():
        out, want = block(x), reference(x)
        assert torch.equal(out.isnan(), want.isnan())
        torch.testing.assert_close(out, want, equal_nan=True, rtol=1e-4, atol=1e-4)
        model, reference = pair(device)
        images_ = images(device=device)
        images_[1, 0, 9, 9] = value
        assert torch.equal(model(images_).isnan(), reference(images_).isnan())
    if value != value:
        assert want.isnan().any()
        assert not torch.fmin(torch.fmax(x, x.new_zeros(())), x.new_full((), 6.0)).isnan().any()  # the seed's relu6


# ---- accuracy ----


@pytest.mark.parametrize("index, unit_expand", [(0, True), *((index, False) for index in range(len(BLOCKS)))])
def test_block(device, dtype, index, unit_expand):
    block, reference, x = block_pair(index, device, dtype, unit_expand)
    with torch.no_grad():
        exact = copy.deepcopy(reference).double()(x.double())
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = x.to(memory_format=memory_format)  # eager's convolutions depend on it
            eager = reference(x)
            assert_no_worse(block(x), eager, exact)
            assert_no_worse(block.forward_batch_norm(x), eager, exact)


def test_network(device, dtype):
    model, reference = pair(device, dtype)
    x = images(4, device=device, dtype=dtype)
    with torch.no_grad():
        exact = copy.deepcopy(reference).double()(x.double())
        eager = reference(x)
        assert_no_worse(model(x), eager, exact)
        assert_no_worse(model.forward_batch_norm(x), eager, exact)


@pytest.mark.parametrize("shape", [(0, 64, 64), (1, 32, 32), (2, 65, 97), (3, 33, 1), (1, 1, 1), (1, 130, 240)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sizes(device, shape, memory_format):
    model, reference = pair(device)
    x = images(*shape, device=device).to(memory_format=memory_format)
    with torch.no_grad():
        want = reference(x)
        assert_equal_up_to_rounding(model(x), want) if len(x) else None
        assert model(x).shape == want.shape == (len(x), CLASSES)
    model(x).sum().backward()
    assert model.conv1.weight.grad.isfinite().all()


def test_mixed_precision(device):
    """float16 convolutions with float32 batch norms."""
    reference = network(device, torch.float16)
    for bn in batch_norms(reference):
        bn.float()
    model = ModelNew.from_reference(reference)
    assert model.conv1.weight.dtype == torch.float16 and model.bn1.weight.dtype == torch.float32
    x = images(device=device, dtype=torch.float16)
    with torch.no_grad():
        assert_no_worse(model(x), reference(x), copy.deepcopy(reference).double()(x.double()))
    assert_no_worse(model(x).detach(), reference(x).detach(), copy.deepcopy(reference).double()(x.double()).detach())


@pytest.mark.parametrize("autocast_dtype", [torch.float16, torch.bfloat16])
def test_autocast(device, autocast_dtype):
    model, reference = pair(device)
    x = images(8, device=device)
    exact = network(device, torch.float64)(x.double()).detach()
    with torch.no_grad():
        before = model(x)
        with torch.autocast(device, autocast_dtype):
            assert_no_worse(model(x), reference(x), exact)
        assert torch.equal(model(x), before)
    with torch.autocast(device, autocast_dtype):
        assert_no_worse(model(x).detach(), reference(x).detach(), exact)
        model(x).sum().backward()
    assert model.conv1.weight.grad.dtype == torch.float32


# ---- gradients in eval mode ----


def test_eval_gradients(device):
    dtype = torch.float64 if device == "cpu" else torch.float32
    model, reference = pair(device, dtype)
    ours, theirs = (images(1, 33, 40, device, dtype).requires_grad_() for _ in range(2))
    model(ours).square().sum().backward(), reference(theirs).square().sum().backward()
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)
    expected = ModelNew(CLASSES).to(device, dtype)
    expected.load_state_dict({name: parameter.grad for name, parameter in reference.named_parameters()}, strict=False)
    for parameter, grad in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(parameter.grad / grad.norm(), (grad / grad.norm()).detach(), **tolerance)


def test_gradient_of_the_image_alone():
    model, reference = pair(dtype=torch.float64)
    model.requires_grad_(False)
    x = images(1, 32, 32, dtype=torch.float64)
    assert not model(x).requires_grad
    x.requires_grad_()
    (ours,) = torch.autograd.grad(model(x).sum(), x)
    (theirs,) = torch.autograd.grad(reference(x).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_frozen_batch_norm_in_training():
    model, reference = pair()
    model.train(), reference.train()
    for bn in batch_norms(model) + batch_norms(reference):
        bn.eval()
    x = images()
    torch.testing.assert_close(model(x), reference(x))
    model.eval(), model.bn1.train(), reference.eval(), reference.bn1.train()
    with torch.no_grad():  # one layer adapts to the batch
        torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.bn1.state_dict(), reference.bn1.state_dict())


# ---- folded weights are kept, and never stale ----


@pytest.fixture(params=["looks first", "launches first"])
def order(request, monkeypatch):
    """The first is what a CPU does, the second what a GPU does; here either does both."""
    monkeypatch.setattr(effnet_aot.fold, "EARLY", {"cpu", "cuda"} if request.param == "launches first" else set())
    return request.param


def replace(module, name, tensor):
    setattr(module, name, nn.Parameter(tensor.clone()))


@torch.no_grad()
def optimizer_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    torch.optim.SGD(model.parameters(), lr=1).step()


def train_and_back(model):
    model.train()
    with torch.no_grad():
        model(images(seed=9).to(model.conv1.weight))
    model.eval()


def load_other_weights(model, **options):
    torch.manual_seed(7)
    other = calibrate_batch_norm(reference_network(CLASSES), images(seed=8))
    model.load_state_dict(other.to(model.conv1.weight.device).state_dict(), **options)


def change_under_inference_mode(model):
    with torch.inference_mode():
        model.mbconv5.expand_conv.weight.mul_(1.5)


def other_stem(model):
    stem = nn.Conv2d(3, 32, 3, stride=1, padding=1, bias=False)
    model.conv1 = stem.to(model.conv1.weight)


def prune(model):
    random_unstructured(model.mbconv3.project_conv, "weight", 0.5)


def parametrize(model):
    weight_norm(model.conv2)
    with torch.no_grad():
        model.conv2.parametrizations.weight.original0.mul_(2)


CHANGES = {
    "convolution in place": lambda m: m.mbconv2.expand_conv.weight.detach().mul_(2),
    "batch norm in place": lambda m: m.mbconv7.project_bn.bias.detach().add_(1),
    "running statistics in place": lambda m: m.bn1.running_var.mul_(3),
    "linear layer in place": lambda m: m.fc_bias.detach().add_(1),
    "under inference_mode": change_under_inference_mode,
    "optimizer step": optimizer_step,
    "parameter replaced": lambda m: replace(m.mbconv4.depthwise_conv, "weight", m.mbconv4.depthwise_conv.weight.detach() * 2),
    "linear layer replaced": lambda m: replace(m, "fc_weight", m.fc_weight.detach() * 2),
    "buffer replaced": lambda m: setattr(m.bn2, "running_mean", m.bn2.running_mean + 1),
    "data replaced": lambda m: setattr(m.conv2.weight, "data", m.conv2.weight.data * 2),
    "written through data, train and back": lambda m: (m.conv2.weight.data.mul_(2), m.train(), m.eval()),
    "load_state_dict": load_other_weights,
    "load_state_dict, assign": functools.partial(load_other_weights, assign=True),
    "train and back": train_and_back,
    "epsilon": lambda m: setattr(m.mbconv2.depthwise_bn, "eps", 1.0),
    "layer replaced": other_stem,
    "block replaced": lambda m: setattr(m, "mbconv1", FusedMBConvBlock(32, 16, 1, 1).to(m.fc_bias).eval()),
    "pruned": prune,
    "parametrized": parametrize,
}


def test_a_parameter_of_one_element_is_watched(order):
    """An equal one in its place compares as equal, and is another one all the same."""
    block = FusedMBConvBlock(1, 1, 1, 1).eval().requires_grad_(False)
    x = torch.rand(2, 1, 5, 5)
    before = block(x)
    block.project_bn.bias = nn.Parameter(block.project_bn.bias.clone(), requires_grad=False)
    torch.testing.assert_close(block(x), before)
    block.project_bn.bias.add_(1)
    torch.testing.assert_close(block(x), before + 1)


@pytest.mark.parametrize("change", CHANGES)
def test_folded_weights_follow(device, order, change):
    model, _ = pair(device)
    x = images(device=device)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before)
    CHANGES[change](model)
    with torch.no_grad():
        want = model.forward_modules(x)  # no folding, no cache
        out = model(x)
        assert error(out, want.double()) < 1e-5
        assert error(before, want.double()) > 1e-3
        assert torch.equal(model(x), out)


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)])
def test_folded_weights_follow_the_dtype(device, order, convert):
    if device == "cuda" and convert is nn.Module.double:
        pytest.skip("float64 is for the CPU")
    model, _ = pair(device)
    x = images(device=device)
    with torch.no_grad():
        before = model(x)
        convert(model)
        want = model.forward_batch_norm(x.to(model.fc_bias))
        assert model(x.to(model.fc_bias)).dtype == model.fc_bias.dtype
        assert_equal_up_to_rounding(model(x.to(model.fc_bias)), want)
        assert_equal_up_to_rounding(model.float()(x), before) if convert is nn.Module.double else None
        convert(model.mbconv2)
        for bn in batch_norms(model):
            bn.float()
        model.float()
        assert_equal_up_to_rounding(model(x), model.forward_batch_norm(x))


def test_a_layer_alone_converted(order):
    """Module.half() on a layer replaces its data behind the network's back, and neither object nor version changes."""
    model, _ = pair(dtype=torch.float16)
    x = images(dtype=torch.float16)
    with torch.no_grad():
        model(x)
        for bn in batch_norms(model):
            bn.float()
            bn.bias.data = bn.bias.data + 0.3
        assert_equal_up_to_rounding(model(x), model.forward_batch_norm(x))


def test_what_is_launched(order, monkeypatch):
    """First, where that is the order, what the last call launched; again, where it was wrong."""
    model, _ = pair()
    launched, launch = [], ModelNew.forward_folded
    monkeypatch.setattr(ModelNew, "forward_folded", lambda self, x, folded: launched.append(folded) or launch(self, x, folded))

    def call(x):
        launched.clear()
        return model(x), len(launched)

    in_vain, x = int(order == "launches first"), images()
    with torch.no_grad():
        before, once = call(x)
        assert (once, call(x)[1]) == (1, 1)
        model.fc_bias += 1
        after, launches = call(x)
        assert launches == 1 + in_vain and call(x)[1] == 1
        torch.testing.assert_close(after, before + 1)
        with torch.autocast("cpu", torch.bfloat16):  # other weights, so none to go by
            assert call(x)[1] == call(x)[1] == 1
        hook = model.mbconv2.register_forward_hook(lambda *_: None)
        with torch.autocast("cpu", torch.bfloat16):
            assert call(x)[1] == in_vain
        assert call(x)[1] == 0
        hook.remove()
        assert call(x)[1] == call(x)[1] == 1
        model.conv1 = nn.Conv2d(4, 32, 3, 2, 1, bias=False).requires_grad_(False)  # its images do not suit the weights of the last call
        four = images().repeat(1, 2, 1, 1)[:, :4]
        assert call(four)[0].shape == before.shape
        with pytest.raises(RuntimeError, match="C_in = 3"):
            model(x)
    assert call(four)[1] == 0  # with gradients
    model.requires_grad_(False)
    assert call(four)[1] == 1


def test_weights_that_another_thread_folds_meanwhile():
    model, x = pair()[0], images()
    with torch.no_grad():
        model(x)
    cache, kept = model._cache, model._cache._entry
    assert cache.is_true(kept, kept.watch)

    def remember():  # what the other thread does while this one compares
        cache.forget()
        return True

    kept.watch.same_state = remember
    assert not cache.is_true(kept, kept.watch)


def test_folding_happens_once(order, monkeypatch):
    from effnet_aot import model as module

    folds = []
    fold = module.fold_batch_norm
    monkeypatch.setattr(module, "fold_batch_norm", lambda *args: folds.append(1) or fold(*args))
    model, _ = pair()
    with torch.no_grad():
        for seed in range(3):
            model(images(seed=seed))
        with torch.inference_mode():
            model(images(2, 32, 32))
        model.eval()(images())
        layers = len(batch_norms(model))
        assert len(folds) == layers
        model.train().eval()(images())
        assert len(folds) == 2 * layers
    model(images())
    assert len(folds) == 2 * layers  # with gradients nothing is folded


@pytest.mark.undisturbed  # under compute-sanitizer the Python frames of calls stay alive, and with them what they refer to; why is not known
def test_the_library_holds_the_folded_weights(device, order):
    """For as long as they are true; who looks at the ops sees one that names them."""
    model, x = pair(device)[0], images(device=device)
    seen = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, arguments=(), kwargs=None):
            seen.append(op.name())
            return op(*arguments, **(kwargs or {}))

    with torch.inference_mode():
        with Ops():
            out = model(x)
            assert [name for name in seen if "network" in name] == ["effnet::network"]
            seen.clear()
        assert torch.equal(model(x), out) and model._cache._entry.folded._number is not None
        folded = weakref.ref(model._cache._entry.folded)
        number = folded()._number
        with Ops():
            again = model(x)
        assert seen == ["effnet::network"] and torch.equal(again, out)
        assert torch.equal(torch.ops.effnet._held_network(x, number), out)
    with torch.no_grad():
        model.fc_bias += 1
        changed = model(x)
    torch.testing.assert_close(changed, out + 1)
    assert model._cache._entry.folded is not folded()
    gc.collect()
    assert folded() is None
    with pytest.raises(RuntimeError, match="_release_network"):
        torch.ops.effnet._held_network(x, number)


def test_tensors_without_data():
    with FakeTensorMode(), torch.no_grad():
        model = ModelNew(CLASSES).eval()
        for _ in range(3):
            assert model(torch.empty(2, 3, 48, 48)).shape == (2, CLASSES)


def test_inference_tensors_are_folded_at_every_call():
    x = images()
    with pytest.warns(UserWarning, match="inference_mode"), torch.inference_mode():
        model = ModelNew.from_reference(network())
        before = model(x)
        model.conv2.weight.mul_(2)
        out = model(x)
        assert error(before, out.double()) > 1e-2
        assert_equal_up_to_rounding(out, model.forward_batch_norm(x))
    with pytest.warns(UserWarning, match="inference_mode"), torch.no_grad():
        assert torch.equal(model(x), out)


def test_folding_under_inference_mode_serves_outside():
    model, _ = pair()
    x = images()
    with torch.inference_mode():
        out = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), out)
    folded = model._cache._entry.folded
    assert not folded.weights[0].is_inference()


def test_functional_call_uses_its_parameters(order):
    model, reference = pair()
    x = images()
    with torch.no_grad():
        before = model(x)
        doubled = {name: parameter * 2 for name, parameter in model.named_parameters() if name.startswith("fc")}
        torch.testing.assert_close(torch.func.functional_call(model, doubled, (x,)), before * 2)
        assert torch.equal(model(x), before)


def test_hooks_fire(order):
    model, reference = pair()
    x = images()
    seen, expected = [], []
    model.mbconv3.register_forward_hook(lambda module, args, out: seen.append(out))
    model.mbconv4.project_conv.register_forward_hook(lambda module, args, out: seen.append(out))
    reference.mbconv3.register_forward_hook(lambda module, args, out: expected.append(out))
    reference.mbconv4[6].register_forward_hook(lambda module, args, out: expected.append(out))
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)
    assert len(seen) == len(expected) == 2
    for ours, theirs in zip(seen, expected):
        assert_equal_up_to_rounding(ours, theirs)


# ---- copies, files, the other layout ----


def test_copies_and_pickles():
    model, _ = pair()
    size = len(pickle.dumps(model))
    x = images()
    with torch.no_grad():
        want = model(x)
        assert len(pickle.dumps(model)) == size  # no folded weights inside
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model.mbconv2)):
            if isinstance(twin, ModelNew):
                assert torch.equal(twin(x), want)
                twin.conv1.weight.zero_()
                assert not torch.equal(twin(x), want)
        assert torch.equal(model(x), want)


def test_state_dict():
    model, reference = pair()
    with torch.no_grad():
        model(images())
    state = model.state_dict()
    assert len(state) == len(reference.state_dict())
    block = ["expand_conv", "expand_bn", "depthwise_conv", "depthwise_bn", "project_conv", "project_bn"]
    layers = ["conv1", "bn1", "conv2", "bn2", *(f"mbconv1.{name}" for name in block[2:]), *(f"mbconv{i}.{name}" for i in range(2, 8) for name in block)]
    assert {name.rpartition(".")[0] for name in state} == {"", *layers}
    assert {"fc_weight", "fc_bias"} <= state.keys()
    other = ModelNew(CLASSES).eval()
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))


@pytest.mark.parametrize("unit_expand", [False, True])
def test_plain_layout_loads(unit_expand):
    reference = network(unit_expand=unit_expand)
    model = ModelNew(CLASSES, unit_expand=unit_expand).eval()
    parent = nn.ModuleDict({"net": model})
    state = reference.state_dict()
    parent.load_state_dict({f"net.{name}": tensor for name, tensor in state.items()})
    assert state.keys() == reference.state_dict().keys()  # the caller's dict is left alone
    with torch.no_grad():
        assert_equal_up_to_rounding(model(images()), reference(images()))
    with pytest.raises(RuntimeError, match="mbconv1.expand_conv.weight"):
        ModelNew(CLASSES, unit_expand=not unit_expand).load_state_dict(state)


def test_plain_layout_is_the_benchmarks():
    names = [name for name in reference_network(unit_expand=True).state_dict() if name.endswith("weight")]
    blocks = [f"mbconv{i}.{j}.weight" for i in range(1, 8) for j in (0, 1, 3, 4, 6, 7)]
    assert names == ["conv1.weight", "bn1.weight", *blocks, "conv2.weight", "bn2.weight", "fc.weight"]


def test_from_reference():
    reference = network(dtype=torch.float16, unit_expand=True).train()
    reference.bn1.float()
    reference.bn1.eps, reference.bn2.momentum = 1e-3, None
    generator = torch.get_rng_state()
    model = ModelNew.from_reference(reference)
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training and model.mbconv1.expand_conv is not None and model.fc_weight.shape == (CLASSES, 1280)
    assert model.bn1.eps == 1e-3 and model.bn2.momentum is None and model.bn2.momentum is None
    assert model.bn1.weight.dtype == torch.float32 and model.bn2.weight.dtype == torch.float16
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert reference.conv1.weight.any()
    again = ModelNew.from_reference(model)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    with pytest.raises(ValueError, match="fc.weight or fc_weight is needed, got Linear"):
        ModelNew.from_reference(nn.Linear(2, 2))


def test_block_is_usable_alone():
    torch.manual_seed(0)
    block, reference = FusedMBConvBlock(8, 12, 2, 4).eval(), reference_block(8, 12, 2, 4).eval()
    block.load_state_dict(reference.state_dict())
    x = torch.randn(2, 8, 9, 11)
    with torch.no_grad():
        assert_equal_up_to_rounding(block(x), reference(x))
    torch.testing.assert_close(block.train()(x), reference.train()(x))


# ---- torch.compile, torch.export ----


def test_compile(device):
    torch.compiler.reset()
    model, reference = pair(device)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 5):
            x = images(batch, device=device)
            torch._dynamo.mark_dynamic(x, 0)
            assert_equal_up_to_rounding(compiled(x), reference(x))
        model.conv2.weight.mul_(2)
        assert_equal_up_to_rounding(compiled(x), model.forward_modules(x))


def test_compiled_gradients():
    torch.compiler.reset()
    model, reference = pair()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images()
    compiled(x).sum().backward(), reference(x).sum().backward()
    assert_equal_up_to_rounding(model.conv1.weight.grad, reference.conv1.weight.grad)


@pytest.mark.parametrize("strict", [False, True])
def test_export(device, strict):
    torch.compiler.reset()
    model, reference = pair(device)
    batch = torch.export.Dim("batch", max=1024)
    with torch.no_grad():
        program = torch.export.export(model, (images(device=device),), dynamic_shapes=({0: batch},), strict=strict)
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert {target for target in targets if target.startswith("effnet.")} == {
            "effnet.conv_bn_relu.default", "effnet.depthwise_bn_relu6.default", "effnet.pointwise_bn_relu6.default",
            "effnet.pointwise_bn.default", "effnet.pointwise_bn_relu_pool.default", "effnet.linear_bias.default",
        }  # fmt: skip
        assert not any("conv2d" in target or "batch_norm" in target for target in targets)
        for size in (1, 7):
            x = images(size, device=device)
            assert_equal_up_to_rounding(program.module()(x), reference(x))


# ---- CUDA ----


def cuda_kernels(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.gpu
@pytest.mark.undisturbed
@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_inference_runs_this_packages_kernels_only(precision, memory_format):
    model, reference = pair("cuda", precision)
    x = images(10, 240, 240, "cuda", precision).to(memory_format=memory_format)
    with torch.no_grad():
        model(x)
        names = cuda_kernels(lambda: model(x))
        assert len(names) >= 10 and all(name.startswith("effnet_") for name in names), names
        assert not all(name.startswith("effnet_") for name in cuda_kernels(lambda: reference(x)))  # the profiler sees them


@pytest.mark.gpu
def test_cuda_graph_as_the_first_call():
    model, reference = pair("cuda")
    x = images(device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            out = model(x)
        assert model._cache._entry is None  # what a capture folds does not exist before the replay
        graph.replay()
        assert_equal_up_to_rounding(out, reference(x))
        assert_equal_up_to_rounding(model(x), reference(x))
        x.copy_(images(seed=5))
        graph.replay()
        assert_equal_up_to_rounding(out, reference(x))


@pytest.mark.gpu
def test_cuda_graph_keeps_its_folded_weights():
    model, reference = pair("cuda")
    x = images(device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        model(x)
        with torch.cuda.graph(graph):
            out = model(x)
        want = reference(x)
        model.conv1.weight.zero_()
        model(x)
        trash = [torch.full((1 << k,), float("nan"), device="cuda") for k in range(4, 22) for _ in range(8)]
        graph.replay()
        assert_equal_up_to_rounding(out, want)
        del trash


@pytest.mark.gpu
def test_streams_share_the_folded_weights():
    model, reference = pair("cuda")
    x = images(device="cuda")
    with torch.no_grad():
        want = reference(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            model(x)
        assert_equal_up_to_rounding(model(x), want)


@pytest.mark.gpu
def test_moving_between_devices():
    model, reference = pair()
    x = images()
    with torch.no_grad():
        want = reference(x)
        for device in ("cpu", "cuda", "cpu", "cuda"):
            assert_equal_up_to_rounding(model.to(device)(x.to(device)).cpu(), want)
