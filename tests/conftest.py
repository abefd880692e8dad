"""Options, the `device` and `dtype` that tests run through, and TF32 off."""

import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail, instead of skipping the gpu tests, where there is no GPU")
    parser.addoption("--report", metavar="FILE", help="write what ran on which machine, and with what result, as JSON")
    parser.addoption("--share", metavar="K/N", help="of the tests only those number K, K + N, K + 2N, ...")
    parser.addoption("--stress-calls", type=int, default=100, metavar="N", help="calls on each of 8 streams of each of 8 threads (default: %(default)s)")
    parser.addoption("--fuzz-examples", type=int, default=40, metavar="N", help="hypothesis's examples of each op on the CPU (default: %(default)s)")
    parser.addoption("--fuzz-cases", type=int, default=500, metavar="N", help="random calls on the GPU (default: %(default)s)")
    parser.addoption("--fuzz-seed", type=int, default=0, metavar="SEED", help="of the first of them; each further one has the next (default: %(default)s)")


def spread_over_gpus(number):
    """Of processes side by side each has another GPU as its first one. Comes before CUDA is used."""
    count = torch.cuda.device_count()
    if count > 1:
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu] or list(map(str, range(count)))
        first = number % len(gpus)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:] + gpus[:first])


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group(name): run by one worker")  # known to pytest-xdist, which is optional
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # pytest-xdist's workers share the cores
        spread_over_gpus(int(config.workerinput["workerid"].removeprefix("gw")))
    elif config.getoption("--share"):
        spread_over_gpus(int(config.getoption("--share").split("/")[0]))
    if not hasattr(config, "workerinput") and config.getoption("--report"):
        from session_report import SessionReport

        config.pluginmanager.register(SessionReport(config.getoption("--report")), "session_report")
    if config.getoption("--require-gpu") and not torch.cuda.is_available():
        pytest.exit("--require-gpu: torch sees no GPU here", returncode=1)


@pytest.hookimpl(trylast=True)  # after those that -m and -k leave out
def pytest_collection_modifyitems(config, items):
    if config.getoption("--share"):
        k, n = map(int, config.getoption("--share").split("/"))
        items[:] = items[k::n]
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
