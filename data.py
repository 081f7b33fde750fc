"""The data sets behind one small interface, and the built-in world.

    python data.py world.h5        # writes the built-in world as a file in DeepMind's layout

The world has the factors of 3D Shapes (Burgess and Kim 2018) but other images and so other scores.

Exports: open_dataset, Dataset, World, write_world, atomic, InputError.
Letters: B batch, H, W height and width (64), K factors, A attributes, n images of a file or folder.
"""
import argparse
import colorsys
import contextlib
import math
import os
import secrets
import sys
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

SIDE = 64  # height and width of all images, in pixels


# ---- 1. The interface ----

class InputError(ValueError):
    """A user's mistake, in one sentence."""


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which is renamed to `path` at the end.

    It is removed after an error or Ctrl-C. Its name is random, so two processes never share it.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Dataset:
    """Images by number and, where they are known, their factors of variation.

    name: for tables.
    factor_names, factor_sizes: tuples of length K, empty without factors. With factors, the images
    are all their combinations in order, the last factor varying fastest.
    attribute_names: tuple of length A. attributes: int64 (len, A) of 0 and 1, or None.
    source: what identifies the images; kept results are compared with it.

    An index and factors may be lists, arrays or tensors; a wrong one is a ValueError.
    """

    factor_names = ()
    factor_sizes = ()
    attribute_names = ()
    attributes = None

    def __init__(self, name: str, source: dict):
        self.name = name
        self.source = source

    def __len__(self) -> int:
        return math.prod(self.factor_sizes)

    def pixels(self, index: np.ndarray) -> np.ndarray:
        """index: (B,) int64 in 0..len-1. Returns uint8 (B, H, W, 3)."""
        raise NotImplementedError

    def images(self, index) -> torch.Tensor:
        """index: (B,) in 0..len-1. Returns float32 (B, 3, H, W) in [-1, 1]."""
        pixels = torch.from_numpy(self.pixels(self.checked(index)))  # (B, H, W, 3)
        return pixels.permute(0, 3, 1, 2) / 127.5 - 1                # (B, 3, H, W)

    def factors(self, index) -> torch.Tensor:
        """index: (B,) in 0..len-1. Returns int64 (B, K): each factor's value, 0..size-1."""
        values = np.unravel_index(self.checked(index), self.factor_sizes)  # K times (B,)
        return torch.from_numpy(np.stack(values, axis=1))

    def index(self, factors) -> torch.Tensor:
        """factors: (B, K), each 0..size-1. Returns int64 (B,): the images that have them."""
        values = tuple(np.asarray(factors).T)  # K times (B,)
        return torch.from_numpy(np.ravel_multi_index(values, self.factor_sizes))

    def checked(self, index) -> np.ndarray:
        """index as an int64 array (B,), or a ValueError."""
        index = np.asarray(index, dtype=np.int64)
        if index.ndim != 1 or ((index < 0) | (index >= len(self))).any():
            raise ValueError(f"index must be (B,) in 0..{len(self) - 1}, not {index}")
        return index


def open_dataset(path: str | Path | None = None, cache: str | Path | None = None) -> Dataset:
    """The built-in world (no path), or the data set in a file or folder, known by its contents.

    cache: folder for the unpacked images; without it they lie beside the data. InputError.
    """
    if not path:
        return World()
    path = Path(os.path.abspath(os.path.expanduser(path)))
    if not path.exists():
        raise InputError(f"there is no {path}: correct --data (without it: the built-in world)")
    try:
        if path.is_dir():
            return open_folder(path, cache)
        with open(path, "rb") as file:
            start = file.read(4)
        if start == b"\x89HDF":
            return open_arrays(path, h5py.File, read_hdf5, cache)
        if start[:2] == b"PK":
            return open_arrays(path, np.load, read_npz, cache)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        advice = "it is damaged or cut short, fetch it again"
        if getattr(error, "errno", None):  # locked by a writer, no permission, ...
            advice = "the system refuses it"
        raise InputError(f"cannot read {path} or unpack it: {advice} ({error})") from error
    raise InputError(f"{path} is neither HDF5 nor .npz nor a folder of images")


# ---- 2. What people download ----

