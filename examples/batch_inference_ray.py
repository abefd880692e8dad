"""Classifies pictures with Ray Data, on the machines and GPUs of a Ray cluster, or on this machine where there is none.

    pip install 'effnet_aot[pretrained]' 'ray[data]'
    python batch_inference_ray.py photographs/ results/         # or s3://bucket/photographs s3://bucket/results

Tasks on the cores read and prepare pictures, an actor for each GPU holds the network. Ray streams between the two, so that
neither waits for long nor runs ahead, and starts again what a lost machine was doing. Without GPUs the actors do both.

The results are Parquet files with a row for each picture: its path, its likeliest classes, or what is wrong with it. For a
folder on one machine `python -m effnet_aot classify DIR --out results.parquet` does the same without Ray.
"""

import argparse
import io
import sys

import numpy as np
import pyarrow.dataset
import ray
import torch

from effnet_aot.pictures import extensions, prepare, read
from effnet_aot.pretrained import RELEASES, Classifier, best


def prepare_row(row, size):
    try:
        picture, error = prepare(read(io.BytesIO(row["bytes"]), size), size).numpy(), ""
    except ValueError as problem:
        picture, error = np.zeros((size, size, 3), np.uint8), str(problem)
    return {"path": row["path"], "error": error, "picture": picture}


class Classify:
    """An actor: makes the network once, then takes batches."""

    def __init__(self, model, dtype, top):
        self.classifier, self.top = Classifier(model, dtype=getattr(torch, dtype)), top

    def __call__(self, batch):
        guesses = best(self.classifier(torch.from_numpy(batch["picture"])), self.top)
        good = batch["error"] == ""
        columns = {"path": batch["path"], "error": batch["error"]}
        for rank, of_rank in enumerate(zip(*guesses, strict=True), 1):
            index, name, probability = zip(*of_rank, strict=True)
            columns[f"class_{rank}"] = np.where(good, index, -1).astype(np.int16)
            columns[f"name_{rank}"] = np.where(good, name, "")
            columns[f"probability_{rank}"] = np.where(good, probability, 0).astype(np.float32)
        return columns


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", help="folder, local or s3://, gs://, ...")
    parser.add_argument("results", help="folder for the Parquet files, which must not exist yet")
    parser.add_argument("--model", choices=list(RELEASES), default="efficientnet-lite0")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()

    ray.init(ignore_reinit_error=True)
    resources = ray.cluster_resources()
    gpus, cores = int(resources.get("GPU", 0)), int(resources["CPU"])
    pictures = ray.data.read_binary_files(
        arguments.photographs, include_paths=True, file_extensions=sorted(extension[1:] for extension in extensions())
    )
    prepared = pictures.map(prepare_row, fn_kwargs={"size": RELEASES[arguments.model].size})
    classified = prepared.map_batches(
        Classify,
        fn_constructor_kwargs={"model": arguments.model, "dtype": arguments.dtype, "top": arguments.top},
        batch_size=arguments.batch_size,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=gpus or max(cores - 1, 1)),
        num_gpus=1 if gpus else 0,
    )
    classified.write_parquet(arguments.results, mode=ray.data.SaveMode.ERROR)  # never beside the files of another run

    results = pyarrow.dataset.dataset(arguments.results)
    bad = results.count_rows(filter=pyarrow.dataset.field("error") != "")
    print(f"{results.count_rows()} pictures in {arguments.results}, {bad} of them could not be read")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
