"""The data sets behind one small interface: a built-in 3D Shapes world, and what people download.

    python data.py shapes3d.h5          # writes the built-in world as a file in DeepMind's layout

The built-in world has the six factors of 3D Shapes (Burgess and Kim 2018) with the same names, sizes and
order, rendered here by ray casting: a room with sky, walls, floor, and a shaded object with its shadow.
The pictures resemble DeepMind's but are not theirs, and scores on them must not be called Shapes3D scores.

Exports: open_dataset, hold_out, DATASETS, Dataset, World, Unpacked, write_world.  Left out: augmentation, loaders.

Letters:  B batch, H, W height and width (64), K factors, A attributes, n pictures of a file or folder,
G geometries (480 = scale x shape x orientation), S samples along a pixel's side, R rays.
"""
import argparse
import colorsys
import contextlib
import hashlib
import math
import mmap
import os
import re
import shutil
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

FACTOR_NAMES = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
FACTOR_SIZES = (10, 10, 10, 8, 4, 15)                               # shapes: cube, cylinder, sphere, capsule
FACTOR_VALUES = (np.arange(10) / 10, np.arange(10) / 10, np.arange(10) / 10, np.linspace(0.75, 1.25, 8),
                 np.arange(4.0), np.linspace(-30, 30, 15))          # as DeepMind's labels give them
FACTORS = {"shapes3d": (FACTOR_NAMES, FACTOR_SIZES),
           "mpi3d": (("color", "shape", "size", "camera_height", "background", "horizontal", "vertical"),
                     (6, 6, 2, 3, 3, 40, 40)),
           "dsprites": (("color", "shape", "scale", "orientation", "x", "y"), (1, 3, 6, 40, 32, 32)),
           "cars3d": (("elevation", "azimuth", "object"), (4, 24, 183))}
TITLES = {"shapes3d": "Shapes3D", "mpi3d": "MPI3D", "dsprites": "dSprites", "cars3d": "Cars3D", "celeba": "CelebA"}
DATASETS = (*TITLES, "folder")
SIDE = 64                                                           # pixels


# ---- the interface --------------------------------------------------------------------------------

class Dataset:
    """Pictures by number and, where they are all combinations of some factors, the last varying fastest, by these.

    It has: name (for tables), image_size (pixels a side), factor_names and factor_sizes (tuples of K, empty without),
    attribute_names (tuple of A), attributes (int64 (len, A) of 0 and 1, or None). Indices and factors may be lists,
    arrays or tensors; tensors come out.
    """
    image_size, attribute_names, attributes = SIDE, (), None

    def __init__(self, name, factor_names, factor_sizes):
        self.name, self.factor_names, self.factor_sizes = name, tuple(factor_names), tuple(factor_sizes)

    def __len__(self):
        return math.prod(self.factor_sizes)

    def pixels(self, index):
        """index: (B,) int array. Returns uint8 (B, H, W, 3)."""
        raise NotImplementedError

    def images(self, index):
        """index: (B,) in 0..len-1. Returns float32 (B, 3, 64, 64) in [-1, 1]."""
        pixels = torch.from_numpy(self.pixels(self.checked(index)))                     # (B, H, W, 3)
        return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)                   # (B, 3, H, W)

    def factors(self, index):
        """index: (B,) in 0..len-1. Returns int64 (B, K): the value of every factor, 0..size-1. ValueError if K = 0."""
        if not self.factor_sizes:
            raise ValueError(f"{self.name} has no factors, only pictures: what needs factors cannot be done with it")
        return torch.from_numpy(np.stack(np.unravel_index(self.checked(index), self.factor_sizes), -1))     # (B, K)

    def index(self, factors):
        """factors: (B, K), each 0..size-1. Returns int64 (B,): the inverse of `factors`. ValueError."""
        factors = np.asarray(factors)
        if not self.factor_sizes or factors.ndim != 2 or factors.shape[1] != len(self.factor_sizes):
            raise ValueError(f"factors must have shape (B, {len(self.factor_sizes)}), not {factors.shape}")
        if len(factors) and (factors.min() < 0 or (factors >= self.factor_sizes).any()):
            raise ValueError(f"factors out of range: each must be 0 or more and below {self.factor_sizes}")
        return torch.from_numpy(np.ravel_multi_index(tuple(factors.T), self.factor_sizes).astype(np.int64))    # (B,)

    def checked(self, index):
        """index as an int64 array (B,), or ValueError."""
        index = np.asarray(index, dtype=np.int64)
        if index.ndim != 1 or (len(index) and not (0 <= index.min() and index.max() < len(self))):
            raise ValueError(f"index must be a list of numbers from 0 to {len(self) - 1}, not {index}")
        return index


