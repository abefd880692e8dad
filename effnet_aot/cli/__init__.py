"""python -m effnet_aot <command>. A command is a module here with add_arguments(parser) and run(arguments) -> exit status;
its docstring's first line is its help."""

import argparse
import importlib
import os

COMMANDS = ["run", "bench", "tune", "info", "classify"]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m effnet_aot", description="Ahead-of-time compiled EfficientNet kernels for PyTorch.")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name in COMMANDS:
        command = importlib.import_module(f".{name}", __name__)
        summary = command.__doc__.splitlines()[0]
        subparser = subparsers.add_parser(name, help=summary, description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, parser=subparser)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def open_console():
    """The console of a command. Tables keep their columns where the output goes to a file or a pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    return console


def printable(path):
    """A path as text, also where its bytes are none."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def positive(text):
    """An argument that is an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


positive.__name__ = "integer"  # what argparse calls the type in its messages
