"""effnet_aot.graphed: what it refuses, and that replays equal the model."""

import pytest
import torch

import effnet_aot
from effnet_aot.cuda_graph import check_input
from effnet_aot.model import ModelNew, calibrate_batch_norm


@pytest.mark.parametrize(
    "model, example, error, message",
    [
        (torch.relu, [1.0], TypeError, "example must be a tensor, got list"),
        (torch.relu, torch.zeros(2, 3), ValueError, "example must be on a CUDA device, got cpu"),
    ],
)
def test_refuses(model, example, error, message):
    with pytest.raises(error, match=f"effnet_aot.graphed: {message}"):
        effnet_aot.graphed(model, example)


@pytest.mark.parametrize(
    "x, error, message",
    [
        (None, TypeError, "x must be a tensor, got NoneType"),
        (torch.zeros(3, 3), ValueError, r"x must have the captured shape \(2, 3\), got \(3, 3\)"),
        (torch.zeros(2, 3, dtype=torch.half), ValueError, "x must have the captured dtype torch.float32, got torch.float16"),
        (torch.zeros(2, 3, device="meta"), ValueError, "x must have the captured device cpu, got meta"),
    ],
)
def test_refuses_other_inputs(x, error, message):
    with pytest.raises(error, match=f"effnet_aot.graphed: {message}"):
        check_input(x, torch.zeros(2, 3))


def test_takes_any_strides():
    check_input(torch.zeros(3, 2).t(), torch.zeros(2, 3))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = ModelNew(10).cuda().half()
    images = torch.randn(3, 4, 3, 64, 64, device="cuda", dtype=torch.half)
    with torch.no_grad():
        return calibrate_batch_norm(model, images[0]).eval(), images


@pytest.mark.gpu
def test_refuses_training_mode(network):
    model, images = network
    with pytest.raises(ValueError, match="must be in eval mode"):
        effnet_aot.graphed(ModelNew(10).cuda().half(), images[0])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_equals_the_model(network, mode):
    model, images = network
    with mode():
        replayed = effnet_aot.graphed(model, images[0])
    with torch.no_grad():
        expected = [model(x) for x in images]
    results = [replayed(x) for x in images]  # all kept: a later call must not overwrite an earlier result
    for result, want in zip(results, expected, strict=True):
        assert torch.equal(result, want) and not result.requires_grad
    assert not torch.equal(results[0], results[1])


@pytest.mark.gpu
def test_any_strides_and_streams(network):
    model, images = network
    with torch.no_grad():
        expected = model(images[1])
    replayed = effnet_aot.graphed(model, images[0])
    torch.testing.assert_close(replayed(images[1].to(memory_format=torch.channels_last)), expected, rtol=0, atol=0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = replayed(images[1])
    stream.synchronize()
    assert torch.equal(result, expected)
    replayed.input.copy_(images[1])
    assert torch.equal(replayed.replay(), expected) and replayed.replay() is replayed.output


@pytest.mark.gpu
def test_keeps_the_captured_weights(network):
    model, images = network
    model = ModelNew.from_reference(model)
    replayed = effnet_aot.graphed(model, images[0])
    before = replayed(images[0])
    with torch.no_grad():
        model.conv1.weight.mul_(0.5)
        changed = model(images[0])
    assert torch.equal(replayed(images[0]), before) and not torch.equal(changed, before)
    assert torch.equal(effnet_aot.graphed(model, images[0])(images[0]), changed)
    del model
    torch.cuda.empty_cache()
    torch.empty(2**24, device="cuda").fill_(torch.nan)  # where freed weights would have been
    assert torch.equal(replayed(images[0]), before)


@pytest.mark.gpu
def test_plain_modules_follow_their_weights():
    layer = torch.nn.Linear(8, 4).cuda().eval()
    x = torch.randn(2, 8, device="cuda")
    replayed = effnet_aot.graphed(layer, x)
    with torch.no_grad():
        layer.weight.mul_(2)
        torch.testing.assert_close(replayed(x), layer(x))


@pytest.mark.gpu
def test_a_model_must_return_a_tensor():
    with pytest.raises(TypeError, match="must return a tensor, got tuple"):
        effnet_aot.graphed(lambda x: (x + 1, x), torch.zeros(2, device="cuda"))