# ---- the built-in world: where a ray meets an object ----------------------------------------------
# All shapes are centred on the origin. o: (3,) or (R, 3) where rays start; d: (R, 3) their directions.
# Each returns the distance (R,), infinite for a miss, and the outward normal (R, 3), anything for a miss.

def nearest(a, b):
    """Of two hits (distance, normal) the nearer one, ray by ray."""
    nearer = b[0] < a[0]
    return np.where(nearer, b[0], a[0]), np.where(nearer[:, None], b[1], a[1])


def hit_round(o, d, radius, axes=(1, 1, 1), z=0.0, half=np.inf):
    """A sphere with its centre at height z; or, with axes (1, 1, 0), the side of an upright cylinder, -half to half."""
    o, axes = o - np.array([0, 0, z]), np.array(axes)
    flat_o, flat_d = o * axes, d * axes
    a, b, c = (flat_d * flat_d).sum(-1), (flat_o * flat_d).sum(-1), (flat_o * flat_o).sum(-1) - radius ** 2
    distance = (-b - np.sqrt(b * b - a * c)) / a                    # the smaller solution of a x^2 + 2 b x + c = 0
    distance = np.where(distance > 0, distance, np.inf)             # a comparison with nan is false
    point = o + distance[:, None] * d                                                   # (R, 3)
    return np.where(np.abs(point[:, 2]) <= half, distance, np.inf), point * axes / radius


def hit_box(o, d, half):
    """A cube of side 2 * half: the last of the three entries into its slabs, if before the first exit."""
    enter = (-np.sign(d) * half - o) / d                                                # (R, 3)
    leave = (np.sign(d) * half - o) / d                                                 # (R, 3)
    first = enter.max(-1)
    distance = np.where((first > 0) & (first < leave.min(-1)), first, np.inf)
    face = np.eye(3)[enter.argmax(-1)]                                                  # (R, 3), the face's axis
    return distance, -np.sign(d) * face


def hit_top(o, d, radius, half):
    """The flat top of an upright cylinder."""
    distance = (half - o[..., 2]) / d[:, 2]
    point = o + distance[:, None] * d                                                   # (R, 3)
    inside = (distance > 0) & ((point[:, :2] ** 2).sum(-1) <= radius ** 2)
    return np.where(inside, distance, np.inf), np.broadcast_to([0.0, 0.0, 1.0], d.shape)


def hit_object(shape, scale, o, d):
    """The object's distance (R,) and normal (R, 3); o in room coordinates. Shapes as in 3D Shapes' labels."""
    half, radius = (0.62 * scale, 0.62 * scale, 0.72 * scale, 1.24 * scale)[shape], 0.62 * scale
    o = o - np.array([0, 0, half])                                  # it stands on the floor
    if shape == 0:
        return hit_box(o, d, half)
    if shape == 1:
        return nearest(hit_round(o, d, radius, (1, 1, 0), half=half), hit_top(o, d, radius, half))
    if shape == 2:
        return hit_round(o, d, half)
    straight = half - radius                                        # a capsule: a cylinder between two half spheres
    return nearest(hit_round(o, d, radius, (1, 1, 0), half=straight),
                   nearest(hit_round(o, d, radius, z=straight), hit_round(o, d, radius, z=-straight)))


