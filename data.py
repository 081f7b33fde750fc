# SPDX-License-Identifier: MIT
"""The data sets behind one small interface: files, folders of images, and the built-in world.

Cars3D comes as a folder of MATLAB files; with SciPy's loadmat this makes the file read here:

    # numpy as np, Path of pathlib, Image of PIL, loadmat of scipy.io
    cars = []
    for file in sorted(Path("data/cars").glob("car_*_mesh.mat")):
        views = loadmat(file)["im"].transpose(4, 3, 0, 1, 2).reshape(96, 128, 128, 3)
        small = [Image.fromarray(view).resize((64, 64), Image.Resampling.LANCZOS) for view in views]
        cars.append(np.stack([np.asarray(image) for image in small]))
    np.savez_compressed("cars3d.npz", images=np.stack(cars, 1).reshape(-1, 64, 64, 3))

Letters: B batch, K factors, A attributes, n images of a file or folder.
"""
import colorsys
import contextlib
import math
import os
import pickle
import re
import secrets
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

SIDE = 64  # height and width of all images, in pixels
UNREADABLE = (  # what Pillow, h5py, numpy and torch raise for missing or damaged files
    OSError, EOFError, ValueError, RuntimeError, LookupError, SyntaxError, struct.error, zlib.error,
    zipfile.BadZipFile, pickle.UnpicklingError, Image.DecompressionBombError,
)


# ---- 1. The interface ----

class InputError(Exception):
    """A user's mistake, in one sentence. Docstrings that end with its name: it may be raised."""


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path, renamed to `path` at the end, removed on errors."""
    path = Path(path)
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Dataset:
    """Images by number and, where they are known, their factors of variation or attributes.

    factor_names, factor_sizes: tuples of length K, empty without factors. With factors, the images
    are all their combinations in order, the last factor varying fastest.
    attributes: int64 (len, A) of 0 and 1, or None. Indices, 0..len-1, and factors may be lists,
    arrays or tensors.
    """

    name = ""
    factor_names = ()
    factor_sizes = ()
    attributes = None

    def __len__(self) -> int:
        return math.prod(self.factor_sizes)

    def pixels(self, index: np.ndarray) -> np.ndarray:
        """index: int64 array (B,). Returns uint8 (B, 64, 64, 3)."""
        raise NotImplementedError

    def checksum(self) -> str:
        """Tells data sets apart: a CRC of 64 evenly spaced images."""
        index = np.linspace(0, len(self) - 1, 64).astype(np.int64)
        return f"{zlib.crc32(self.pixels(index).tobytes()):08x}"

    def images(self, index) -> torch.Tensor:
        """index: (B,). Returns float32 (B, 3, 64, 64) in [-1, 1]."""
        pixels = torch.from_numpy(self.pixels(np.asarray(index)))  # (B, 64, 64, 3)
        return pixels.permute(0, 3, 1, 2) / 127.5 - 1              # (B, 3, 64, 64)

    def factors(self, index) -> torch.Tensor:
        """index: (B,). Returns int64 (B, K): each factor's value, 0..size-1."""
        values = np.unravel_index(np.asarray(index), self.factor_sizes)  # K times (B,)
        return torch.from_numpy(np.stack(values, axis=1))

    def index(self, factors) -> torch.Tensor:
        """factors: (B, K), each 0..size-1. Returns int64 (B,): the images that have them."""
        values = tuple(np.asarray(factors).T)  # K times (B,)
        return torch.from_numpy(np.ravel_multi_index(values, self.factor_sizes))


def open_dataset(path: str | Path | None = None, cache: str | Path | None = None) -> Dataset:
    """The built-in world (no path), or the data set in a file or folder, known by its contents.

    cache: folder for the unpacked images; without it they lie beside the data. InputError.
    """
    if not path:
        return World()
    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise InputError(f"there is no {path}: correct --data (without it: the built-in world)")
    try:
        if path.is_dir():
            return open_folder(path, cache)
        if zipfile.is_zipfile(path):
            with np.load(path) as file:
                return open_arrays(path, cache, file, read_npz)
        with h5py.File(path) as file:
            return open_arrays(path, cache, file, read_hdf5)
    except UNREADABLE as error:
        raise InputError(f"cannot unpack {path} ({error}): it must be a folder, .npz or HDF5 file, "
                         "undamaged; name a --cache if nothing can be written beside it") from error


