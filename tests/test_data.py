"""data.py: the built-in world's geometry and colours, and what people download: good, damaged, interrupted."""
import colorsys
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import DATASETS, FACTOR_VALUES, FACTORS, Dataset, hold_out, open_dataset

ROOT = Path(__file__).resolve().parent.parent
SIZES = (2, 3, 2, 3, 2, 4)                                          # of the small HDF5 files: 288 images
SMALL = {"mpi3d": (2, 3, 2, 2, 2, 3, 2), "dsprites": (1, 2, 2, 3, 2, 5), "cars3d": (2, 3, 5)}


# ---- the built-in world ---------------------------------------------------------------------------

def test_factors_and_index_are_inverse(world):
    assert len(world) == 480000 and world.factor_sizes == (10, 10, 10, 8, 4, 15)
    index = torch.arange(len(world))
    factors = world.factors(index)
    assert factors.dtype == torch.int64 and torch.equal(world.index(factors), index)
    assert factors[1].tolist() == [0, 0, 0, 0, 0, 1]                # the last varies fastest
    assert torch.equal(factors.max(0).values + 1, torch.tensor(world.factor_sizes))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_images_are_whole_bytes_between_minus_1_and_1(world, kind):
    x = world.images(kind([7, 479999, 1234]))
    assert x.shape == (3, 3, 64, 64) and x.dtype == torch.float32 and -1 <= x.min() and x.max() <= 1
    steps = (x.double() + 1) * 127.5
    assert (steps - steps.round()).abs().max() < 1e-4
    assert torch.equal(x[1:2], world.images([479999]))
    assert world.index(kind([[1, 2, 3, 4, 2, 6]])).shape == (1,)


def image(world, **factors):
    """One picture (3, 64, 64); factors not named are in the middle."""
    values = dict(floor_hue=3, wall_hue=6, object_hue=0, scale=4, shape=0, orientation=7) | factors
    return world.images(world.index([[values[name] for name in world.factor_names]]))[0]


def hue(rgb):
    """Hue 0..1 of a colour in [-1, 1]."""
    return colorsys.rgb_to_hsv(*((rgb + 1) / 2).tolist())[0]


def test_colours_land_where_they_should(world):
    for value in range(10):
        floor = image(world, floor_hue=value)[:, 60, 3]
        wall = image(world, wall_hue=value)[:, 24, 32]
        thing = image(world, object_hue=value)[:, 44, 32]
        for rgb in (floor, wall, thing):
            assert min(abs(hue(rgb) - value / 10), 1 - abs(hue(rgb) - value / 10)) < 0.01
    sky = image(world)[:, 1, 32]
    assert sky[2] > sky[1] > sky[0]                                 # light blue, whatever the factors are
    assert torch.equal(sky, image(world, floor_hue=9, wall_hue=1, object_hue=5, scale=0, shape=2)[:, 1, 32])


def changed(world, **factors):
    """(64, 64) bool: which pixels change with these factors."""
    return (image(world) != image(world, **factors)).any(0)


def test_each_hue_changes_its_own_surface_only(world):
    floor, wall, thing = changed(world, floor_hue=5), changed(world, wall_hue=1), changed(world, object_hue=4)
    assert floor[60, 3] and wall[24, 32] and thing[44, 32]
    assert not floor[:20].any() and not wall[50:].any() and not thing[:15].any()
    for a, b in ((floor, wall), (wall, thing), (floor, thing)):     # only pixels on an edge show two surfaces
        assert (a & b).sum() < 0.15 * min(a.sum(), b.sum())


def test_scale_shape_and_orientation_do_what_they_say(world):
    areas = [sum(((image(world, scale=k, shape=j) != image(world, scale=k, shape=j, object_hue=4)).any(0)).sum().item()
                 for j in range(4)) for k in range(8)]
    assert all(a < b for a, b in zip(areas, areas[1:]))
    outlines = {tuple((image(world, shape=j) != image(world, shape=j, object_hue=4)).any(0).flatten().tolist())
                for j in range(4)}
    assert len(outlines) == 4
    views = [image(world, orientation=k) for k in range(15)]
    assert all((a - b).abs().mean() > 0.01 for a, b in zip(views, views[1:]))