# ---- the built-in world: the room -----------------------------------------------------------------

CAMERA_DISTANCE, CAMERA_HEIGHT, FOCAL = 4.3, 1.7, 1.9               # focal length: 1 is half the picture
ROOM, WALL_HEIGHT = 6.0, 3.6                                        # half the room's side; its walls
LIGHT = np.array([-0.5, -0.6, 1.0]) / np.linalg.norm([-0.5, -0.6, 1.0])
WALL_SHADES = (1.0, 0.55, 0.7)                                      # back, left, right
SHADOW, SKY = 0.3, (0.61, 0.89, 0.98)                               # brightness of the floor in the shadow; a colour
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
    """The share of each surface (floor, wall, object, sky) in every ray, (R, 4); who sees floor, (R,); where."""
    weights, nearest_hit = np.zeros((len(d), 4)), np.full(len(d), np.inf)
    weights[:, 3] = 1                                               # sky, until something is in front of it
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


def render(scale, shape, room):
    """One geometry: weights (H * W, 4) of floor, wall, object and sky. `room`: camera and cast_room's answer."""
    (o, d, _, floor, points), weights = room, room[2].copy()
    near = floor & (np.abs(points[:, :2]) < 4).all(-1)              # no shadow is longer than that
    lit, _ = hit_object(shape, scale, points[near], np.broadcast_to(LIGHT, (near.sum(), 3)))
    weights[near, 0] = np.where(np.isfinite(lit), SHADOW, 1.0)
    distance, normal = hit_object(shape, scale, o, d)
    seen = np.isfinite(distance)
    weights[seen] = 0
    weights[seen, 2] = np.minimum(0.45 + 0.75 * np.clip(normal[seen] @ LIGHT, 0, 1), 1)      # ambient, diffuse
    return weights.reshape(SIDE, SAMPLES, SIDE, SAMPLES, 4).mean((1, 3)).reshape(-1, 4)


class World(Dataset):
    """The built-in world: 480 geometries are rendered at the start; a picture is linear in its four colours."""

    def __init__(self):
        super().__init__("built-in world", FACTOR_NAMES, FACTOR_SIZES)
        shape = FACTOR_SIZES[3:]
        self.weights = torch.empty(int(np.prod(shape)), SIDE ** 2, 4)                   # (G, H*W, 4)
        with np.errstate(divide="ignore", invalid="ignore"):        # rays that miss, or never meet a plane
            for k, degrees in enumerate(FACTOR_VALUES[5]):
                o, d = camera(degrees)
                room = (o, d, *cast_room(o, d))
                for i, j in np.ndindex(shape[:2]):
                    g = np.ravel_multi_index((i, j, k), shape)
                    self.weights[g] = torch.from_numpy(render(FACTOR_VALUES[3][i], j, room))
        self.hues = torch.tensor([colorsys.hsv_to_rgb(hue / 10, 1, 1) for hue in range(10)])   # (10, 3)
        self.sky = torch.tensor(SKY)

    def pixels(self, index):
        f = self.factors(index)                                                         # (B, 6)
        colours = torch.cat([self.hues[f[:, :3]], self.sky.expand(len(f), 1, 3)], 1)    # (B, 4, 3)
        geometry = torch.from_numpy(index % len(self.weights))                          # (B,), the last three factors
        picture = self.weights[geometry] @ colours                                      # (B, H*W, 3) in [0, 1]
        return (picture * 255).round().to(torch.uint8).view(-1, SIDE, SIDE, 3).numpy()


# ---- unpacked copies ------------------------------------------------------------------------------
# Single pictures are slow to read from what people download, so all are copied once, uncompressed, and the copy is
# mapped into memory: however large it is, only what is asked for is read. What is copied comes from a generator, which
# first tells what it has, then yields the pictures in blocks, uint8 (rows, ...), and at last bool (n,): the readable.

