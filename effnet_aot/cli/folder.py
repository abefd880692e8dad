"""A folder of pictures, classified as a stream: worker processes read them while the network works, rows are written batch by
batch, and a run that was interrupted goes on where the rows end.

What makes that safe: a row counts when its line is complete, and a batch's rows are appended after it is done. So whatever
stops the run, a kill or a full disk, at most the last line is a part of a row; it is cut off at the next start, and its
picture is done again.
"""

import csv
import ctypes
import fcntl
import io
import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..pictures import extensions, prepare, read
from ..pretrained import RELEASES, best
from . import printable


def classify_folder(arguments, make_classifier, console, errors):
    folder, out = arguments.photographs[0], Path(arguments.out)
    Output = Parquet if out.suffix == ".parquet" else Rows
    with Output(out, arguments.model, arguments.top) as rows:
        paths, others, unreadable = pictures_below(folder)
        todo = [path for path in paths if printable(path) not in rows.done]
        if len(todo) < len(paths):
            console.print(f"{len(paths) - len(todo)} of {len(paths)} pictures are in {out} already", markup=False, soft_wrap=True)
        try:
            if todo:
                stream(folder, todo, rows, arguments, make_classifier, console)
            rows.finish()
        except KeyboardInterrupt:
            errors.print(f"interrupted; {len(rows.done)} rows are kept, and the same command goes on from there")
            return 130
        summary = f"{len(rows.done)} pictures in {out}, {len(rows.failed)} of them could not be read"
        summary += f"; {others} other files are no pictures by their names" if others else ""
        console.print(summary, markup=False, soft_wrap=True)
    messages = unreadable + [f"{path}: {error}" for path, error in rows.failed.items()]
    if not paths:
        messages.append(f"{folder}: no pictures in this folder")
    for message in messages[:10]:
        errors.print(message, markup=False)
    if len(messages) > 10:
        errors.print(f"... and {len(messages) - 10} more, in the column error of {out}", markup=False)
    return 1 if messages else 0


def pictures_below(folder):
    """Relative paths of the files that are pictures by their extensions, how many are not, and folders that cannot be listed.
    Hidden files and folders are left out."""
    paths, others, unreadable = [], 0, []
    known = extensions()
    for parent, folders, files in os.walk(folder, onerror=lambda error: unreadable.append(f"{printable(error.filename)}: {error.strerror.lower()}")):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            if os.path.splitext(name)[1].lower() in known:
                paths.append(os.path.relpath(os.path.join(parent, name), folder))
            else:
                others += 1
    return paths, others, unreadable