@pytest.mark.parametrize("index", [[-1], [480000], [[1, 2]], [0, 10 ** 9]])
def test_wrong_indices_are_refused(world, index):
    with pytest.raises(ValueError, match="from 0 to 479999"):
        world.images(index)


@pytest.mark.parametrize("factors", [[[0, 0, 0, 0, 0, 15]], [[0, 0, 0, -1, 0, 0]], [[0, 0]], [0, 0, 0, 0, 0, 0]])
def test_wrong_factors_are_refused(world, factors):
    with pytest.raises(ValueError, match="factors"):
        world.index(factors)


# ---- what people download, written small in the authors' layouts ----------------------------------

def noise(*shape, high=256):
    return np.random.default_rng(0).integers(0, high, shape, dtype=np.uint8)


def write_shapes3d(path, images=None, labels=None):
    """A file in DeepMind's layout: gzip and h5py's automatic chunks."""
    images = noise(288, 64, 64, 3) if images is None else images
    grid = np.indices(SIZES).reshape(6, -1).T
    labels = np.stack([values[f] for values, f in zip(FACTOR_VALUES, grid.T)], 1) if labels is None else labels
    with h5py.File(path, "w") as file:
        for name, array in (("images", images), ("labels", labels)):
            if array is not False:
                file.create_dataset(name, data=array, chunks=True, compression="gzip")
    return images


class Bomb:
    """Unpickling it makes a folder."""
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def write_dsprites(path, **others):
    """An .npz with dSprites' arrays; `metadata` is a pickled object in it as in theirs."""
    grid = np.indices(SMALL["dsprites"]).reshape(6, -1).T
    arrays = dict(metadata=np.array([Bomb()], dtype=object), imgs=noise(len(grid), 64, 64, high=2),
                  latents_classes=grid.astype(np.int64), latents_values=grid.astype(np.float64))
    np.savez_compressed(path, **{name: array for name, array in (arrays | others).items() if array is not None})
    return np.stack([arrays["imgs"] * 255] * 3, -1)


def write_npz(path, n, save=np.savez_compressed):
    images = noise(n, 64, 64, 3)
    save(path, images=images)
    return images


def write_celeba(path, n=9):
    """A folder of JPEGs and, beside it, their list of attributes; the pictures after Resize(96) and CenterCrop(64)."""
    path.mkdir()
    wanted, lines = [], []
    for i, values in enumerate(BITS[:n]):
        file = path / f"{i + 1:06}.jpg"
        Image.fromarray(noise(n, 8, 6, 3)[i]).resize((178, 218)).save(file, quality=95)
        small = Image.open(file).resize((96, 117), Image.Resampling.BILINEAR)
        wanted.append(np.asarray(small.crop((16, 26, 80, 90))))
        lines.append(file.name + "".join("  1" if value else " -1" for value in values))    # two blanks, as in theirs
    (path.parent / "list_attr_celeba.txt").write_text("\n".join([str(n), " ".join(NAMES) + " ", *lines, ""]))
    return np.stack(wanted)


NAMES = [f"Name_{k}" for k in range(40)]
BITS = np.random.default_rng(1).integers(0, 2, (9, 40))


