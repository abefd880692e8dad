"""Name what photographs show, with a pretrained EfficientNet-Lite.

For photographs: a table of the likeliest classes of ImageNet, and with --save a picture of it. For a folder, with --out: a
row for every picture below it, in a CSV or Parquet file; an interrupted run is taken up where it stopped by the same command.

The exit status is 0 when every picture could be read, 1 when some could not (the others are classified all the same) or
nothing could be done, 2 when the arguments are wrong, 130 when interrupted.
"""

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..pictures import MissingPackage, pillow, prepare, read
from ..pretrained import RELEASES, Classifier, Guess, best
from . import positive, printable

SAMPLES = ["coffee.png", "camera.png", "chelsea.png"]  # of scikit-image


def add_arguments(parser):
    parser.add_argument("photographs", nargs="+", metavar="photograph", help="picture files, or one folder together with --out")
    parser.add_argument("--top", type=positive, default=5, help="classes to name for each (default: %(default)s)")
    parser.add_argument("--model", type=model_name, choices=list(RELEASES), default="efficientnet-lite0", help="default: %(default)s; lite0 and lite1 will do")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of weights and activations (default: %(default)s)")
    parser.add_argument("--save", metavar="FILE", help="write the photographs with their classes into a picture")
    parser.add_argument("--batch-size", type=positive, default=32, help="pictures that are classified at a time (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="for a folder: the .csv or .parquet file to write, or to go on with")
    parser.add_argument("--workers", type=count, default=len(os.sched_getaffinity(0)), help="for a folder: processes that read pictures (default: %(default)s, a core each)")


def model_name(text):
    return f"efficientnet-{text}" if f"efficientnet-{text}" in RELEASES else text


def count(text):
    return positive(text) if text != "0" else 0


count.__name__ = "integer"  # what argparse calls the type in its messages


def run(arguments):
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        check(arguments)
        make_classifier = partial(Classifier, arguments.model, arguments.device, getattr(torch, arguments.dtype))
        if arguments.out is not None:
            from .folder import classify_folder

            return classify_folder(arguments, make_classifier, console, errors)
        return classify_files(arguments, make_classifier, console, errors)
    except (MissingPackage, RuntimeError, OSError) as error:
        errors.print(f"classify: {error}", markup=False)
        return 1


def check(arguments):
    fail = arguments.parser.error
    if arguments.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no usable GPU here")
    if arguments.top > 1000:
        fail(f"--top: there are 1000 classes, got {arguments.top}")
    folders = [path for path in arguments.photographs if os.path.isdir(path)]
    if arguments.out is not None:
        if len(arguments.photographs) > 1 or not folders:
            fail(f"--out is for one folder, got {' '.join(arguments.photographs)}")
        if arguments.save is not None:
            fail("--save is for single photographs, --out for a folder")
        if Path(arguments.out).suffix not in (".csv", ".parquet"):
            fail(f"--out: a .csv or .parquet file is needed, got {arguments.out}")
    elif folders:
        fail(f"{folders[0]} is a folder: say with --out results.csv where its results go")
    if arguments.save is not None:
        Image, _ = pillow()
        if Image.registered_extensions().get(Path(arguments.save).suffix.lower()) not in Image.SAVE:
            fail(f"--save: a picture's name such as annotated.png is needed, got {arguments.save}")


class Result(NamedTuple):
    path: str
    guesses: list[Guess]


def classify_files(arguments, make_classifier, console, errors):
    pillow()
    classifier = make_classifier()
    results, failed = [], 0
    for start in range(0, len(arguments.photographs), arguments.batch_size):
        paths, pictures = [], []
        for path in arguments.photographs[start : start + arguments.batch_size]:
            try:
                pictures.append(prepare(read(path, classifier.size), classifier.size))
                paths.append(path)
            except ValueError as error:
                failed += 1
                errors.print(f"{printable(path)}: {error}", markup=False)
        if pictures:
            guesses = best(classifier(torch.stack(pictures)), arguments.top)
            results += [Result(path, row) for path, row in zip(paths, guesses, strict=True)]
    if results:
        console.print(table(results))
        if arguments.save is not None:
            from .annotate import annotated

            try:
                annotated(results).save(arguments.save)
            except (OSError, ValueError) as error:
                raise RuntimeError(f"{arguments.save} could not be written: {error}") from error
            console.print(f"annotated picture: {arguments.save}", markup=False, soft_wrap=True)
    return 1 if failed else 0


def table(results, title=None):
    table = Table("photograph", "class", "name", title=title)
    table.add_column("probability", justify="right")
    unique = len({os.path.basename(result.path) for result in results}) == len(results)
    for path, guesses in results:
        name = Text(printable(os.path.basename(path) if unique else path), overflow="fold")
        for guess in guesses:
            table.add_row(name, str(guess.index), Text(guess.name), f"{guess.probability:.1%}", end_section=guess is guesses[-1])
            name = ""
    return table


def samples(console, device, dtype):
    """What three of scikit-image's photographs show: the end of the command `run`. Returns whether nothing was wrong."""
    import skimage

    try:
        classifier = Classifier("efficientnet-lite0", device, dtype)
    except (MissingPackage, RuntimeError) as error:
        console.print(f"What the photographs show is left out: {error}", markup=False, soft_wrap=True)
        return isinstance(error, MissingPackage)
    folder = Path(skimage.__file__).parent / "data"
    guesses = best(classifier(torch.stack([prepare(read(folder / name), classifier.size) for name in SAMPLES])), 5)
    results = [Result(name, row) for name, row in zip(SAMPLES, guesses, strict=True)]
    console.print(table(results, f"{classifier.name}, pretrained on ImageNet, {str(dtype).removeprefix('torch.')}"))
    return True
