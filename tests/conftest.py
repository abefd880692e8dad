"""--require-gpu, the `device` and `dtype` that tests run through, and TF32 off."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail, instead of skipping the gpu tests, where there is no GPU")


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group(name): run by one worker")  # known to pytest-xdist, which is optional
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # pytest-xdist's workers share the cores
    if config.getoption("--require-gpu") and not torch.cuda.is_available():
        pytest.exit("--require-gpu: torch sees no GPU here", returncode=1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


DTYPES = {"cpu": [torch.float32, torch.float16, torch.bfloat16, torch.float64], "cuda": [torch.float32, torch.float16, torch.bfloat16]}


def pytest_generate_tests(metafunc):
    """`device` runs a test on the CPU and, marked gpu, on CUDA; `dtype` goes through what the ops take there."""
    marks = {"cpu": (), "cuda": pytest.mark.gpu}
    if "dtype" in metafunc.fixturenames:
        pairs = [(device, dtype) for device in DTYPES for dtype in DTYPES[device]]
        metafunc.parametrize(
            "device, dtype", [pytest.param(d, t, marks=marks[d], id=f"{d}-{str(t).removeprefix('torch.')}") for d, t in pairs]
        )
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [pytest.param(d, marks=marks[d]) for d in DTYPES])


@pytest.fixture(autouse=True)
def true_float32():
    """TF32 off: the references are float32 or float64. Tests of TF32 switch it on themselves."""
    conv, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = conv, matmul


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    """A CUDA driver without a GPU, for child processes."""
    from stub_cuda import StubDriver

    return StubDriver(tmp_path_factory.mktemp("stub"))