def write_folder(path):
    """Pictures of 64x64 in several formats and nested folders, and a file that is none."""
    (path / "b" / "c").mkdir(parents=True)
    names = ["a.png", "b.PNG", "b/a.webp", "b/c/1.png", "b/c/2.png", "b/d.jpeg", "z.jpg"]
    for name, one in zip(names, noise(7, 64, 64, 3)):
        Image.fromarray(one).save(path / name)
    (path / "notes.txt").write_text("not an image")
    return np.stack([np.asarray(Image.open(path / name)) for name in names])


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(kind) writes a small source of this kind: its path, and the pictures (n, 64, 64, 3) that it must give."""
    for kind, sizes in {"shapes3d": SIZES, **SMALL}.items():
        monkeypatch.setitem(FACTORS, kind, (FACTORS[kind][0], sizes))
    write = {"shapes3d": write_shapes3d, "dsprites": write_dsprites, "celeba": write_celeba, "folder": write_folder,
             "mpi3d": lambda path: write_npz(path, 288), "cars3d": lambda path: write_npz(path, 30)}

    def make(kind):
        name = {"shapes3d": "3dshapes.h5", "celeba": "pictures", "folder": "pictures"}.get(kind, f"{kind}.npz")
        return tmp_path / name, write[kind](tmp_path / name)
    return make


@pytest.mark.parametrize("kind", DATASETS)
def test_what_was_written_is_read(make, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(data, "SLAB", 10 * 64 * 64 * 3)             # several blocks, the last one not full
    monkeypatch.chdir(tmp_path)
    path, wanted = make(kind)
    for name in (None, kind):                                       # the second time from the copy
        ds = open_dataset(path, name=name)
        assert len(ds) == len(wanted) and ds.name == dict(data.TITLES, folder="pictures")[kind]
        index = torch.randperm(len(ds))
        assert np.array_equal(ds.pixels(index.numpy()), wanted[index])
        assert np.array_equal(((ds.images(index) + 1) * 127.5).round().byte().permute(0, 2, 3, 1), wanted[index])
        with pytest.raises(ValueError, match=f"from 0 to {len(ds) - 1}"):
            ds.images([len(ds)])
    if kind in FACTORS:
        names, sizes = zip(*((name, size) for name, size in zip(*FACTORS[kind]) if size > 1))
        assert ds.factor_names == names and ds.factor_sizes == sizes
        assert torch.equal(ds.factors(range(len(ds))), torch.cartesian_prod(*map(torch.arange, sizes)))
        assert torch.equal(ds.index(ds.factors(index)), index)
    else:
        assert ds.factor_names == ds.factor_sizes == ()
        with pytest.raises(ValueError, match="no factors"):
            ds.factors([0])
        with pytest.raises(ValueError, match="factors"):
            ds.index([[0]])
    assert not (tmp_path / "unpickled").exists() and (ds.attributes is None) == (kind != "celeba")


@pytest.mark.parametrize("kind", FACTORS)
def test_factor_round_trips_over_all_combinations(kind):
    ds = Dataset(kind, *FACTORS[kind])
    assert len(ds) == {"shapes3d": 480000, "mpi3d": 1036800, "dsprites": 737280, "cars3d": 17568}[kind]
    factors = ds.factors(torch.arange(len(ds)))
    assert torch.equal(ds.index(factors), torch.arange(len(ds)))
    assert (factors.max(0).values + 1).tolist() == list(ds.factor_sizes) and len(ds.factor_names) == factors.shape[1]


@pytest.mark.parametrize("chunks", [None, (100, 8, 8, 3), (300, 4, 4, 1), (1, 64, 64, 3)])
def test_any_chunks_are_read(tmp_path, monkeypatch, chunks):
    monkeypatch.setattr(data, "SLAB", 50 * 64 * 64 * 3)
    images = write_shapes3d(tmp_path / "3dshapes.h5")
    with h5py.File(tmp_path / "3dshapes.h5", "a") as file:
        del file["images"]
        more = dict(chunks=chunks, compression="gzip", compression_opts=1, maxshape=(None, 64, 64, 3)) if chunks else {}
        file.create_dataset("images", data=images, **more)
    ds = open_dataset(tmp_path / "3dshapes.h5")
    assert np.array_equal(ds.pixels(np.arange(288)), images) and ds.factor_sizes == SIZES
    assert ds.name == "3dshapes" and ds.factor_names[0] == "factor_0"                   # not the real one's sizes
    with pytest.raises(ValueError, match="not shapes3d"):
        open_dataset(tmp_path / "3dshapes.h5", name="shapes3d")


def test_stored_arrays_and_long_headers_are_read(make):
    path, images = make("cars3d")
    write_npz(path, 30, save=np.savez)                              # not compressed
    assert np.array_equal(open_dataset(path).pixels(np.arange(30)), images)
    with zipfile.ZipFile(path, "w") as npz, npz.open("images.npy", "w") as file:
        np.lib.format.write_array(file, images[::-1].copy(), version=(2, 0))
    assert np.array_equal(open_dataset(path).pixels(np.arange(30)), images[::-1])


def test_images_are_cropped_to_the_middle(tmp_path):
    for name, width, height in (("wide", 300, 150), ("tall", 70, 140), ("tiny", 3, 5), ("line", 1, 900)):
        ramp = np.linspace(0, 255, max(width, height)).round().astype(np.uint8)[:, None]   # the longer side
        Image.fromarray(np.broadcast_to(ramp if width > height else ramp[:, None], (height, width, 3)).copy()).save(
            tmp_path / f"{name}.png")
    Image.new("RGBA", (90, 90), (10, 200, 30, 128)).save(tmp_path / "x-alpha.webp", lossless=True)
    Image.new("L", (90, 90), 77).save(tmp_path / "y-grey.jpg")
    Image.new("P", (90, 90), 0).save(tmp_path / "z-palette.png")
    Image.new("RGB", (3000, 2000), (255, 0, 0)).save(tmp_path / "z-large.jpg")
    ds = open_dataset(tmp_path)
    assert len(ds) == 8                                             # in the order of their names
    tall, wide = ds.pixels(np.array([1]))[0].astype(int), ds.pixels(np.array([3]))[0].astype(int)
    for ramp in (tall[:, 0, 0], wide[0, :, 0]):                     # from a quarter to three quarters of the ramp
        assert abs(ramp - np.linspace(64.5, 190.5, 64)).max() < 3
    assert ds.pixels(np.array([4, 5, 7]))[:, 9, 9].tolist() == [[10, 200, 30], [77, 77, 77], [0, 0, 0]]
    assert abs(ds.pixels(np.array([6]))[0].astype(int) - [254, 0, 0]).max() < 3


# ---- CelebA's list --------------------------------------------------------------------------------

def test_attributes_belong_to_the_pictures_that_were_kept(make, tmp_path, capsys):
    path, wanted = make("celeba")
    ds = open_dataset(path)
    assert ds.attribute_names == tuple(NAMES) and ds.attributes.dtype == np.int64
    assert np.array_equal(ds.attributes, BITS) and not capsys.readouterr().err.count("skipped")
    (path / "000003.jpg").write_bytes((path / "000003.jpg").read_bytes()[:900])
    (path / "000005.jpg").rename(path / "unlisted.jpg")
    for _ in range(2):                                              # also from the copy
        ds = open_dataset(path)
        assert "skipped 2 of 9 images" in capsys.readouterr().err
        kept = [0, 1, 3, 5, 6, 7, 8]
        assert np.array_equal(ds.attributes, BITS[kept]) and np.array_equal(ds.pixels(np.arange(7)), wanted[kept])
    for place in (path, tmp_path.parent):
        (tmp_path / "list_attr_celeba.txt").rename(place / "list_attr_celeba.txt")
        assert open_dataset(path).name == "CelebA"                  # the list in the folder, above it
        (place / "list_attr_celeba.txt").rename(tmp_path / "list_attr_celeba.txt")
    assert open_dataset(tmp_path).name == "CelebA"                  # the folder above both
    assert open_dataset(path, name="folder").attributes is None
    (tmp_path / "list_attr_celeba.txt").unlink()
    with pytest.raises(ValueError, match="not celeba.*list_attr_celeba.txt"):
        open_dataset(path, name="celeba")


@pytest.mark.parametrize("old, new, word", [
    ("9\n", "8\n", "lists 9 images, not '8'"), ("9\n", "", "first line|lists|values"), ("000004.jpg", "", "40 values"),
    ("000004.jpg", "000004.jpg 1", "40 values.*000004"), (" -1", " 0", "40 values"), ("Name_7 ", "", "39 values"),
    ("000001.jpg", "000002.jpg", "lists 8 images"), (None, None, "lists 0 images")])
def test_wrong_lists_are_refused(make, tmp_path, old, new, word):
    path, _ = make("celeba")
    file = tmp_path / "list_attr_celeba.txt"
    file.write_text(file.read_text().replace(old, new, 1) if old else "")
    with pytest.raises(ValueError, match=word) as error:
        open_dataset(path)
    assert str(file) in str(error.value) and not list(tmp_path.glob("*.npy"))


def test_a_list_of_other_images_is_refused(make, tmp_path):
    path, _ = make("folder")
    write_celeba(tmp_path / "faces")
    with pytest.raises(ValueError, match="none of its 7 images"):
        open_dataset(path)
    assert len(open_dataset(path, name="folder")) == 7


# ---- copies ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", DATASETS)
def test_the_copy_is_made_once_and_follows_its_source(make, tmp_path, monkeypatch, kind):
    path, wanted = make(kind)
    ds = open_dataset(path)
    mine = [tmp_path / f"{path.name}.mine.npy", tmp_path / "other.0123456789abcdef.npy", tmp_path / f"{path.name}.npy"]
    killed = tmp_path / f"{ds.copy.name}.123.tmp"                   # as a killed process leaves it
    for file in (*mine, killed):
        file.write_text("something")
    os.utime(killed, (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(data.Unpacked, "unpack", None)                # must not be called again
        assert open_dataset(str(path)).copy == ds.copy
    source = max(path.rglob("*.jpg")) if path.is_dir() else path
    os.utime(source, ns=(0, source.stat().st_mtime_ns + 1))
    new = open_dataset(path)
    assert new.copy.exists() and not ds.copy.exists() and not killed.exists() and all(file.exists() for file in mine)
    assert np.array_equal(new.pixels(np.arange(len(wanted))), wanted)
    cache = tmp_path / "deep" / "cache"                             # made if missing
    other = tmp_path / "other" / path.name
    other.parent.mkdir()
    (shutil.copytree if path.is_dir() else shutil.copy)(path, other)
    copies = {open_dataset(p, cache=cache, name="folder" if path.is_dir() else None).copy for p in (path, other, path)}
    assert {str(copy) for copy in copies} == {str(file) for file in cache.iterdir()} and len(copies) == 2


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "crop"])
def test_the_copy_of_a_folder_follows_its_files(make, tmp_path, change):
    path, wanted = make("folder")
    old = open_dataset(path).copy
    wanted = list(wanted)
    if change == "added":
        shutil.copy(path / "a.png", path / "zz.png")
        wanted.append(wanted[0])
    elif change == "removed":
        (path / "a.png").unlink()
        wanted.pop(0)
    elif change == "renamed":
        (path / "a.png").rename(path / "zz.png")
        wanted.append(wanted.pop(0))
    else:
        names = [os.path.basename(file) for file in sorted(path.rglob("*.*"))]
        lines = [name + " 1" for name in dict.fromkeys(names) if name != "notes.txt"]
        (path / "list_attr_celeba.txt").write_text("\n".join([str(len(lines)), "Face", *lines]))
    ds = open_dataset(path)
    assert not old.exists() and list(tmp_path.glob("*.npy")) == [ds.copy]
    assert np.array_equal(ds.pixels(np.arange(len(ds))), wanted) == (change != "crop")


@pytest.mark.parametrize("kind", ["shapes3d", "dsprites", "celeba"])
@pytest.mark.parametrize("left", [0, 50, 200, 100000, -1])
def test_a_copy_that_was_cut_short_is_named(make, kind, left):
    path, _ = make(kind)
    copy = open_dataset(path).copy
    with open(copy, "r+b") as file:
        file.truncate(left if left >= 0 else copy.stat().st_size + left)
    with pytest.raises(ValueError, match=f"{copy.name} was cut short: delete it"):
        open_dataset(path)


@pytest.mark.parametrize("kind", DATASETS)
def test_an_interruption_leaves_nothing_half_made(make, tmp_path, monkeypatch, kind):
    path, wanted = make(kind)
    monkeypatch.setattr(data, "SLAB", 10 * 64 * 64 * 3)
    before = sorted(tmp_path.iterdir())

    class Stops(data.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "tqdm", Stops)
        with pytest.raises(KeyboardInterrupt):
            open_dataset(path)
    assert sorted(tmp_path.iterdir()) == before
    assert len(open_dataset(path)) == len(wanted)


def test_a_killed_process_leaves_no_copy(make, tmp_path):
    path, images = make("cars3d")
    code = ("import os, signal, sys; sys.path.insert(0, sys.argv[1]); import data; data.SLAB = 20000; "
            "data.FACTORS['cars3d'] = (('elevation', 'azimuth', 'object'), (2, 3, 5)); "
            "data.tqdm.update = lambda self, n: self.n > 90000 and os.kill(os.getpid(), signal.SIGKILL) or "
            "setattr(self, 'n', self.n + n); data.open_dataset(sys.argv[2])")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(path)], capture_output=True, text=True)
    assert done.returncode == -9 and not list(tmp_path.glob("*.npy")) and list(tmp_path.glob("*.tmp"))
    assert np.array_equal(open_dataset(path).pixels(np.arange(30)), images)


def test_full_disks_and_wrong_caches_are_said(make, tmp_path, monkeypatch):
    path, _ = make("cars3d")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="could not write.*--cache"):
        open_dataset(path, cache=tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(OSError, match=r"needs 0.0 GB and 0.0 GB are free.*make room"):
            open_dataset(path)
    with monkeypatch.context() as patch:
        patch.setattr(data.os, "replace", lambda *paths: os.stat(tmp_path / "No space left on device"))
        with pytest.raises(OSError, match="could not write.*No space.*make room"):
            open_dataset(path)
    assert {p.name for p in tmp_path.iterdir()} == {"cars3d.npz", "file"}


# ---- what is wrong with a source ------------------------------------------------------------------

def refused(path, *words, **options):
    """Opening it raises one ValueError that names it and says these words; nothing is written."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(ValueError) as error:
        open_dataset(path, **options)
    for word in (path.name, *words):
        assert word in str(error.value), error.value
    assert "\n" not in str(error.value) and sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize("kind", ["shapes3d", "mpi3d", "dsprites", "cars3d"])