def stream(folder, paths, rows, arguments, make_classifier, console):
    batch_size = arguments.batch_size
    loader = torch.utils.data.DataLoader(
        Pictures(folder, paths, RELEASES[arguments.model].size),
        batch_size=batch_size,
        num_workers=min(arguments.workers, -(-len(paths) // batch_size)),
        collate_fn=collate,
        worker_init_fn=end_with_parent,
    )
    batches = iter(loader)  # the workers start, and read while the network is made
    classifier = make_classifier()
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(*columns, console=console) as progress:
        task, start, done = progress.add_task("", total=len(paths), rate=""), time.monotonic(), 0
        for names, failures, data in batches:
            guesses = []
            if names:
                pictures = torch.frombuffer(data, dtype=torch.uint8).view(len(names), classifier.size, classifier.size, 3)
                guesses = best(classifier(pictures), arguments.top)
            rows.append({**dict(zip(names, guesses, strict=True)), **failures})
            done += len(names) + len(failures)
            progress.update(task, completed=done, rate=f"{done / (time.monotonic() - start):.1f} pictures/s")


def end_with_parent(worker):
    """A worker sees by itself that its parent was killed, but not while it waits for somebody to take its pictures: it would
    stay for ever. So the kernel ends it."""
    parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
    if not multiprocessing.parent_process().is_alive():  # too late for the signal
        os._exit(1)


class Pictures(torch.utils.data.Dataset):
    """(path, picture as the network wants it or None, what is wrong with the file or None)"""

    def __init__(self, folder, paths, size):
        self.folder, self.paths, self.size = folder, paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        try:
            return path, prepare(read(os.path.join(self.folder, path), self.size), self.size), None
        except ValueError as error:
            return path, None, str(error)


def collate(items):
    """(paths, {path: error}, the bytes of the paths' pictures)

    Bytes come from a worker through a pipe; tensors would lie in /dev/shm, of which containers have 64 MB.
    """
    good = [(path, picture) for path, picture, error in items if error is None]
    data = bytearray().join(ctypes.string_at(picture.data_ptr(), picture.numel()) for _, picture in good)
    return [path for path, _ in good], {path: error for path, _, error in items if error is not None}, data


class Rows:
    """A CSV file of results that is appended to: a row for each picture, with its classes or its error.

    done: the paths that it has. failed: {path: error} of those that could not be read. Raises RuntimeError for a file that
    is not such a one, or is being written by another process.
    """

    def __init__(self, path, model, top):
        self.path, self.model, self.top = path, model, top
        self.columns = ["path", "model", "error", *(f"{name}_{rank}" for rank in range(1, top + 1) for name in ("class", "name", "probability"))]
        self.done, self.failed = set(), {}
        self.open()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def open(self):
        self.file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            # A POSIX lock, which forked workers that outlive their parent for a moment do not hold.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.resume()
        except BaseException as error:
            self.file.close()
            if isinstance(error, BlockingIOError):
                raise RuntimeError(f"{self.path} is being written by another process") from None
            raise

    def resume(self):
        """Takes in the rows that are there, and cuts off a last one that is not complete."""
        end = number = 0
        for number, (fields, end) in enumerate(complete_rows(self.file), 1):
            if number == 1:
                self.check_columns(fields)
            else:
                self.take(number, fields)
        self.file.seek(end)
        rest = self.file.read(1 << 16)
        if number == 0 and not encoded([self.columns]).startswith(rest):
            self.check_columns([rest.decode(errors="replace")])
        if self.file.read(1):  # longer than any row
            raise RuntimeError(f"{self.path} is damaged from byte {end} on: repair it by hand, or write into another file")
        self.file.seek(end)
        if rest:
            self.file.truncate()
        if number == 0:
            self.write([self.columns])

    def check_columns(self, fields):
        if fields != self.columns:
            found = ",".join(fields)
            raise RuntimeError(f"{self.path} has other columns than --top {self.top} gives: {found[:100]}{'...' * (len(found) > 100)}")

    def take(self, number, fields):
        if len(fields) != len(self.columns):
            raise RuntimeError(f"{self.path}, row {number}: {len(self.columns)} columns were expected, got {len(fields)}")
        path, model, error, *_ = fields
        if model != self.model:
            raise RuntimeError(f"{self.path} holds results of {model}: write those of {self.model} into another file")
        self.done.add(path)
        if error:
            self.failed[path] = error

    def append(self, results):
        """results: {path: guesses or an error}"""
        rows = []
        for path, result in results.items():
            path = printable(path)
            if isinstance(result, str):
                rows.append([path, self.model, result] + [""] * (3 * self.top))
                self.failed[path] = result
            else:
                rows.append([path, self.model, "", *(value for guess in result for value in (guess.index, guess.name, f"{guess.probability:.6f}"))])
        self.write(rows)
        self.done.update(row[0] for row in rows)

    def write(self, rows):
        self.file.write(encoded(rows))
        self.file.flush()

    def finish(self):
        os.fsync(self.file.fileno())


def encoded(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def complete_rows(file):
    """(fields, where it ends) of every complete row of a CSV file; quoted fields may contain line breaks."""
    row, end, quoted = [], 0, False
    for line in file:
        row.append(line)
        quoted ^= line.count(b'"') % 2 == 1
        if line.endswith(b"\n") and not quoted:
            text = b"".join(row)
            end += len(text)
            try:
                fields = next(csv.reader(io.StringIO(text.decode(errors="replace"), newline="")))
            except csv.Error:
                fields = []
            yield fields, end
            row = []


class Parquet(Rows):
    """The same as Parquet, which cannot be appended to: a CSV file beside it collects the rows until the run is complete."""

    def __init__(self, path, model, top):
        try:
            import pyarrow.csv
            import pyarrow.parquet
        except ImportError as error:
            raise RuntimeError(f"{path}: Parquet files are written with pyarrow, which is not installed: pip install pyarrow") from error
        self.pyarrow, self.parquet, self.written = pyarrow, path, set()
        super().__init__(path.with_name(f"{path.name}.rows.csv"), model, top)

    def open(self):
        if self.parquet.exists():
            try:
                old = self.pyarrow.parquet.ParquetFile(self.parquet)
            except self.pyarrow.ArrowInvalid as error:
                raise RuntimeError(f"{self.parquet}: {error}") from error
            with old:
                self.check_columns(old.schema_arrow.names)
                rows = (row for batch in old.iter_batches(columns=self.columns[:3]) for row in batch.to_pylist())
                for number, row in enumerate(rows, 1):
                    self.take(number, [row["path"], row["model"], row["error"] or "", *self.columns[3:]])
            self.written = set(self.done)
        super().open()

    def finish(self):
        super().finish()
        if self.done != self.written or not self.parquet.exists():
            temporary = self.parquet.with_name(f"{self.parquet.name}.tmp")
            with self.pyarrow.parquet.ParquetWriter(temporary, self.schema()) as writer:
                for batch in self.batches():
                    writer.write_batch(batch)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.parquet)
        self.path.unlink()

    def schema(self):
        types = {"class": self.pyarrow.int16(), "probability": self.pyarrow.float32()}
        return self.pyarrow.schema([(column, types.get(column.split("_")[0], self.pyarrow.string())) for column in self.columns])

    def batches(self):
        """The rows that the Parquet file has, then those that it has not: a run that is killed between the two steps of
        finish() leaves them in both files."""
        if self.parquet.exists():
            with self.pyarrow.parquet.ParquetFile(self.parquet) as old:
                yield from old.iter_batches()
        schema, options = self.schema(), self.pyarrow.csv
        convert = options.ConvertOptions(column_types=schema, strings_can_be_null=True, null_values=[""])
        with options.open_csv(self.path, parse_options=options.ParseOptions(newlines_in_values=True), convert_options=convert) as rows:
            for batch in rows:
                yield batch.filter(self.pyarrow.array([path not in self.written for path in batch.column("path").to_pylist()]))