class CachedDataset(Dataset):
    """Images of a file or folder, unpacked once into an .npy file that is mapped into memory.

    files: what the images are read from. A checksum of their names, sizes and times of change is in
    the .npy file's name, so a change makes a new one. shape: (n, 64, 64, 3) or grey (n, 64, 64).
    blocks: yields the bytes in order.
    """

    def __init__(self, path, cache, files, shape, blocks):
        facts = []
        for source in files:
            stat = os.stat(source)
            name = os.path.relpath(source, path.parent)
            facts.append((name, stat.st_size, stat.st_mtime_ns))
        state = f"{zlib.crc32(repr(facts).encode()):08x}"
        super().__init__(path.name, {"file": path.name, "state": state})
        folder = Path(cache).expanduser() if cache else path.parent
        file = folder / f"{path.name}.{state}.cache.npy"
        if not file.exists():
            unpack(file, shape, blocks)
        self.stored = np.load(file, mmap_mode="r")  # (n, H, W, 3) or (n, H, W)
        self.scale = 255 if self.stored[:100].max() == 1 else 1  # dSprites: 0 and 1

    def __len__(self):
        return len(self.stored)

    def pixels(self, index):
        pixels = np.asarray(self.stored)[index] * np.uint8(self.scale)
        if pixels.ndim == 3:  # grey
            pixels = np.stack([pixels] * 3, axis=-1)
        return pixels  # (B, H, W, 3)