def test_damaged_files_are_refused(make, kind):
    path, _ = make(kind)
    whole = path.read_bytes()
    for part in (2 / 3, 0.01, 0):                                   # cut short
        path.write_bytes(whole[:int(len(whole) * part)])
        refused(path, "damaged, cut short", "fetch it again")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(b ^ 255 for b in whole[middle:middle + 2000]) + whole[middle + 2000:])
    refused(path, "damaged, cut short", "fetch it again")
    path.write_text("not a data file at all")
    refused(path, "damaged, cut short", "fetch it again")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="there is no data file"):
        open_dataset(path)


LABELS = np.indices(SIZES).reshape(6, -1).T.astype(float)
SOME = np.zeros((288, 64, 64, 3), np.uint8)


@pytest.mark.parametrize("contents, word", [
    (dict(images=False), "images"), (dict(labels=False), "labels"),
    (dict(images=SOME[:, :32]), "(288, 32, 64, 3)"), (dict(images=SOME[..., 0]), "(288, 64, 64)"),
    (dict(images=SOME.astype(np.float32)), "float32"), (dict(images=SOME[:100]), "288 labels of 100 images"),
    (dict(labels=LABELS[::-1]), "in order"), (dict(labels=np.random.rand(288, 6)), "every combination"),
    (dict(labels=LABELS[:, 0]), "every combination"), (dict(images=SOME[:0], labels=LABELS[:0]), "damaged")])
