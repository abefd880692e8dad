"""GPU tests under compute-sanitizer, in processes side by side, each with a share of the tests:

    python tools/gpu_sanitize.py memcheck --cached --results results
    python tools/gpu_sanitize.py memcheck racecheck initcheck synccheck --tests tests/test_variants_gpu.py --images cubin ptx

Only our kernels are looked at, and with torch's caching off what lies beyond a tensor belongs to nobody. CUDA graphs need the caching:
--cached leaves it on. Failing calls of the driver are torch's probing, or reported by the tests. Left out are tests marked
"undisturbed", which ask when things run and what memory is free. Processes that the tests start are not looked into. Writes
RESULTS/sanitizer-TOOL.txt, or sanitizer-TOOL-cached.txt, with a part for every kind of image.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def options(sanitizer, tool):
    help_text = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    only_ours = "--kernel-name" if "--kernel-name" in help_text else "--kernel-regex"  # before 2023.3
    return ["--tool", tool, "--error-exitcode", "1", "--target-processes", "application-only", "--launch-timeout", "300", only_ours, "kns=effnet_", *(["--report-api-errors", "no"] if tool == "memcheck" else [])]


class Share:
    """One process: the tests number k, k + n, k + 2n, ... of those selected."""

    def __init__(self, command, pytest_arguments, k, n, logs, name, environment):
        self.log, self.output = logs / f"sanitizer-{name}-{k}.log", logs / f"sanitizer-{name}-{k}.out"
        self.log.unlink(missing_ok=True)
        pytest = [sys.executable, "-m", "pytest", "-m", "gpu and not undisturbed", "--require-gpu", "-p", "no:cacheprovider", f"--share={k}/{n}", *pytest_arguments]
        with open(self.output, "w") as output:
            self.process = subprocess.Popen([*command, "--log-file", self.log, *pytest], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def summaries(self):
        return [line for line in self.text(self.log).splitlines() if "SUMMARY" in line]

    def counted(self):
        """pytest's last line, without its rule."""
        lines = self.text(self.output).strip().splitlines() or ["no output"]
        return lines[-1].strip("= ")

    @staticmethod
    def text(path):
        return path.read_text(errors="replace") if path.exists() else ""


def sanitize(arguments, tool):
    """Whether all went well with every kind of image."""
    name = f"{tool}-cached" if arguments.cached else tool
    parts, good = [], True
    for image in arguments.images:
        part, well = sanitize_image(arguments, tool, name, image)
        parts, good = [*parts, part], good and well
        (arguments.results / f"sanitizer-{name}.txt").write_text("\n".join(parts))  # what comes next may be stopped
        print(part, flush=True)
    return good


def sanitize_image(arguments, tool, name, image):
    """(what is to be said, whether all went well: every process ended well, passed a test and has the tool's summary)"""
    begin, n = time.monotonic(), arguments.jobs
    caching = {} if arguments.cached else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EFFNET_AOT_IMAGE": image, **caching}
    command = [arguments.sanitizer, *options(arguments.sanitizer, tool)]
    shares = [Share(command, [*map(str, arguments.tests), *arguments.pytest_args], k, n, arguments.logs, f"{name}-{image}", environment) for k in range(n)]
    for share in shares:
        share.process.wait()
    bad = [share for share in shares if share.process.returncode or not share.summaries() or " passed" not in share.counted()]
    for share in bad:
        print(f"{share.output}:", *share.text(share.output).splitlines()[-40:], f"{share.log}:", *share.text(share.log).splitlines()[:60], sep="\n")
    commit = os.environ.get("GIT_COMMIT") or subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    version = subprocess.run([arguments.sanitizer, "--version"], capture_output=True, text=True).stdout
    machine = subprocess.run([sys.executable, "-m", "effnet_aot", "info"], cwd=ROOT, capture_output=True, text=True, env=environment).stdout
    lines = [
        f"commit {commit}; {n} processes side by side, {time.monotonic() - begin:.0f} s",
        *re.findall(r"^Version.*", version, re.MULTILINE), " ".join(["compute-sanitizer", *command[1:]]), "tests: " + " ".join(path.name for path in arguments.tests), f"torch's caching of memory: {'on' if arguments.cached else 'off'}; EFFNET_AOT_IMAGE={image}",
        *re.findall(r"^(?:torch|driver|GPU).*", machine, re.MULTILINE),
    ]  # fmt: skip
    for share in shares:
        lines += [*share.summaries(), share.counted()]
    return "\n".join(line.rstrip() for line in lines) + "\n", not bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="+", choices=TOOLS, metavar="TOOL", help=", ".join(TOOLS))
    parser.add_argument("--tests", nargs="+", type=Path, default=[ROOT / "tests"], metavar="FILE", help="default: all GPU tests")
    parser.add_argument("--jobs", type=int, default=max(1, min(30, len(os.sched_getaffinity(0)) - 1)), help="processes side by side (default: %(default)s)")
    parser.add_argument("--images", nargs="+", choices=("auto", "cubin", "ptx"), default=[os.environ.get("EFFNET_AOT_IMAGE") or "auto"], metavar="IMAGE", help="kinds of images, one after the other (default: $EFFNET_AOT_IMAGE, or what serves the GPU)")
    parser.add_argument("--cached", action="store_true", help="let torch keep memory for the next tensors, as graphs need it")
    parser.add_argument("--sanitizer", default="compute-sanitizer", metavar="PROGRAM")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER")
    parser.add_argument("--logs", type=Path, default=ROOT / "build", metavar="FOLDER")
    parser.add_argument("--pytest-args", nargs=argparse.REMAINDER, default=[], help="the rest of the line goes to pytest")
    arguments = parser.parse_args()
    if not shutil.which(arguments.sanitizer):
        parser.error(f"{arguments.sanitizer} is not installed: it comes with the CUDA toolkit")
    for folder in (arguments.results, arguments.logs):
        folder.mkdir(parents=True, exist_ok=True)
    return 0 if all([sanitize(arguments, tool) for tool in arguments.tools]) else 1


if __name__ == "__main__":
    sys.exit(main())