def unpack(file, shape, blocks):
    """Writes blocks of bytes, in all uint8 of this shape, as an .npy file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"cannot write into {file.parent}: name another folder by --cache")
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    bar = tqdm(desc=f"unpacking {file.name}", total=math.prod(shape), unit="B", unit_scale=True)
    with bar, atomic(file) as temporary, open(temporary, "wb") as output:
        np.lib.format.write_array_header_1_0(output, header)
        for block in blocks:
            bar.update(output.write(block))


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
ROWS = 1000  # images read at a time


def open_arrays(path, opener, reader, cache):
    """The data set in a file of images and labels (n, K); without labels n tells the factors."""
    with opener(path) as file:
        keys = [key for key in ("images", "imgs") if key in file]
        labels = np.empty((1, 0))
        for key in ("labels", "latents_classes", "latents/classes"):
            if key in file:
                labels = file[key][:]  # (n, K)
        if not keys:
            raise InputError(f"{path} has no `images` or `imgs` but {', '.join(file)}")
        shape, dtype, blocks = reader(file, keys[0])
        if shape[1:] not in ((SIDE, SIDE, 3), (SIDE, SIDE)) or dtype != np.uint8:
            raise InputError(f"{path} needs images of uint8 (n, 64, 64, 3) or (n, 64, 64), but has "
                             f"{shape} {dtype}")
        title, names, sizes = find_factors(path, shape[0], labels)
        ds = CachedDataset(path, cache, [path], shape, blocks)
        if getattr(file, "attrs", {}).get("source") == SOURCE:  # only HDF5 has it
            title = "built-in world"
    ds.name = title or path.name
    ds.factor_names = names
    ds.factor_sizes = sizes
    return ds


def read_hdf5(file, key):
    """Returns shape and dtype of the images, and blocks of them, read when they are asked for."""
    images = file[key]
    rows = images.chunks[0] if images.chunks else ROWS  # each chunk is decompressed once
    blocks = (images[i:i + rows] for i in range(0, len(images), rows))
    return images.shape, images.dtype, blocks


def read_npz(file, key):
    """The same of an .npz; pickled arrays in it are not touched."""
    stream = file.zip.open(f"{key}.npy")
    np.lib.format.read_magic(stream)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    size = math.prod(shape[1:])
    blocks = (stream.read(size) for _ in range(shape[0]))
    return shape, "Fortran order" if fortran else dtype, blocks


def find_factors(path, n, labels):
    """Title, names and sizes of the factors: from labels (n, K) or, if they are empty, from n."""
    columns, sizes = [], ()
    for column in labels.reshape(len(labels), -1).T:
        values, classes = np.unique(column, return_inverse=True)
        if len(values) > 1:
            columns.append(classes)  # (n,)
            sizes += (len(values),)
    found = "", tuple(f"factor_{k}" for k in range(len(sizes))), sizes
    for grid in GRIDS:
        if grid[2] == sizes or (not sizes and math.prod(grid[2]) == n):
            found = grid
    whole = math.prod(found[2]) == n
    if whole and sizes:
        whole = np.array_equal(np.ravel_multi_index(columns, sizes), np.arange(n))
    if not whole:
        raise InputError(f"{path} has {n} images and labels of {sizes} values: `labels` (n, K) must"
                         " list all combinations in order, the last varying fastest; images without"
                         " factors go into a folder as PNG or JPEG")
    return found


def open_folder(path, cache):
    """A folder of images, or CelebA if its list of attributes is inside, beside or above it."""
    files = image_files(path)
    for place in (path, path.parent, path.parent.parent):
        if (place / ATTRIBUTE_LIST).is_file():
            return open_celeba(path, cache, files, place / ATTRIBUTE_LIST)
    blocks = folder_blocks(path, files, SIDE)
    return CachedDataset(path, cache, files, (len(files), SIDE, SIDE, 3), blocks)


def open_celeba(path, cache, files, attribute_list):
    """The images in the list: a count, A names, lines of a file (any suffix) and A times 1 or -1.

    As by the authors of TAD, images are resized to 96 and the centre is cropped.
    """
    _, names, *lines = [*attribute_list.read_text("utf-8").split("\n"), ""]
    names = tuple(names.split())
    attributes = {}
    for line in filter(str.strip, lines):
        file, *values = line.split()
        if len(values) != len(names) or not set(values) <= {"1", "-1"}:
            raise InputError(f"{attribute_list} needs {len(names)} values of 1 or -1 in each line: "
                             f"mend or delete the one of {file}")
        attributes[Path(file).stem] = [int(value == "1") for value in values]
    used = [file for file in files if Path(file).stem in attributes]
    if len(used) < len(files):
        print(f"{path}: {len(used)} of {len(files)} images are used, the others are not in "
              f"{ATTRIBUTE_LIST}", file=sys.stderr)
    blocks = folder_blocks(path, used, side=96)
    shape = (len(used), SIDE, SIDE, 3)
    ds = CachedDataset(path, cache, [*used, attribute_list], shape, blocks)
    ds.name = "CelebA"
    ds.attribute_names = names
    ds.attributes = np.array([attributes[Path(file).stem] for file in used])  # (len, A)
    return ds


def image_files(folder: Path) -> list:
    """The image files in a folder, however deep, by name; links are followed.

    Left out are hidden files and folders, thumbnails (@eaDir), and the run folders of train.py.
    """
    def refuse(error):
        raise error

    files, visited = [], set()
    for here, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in visited or "run.json" in names:  # links may go round in circles
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = [s for s in sorted(subfolders) if not s.startswith((".", "@eaDir"))]
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                files.append(os.path.join(here, name))
    return sorted(files)


def folder_blocks(path, files, side):
    """Yields images (64, 64, 3)."""
    if not files:
        raise InputError(f"{path} has no JPEG, PNG or WebP image (of CelebA: none that is in "
                         f"{ATTRIBUTE_LIST})")
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), ROWS):
            part = files[start:start + ROWS]
            yield from pool.map(load_image, part, [side] * len(part))


def load_image(file: str, side: int) -> np.ndarray:
    """An image file as uint8 (64, 64, 3). InputError if it cannot be read.

    Turned as its EXIF entry says, 16-bit grey scaled, on white where it is transparent; its
    shorter side is resized to `side`, the centre cropped.
    """
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} is no readable image, remove it ({error})") from error
    if image.mode.startswith("I"):  # 0..65535
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    width = side * image.width // min(image.size)
    height = side * image.height // min(image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left = round((width - SIDE) / 2)
    top = round((height - SIDE) / 2)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))  # (H, W, 3)


# ---- 3. The built-in world ----
# A room with sky, three walls, a floor, and an object with its shadow, by ray casting. Fitted to 13
# images of DeepMind's 3D Shapes by least squares; lengths came out within 0.4 % of these numbers.
# x points right, y away from the camera at orientation 0, z up; the object stands at (0, 0, 0).
# G: geometries (scale x shape x orientation, 480). R: rays (H*SAMPLES * W*SAMPLES).

SOURCE = "rendered by this EncDiff implementation's data.py; not DeepMind's 3D Shapes"
HUES = np.arange(10) / 10
SCALES = np.linspace(0.75, 1.25, 8)
ORIENTATIONS = np.linspace(-30, 30, 15)  # degrees
SAMPLES = 3           # along a pixel's side
UP = np.array([[0], [0], [1]])
CAMERA = np.array([[0.0], [-10.0], [3.0]])  # its position; it looks horizontally
FIELD_OF_VIEW = 50.0  # degrees
ROOM = 14.0           # from the room's axis to each wall
WALL_HEIGHT = 8.0
RADIUS = (1.4, 1.5, 1.7, 1.3)  # of cube (half its side), cylinder, sphere, capsule at scale 1
LAMP = np.array([[-5.8], [1.8], [30.0]])  # its position; it shines straight down
BEAM = 10.0           # how narrowly: the exponent of a cosine
LAMPLIGHT = 0.95      # brightness straight below it; 1 shows a surface's own colour
AMBIENT = 0.343       # brightness everywhere
HEADLIGHT = 0.593     # brightness of what faces the camera
HIGHLIGHT = 0.115     # white, where the object faces the lamp
SKY = (0.600, 0.886, 0.976)  # red, green, blue


# Where rays from o, (3, 1) or (3, R), in directions d (3, R) meet a shape around the origin: the
# distance in units of d (R,), infinite for a miss, and the outward normal (3, R).

def nearest(a, b):
    """The nearer one of two hits (distance, normal)."""
    nearer = b[0] < a[0]
    return np.where(nearer, b[0], a[0]), np.where(nearer, b[1], a[1])


def hit_cube(o, d, half):
    """The last entry into its three slabs, if before the first exit."""
    enter = (-np.sign(d) * half - o) / d  # (3, R)
    leave = (np.sign(d) * half - o) / d   # (3, R)
    distance = enter.max(0)
    hit = (distance > 0) & (distance < leave.min(0))
    return np.where(hit, distance, np.inf), -np.sign(d) * (enter == distance)


def hit_sphere(o, d, radius, z=0.0):
    """A sphere with its centre at height z."""
    o = o - z * UP
    a = (d * d).sum(0)  # a x^2 + 2 b x + c = 0
    b = (o * d).sum(0)
    c = (o * o).sum(0) - radius ** 2
    distance = (-b - np.sqrt(b * b - a * c)) / a  # nan for a miss
    normal = (o + distance * d) / radius          # (3, R)
    return np.where(distance > 0, distance, np.inf), normal


def hit_side(o, d, radius, half):
    """The side of an upright cylinder: a circle from above, cut at heights -half and half."""
    flat = 1 - UP
    distance, normal = hit_sphere(o * flat, d * flat, radius)
    height = o[2] + distance * d[2]
    return np.where(np.abs(height) <= half, distance, np.inf), normal


def hit_top(o, d, radius, half):
    """The flat top of an upright cylinder."""
    distance = (half - o[2]) / d[2]
    x, y, _ = o + distance * d
    hit = (distance > 0) & (x * x + y * y < radius ** 2)
    return np.where(hit, distance, np.inf), UP


def hit_object(scale, shape, o, d):
    """The object, which stands on the floor; o in room coordinates."""
    radius = scale * RADIUS[shape]
    half = 2 * radius if shape == 3 else radius  # half the height
    o = o - half * UP
    if shape == 0:
        return hit_cube(o, d, half)
    if shape == 1:
        return nearest(hit_side(o, d, radius, half), hit_top(o, d, radius, half))
    if shape == 2:
        return hit_sphere(o, d, radius)
    ends = nearest(hit_sphere(o, d, radius, radius), hit_sphere(o, d, radius, -radius))
    return nearest(hit_side(o, d, radius, radius), ends)


def camera(degrees):
    """Turned round the room's axis: position (3, 1), view (3, 1), directions of rays (3, R)."""
    u = (np.arange(SIDE * SAMPLES) + 0.5) / (SIDE * SAMPLES) * 2 - 1
    x, z = np.meshgrid(u, -u)                          # right and up
    focal = 1 / np.tan(np.radians(FIELD_OF_VIEW / 2))  # 1 is half the image's side
    d = np.stack([x, np.full_like(x, focal), z]).reshape(3, -1)
    c = np.cos(np.radians(degrees))
    s = np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return turn @ CAMERA, turn @ [[0], [1], [0]], turn @ d