def test_wrong_hdf5_layouts_are_named(tmp_path, contents, word):
    write_shapes3d(tmp_path / "bad.h5", **contents)
    refused(tmp_path / "bad.h5", word)


@pytest.mark.parametrize("contents, word", [
    (dict(pictures=SOME), "images.npy"), (dict(images=SOME[:29]), "it has 29 images, not"),
    (dict(images=SOME[:30, :32]), "(30, 32, 64, 3)"), (dict(images=SOME[:30].astype(np.int8)), "int8"),
    (dict(images=SOME[:30, ..., 0]), "(30, 64, 64)"), (dict(images=np.asfortranarray(SOME[:30])), "C order"),
    (dict(images=np.array([Bomb()], dtype=object)), "object"), (dict(images=np.array(3)), "()")])
def test_wrong_npz_layouts_are_named(make, tmp_path, contents, word):
    path, _ = make("cars3d")
    np.savez_compressed(path, **contents)
    refused(path, word)


CLASSES = np.indices(SMALL["dsprites"]).reshape(6, -1).T


@pytest.mark.parametrize("contents, word", [
    (dict(latents_classes=None), "latents_classes"), (dict(latents_classes=CLASSES[::-1]), "in order"),
    (dict(latents_classes=CLASSES[:-1]), "119 labels of 120 images"), (dict(latents_classes=CLASSES[:, 1:]), "shorter"),
    (dict(latents_classes=np.array([Bomb()], dtype=object)), "allow_pickle"), (dict(imgs=None), "images.npy"),
    (dict(imgs=SOME[:120]), "(120, 64, 64, 3)"), (dict(imgs=np.zeros((120, 64, 64), bool)), "bool")])
