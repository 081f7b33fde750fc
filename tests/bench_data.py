"""How fast pictures come, from the built-in world and from a file. Run by hand:

    python tests/bench_data.py [FILE.h5]

Prints milliseconds for a batch of 64 random pictures and the memory that the process holds.
"""
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import open_dataset                                       # noqa: E402


def main():
    for path in [None, *sys.argv[1:]]:
        started = time.monotonic()
        ds = open_dataset(path)
        opened = time.monotonic() - started
        times = []
        for _ in range(300):
            index = torch.randint(len(ds), (64,))
            started = time.monotonic()
            ds.images(index)
            times.append(1000 * (time.monotonic() - started))
        times.sort()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{path or 'built-in world'}: opened in {opened:.1f} s, 64 pictures in {times[150]:.2f} ms (median), "
              f"{times[285]:.2f} ms (95 %), process at most {memory:.0f} MiB")


if __name__ == "__main__":
    main()