# ---- 2. What people download ----

class CachedDataset(Dataset):
    """Images of a file or folder, unpacked once into an .npy file that is mapped into memory.

    files: the sources. The .npy file's name has a checksum of their inodes, sizes and times: when
    one is replaced, they are unpacked again.
    shape: (n, 64, 64, 3) or grey (n, 64, 64). blocks: yields the bytes in order.
    """

    def __init__(self, path, cache, files, shape, blocks):
        facts = []
        for source in files:
            stat = source.stat()
            facts.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        state = f"{zlib.crc32(repr(facts).encode()):08x}"
        self.name = path.name
        file = Path(cache or path.parent) / f"{path.name}.{state}.cache.npy"
        try:
            self.stored = np.load(file, mmap_mode="r")
        except UNREADABLE:  # not there, or cut short
            unpack(file, shape, blocks)
            self.stored = np.load(file, mmap_mode="r")

    def __len__(self):
        return len(self.stored)

    def pixels(self, index):
        pixels = np.asarray(self.stored)[index]  # (B, 64, 64, 3) or (B, 64, 64)
        if pixels.ndim == 3:  # grey
            if self.name == "dSprites":  # 0 and 1
                pixels = 255 * np.minimum(pixels, 1)
            pixels = np.stack([pixels] * 3, axis=-1)
        return pixels  # (B, 64, 64, 3)