def test_wrong_dsprites_are_named(make, tmp_path, monkeypatch, contents, word):
    monkeypatch.chdir(tmp_path)
    path, _ = make("dsprites")
    write_dsprites(path, **contents)
    refused(path, word)
    assert not (tmp_path / "unpickled").exists()


def test_an_array_shorter_than_its_header_says(make):
    path, images = make("cars3d")
    with zipfile.ZipFile(path, "w") as npz, npz.open("images.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=images.shape))
        file.write(images[:-1].tobytes())
    refused(path, "must be whole")
    with zipfile.ZipFile(path, "w") as npz:
        npz.writestr("images.npy", b"no array")
    refused(path, "magic")


def test_unreadable_images_are_skipped_with_their_number(make, tmp_path, capsys):
    path, wanted = make("folder")
    (path / "b" / "a.webp").write_bytes((path / "b" / "a.webp").read_bytes()[:300])
    (path / "b" / "c" / "1.png").write_text("not an image")
    (path / "nowhere.jpg").symlink_to(tmp_path / "no such file")
    for _ in range(2):                                              # also from the copy
        ds = open_dataset(path)
        assert "skipped 3 of 8 images" in capsys.readouterr().err
        assert np.array_equal(ds.pixels(np.arange(5)), wanted[[0, 1, 4, 5, 6]])
    for file in path.rglob("*.*"):
        if file.name != "notes.txt":
            file.unlink()
            file.write_text("not an image")
    with pytest.raises(ValueError, match="none of its 8 images"):
        open_dataset(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: none of its 0 images"):
        open_dataset(tmp_path / "empty")


@pytest.mark.parametrize("kind", DATASETS)
def test_another_name_is_refused(make, kind):
    path, _ = make(kind)
    for name in DATASETS:
        if name != kind and (kind, name) != ("celeba", "folder"):   # a folder may always be opened as such
            refused(path, f"not {name}, it is {kind}", name=name)
    with pytest.raises(ValueError, match="mpi4d.: name one of shapes3d, mpi3d"):
        open_dataset(path, name="mpi4d")
    with pytest.raises(ValueError, match="give its file or folder by --data"):
        open_dataset(name=kind)


# ---- held-out data --------------------------------------------------------------------------------

def grid(ds):
    return ds.factors(torch.arange(len(ds))).numpy()


def test_a_share_is_held_out_at_random():
    ds = Dataset("cars3d", *FACTORS["cars3d"])
    seen, unseen = hold_out(ds, share=0.1)
    assert seen.dtype == unseen.dtype == np.int64 and len(unseen) == 1757
    assert np.array_equal(np.sort(np.concatenate([seen, unseen])), np.arange(17568))
    assert np.array_equal(unseen, hold_out(ds, share=0.1)[1])       # the same seed, the same images
    other = hold_out(ds, share=0.1, seed=1)[1]
    assert 100 < len(np.intersect1d(unseen, other)) < 250
    assert len(hold_out(ds, share=1e-9)[1]) == 1 and len(hold_out(ds)[1]) == 0
    assert 0.2 < (grid(ds)[unseen, 0] == 1).mean() < 0.3


def test_combinations_are_held_out():
    ds = Dataset("shapes3d", *FACTORS["shapes3d"])
    f = grid(ds)
    for text, wanted in (("floor_hue=3,shape=1", (f[:, 0] == 3) & (f[:, 4] == 1)), ("scale=7", f[:, 3] == 7),
                         (" floor_hue = 3,shape=1 ; orientation=14 ",
                          (f[:, 0] == 3) & (f[:, 4] == 1) | (f[:, 5] == 14))):
        seen, unseen = hold_out(ds, combinations=text)
        assert np.array_equal(unseen, np.flatnonzero(wanted)) and np.array_equal(seen, np.flatnonzero(~wanted))
    both = hold_out(ds, share=0.2, combinations="shape=1")[1]
    assert np.array_equal(both, np.union1d(hold_out(ds, share=0.2)[1], np.flatnonzero(f[:, 4] == 1)))


@pytest.mark.parametrize("text, words", [
    ("colour=3", "colour=3"), ("shape=4", "shape"), ("shape=-1", "shape"), ("shape=x", "shape"), ("shape", "shape"),
    ("shape=1,", "shape=1,"), ("shape=1;;scale=1", "''"), ("shape=1,shape=2", "once"), ("=", "'='"),
    (";".join(f"shape={k}" for k in range(4)), "nothing is left")])
def test_wrong_combinations_are_named(text, words):
    with pytest.raises(ValueError) as error:
        hold_out(Dataset("shapes3d", *FACTORS["shapes3d"]), combinations=text)
    assert words in str(error.value)


def test_nothing_else_can_be_held_out(make):
    ds = open_dataset(make("folder")[0])
    assert len(hold_out(ds, share=0.5)[1]) == 4
    with pytest.raises(ValueError, match="no factors"):
        hold_out(ds, combinations="shape=1")
    for share in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share"):
            hold_out(ds, share=share)
    with pytest.raises(ValueError, match="nothing is left"):
        hold_out(ds, share=0.99)


# ---- writing --------------------------------------------------------------------------------------

def test_the_written_world_equals_the_rendered_one(tmp_path, monkeypatch, world):
    """`python data.py FILE` with 2 x 1 x 3 colours, so 2,880 images instead of 480,000."""
    monkeypatch.setattr(data, "FACTOR_SIZES", (2, 1, 3, 8, 4, 15))
    data.write_world(tmp_path / "shapes3d.h5")
    with h5py.File(tmp_path / "shapes3d.h5") as file:
        assert file["images"].shape == (2880, 64, 64, 3) and file["images"].chunks and file["images"].compression
        assert file["labels"].shape == (2880, 6) and file["labels"].dtype == np.float64
        assert "not DeepMind's" in file.attrs["source"]
        assert file["labels"][-1].tolist() == [0.1, 0.0, 0.2, 1.25, 3.0, 30.0]
    ds = open_dataset(tmp_path / "shapes3d.h5")
    assert ds.name == "built-in world" and ds.factor_sizes == (2, 3, 8, 4, 15)          # one wall hue is no factor
    assert ds.factor_names == ("floor_hue", "object_hue", "scale", "shape", "orientation")
    index = torch.arange(0, 2880, 7)
    f = ds.factors(index)
    f = torch.cat([f[:, :1], torch.zeros_like(f[:, :1]), f[:, 1:]], 1)
    assert torch.equal(ds.images(index), world.images(world.index(f)))
    with pytest.raises(ValueError, match="exists"):
        data.write_world(tmp_path / "shapes3d.h5")


def test_writing_where_nothing_can_be_written(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "data.py"), str(tmp_path / "no" / "folder.h5")],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "could not write" in done.stderr and "Traceback" not in done.stderr