def light(point, normal, view):
    """Brightness without the lamp (R,), and what the lamp adds (R,), at points (3, R).

    normal: (3, 1) or (3, R). view: (3, 1), where the camera looks.
    """
    to_lamp = LAMP - point  # (3, R)
    to_lamp = to_lamp / np.sqrt((to_lamp ** 2).sum(0))
    lamp = np.maximum((normal * to_lamp).sum(0), 0) * to_lamp[2] ** BEAM
    headlight = np.maximum(-(normal * view).sum(0), 0)
    return AMBIENT + HEADLIGHT * headlight, LAMPLIGHT * lamp


def cast_room(o, view, d):
    """The empty room: weights (5, R) of the colours of floor, wall, object, sky and white.

    Also where rays meet the last plane, the floor (3, R), and what the lamp adds there (R,).
    """
    weights = np.zeros((5, d.shape[1]))
    weights[3] = 1  # sky
    first = np.full(d.shape[1], np.inf)  # distance of the nearest so far
    planes = (  # surface, axis, offset and normal on it
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
    return weights, point, np.where(seen, lamp, 0)


def render(scale, shape, eye, room):
    """One geometry: weights (5, H*W). eye, room: what `camera` and `cast_room` return."""
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

    def __init__(self):
        super().__init__("built-in world", {"file": ""})
        _, self.factor_names, self.factor_sizes = GRIDS[0]
        weights = np.empty((8, 4, 15, 5, SIDE ** 2), np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):  # rays that miss
            for k, degrees in enumerate(ORIENTATIONS):
                eye = camera(degrees)
                room = cast_room(*eye)
                for i, shape in np.ndindex(8, 4):
                    weights[i, shape, k] = render(SCALES[i], shape, eye, room)
        self.weights = torch.from_numpy(weights).flatten(0, 2)  # (G, 5, H*W)
        hues = [colorsys.hsv_to_rgb(hue, 1, 1) for hue in HUES.tolist()]
        self.hues = torch.tensor(hues)                   # (10, 3)
        self.sky_white = torch.tensor([SKY, (1, 1, 1)])  # (2, 3)

    def pixels(self, index):
        hues = self.hues[self.factors(index)[:, :3]]    # (B, 3, 3): a row a surface
        sky_white = self.sky_white.expand(len(hues), 2, 3)
        colours = torch.cat([hues, sky_white], 1)       # (B, 5, 3)
        weights = self.weights[index % len(self.weights)]
        images = 255 * colours.mT @ weights             # (B, 3, H*W)
        images = images.clamp_(max=255).round_().to(torch.uint8)
        return images.view(-1, 3, SIDE, SIDE).permute(0, 2, 3, 1).numpy()


def write_world(path: str | Path) -> None:
    """Writes the built-in world as DeepMind's file: HDF5 with `images` and `labels`. InputError."""
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} exists: name another file, or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    world = World()
    n = len(world)
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["source"] = SOURCE
        images = file.create_dataset("images", (n, 64, 64, 3), np.uint8, chunks=(240, 64, 64, 3),
                                     compression=1)  # gzip, fast
        for i in tqdm(range(0, n, 240), desc=f"writing {path.name}"):
            images[i:i + 240] = world.pixels(np.arange(i, i + 240))
        values = (HUES, HUES, HUES, SCALES, np.arange(4.0), ORIENTATIONS)
        factors = world.factors(range(n)).numpy().T  # (6, n)
        file["labels"] = np.stack([v[f] for v, f in zip(values, factors)], axis=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file", help="the HDF5 file to write the built-in world to")
    try:
        write_world(parser.parse_args().file)
    except InputError as error:
        parser.error(str(error))