def unpack(file, shape, blocks):
    """Writes blocks of bytes, in all uint8 of this shape, as an .npy file, renamed at the end.

    What a killed process left is overwritten. Two at once do no harm: they write the same bytes.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    bar = tqdm(desc=f"unpacking {file.name}", total=math.prod(shape), unit="B", unit_scale=True)
    try:
        with bar, open(partial, "r+b", opener=open_or_create) as output:
            np.lib.format.write_array_header_1_0(output, header)
            for block in blocks:
                bar.update(output.write(block))
        with contextlib.suppress(FileNotFoundError):  # the other process was faster
            partial.replace(file)
    except (InputError, *UNREADABLE):
        partial.unlink(missing_ok=True)
        raise


def open_or_create(path, flags):
    """For `open`: in one call, so that no other process renames the file in between."""
    return os.open(path, flags | os.O_CREAT, 0o666)


SHAPES3D = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
MPI3D = ("color", "shape", "size", "camera_height", "background", "horizontal", "vertical")
GRIDS = (  # name (else the file's), factors, sizes
    ("Shapes3D", SHAPES3D, (10, 10, 10, 8, 4, 15)),
    ("", MPI3D, (6, 6, 2, 3, 3, 40, 40)),  # toy, realistic, real
    ("", MPI3D, (4, 4, 2, 3, 3, 40, 40)),  # real, complicated shapes
    ("dSprites", ("shape", "scale", "orientation", "x", "y"), (3, 6, 40, 32, 32)),
    ("Cars3D", ("elevation", "azimuth", "object"), (4, 24, 183)),
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ATTRIBUTE_LIST = "list_attr_celeba.txt"


def open_arrays(path, cache, file, read):
    """The data set in an open file, whose images `read` reads."""
    images = "imgs" if "imgs" in file else "images"
    if images not in file:
        raise InputError(f"{path} has no `images` or `imgs` but {', '.join([*file][:9])}")
    shape, dtype, blocks = read(file, images)
    if shape[1:] not in ((SIDE, SIDE, 3), (SIDE, SIDE)) or dtype != np.uint8:
        raise InputError(f"{path} needs images of uint8 (n, 64, 64, 3) or (n, 64, 64), not of "
                         f"{dtype} {shape}")
    labels = np.empty((0, 0))
    for key in ("labels", "latents_classes", "latents/classes"):
        if key in file:
            labels = file[key][:]  # (n, K)
    title, names, sizes = find_factors(path, shape[0], labels)
    ds = CachedDataset(path, cache, [path], shape, blocks)
    ds.name = title or ds.name
    ds.factor_names, ds.factor_sizes = names, sizes
    return ds


def read_hdf5(file, key):
    """Shape, dtype and blocks of the images, which are read when asked for."""
    images = file[key]
    rows = images.chunks[0] if images.chunks else 1000  # each chunk is decompressed once
    blocks = (images[i:i + rows] for i in range(0, len(images), rows))
    return images.shape, images.dtype, blocks


def read_npz(file, key):
    """The same of an .npz, image by image."""
    stream = file.zip.open(f"{key}.npy")
    np.lib.format.read_magic(stream)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    blocks = (stream.read(math.prod(shape[1:])) for _ in range(shape[0]))
    return shape, "Fortran order" if fortran else dtype, blocks


def find_factors(path, n, labels):
    """Title, names and sizes of the factors: from labels (n, K) or, without any, from n."""
    sizes = ()
    for column in labels.T:
        size = len(np.unique(column))
        if size > 1:  # dSprites has one colour
            sizes += (size,)
    found = "", tuple(f"factor_{k}" for k in range(len(sizes))), sizes
    for grid in GRIDS:
        if sizes in ((), grid[2]) and math.prod(grid[2]) == n:
            found = grid
    in_order = not sizes or np.array_equal(np.unique(labels, axis=0), labels)
    if math.prod(found[2]) != n or not in_order:
        raise InputError(f"{path} has {n} images and labels of {sizes} values: `labels` (n, K) must"
                         " list all combinations in order, the last varying fastest")
    return found


def open_folder(path, cache):
    """A folder of images, also in subfolders; CelebA if its list of attributes is in or beside it.

    CelebA's images, 000001.jpg and so on, are resized to 96, then cropped to 64, as by the authors
    of TAD.
    """
    files = []
    for file in sorted(path.rglob("*"), key=str):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.suffix.lower() in SUFFIXES and not hidden:
            files.append(file)
    lists = [*path.glob(ATTRIBUTE_LIST), *path.parent.glob(ATTRIBUTE_LIST)]
    side, attributes = SIDE, None
    if lists and all(re.fullmatch("[0-9]{6}", file.stem) for file in files):
        side = 96
        attributes = read_attributes(lists[0])
        files = [file for file in files if file.stem in attributes]
        print(f"{path}: {len(files)} images are in {lists[0].name}")
    if not files:
        raise InputError(f"{path} has no JPEG, PNG or WebP image (CelebA: in its list)")
    shape = (len(files), SIDE, SIDE, 3)
    blocks = (load_image(file, side) for file in files)
    ds = CachedDataset(path, cache, files + lists, shape, blocks)
    if attributes:
        ds.name = "CelebA"
        ds.attributes = np.array([attributes[file.stem] for file in files])  # (len, A)
    return ds


def read_attributes(file):
    """From CelebA's list: a file's name, without suffix, -> A times 0 or 1."""
    attributes = {}
    for line in file.read_text("utf-8").splitlines():
        words = line.split()
        if len(words) == 41:  # a file and 40 times 1 or -1; the last line may be cut short
            attributes[Path(words[0]).stem] = [int(word == "1") for word in words[1:]]
    return attributes


def load_image(file, side):
    """Resizes the shorter side to `side` and crops the centre: uint8 (64, 64, 3)."""
    try:
        image = ImageOps.exif_transpose(Image.open(file))  # as the camera was held
        if image.mode.startswith("I"):  # 16 bits
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        image = image.convert("RGB")
    except UNREADABLE as error:
        raise InputError(f"{file} is no readable image, remove it ({error})") from error
    width = side * image.width // min(image.size)
    height = side * image.height // min(image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left = round((width - SIDE) / 2)
    top = round((height - SIDE) / 2)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))  # (64, 64, 3)


# ---- 3. The built-in world ----
# A room with sky, three walls, a floor, and an object with its shadow, by ray casting. Fitted to 13
# images of 3D Shapes (Burgess and Kim 2018): the same factors, other images, other scores.
# x points right, y away from the camera at orientation 0, z up; the object stands at (0, 0, 0).
# G: geometries (scale x shape x orientation, 480). R: rays (64*SAMPLES * 64*SAMPLES).

SCALES = np.linspace(0.75, 1.25, 8)
ORIENTATIONS = np.linspace(-30, 30, 15)  # degrees
SAMPLES = 3           # along a pixel's side
UP = np.array([[0], [0], [1]])
CAMERA = np.array([[0.0], [-10.0], [3.0]])  # it looks horizontally
FIELD_OF_VIEW = 50.0  # degrees
ROOM = 14.0           # from the room's axis to each wall
WALL_HEIGHT = 8.0
RADIUS = (1.4, 1.5, 1.7, 1.3)  # of cube (half its side), cylinder, sphere, capsule at scale 1
LAMP = np.array([[-5.8], [1.8], [30.0]])  # it shines straight down
BEAM = 10.0           # how narrowly: the exponent of a cosine
LAMPLIGHT = 0.95      # brightness straight below it; 1 is a surface's own colour
AMBIENT = 0.343       # brightness everywhere
HEADLIGHT = 0.593     # brightness of what faces the camera
HIGHLIGHT = 0.115     # white, where the object faces the lamp
SKY = (0.600, 0.886, 0.976)  # red, green, blue


# Where rays from o, (3, 1) or (3, R), in directions d (3, R) meet a shape around the origin: the
# distance in units of d (R,), infinite for a miss, and the outward normal (3, R).

def nearest(a, b):
    """The nearer of two hits (distance, normal)."""
    nearer = b[0] < a[0]
    return np.where(nearer, b[0], a[0]), np.where(nearer, b[1], a[1])


def hit_cube(o, d, half):
    """The last entry into its three slabs, if before the first exit."""
    sign = np.sign(d)
    enter = (-sign * half - o) / d  # (3, R)
    leave = (sign * half - o) / d   # (3, R)
    distance = enter.max(0)
    hit = (distance > 0) & (distance < leave.min(0))
    return np.where(hit, distance, np.inf), -sign * (enter == distance)


def hit_sphere(o, d, radius):
    """The first of its two points."""
    a = (d * d).sum(0)  # a x^2 + 2 b x + c = 0
    b = (o * d).sum(0)
    c = (o * o).sum(0) - radius ** 2
    distance = (-b - np.sqrt(b * b - a * c)) / a  # nan for a miss
    normal = (o + distance * d) / radius          # (3, R)
    return np.where(distance > 0, distance, np.inf), normal


def hit_cylinder(o, d, radius, half):
    """Upright: a circle from above, between heights -half and half; then its flat top."""
    flat = 1 - UP
    side, normal = hit_sphere(o * flat, d * flat, radius)
    height = o[2] + side * d[2]
    side = np.where(np.abs(height) <= half, side, np.inf)
    top = (half - o[2]) / d[2]
    x, y, _ = o + top * d
    hit = (top > 0) & (x * x + y * y < radius ** 2)
    return nearest((side, normal), (np.where(hit, top, np.inf), UP))


def hit_object(scale, shape, o, d):
    """The object, which stands on the floor."""
    radius = scale * RADIUS[shape]
    half = 2 * radius if shape == 3 else radius  # half the height
    o = o - half * UP
    if shape == 0:
        return hit_cube(o, d, half)
    if shape == 1:
        return hit_cylinder(o, d, radius, half)
    if shape == 2:
        return hit_sphere(o, d, radius)
    top = hit_sphere(o - radius * UP, d, radius)
    bottom = hit_sphere(o + radius * UP, d, radius)
    return nearest(hit_cylinder(o, d, radius, radius), nearest(top, bottom))


def camera(degrees):
    """Turned round the z axis: position (3, 1), view (3, 1), directions of rays (3, R)."""
    u = (np.arange(SIDE * SAMPLES) + 0.5) / (SIDE * SAMPLES) * 2 - 1
    x, z = np.meshgrid(u, -u)                          # right and up
    focal = 1 / np.tan(np.radians(FIELD_OF_VIEW / 2))  # 1 is half the image's side
    d = np.stack([x, np.full_like(x, focal), z]).reshape(3, -1)
    c = np.cos(np.radians(degrees))
    s = np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return turn @ CAMERA, turn @ [[0], [1], [0]], turn @ d


def light(point, normal, view):
    """Brightness without the lamp (R,), and what the lamp adds (R,), at points (3, R)."""
    to_lamp = LAMP - point  # (3, R)
    to_lamp = to_lamp / np.sqrt((to_lamp ** 2).sum(0))
    lamp = np.maximum((normal * to_lamp).sum(0), 0) * to_lamp[2] ** BEAM
    headlight = np.maximum(-(normal * view).sum(0), 0)
    return AMBIENT + HEADLIGHT * headlight, LAMPLIGHT * lamp


def cast_room(o, view, d):
    """The empty room: weights (5, R) of the colours of floor, wall, object, sky and white.

    Also where rays meet the floor (3, R), and what the lamp adds there (R,).
    """
    weights = np.zeros((5, d.shape[1]))
    weights[3] = 1  # sky
    first = np.full(d.shape[1], np.inf)  # distance of the nearest so far
    planes = (  # surface, axis, offset and normal on it; the floor last, for what is returned
        (1, 1, ROOM, -1),  # back wall
        (1, 0, -ROOM, 1),  # left wall
        (1, 0, ROOM, -1),  # right wall
        (0, 2, 0, 1),      # floor
    )
    for surface, axis, offset, inward in planes:
        distance = (offset - o[axis]) / d[axis]
        point = o + distance * d  # (3, R)
        seen = (distance > 0) & (distance < first) & (point[2] < WALL_HEIGHT)
        first[seen] = distance[seen]
        normal = inward * np.eye(3)[:, [axis]]  # (3, 1)
        dark, lamp = light(point, normal, view)
        weights[:, seen] = 0
        weights[surface, seen] = (dark + lamp)[seen]
    return weights, point, np.where(seen, lamp, 0)  # the floor's


def render(scale, shape, eye, room):
    """One geometry: weights (5, 64*64). eye, room: from `camera` and `cast_room`."""
    o, view, d = eye
    weights, point, lamp = room
    weights = weights.copy()
    floor = lamp > 0  # the lamp reaches all of it
    shadow, _ = hit_object(scale, shape, point[:, floor], (LAMP - point)[:, floor])
    weights[0, floor] -= np.where(np.isfinite(shadow), lamp[floor], 0)
    distance, normal = hit_object(scale, shape, o, d)
    seen = np.isfinite(distance)
    dark, lamp = light(o + distance[seen] * d[:, seen], normal[:, seen], view)
    weights[:, seen] = 0
    weights[2, seen] = dark + lamp
    weights[4, seen] = np.where(lamp > 0, HIGHLIGHT, 0)
    samples = weights.reshape(5, SIDE, SAMPLES, SIDE, SAMPLES)
    return samples.mean((2, 4)).reshape(5, -1)


class World(Dataset):
    """The built-in world: geometries are rendered at the start, colours are mixed on demand."""

    name = "built-in world"
    factor_names, factor_sizes = GRIDS[0][1:]

    def __init__(self):
        weights = np.empty((8, 4, 15, 5, SIDE ** 2), np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):  # rays that miss
            for k, degrees in enumerate(ORIENTATIONS):
                eye = camera(degrees)
                room = cast_room(*eye)
                for i, shape in np.ndindex(8, 4):
                    weights[i, shape, k] = render(SCALES[i], shape, eye, room)
        self.weights = torch.from_numpy(weights).flatten(0, 2)  # (G, 5, 64*64)
        hues = [colorsys.hsv_to_rgb(k / 10, 1, 1) for k in range(10)]
        self.hues = torch.tensor(hues)                   # (10, 3)
        self.sky_white = torch.tensor([SKY, (1, 1, 1)])  # (2, 3)

    def checksum(self):
        return self.name  # another machine may round a pixel differently

    def pixels(self, index):
        hues = self.hues[self.factors(index)[:, :3]]    # (B, 3, 3): surface, colour
        sky_white = self.sky_white.expand(len(hues), 2, 3)
        colours = torch.cat([hues, sky_white], 1)       # (B, 5, 3)
        weights = self.weights[index % len(self.weights)]  # the last three factors vary fastest
        images = 255 * colours.mT @ weights             # (B, 3, 64*64)
        images = images.clamp_(max=255).round_().to(torch.uint8)
        return images.view(-1, 3, SIDE, SIDE).permute(0, 2, 3, 1).numpy()
