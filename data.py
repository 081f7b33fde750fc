"""The data sets behind one small interface: a built-in 3D Shapes world, and DeepMind's 3dshapes.h5.

    python data.py shapes3d.h5          # writes the built-in world as a file in DeepMind's layout

The built-in world has the six factors of 3D Shapes (Burgess and Kim 2018) with the same names, sizes and
order, rendered here by ray casting: a room with sky, walls, floor, and a shaded object with its shadow.
The pictures resemble DeepMind's but are not theirs, and scores on them must not be called Shapes3D scores.

Exports: open_dataset, Dataset, World, HDF5, write_world.  Left out: augmentation, loader processes.

Letters:  B batch, H, W height and width (64), K factors, G geometries (480 = scale x shape x orientation),
S samples along a pixel's side, R rays.
"""
import argparse
import colorsys
import os
import re
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

FACTOR_NAMES = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
FACTOR_SIZES = (10, 10, 10, 8, 4, 15)                               # shapes: cube, cylinder, sphere, capsule
FACTOR_VALUES = (np.arange(10) / 10, np.arange(10) / 10, np.arange(10) / 10, np.linspace(0.75, 1.25, 8),
                 np.arange(4.0), np.linspace(-30, 30, 15))          # as DeepMind's labels give them
SIDE = 64                                                           # pixels


# ---- the interface --------------------------------------------------------------------------------

class Dataset:
    """Images that are all combinations of some factors, in mixed-radix order: the last factor varies fastest.

    A data set gives `pixels(index)` and these attributes: name (for tables), factor_names and
    factor_sizes (tuples of K), image_size (pixels a side). Indices and factors may be lists, arrays or
    tensors; tensors come out.
    """
    image_size = SIDE

    def __init__(self, name, factor_names, factor_sizes):
        self.name, self.factor_names, self.factor_sizes = name, tuple(factor_names), tuple(factor_sizes)

    def __len__(self):
        return int(np.prod(self.factor_sizes))

    def pixels(self, index):
        """index: (B,) int array. Returns uint8 (B, H, W, 3)."""
        raise NotImplementedError

    def images(self, index):
        """index: (B,) in 0..len-1. Returns float32 (B, 3, 64, 64) in [-1, 1]."""
        pixels = torch.from_numpy(self.pixels(self.checked(index)))                     # (B, H, W, 3)
        return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)                   # (B, 3, H, W)

    def factors(self, index):
        """index: (B,) in 0..len-1. Returns int64 (B, K): the value of every factor, 0..size-1."""
        return torch.from_numpy(np.stack(np.unravel_index(self.checked(index), self.factor_sizes), axis=-1))

    def index(self, factors):
        """factors: (B, K), each 0..size-1. Returns int64 (B,): the inverse of `factors`."""
        factors = np.asarray(factors)
        if factors.ndim != 2 or factors.shape[1] != len(self.factor_sizes):
            raise ValueError(f"factors must have shape (B, {len(self.factor_sizes)}), not {factors.shape}")
        if len(factors) and (factors.min() < 0 or (factors >= self.factor_sizes).any()):
            raise ValueError(f"factors out of range: each must be 0 or more and below {self.factor_sizes}")
        return torch.from_numpy(np.ravel_multi_index(tuple(factors.T), self.factor_sizes).astype(np.int64))

    def checked(self, index):
        """index as an int64 array (B,), or ValueError."""
        index = np.asarray(index, dtype=np.int64)
        if index.ndim != 1 or (len(index) and not (0 <= index.min() and index.max() < len(self))):
            raise ValueError(f"index must be a list of numbers from 0 to {len(self) - 1}, not {index}")
        return index


# ---- the built-in world: where a ray meets an object ----------------------------------------------
# All shapes are centred on the origin. o: (3,) or (R, 3) where rays start; d: (R, 3) their directions.
# Each returns the distance (R,), infinite for a miss, and the outward normal (R, 3).

