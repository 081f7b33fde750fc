"""How fast pictures come from the built-in world and from what people download, and in how much memory. By hand:

    python tests/bench_data.py [FILE ...] [--cache DIR]              # files or folders, as --data of train.py
    python tests/bench_data.py --write mpi3d FILE.npz [--images N]   # a file in MPI3D's layout and size to try it on

Prints a table: seconds and MB/s of unpacking, if it happens now; images a second in random batches of 64, as float
tensors, from a cold page cache, a warm one, the original file (single pictures, where it allows that) and an array of
at most 20,000 pictures in memory; and the most anonymous memory (RssAnon) while the copy was made and read. Linux.
"""
import argparse
import gc
import os
import sys
import threading
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                                                         # noqa: E402
from data import Dataset, World, open_dataset                       # noqa: E402
from train import end_with                                          # noqa: E402

BATCH = 64


class InMemory(Dataset):
    """The first pictures of a data set as an array."""

    def __init__(self, ds, n=20000):
        super().__init__(ds.name, ("picture",), (min(n, len(ds)),))
        self.array = np.concatenate([ds.pixels(np.arange(len(self))[i:i + 256]) for i in range(0, len(self), 256)])

    def pixels(self, index):
        return self.array[index]


class Peak(threading.Thread):
    """Watches this process's anonymous memory; `mib` is the most that was seen."""

    def __init__(self):
        super().__init__(daemon=True)
        self.mib, self.running = 0, True
        self.start()

    def run(self):
        while self.running and os.path.exists("/proc/self/status"):
            lines = Path("/proc/self/status").read_text().splitlines()
            self.mib = max([self.mib] + [int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon")])
            time.sleep(0.01)


def speed(ds, seconds=3.0, batches=1000):
    """Images a second in random batches, over this time or this many batches, whichever is less."""
    rng, done, started = np.random.default_rng(0), 0, time.monotonic()
    while done < batches and time.monotonic() - started < seconds:
        ds.images(rng.integers(len(ds), size=BATCH))
        done += 1
    return f"{BATCH * done / (time.monotonic() - started):,.0f}"


def forget(path):
    """Takes a file, which nobody may have mapped, out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def original_speed(path, seconds=5.0):
    """Images a second when single ones are read from what was downloaded; "-" from an .npz, which is one stream."""
    rng, done, started = np.random.default_rng(0), 0, time.monotonic()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix.lower() in data.SUFFIXES]
        while time.monotonic() - started < seconds:
            data.picture(files[rng.integers(len(files))], data.SIDE)
            done += 1
    elif h5py.is_hdf5(path):
        with h5py.File(path) as file:
            while time.monotonic() - started < seconds:
                file["images"][rng.integers(len(file["images"]))]
                done += 1
    return f"{done / (time.monotonic() - started):,.1f}" if done else "-"


def row(path, cache):
    """One line of the table."""
    peak = Peak()
    started = time.monotonic()
    ds = open_dataset(path, cache)
    opened = time.monotonic() - started
    if path is None:
        return [ds.name, f"{len(ds):,}", "-", "-", "-", speed(ds), "-", "-", f"{peak.mib:,}"]
    size = os.path.getsize(ds.copy)
    new = time.time() - os.path.getmtime(ds.copy) < opened + 1      # it was written just now
    copy, n = ds.copy, len(ds)
    del ds
    gc.collect()
    forget(copy)
    cold = speed(open_dataset(path, cache), batches=max(1, n // BATCH // 10))
    gc.collect()
    with open(copy, "rb") as file:                                  # into the page cache, as far as there is memory
        while file.read(2 ** 24):
            pass
    ds = open_dataset(path, cache)
    warm = speed(ds)
    peak.running = False
    return [f"{path.name} ({ds.name})", f"{n:,}", f"{opened:.1f}" if new else "-",
            f"{size / 1e6 / opened:,.0f}" if new else "-", cold, warm, original_speed(path), speed(InMemory(ds)),
            f"{peak.mib:,}"]


def write_mpi3d(path, n):
    """Writes n pictures in MPI3D's layout, compressed: the built-in world's, again and again, shifted sideways."""
    world = World()
    some = np.random.default_rng(0).integers(len(world), size=min(n, 4096))
    pictures = np.concatenate([world.pixels(part) for part in np.array_split(some, len(some) // 256 + 1)])
    with data.whole(Path(path)) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED,
                                                              compresslevel=1) as npz:
        with npz.open("images.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(n, 64, 64, 3)))
            for start in tqdm(range(0, n, len(pictures)), desc=f"writing {path}", unit="slab"):
                file.write(np.roll(pictures[:n - start], start // len(pictures), axis=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="data files or folders")
    parser.add_argument("--cache", help="folder for unpacked copies")
    parser.add_argument("--write", nargs=2, metavar=("mpi3d", "FILE.npz"), help="write a file instead")
    parser.add_argument("--images", type=int, default=1036800, help="pictures in the file to write [%(default)s]")
    args = parser.parse_args()
    if args.write:
        if args.write[0] != "mpi3d" or os.path.exists(args.write[1]):
            parser.error("--write mpi3d FILE.npz, where FILE.npz is not there yet")
        return write_mpi3d(args.write[1], args.images)
    rows = [row(path, args.cache) for path in [None, *args.files]]
    header = ["data", "images", "unpacked in, s", "MB/s", "images/s, cold", "warm", "original", "in memory",
              "RssAnon, MiB"]
    for cells in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    end_with(main)