@contextlib.contextmanager
def whole(path):
    """A temporary path that becomes `path` at the end: after an error or Ctrl-C nothing half-made is left. OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                        # h5py reports a full disk as either
        why = str(error).split("\n")[0]
        raise OSError(f"could not write {path} ({why}): what was there before is unharmed; make room or name another "
                      "folder (--out, --cache), and go on (train.py --resume)") from None
    finally:
        if temporary.exists():
            temporary.unlink()


class Unpacked(Dataset):
    """The pictures of a file or folder, from an unpacked copy beside it or in the folder `cache`.

    source: a generator, see above, that has told the rest; used only if there is no copy of these very `files`.
    shape: (n, 64, 64, 3), or (n, 64, 64) of 0 and 1. attributes: their names, and int64 (n, A). Pictures that cannot be
    read are left out. Raises OSError, or ValueError when the source is damaged or the copy was cut short.
    """

    def __init__(self, source, path, cache, kind, files, shape, name, factor_names, factor_sizes, attributes=None):
        super().__init__(name, factor_names, factor_sizes)
        stats = [(os.path.relpath(file, path), os.path.exists(file) and os.stat(file)) for file in files]
        made_of = kind, [(file, stat and (stat.st_size, stat.st_mtime_ns)) for file, stat in stats]
        stem = path.name if not cache else f"{path.name}-{hashlib.sha256(repr(path).encode()).hexdigest()[:8]}"
        self.copy = Path(cache or path.parent) / f"{stem}.{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.npy"
        if not self.copy.exists():
            self.unpack(source, shape, re.escape(stem) + r"\.[0-9a-f]{16}\.npy(\.\d+\.tmp)?")
        try:
            self.stored = np.load(self.copy, mmap_mode="r")                             # (n, H, W, 3) or (n, H, W)
            readable = np.fromfile(self.copy, bool, offset=self.stored.offset + self.stored.nbytes)     # (n,)
        except (ValueError, EOFError):
            readable = ()
        if len(readable) != shape[0]:
            raise ValueError(f"{self.copy} was cut short: delete it, and it will be unpacked again")
        self.rows = np.flatnonzero(readable)                                            # (len,)
        if attributes:
            self.attribute_names, self.attributes = attributes[0], attributes[1][self.rows]             # (len, A)
        if missing := shape[0] - len(self):
            print(f"{path}: skipped {missing} of {shape[0]} images, unreadable or not listed", file=sys.stderr)
        if hasattr(mmap, "MADV_RANDOM"):
            self.stored.base.madvise(mmap.MADV_RANDOM)              # read nothing around what is asked for

    def unpack(self, source, shape, ours):
        """Writes the pictures into an .npy file and, behind them, one byte for each: 1 if it is readable. OSError."""
        with whole(self.copy) as temporary:
            self.copy.parent.mkdir(parents=True, exist_ok=True)
            for old in self.copy.parent.iterdir():                  # of what the source was, or of a killed process
                mine = re.fullmatch(ours, old.name) and old != self.copy
                if mine and (old.suffix == ".npy" or time.time() - old.stat().st_mtime > 60):
                    old.unlink()
            size, free = math.prod(shape) + shape[0], shutil.disk_usage(self.copy.parent).free
            if free < 1.02 * size:
                raise OSError(f"it needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
            with open(temporary, "wb") as file, tqdm(total=size, desc=f"unpacking into {self.copy.name}", unit="B",
                                                     unit_scale=True, mininterval=1.0) as bar:
                np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
                for block in source:
                    bar.update(file.write(block))

    def __len__(self):
        return len(self.rows)

    def pixels(self, index):
        rows, size = self.rows[index], self.stored[0].nbytes                            # (B,)
        if hasattr(mmap, "MADV_WILLNEED"):                          # ask the disk for all before waiting for the first
            for first in (self.stored.offset + rows * size).tolist():
                page = first - first % mmap.PAGESIZE
                self.stored.base.madvise(mmap.MADV_WILLNEED, page, first + size - page)
        pictures = np.asarray(self.stored)[rows]                                        # (B, H, W, 3) or (B, H, W)
        if pictures.ndim == 3:
            pictures = np.repeat(pictures[..., None] * np.uint8(255), 3, axis=-1)       # (B, H, W, 3)
        return pictures


# ---- what people download -------------------------------------------------------------------------
# Each generator first yields the arguments of Unpacked from `kind` on; kind is one of DATASETS if we know it.

SLAB = 16 * 2 ** 20                                                 # bytes of pixels held in memory at a time
SOURCE = "rendered by this EncDiff implementation's data.py; not DeepMind's 3D Shapes"      # a file's attribute
ATTRIBUTES = "list_attr_celeba.txt"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@contextlib.contextmanager
def reading(path):
    """Whatever h5py, zipfile, zlib, NumPy or we find wrong with a file becomes a ValueError with one sentence."""
    try:
        yield
    except Exception as error:
        why = str(error).split("\n")[0] or "it ends too early"
        raise ValueError(f"{path} is damaged, cut short or no data set we know ({why}): fetch it again") from None


def factor_sizes_of(labels, n):
    """Sizes of the factors whose combinations the labels (n, K) list in order, the last varying fastest. ValueError."""
    ranks = [np.unique(column, return_inverse=True)[1] for column in labels.T] if labels.ndim == 2 else []
    sizes = tuple(int(rank.max()) + 1 for rank in ranks)
    if not math.prod(sizes) == len(labels) == n or (np.ravel_multi_index(ranks, sizes) != np.arange(n)).any():
        raise ValueError(f"the {len(labels)} labels of {n} images do not list every combination of {sizes} in order")
    return sizes


def read_hdf5(path):
    """A file in the layout of DeepMind's 3dshapes.h5: theirs, the built-in world, or one with other factors."""
    with reading(path), h5py.File(path) as file:
        images = file["images"]
        if images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8:
            raise ValueError(f"`images` must be (n, 64, 64, 3) uint8, not {images.shape} {images.dtype}")
        sizes = factor_sizes_of(file["labels"][:], len(images))
        ours, theirs = file.attrs.get("source") == SOURCE, sizes == FACTORS["shapes3d"][1]
        names = FACTORS["shapes3d"][0] if ours or theirs else [f"factor_{k}" for k in range(len(sizes))]
        names, sizes = zip(*((name, size) for name, size in zip(names, sizes) if size > 1))
        yield ("shapes3d" if ours or theirs else "a file with other factors", [path], images.shape,
               "built-in world" if ours else TITLES["shapes3d"] if theirs else path.stem, names, sizes)
        chunk, size = images.chunks or (1, SIDE, SIDE, 3), SIDE * SIDE * 3              # chunks may span thousands
        rows = min(chunk[0] * max(1, SLAB // (chunk[0] * size)), 16 * SLAB // size)
        block = np.empty((min(rows, len(images)), SIDE, SIDE, 3), np.uint8)
        for start in range(0, len(images), rows):
            pictures = block[:len(images) - start]                                      # (rows, H, W, 3)
            for c in range(3) if chunk[3] == 1 else [slice(None)]:  # as the chunks are cut: twice as fast
                pictures[..., c] = images[start:start + rows, :, :, c]
            yield pictures
        yield np.ones(len(images), bool)


def read_npz(path):
    """The .npz of MPI3D, dSprites or Cars3D, told apart by their arrays. Pickled arrays are not touched."""
    with reading(path), zipfile.ZipFile(path) as file:
        key, tail = ("imgs", (SIDE, SIDE)) if "imgs.npy" in file.namelist() else ("images", (SIDE, SIDE, 3))
        with file.open(key + ".npy") as array:
            version, _ = np.lib.format.read_magic(array)
            shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version}_0")(array)
            whole_size = array.tell() + math.prod(shape) == file.getinfo(key + ".npy").file_size
            if shape[1:] != tail or dtype != np.uint8 or fortran or not whole_size:
                raise ValueError(f"`{key}` must be whole, (n, {str(tail)[1:-1]}) uint8, C order, not {shape} {dtype}")
            counts = {math.prod(FACTORS[kind][1]): kind for kind in ("mpi3d", "cars3d")}
            if key == "images" and shape[0] not in counts:
                raise ValueError(f"it has {shape[0]} images, not {' or '.join(map(str, counts))}")
            kind = "dsprites" if key == "imgs" else counts[shape[0]]
            sizes = factor_sizes_of(np.load(path)["latents_classes"], shape[0]) if key == "imgs" else FACTORS[kind][1]
            names, sizes = zip(*((k, size) for k, size in zip(FACTORS[kind][0], sizes, strict=True) if size > 1))
            yield kind, [path], shape, TITLES[kind], names, sizes   # without dSprites' colour, which is always the same
            while block := array.read(SLAB):
                yield block
        yield np.ones(shape[0], bool)


def read_attributes(path):
    """CelebA's list: the names of the attributes, and the values of each image file, bytes of 0 and 1. ValueError."""
    count, names, *lines = path.read_text("utf-8", "replace").rstrip().split("\n") + [""]
    names, values_of = tuple(names.split()), {}
    for file, *values in ((line.split() or [""]) for line in lines[:-1]):
        if len(values) != len(names) or not set(values) <= {"1", "-1"}:
            raise ValueError(f"{path}: not {len(names)} values of 1 or -1 for {file!r}: fetch it again")
        values_of[file] = bytes(value == "1" for value in values)
    if count.strip() != str(len(values_of)):
        raise ValueError(f"{path} lists {len(values_of)} images, not {count[:50]!r} as it says: fetch it again")
    return names, values_of


def picture(file, side):
    """An image file as uint8 (64, 64, 3), its shorter side resized to `side`, the centre cropped. None: unreadable."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (4 * side, 4 * side))                # a large JPEG is decoded at a fraction of its size
            image = ImageOps.exif_transpose(image).convert("RGB")
        image = image.resize([side * length // min(image.size) for length in image.size], Image.Resampling.BILINEAR)
        left, top = (round((length - SIDE) / 2) for length in image.size)
        return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))             # (H, W, 3)
    except Exception:                                               # Pillow raises many kinds for a damaged file
        return None


def read_folder(path, name):
    """A folder of images: CelebA if its list of attributes is inside, beside or above it, unless named "folder"."""
    files = sorted(os.path.join(root, file) for root, _, names in os.walk(path) for file in names
                   if file.lower().endswith(SUFFIXES))
    lists = [file for file in (place / ATTRIBUTES for place in (path, *path.parents[:2])) if file.is_file()]
    kind, side, names, values_of = "folder", SIDE, (), {os.path.basename(file): b"" for file in files}
    if lists and name != "folder":
        kind, side, (names, values_of) = "celeba", 96, read_attributes(lists[0])        # the crop of TAD's authors
    table = [list(values_of.get(os.path.basename(file), bytes(len(names)))) for file in files]          # (n, A)
    yield (kind, files + lists, (len(files), SIDE, SIDE, 3), TITLES.get(kind, path.name), (), (),
           (names, np.array(table, np.int64)) if names else None)
    readable, black = [], np.zeros((SIDE, SIDE, 3), np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), 256):
            pictures = list(pool.map(lambda file: picture(file, side) if os.path.basename(file) in values_of else None,
                                     files[start:start + 256]))
            readable += [one is not None for one in pictures]
            yield np.stack([black if one is None else one for one in pictures])         # (rows, H, W, 3)
    if not any(readable):
        raise ValueError(f"{path}: none of its {len(files)} images is readable and listed (a folder needs no list)")
    yield np.array(readable)


# ---- opening, holding out, writing ----------------------------------------------------------------

def open_dataset(path=None, cache=None, name=None):
    """The built-in world (no path), or the data set in a file or folder, recognised by what is in it.

    cache: folder for unpacked copies, made if missing; without, they lie beside the data. name: one of DATASETS, if
    it must be that. Raises ValueError or OSError with one sentence about what is wrong.
    """
    if name and (name not in DATASETS or not path):
        raise ValueError(f"data set {name!r}: name one of {', '.join(DATASETS)}, and give its file or folder by --data")
    if not path:
        return World()
    path = Path(os.path.abspath(path))
    if not path.exists():
        raise FileNotFoundError(f"there is no data file {path}: check the name, or leave --data out for our own world")
    source = (read_folder(path, name) if path.is_dir() else read_hdf5(path) if h5py.is_hdf5(path) else read_npz(path))
    kind, *rest = next(source)
    if name and name != kind:
        raise ValueError(f"{path} is not {name}, it is {kind}: name that, or nothing (celeba has {ATTRIBUTES})")
    return Unpacked(source, path, cache or None, kind, *rest)


def hold_out(ds, share=0.0, combinations="", seed=0):
    """Splits a data set into what training may see and what it may not: (seen, unseen), int64 arrays of indices.

    share: [0, 1), drawn at random with `seed`. combinations: "floor_hue=3,shape=1" keeps out the pictures that have
    both values; several such, with ";" between them, each keep out theirs. Raises ValueError.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share held out must be at least 0 and less than 1, not {share}")
    out = np.zeros(len(ds), bool)
    out[np.random.default_rng(seed).permutation(len(ds))[:max(round(share * len(ds)), share > 0)]] = True
    sizes = dict(zip(ds.factor_names, ds.factor_sizes))
    known = {f"{factor}={value}": (factor, value) for factor in sizes for value in range(sizes[factor])}
    for group in re.sub(r"\s", "", combinations).split(";") if combinations else ():
        where = dict(known.get(term, (None, None)) for term in group.split(","))
        if None in where or len(where) < len(group.split(",")):
            raise ValueError(f"{group!r} cannot be held out of {ds.name}: write it like floor_hue=3,shape=1, with "
                             f"values from 0 below {sizes or '(it has no factors)'}, each factor once")
        out.reshape(ds.factor_sizes)[tuple(where.get(factor, slice(None)) for factor in sizes)] = True  # a view of out
    if out.all():
        raise ValueError("nothing is left to train on: hold out less")
    return np.flatnonzero(~out), np.flatnonzero(out)                                    # (seen,), (unseen,)


def write_world(path):
    """Writes the built-in world to `path` in DeepMind's layout: `images` and `labels`, gzip, automatic chunks."""
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists: name another file, or delete it first")
    with whole(path) as temporary, h5py.File(temporary, "w") as file:
        world, file.attrs["source"] = World(), SOURCE
        images = file.create_dataset("images", (len(world), SIDE, SIDE, 3), np.uint8, chunks=True, compression="gzip",
                                     compression_opts=1)
        for start in tqdm(range(0, len(world), images.chunks[0]), desc=f"writing {path.name}", unit="slab"):
            index = np.arange(len(world))[start:start + images.chunks[0]]
            images[start:start + len(index)] = np.concatenate([world.pixels(part) for part in np.array_split(
                index, max(1, len(index) // 256))])                                     # (rows, H, W, 3)
        factors = world.factors(np.arange(len(world))).numpy()                          # (len, 6)
        file["labels"] = np.stack([values[f] for values, f in zip(FACTOR_VALUES, factors.T)], 1)        # (len, 6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the HDF5 file to write")
    try:
        write_world(parser.parse_args().file)
    except (ValueError, OSError) as error:
        parser.error(str(error))