def roots(a, b, c):
    """The smaller solution of a x^2 + 2 b x + c = 0, infinite where there is none or it is negative."""
    with np.errstate(divide="ignore", invalid="ignore"):
        x = (-b - np.sqrt(b * b - a * c)) / a
    return np.where(x > 0, x, np.inf)                               # a comparison with nan is false


def nearest(*hits):
    """Of several (distance, normal) the nearest, ray by ray."""
    distance, normal = hits[0]
    for other, other_normal in hits[1:]:
        normal = np.where((other < distance)[:, None], other_normal, normal)
        distance = np.minimum(distance, other)
    return distance, normal


def at(o, d, distance):
    """The points o + distance * d, (R, 3); the origin for a miss."""
    return np.where(np.isfinite(distance)[:, None], o + np.where(np.isfinite(distance), distance, 0)[:, None] * d, 0)


def hit_sphere(o, d, radius, z=0.0):
    """A sphere of this radius with its centre at height z."""
    o = o - np.array([0, 0, z])
    distance = roots((d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - radius ** 2)
    return distance, at(o, d, distance) / radius


def hit_side(o, d, radius, half):
    """The round side of an upright cylinder from height -half to half."""
    flat_o, flat_d = o[..., :2], d[..., :2]
    distance = roots((flat_d * flat_d).sum(-1), (flat_o * flat_d).sum(-1), (flat_o * flat_o).sum(-1) - radius ** 2)
    point = at(o, d, distance)
    distance = np.where(np.abs(point[:, 2]) <= half, distance, np.inf)
    return distance, point * np.array([1, 1, 0]) / radius


def hit_box(o, d, half):
    """A cube of side 2 * half: the last of the three entries into its slabs, if before the first exit."""
    with np.errstate(divide="ignore"):
        enter = (-np.sign(d) * half - o) / d                                            # (R, 3)
        leave = (np.sign(d) * half - o) / d                                             # (R, 3)
    first = enter.max(-1)
    distance = np.where((first > 0) & (first < leave.min(-1)), first, np.inf)
    face = np.eye(3)[enter.argmax(-1)]                                                  # (R, 3), the face's axis
    return distance, -np.sign(d) * face


def hit_top(o, d, radius, half):
    """The flat top of an upright cylinder."""
    with np.errstate(divide="ignore"):
        distance = (half - o[..., 2]) / d[:, 2]
    point = at(o, d, distance)
    inside = (distance > 0) & ((point[:, :2] ** 2).sum(-1) <= radius ** 2)
    return np.where(inside, distance, np.inf), np.broadcast_to([0.0, 0.0, 1.0], d.shape)


def hit_object(shape, scale, o, d):
    """The object's distance (R,) and normal (R, 3); o in room coordinates. Shapes as in 3D Shapes' labels."""
    half, radius = (0.62 * scale, 0.62 * scale, 0.72 * scale, 1.24 * scale)[shape], 0.62 * scale
    o = o - np.array([0, 0, half])                                  # it stands on the floor
    if shape == 0:
        return hit_box(o, d, half)
    if shape == 1:
        return nearest(hit_side(o, d, radius, half), hit_top(o, d, radius, half))
    if shape == 2:
        return hit_sphere(o, d, half)
    straight = half - radius                                        # a capsule: a cylinder between two half spheres
    return nearest(hit_side(o, d, radius, straight), hit_sphere(o, d, radius, straight),
                   hit_sphere(o, d, radius, -straight))


# ---- the built-in world: the room -----------------------------------------------------------------

CAMERA_DISTANCE, CAMERA_HEIGHT, FOCAL = 4.3, 1.7, 1.9               # focal length: 1 is half the picture
ROOM, WALL_HEIGHT = 6.0, 3.6                                        # half the room's side; its walls
LIGHT = np.array([-0.5, -0.6, 1.0]) / np.linalg.norm([-0.5, -0.6, 1.0])
WALL_SHADES = (1.0, 0.55, 0.7)                                      # back, left, right
SHADOW = 0.3                                                        # brightness of the floor in the shadow
SKY = (0.61, 0.89, 0.98)
SAMPLES = 3                                                         # S: rays along a pixel's side


def camera(degrees):
    """Position (3,) and ray directions (R, 3) of a camera that has gone round the room's centre by `degrees`."""
    u = (np.arange(SIDE * SAMPLES) + 0.5) / (SIDE * SAMPLES) * 2 - 1
    x, z = np.meshgrid(u, -u)                                       # right and up
    d = np.stack([x, np.full_like(x, FOCAL), z], -1).reshape(-1, 3)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return turn @ [0, -CAMERA_DISTANCE, CAMERA_HEIGHT], d @ turn.T


def cast_room(o, d):
    """How much of each surface's colour every ray shows, (R, 4): floor, wall, object, sky; and floor points."""
    weights, nearest_hit = np.zeros((len(d), 4)), np.full(len(d), np.inf)
    weights[:, 3] = 1                                               # sky, until something is in front of it
    with np.errstate(divide="ignore", invalid="ignore"):
        for (axis, sign), shade in zip(((1, 1), (0, -1), (0, 1)), WALL_SHADES):
            distance = (sign * ROOM - o[axis]) / d[:, axis]
            height = o[2] + distance * d[:, 2]
            seen = (distance > 0) & (distance < nearest_hit)
            nearest_hit = np.where(seen, distance, nearest_hit)
            weights[seen] = np.where((height < WALL_HEIGHT)[:, None], [0, shade, 0, 0], [0, 0, 0, 1])[seen]
        distance = -o[2] / d[:, 2]
        floor = (distance > 0) & (distance < nearest_hit)
    weights[floor] = [1, 0, 0, 0]
    return weights, floor, o + np.where(floor, distance, 0)[:, None] * d


def render(scale, shape, orientation, room):
    """One geometry: weights (H * W, 4) of floor, wall, object and sky. `room`: camera and cast_room's answer."""
    o, d, weights, floor, points = room
    weights = weights.copy()
    near = floor & (np.abs(points[:, :2]) < 4).all(-1)              # no shadow is longer than that
    lit, _ = hit_object(shape, scale, points[near], np.broadcast_to(LIGHT, (near.sum(), 3)))
    weights[near, 0] = np.where(np.isfinite(lit), SHADOW, 1.0)
    distance, normal = hit_object(shape, scale, o, d)
    seen = np.isfinite(distance)
    weights[seen] = 0
    weights[seen, 2] = np.minimum(0.45 + 0.75 * np.clip(normal[seen] @ LIGHT, 0, 1), 1)      # ambient, diffuse
    return weights.reshape(SIDE, SAMPLES, SIDE, SAMPLES, 4).mean((1, 3)).reshape(-1, 4)


class World(Dataset):
    """The built-in world: 480 geometries are rendered at the start, colours are filled in when asked for.

    A pixel is linear in the colours of floor, wall and object, so a picture is a (H*W, 4) x (4, 3) product.
    """

    def __init__(self):
        super().__init__("built-in world", FACTOR_NAMES, FACTOR_SIZES)
        shape = FACTOR_SIZES[3:]
        self.weights = torch.empty(int(np.prod(shape)), SIDE ** 2, 4)                   # (G, H*W, 4)
        for k, degrees in enumerate(FACTOR_VALUES[5]):
            o, d = camera(degrees)
            room = (o, d, *cast_room(o, d))
            for i, scale in enumerate(FACTOR_VALUES[3]):
                for j in range(shape[1]):
                    g = np.ravel_multi_index((i, j, k), shape)
                    self.weights[g] = torch.from_numpy(render(scale, j, degrees, room))
        self.hues = torch.tensor([colorsys.hsv_to_rgb(hue / 10, 1, 1) for hue in range(10)])   # (10, 3)
        self.sky = torch.tensor(SKY)

    def pixels(self, index):
        f = self.factors(index)                                                         # (B, 6)
        colours = torch.cat([self.hues[f[:, :3]], self.sky.expand(len(f), 1, 3)], 1)    # (B, 4, 3)
        geometry = torch.from_numpy(index % len(self.weights))                          # (B,), the last three factors
        picture = self.weights[geometry] @ colours                                      # (B, H*W, 3) in [0, 1]
        return (picture * 255).round().to(torch.uint8).view(-1, SIDE, SIDE, 3).numpy()


# ---- DeepMind's file ------------------------------------------------------------------------------

SLAB = 128 * 2 ** 20                                                # bytes of pixels held in memory at a time
SOURCE = "rendered by this EncDiff implementation's data.py; not DeepMind's 3D Shapes"      # a file's attribute


def rows_at_a_time(images):
    """Rows of an HDF5 data set to read or write at once: whole chunks, as many as fit in SLAB, at least one."""
    chunk = images.chunks[0] if images.chunks else 1
    fit = max(1, SLAB // (images.dtype.itemsize * int(np.prod(images.shape[1:]))))
    return fit // chunk * chunk or min(chunk, 4 * fit)


def open_hdf5(path):
    """An open h5py file in DeepMind's layout, or ValueError or OSError with one sentence."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no data file {path}: check the name, or leave --data out for the "
                                "built-in world")
    try:
        file = h5py.File(path, "r")
    except OSError:
        raise ValueError(f"{path} is not an HDF5 file or was cut short: fetch it again") from None
    for name, wanted in (("images", "(n, 64, 64, 3) uint8"), ("labels", "(n, K) float")):
        found = file.get(name)
        fits = isinstance(found, h5py.Dataset) and (
            found.shape[1:] == (SIDE, SIDE, 3) and found.dtype == np.uint8 if name == "images"
            else found.ndim == 2 and found.dtype.kind == "f")
        if not fits:
            have = f"{found.shape} {found.dtype}" if isinstance(found, h5py.Dataset) else "nothing of that kind"
            file.close()
            raise ValueError(f"{path}: `{name}` must be {wanted}, and there is {have}: not 3dshapes.h5's layout")
    return file


def factor_sizes_of(labels, path):
    """Sizes of the factors whose combinations the labels (n, K) list in order, the last varying fastest."""
    columns = [np.unique(column, return_inverse=True) for column in labels.T]
    sizes = tuple(len(values) for values, _ in columns)
    expected = np.indices(sizes, dtype=np.int16).reshape(len(sizes), -1).T if np.prod(sizes) == len(labels) else None
    if expected is None or not np.array_equal(np.stack([c for _, c in columns], 1), expected):
        raise ValueError(f"{path}: the labels do not list every combination of their values in order "
                         f"({len(labels)} rows, {' x '.join(map(str, sizes))} values), so it is not 3dshapes.h5")
    return sizes


def unpack(source, target):
    """Copies the HDF5 data set `source` (n, ...) into an uncompressed .npy file, a slab at a time.

    Written under a temporary name and renamed, so that an interruption leaves nothing half-made.
    """
    size = source.dtype.itemsize * int(np.prod(source.shape))
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)                           # of an earlier attempt that was killed
        free = shutil.disk_usage(target.parent).free
        if free < 1.02 * size:
            raise OSError(f"unpacking needs {size / 1e9:.1f} GB in {target.parent}, which has {free / 1e9:.1f} GB free")
        with open(temporary, "wb") as file, tqdm(total=size, desc=f"unpacking into {target.name}", unit="B",
                                                 unit_scale=True, mininterval=1.0) as bar:
            np.lib.format.write_array_header_1_0(file, dict(descr=source.dtype.str, fortran_order=False,
                                                            shape=source.shape))
            rows = rows_at_a_time(source)
            for start in range(0, len(source), rows):
                slab = source[start:start + rows]
                slab.tofile(file)
                bar.update(slab.nbytes)
        os.replace(temporary, target)
    except PermissionError:
        raise PermissionError(f"{target.parent} is not writable, and the pictures must be unpacked there once: make it "
                              "writable, or copy the data file elsewhere") from None
    except BaseException as error:                                  # also KeyboardInterrupt: leave nothing half-made
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and "unpacking needs" not in str(error):
            raise OSError(f"could not unpack into {target} ({error}): damaged source, or full disk?") from None
        raise


class HDF5(Dataset):
    """A file in DeepMind's 3dshapes.h5 layout.

    Its chunks span thousands of pictures, so reading single ones is hopeless: all are unpacked once into a
    .npy file beside it (in `cache`, if given), from which single ones are read. The copy's name holds the
    source's size and time; when the source has changed, a new copy replaces the old.
    """

    def __init__(self, path, cache=None):
        path = Path(path)
        with open_hdf5(path) as file:
            images, labels = file["images"], file["labels"]
            if len(images) != len(labels):
                raise ValueError(f"{path}: {len(images)} images and {len(labels)} labels: not 3dshapes.h5's layout")
            sizes = factor_sizes_of(labels[:], path)
            ours, shapes3d = file.attrs.get("source") == SOURCE, sizes == FACTOR_SIZES
            super().__init__("built-in world" if ours else "Shapes3D" if shapes3d else path.stem,
                             FACTOR_NAMES if ours or shapes3d else [f"factor_{k}" for k in range(len(sizes))], sizes)
            stat, folder = path.stat(), Path(cache or path.parent)
            copy = folder / f"{path.name}.{stat.st_size:x}-{stat.st_mtime_ns:x}.npy"
            if not copy.exists():
                unpack(images, copy)
                for old in folder.glob(f"{path.name}.*.npy"):
                    if old != copy and re.fullmatch(r"\.[0-9a-f]+-[0-9a-f]+\.npy", old.name[len(path.name):]):
                        old.unlink()
        self.offset = np.load(copy, mmap_mode="r").offset                               # bytes before picture 0
        self.file = open(copy, "rb", buffering=0)                   # read, not mapped: mapped pages count as memory

    def pixels(self, index):
        pictures = np.empty((len(index), SIDE, SIDE, 3), np.uint8)                      # (B, H, W, 3)
        for picture, i in zip(pictures, index.tolist()):
            self.file.seek(self.offset + i * picture.nbytes)
            if self.file.readinto(picture) != picture.nbytes:
                raise OSError(f"{self.file.name} ends before picture {i}: delete it, it will be unpacked again")
        return pictures


# ---- opening and writing --------------------------------------------------------------------------

def open_dataset(path=None, cache=None):
    """The built-in world (no path), or the data set in a file. `cache`: a folder for unpacked copies.

    Raises ValueError or OSError with one sentence about what is wrong with the file.
    """
    return World() if path is None else HDF5(path, cache)


def write_world(path):
    """Writes the built-in world to `path` in DeepMind's layout: `images` and `labels`, gzip, automatic chunks."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    if path.exists():
        raise ValueError(f"{path} exists: name another file, or delete it first")
    world = World()
    try:
        with h5py.File(temporary, "w") as file:
            file.attrs["source"] = SOURCE
            images = file.create_dataset("images", (len(world), SIDE, SIDE, 3), np.uint8, chunks=True,
                                         compression="gzip", compression_opts=1)
            rows = rows_at_a_time(images)
            for start in tqdm(range(0, len(world), rows), desc=f"writing {path.name}", unit="slab"):
                index = np.arange(start, min(start + rows, len(world)))
                images[start:start + rows] = np.concatenate([world.pixels(part) for part in np.array_split(
                    index, max(1, len(index) // 256))])
            factors = world.factors(np.arange(len(world))).numpy()
            file["labels"] = np.stack([values[f] for values, f in zip(FACTOR_VALUES, factors.T)], 1)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):              # h5py reports a full disk as either
            raise OSError(f"could not write {path} ({str(error).splitlines()[0]}): is the folder there, writable, and "
                          "has it a few GB free?") from None
        raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the HDF5 file to write")
    try:
        write_world(parser.parse_args().file)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
