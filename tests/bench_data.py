"""How fast images come from the built-in world and from what people download. By hand, on Linux:

    python tests/bench_data.py [FILE ...] [--cache DIR]      # files or folders, as --data

Prints a table: seconds and MB/s of unpacking (done now if it was not before), and images a second
as float tensors in random batches of 64, the unpacked file out of (cold) and in the page cache.
"""
import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import open_dataset  # noqa: E402

BATCH = 64


def speed(ds, batches=1000, seconds=3.0):
    """Images a second in so many random batches or so many seconds, whichever ends first."""
    rng = np.random.default_rng(0)
    done = 0
    started = time.monotonic()
    while done < batches and time.monotonic() - started < seconds:
        ds.images(rng.integers(len(ds), size=BATCH))
        done += 1
    return f"{BATCH * done / (time.monotonic() - started):,.0f}"


def measure(path, cache):
    """The cells of one row."""
    started = time.time()
    ds = open_dataset(path, cache)
    seconds = time.time() - started
    if path is None:
        return ds.name, f"{len(ds):,}", "-", "-", "-", speed(ds)
    file, size = ds.stored.filename, ds.stored.nbytes
    unpacked = f"{seconds:.1f}", f"{size / 1e6 / seconds:,.0f}"
    if os.path.getmtime(file) < started:                            # unpacked earlier
        unpacked = "-", "-"

    del ds                                                          # unmaps the file
    with open(file, "rb") as cached:
        os.fsync(cached.fileno())
        os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    ds = open_dataset(path, cache)
    cold = speed(ds, batches=max(1, len(ds) // BATCH // 10))        # few images come twice
    with open(file, "rb") as cached:
        while cached.read(2 ** 24):
            pass
    return ds.name, f"{len(ds):,}", *unpacked, cold, speed(ds)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="data files or folders")
    parser.add_argument("--cache", help="folder for the unpacked images")
    args = parser.parse_args()
    header = "data", "images", "unpacked in, s", "MB/s", "images/s, cold", "warm"
    print("| " + " | ".join(header) + " |")
    print("| --- " * len(header) + "|")
    for path in (None, *args.files):
        print("| " + " | ".join(measure(path, args.cache)) + " |")


if __name__ == "__main__":
    main()
