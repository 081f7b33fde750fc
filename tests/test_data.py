"""data.py: the interface, what people download (good, odd and broken), the cache, the world."""
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import InputError, atomic, open_dataset

DSPRITES = (1, 3, 2, 4, 2, 5)  # sizes of the small file; colour is always the same
GRID = (2, 3, 2, 4)            # sizes of a file with labels that we do not know


def noise(*shape, high=256):
    return np.random.default_rng(0).integers(0, high, shape, dtype=np.uint8)


def grid(sizes):
    return np.indices(sizes).reshape(len(sizes), -1).T


def everything(ds):
    return ds.pixels(np.arange(len(ds)))


def refused(path, *words):
    """Opening it is a user's mistake, in one line with these words."""
    with pytest.raises(InputError) as error:
        open_dataset(path)
    assert [word for word in (*words, "\n") if word not in str(error.value)] == ["\n"]
    return str(error.value)


# ---- the built-in world --------------------------------------------------------------------------

def test_factors_and_index_are_inverse(world):
    assert len(world) == 480000 and world.factor_sizes == (10, 10, 10, 8, 4, 15)
    index = torch.arange(len(world))
    factors = world.factors(index)
    assert factors.dtype == torch.int64 and torch.equal(world.index(factors), index)
    assert factors[1].tolist() == [0, 0, 0, 0, 0, 1]
    assert torch.equal(factors.max(0).values + 1, torch.tensor(world.factor_sizes))
    for wrong in ([-1], [480000]):
        with pytest.raises(ValueError):
            world.images(wrong)
    with pytest.raises(ValueError):
        world.index([[0, 0, 0, 0, 0, 15]])


def test_images_are_whole_bytes_between_minus_1_and_1(world):
    x = world.images([7, 479999, 1234])
    assert x.shape == (3, 3, 64, 64) and x.dtype == torch.float32
    assert torch.equal(x, ((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1)
    for kind in (np.array, torch.tensor):
        assert torch.equal(x[1:2], world.images(kind([479999])))


def test_each_factor_shows_and_colours_add_up(world):
    middle = [3, 6, 0, 4, 0, 7]
    for k, size in enumerate(world.factor_sizes):
        rows = np.array([middle] * size)
        rows[:, k] = np.arange(size)
        x = world.images(world.index(rows))
        assert ((x[1:] - x[:-1]).abs().mean((1, 2, 3)) > 1e-3).all()
    rows = [[1, 2, 3, 4, 1, 7], [5, 8, 9, 4, 1, 7], [1, 8, 9, 4, 1, 7], [5, 2, 3, 4, 1, 7]]
    x = world.pixels(world.index(rows).numpy()).astype(int)
    error = abs(x[0] + x[1] - x[2] - x[3])
    assert (error * (x.max(0) < 255)).max() <= 2  # linear where nothing is cut off at 255


# ---- what people download, written small in the authors' layouts ---------------------------------

class Bomb:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def save(path, **arrays):
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
        return
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            chunks = (7, *array.shape[1:])  # the last block is not full
            file.create_dataset(key, data=array, chunks=chunks, compression="gzip")


def write_3dshapes(path):
    labels = grid((2, 3, 2, 3, 2, 4))
    images = noise(len(labels), 64, 64, 3)
    save(path, images=images, labels=labels / 8 - 0.25)
    return images


def write_dsprites(path):
    """The two editions differ in a key; the HDF5 one is stored as 0 and 255 here."""
    classes = grid(DSPRITES)
    images = noise(len(classes), 64, 64, high=2)
    if path.suffix == ".npz":
        metadata = np.array([Bomb()], dtype=object)
        save(path, metadata=metadata, imgs=images, latents_classes=classes)
    else:
        save(path, **{"imgs": images * 255, "latents/classes": classes})
    return np.stack([images * 255] * 3, -1)


def write_plain(path):
    images = noise(48, 64, 64, 3)
    labels = {"labels": grid(GRID) * 0.5 - 3} if path.stem == "mine" else {}
    save(path, images=images, **labels)
    return images


NAMES = [f"Name_{k}" for k in range(40)]
BITS = np.random.default_rng(1).integers(0, 2, (9, 40))


def write_celeba(path):
    """JPEGs and beside them their list; gives the images after Resize(96), CenterCrop(64)."""
    path.mkdir()
    wanted, lines = [], []
    for i, bits in enumerate(BITS):
        file = path / f"{i + 1:06}.jpg"
        Image.fromarray(noise(9, 8, 6, 3)[i]).resize((178, 218)).save(file, quality=95)
        small = Image.open(file).resize((96, 117), Image.Resampling.BILINEAR)
        wanted.append(np.asarray(small.crop((16, 26, 80, 90))))
        lines.append(file.name + "".join("  1" if bit else " -1" for bit in bits))
    text = "\n".join(["202599", " ".join(NAMES) + " ", *lines, ""])
    (path.parent / "list_attr_celeba.txt").write_text(text)
    return np.stack(wanted)


def write_folder(path):
    (path / "b" / "c").mkdir(parents=True)
    names = ["a.png", "b.PNG", "b/a.webp", "b/c/1.png", "b/d.jpeg", "z.jpg"]
    for name, image in zip(names, noise(6, 64, 64, 3)):
        Image.fromarray(image).save(path / name)
    (path / "notes.txt").write_text("not an image")
    return np.stack([np.asarray(Image.open(path / name)) for name in names])


CASES = {  # writer, name, first factor, sizes
    "3dshapes.h5": (write_3dshapes, "Shapes3D", "floor_hue", (2, 3, 2, 3, 2, 4)),
    "mpi3d_toy.npz": (write_plain, "mpi3d_toy.npz", "color", (6, 8)),
    "dsprites.npz": (write_dsprites, "dSprites", "shape", DSPRITES[1:]),
    "dsprites.hdf5": (write_dsprites, "dSprites", "shape", DSPRITES[1:]),
    "mine.npz": (write_plain, "mine.npz", "factor_0", GRID),
    "img_align_celeba": (write_celeba, "CelebA", None, ()),
    "faces": (write_folder, "faces", None, ()),
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(file name) writes a small source: its path, and the images (n, 64, 64, 3) it holds."""
    small = []
    for row, sizes in zip(data.GRIDS, ((2, 3, 2, 3, 2, 4), (6, 8), (9,), DSPRITES[1:])):
        small.append((*row[:2], sizes))
    monkeypatch.setattr(data, "GRIDS", small)
    monkeypatch.chdir(tmp_path)
    return lambda name: (tmp_path / name, CASES[name][0](tmp_path / name))


@pytest.mark.parametrize("name", CASES)
def test_what_was_written_is_read(make, tmp_path, monkeypatch, name):
    path, wanted = make(name)
    _, title, first, sizes = CASES[name]
    for _ in range(2):  # then from the cache
        ds = open_dataset(path)
        assert np.array_equal(everything(ds), wanted) and len(ds) == len(wanted)
        index = torch.randperm(len(ds))
        bytes_ = ((ds.images(index) + 1) * 127.5).round().byte()
        assert np.array_equal(bytes_.permute(0, 2, 3, 1), wanted[index])
        monkeypatch.setattr(data, "unpack", None)  # must not be called again
    assert (ds.name, ds.factor_sizes) == (title, sizes) and ds.factor_names[:1] in ((), (first,))
    if sizes:
        assert np.array_equal(ds.factors(range(len(ds))), grid(sizes))
        assert torch.equal(ds.index(ds.factors(index)), index)
    with pytest.raises(IndexError):
        ds.images([len(ds)])
    assert not (tmp_path / "unpickled").exists() and not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize("n, name, sizes", [
    (480000, "Shapes3D", (10, 10, 10, 8, 4, 15)), (17568, "Cars3D", (4, 24, 183)),
    (1036800, "", (6, 6, 2, 3, 3, 40, 40)), (460800, "", (4, 4, 2, 3, 3, 40, 40)),
    (737280, "dSprites", (3, 6, 40, 32, 32))])
def test_data_sets_without_labels_are_known_by_their_size(n, name, sizes):
    found = data.find_factors("x.npz", n, np.empty((1, 0)))
    assert (found[0], found[2]) == (name, sizes) and len(found[1]) == len(sizes)


def test_data_sets_are_told_apart_by_their_pixels(make, tmp_path, world):
    path, wanted = make("mine.npz")
    first = open_dataset(path)
    assert first.checksum() == open_dataset(path).checksum() != world.checksum()
    (tmp_path / "other").mkdir()
    save(tmp_path / "other" / "mine.npz", images=255 - wanted, labels=grid(GRID))
    other = open_dataset(tmp_path / "other" / "mine.npz")
    assert (other.name, len(other)) == (first.name, len(first))
    assert other.checksum() != first.checksum()


def test_dark_images_stay_dark(tmp_path):
    """Only dSprites' 0 and 1 mean black and white."""
    images = noise(150, 64, 64, 3, high=2)
    images[120] = 200
    save(tmp_path / "dark.npz", images=images, labels=grid((150,)))
    assert np.array_equal(everything(open_dataset(tmp_path / "dark.npz")), images)
    photos = tmp_path / "dSprites"
    photos.mkdir()
    Image.fromarray(images[120]).save(photos / "0.png")
    assert np.array_equal(everything(open_dataset(photos)), images[120:121])


# ---- folders of images ---------------------------------------------------------------------------

def test_kinds_of_images_get_the_right_values(tmp_path):
    """Grey, CMYK, a wide image."""
    ramp = np.arange(0, 256, 4, dtype=np.uint8)
    Image.fromarray(np.tile(ramp, (64, 1))).save(tmp_path / "0.png")
    Image.new("CMYK", (90, 90), (0, 255, 255, 0)).save(tmp_path / "1.jpg")
    wide = np.linspace(0, 255, 300).round().astype(np.uint8)
    Image.fromarray(np.tile(wide, (150, 1))).save(tmp_path / "2.png")
    x = everything(open_dataset(tmp_path)).astype(int)
    assert (x[0, 5] == ramp[:, None]).all()
    assert abs(x[1, 9, 9] - [255, 0, 0]).max() < 3
    assert abs(x[2, 5, :, 1] - np.linspace(64.5, 190.5, 64)).max() < 3  # its middle half


def test_sixteen_bits_and_the_cameras_orientation(tmp_path):
    ramp = np.arange(0, 65536, 1028).astype(np.uint16)  # each 4 / 257 brighter
    Image.fromarray(np.tile(ramp, (64, 1))).save(tmp_path / "0.png")
    image = Image.fromarray(noise(1, 64, 64, 3)[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / "1.png", exif=exif)
    x = everything(open_dataset(tmp_path))
    assert (x[0, 7] == np.arange(0, 256, 4)[:, None]).all()
    assert np.array_equal(x[1], np.rot90(np.asarray(image), -1))


def test_a_link_to_its_own_folder_is_not_followed(make):
    path, wanted = make("faces")
    (path / "loop").symlink_to(path, target_is_directory=True)
    assert np.array_equal(everything(open_dataset(path)), wanted)


def test_hidden_files_are_left_out(make):
    path, wanted = make("faces")
    (path / ".thumbnails").mkdir()
    for copied in (".thumbnails/a.png", "._a.png"):
        shutil.copy(path / "a.png", path / copied)
    assert np.array_equal(everything(open_dataset(path)), wanted)


def test_unreadable_images_are_named(make):
    path, _ = make("faces")
    (path / "b" / "a.webp").write_bytes((path / "b" / "a.webp").read_bytes()[:300])
    refused(path, "b/a.webp is no readable image, remove it")
    whole = (path / "z.jpg").read_bytes()
    (path / "b" / "a.webp").unlink()
    for cut in (0, 9, 200):
        (path / "z.jpg").write_bytes(whole[:cut])
        refused(path, "z.jpg is no readable image")
    Image.new("1", (20000, 20000)).save(path / "z.jpg", "PNG")  # a decompression bomb
    refused(path, "z.jpg is no readable image")
    assert not list(path.parent.glob("*.partial"))
    Image.new("RGB", (64, 64)).save(path / "b" / "a.webp")
    for file in (*path.rglob("*.*p*g"), *path.rglob("*.PNG"), path / "b" / "a.webp"):
        file.unlink()
    refused(path, "no JPEG, PNG or WebP image")


def test_celeba_uses_the_rows_that_are_there(make, tmp_path):
    path, wanted = make("img_align_celeba")
    ds = open_dataset(path)
    assert ds.attributes.dtype == np.int64 and np.array_equal(ds.attributes, BITS)
    file = tmp_path / "list_attr_celeba.txt"
    text = "\n".join(file.read_text().splitlines()[:7])  # 5 of 9 rows
    for cut_short, n in ((text, 5), (text[:-4], 4)):
        file.write_text(cut_short)
        ds = open_dataset(path)
        assert np.array_equal(ds.attributes, BITS[:n])
        assert np.array_equal(everything(ds), wanted[:n])
    file.write_text("")
    refused(path, "no JPEG, PNG or WebP image (CelebA: in its list)")


def test_photos_beside_a_list_are_not_celeba(make, tmp_path):
    make("img_align_celeba")
    path, wanted = make("faces")
    Image.fromarray(wanted[0]).save(path / "000001.jpg")
    ds = open_dataset(path)
    assert (ds.name, len(ds), ds.attributes) == ("faces", 7, None)


# ---- the cache -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mpi3d_toy.npz", "faces"])
def test_the_cache_follows_the_data(make, name):
    path, wanted = make(name)
    open_dataset(path)
    part = path
    if path.is_dir():
        part = path / "a.png"
        Image.fromarray(255 - wanted[0]).save(part)
    else:
        save(path, images=255 - wanted)
    os.utime(part, (0, 0))  # older than the cache
    ds = open_dataset(path)
    assert np.array_equal(ds.pixels(np.array([0]))[0], 255 - wanted[0])


def test_one_folder_may_hold_the_caches_of_many(make, tmp_path):
    path, wanted = make("mpi3d_toy.npz")
    (tmp_path / "other").mkdir()
    save(tmp_path / "other" / path.name, images=255 - wanted)
    cache = tmp_path / "deep" / "cache"
    for _ in range(2):
        assert np.array_equal(everything(open_dataset(path, cache)), wanted)
        other = open_dataset("other/mpi3d_toy.npz", cache)
        assert np.array_equal(everything(other), 255 - wanted)
    assert len(list(cache.iterdir())) == 2 and not list(tmp_path.glob("*.cache.*"))


def test_a_copy_of_equal_size_and_time_is_another_source(make, tmp_path):
    path, wanted = make("mine.npz")
    path.write_bytes(np.random.default_rng(1).bytes(9))
    for folder, images in (("a", wanted), ("b", 255 - wanted)):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "mine.npz", images=images, labels=grid(GRID))
        os.utime(tmp_path / folder / "mine.npz", (0, 0))
    for folder, images in (("a", wanted), ("b", 255 - wanted)):
        ds = open_dataset(tmp_path / folder / "mine.npz", tmp_path / "cache")
        assert np.array_equal(everything(ds), images)
    shutil.copyfile(tmp_path / "b" / "mine.npz", tmp_path / "a" / "mine.npz")  # in place
    os.utime(tmp_path / "a" / "mine.npz", (0, 0))
    ds = open_dataset(tmp_path / "a" / "mine.npz", tmp_path / "cache")
    assert np.array_equal(everything(ds), 255 - wanted)


def test_a_cut_short_or_interrupted_copy_is_unpacked_again(make, tmp_path):
    path, wanted = make("mine.npz")
    open_dataset(path)
    file, = tmp_path.glob("*.cache.npy")
    whole = file.read_bytes()
    for left in (whole[:-1], whole[:50], b""):
        file.write_bytes(left)
        assert np.array_equal(everything(open_dataset(path)), wanted)
    file.unlink()
    file.with_suffix(".partial").write_bytes(whole[:5000])  # of a process that was killed
    assert np.array_equal(everything(open_dataset(path)), wanted)
    assert {left.name for left in tmp_path.iterdir()} == {path.name, file.name}


def test_two_may_unpack_at_once(tmp_path, monkeypatch):
    """Two threads have one process number, as processes of two containers do."""
    wanted = write_plain(tmp_path / "mine.npz")
    both = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(data.tqdm, "update", lambda bar, n: both.wait())
    with ThreadPoolExecutor(2) as pool:
        for ds in pool.map(open_dataset, [tmp_path / "mine.npz"] * 2):
            assert np.array_equal(everything(ds), wanted)
    assert len(list(tmp_path.iterdir())) == 2  # data and cache


def test_atomic_writes_all_or_nothing(tmp_path):
    path = tmp_path / "x.json"
    with atomic(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(path) as first, atomic(path) as second:
        assert first != second and first.parent == tmp_path and first.suffix == ".json"
        first.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---- what is wrong with a source -----------------------------------------------------------------

@pytest.mark.parametrize("name", ["3dshapes.h5", "mpi3d_toy.npz"])
def test_damaged_files_are_refused(make, tmp_path, name):
    path, _ = make(name)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = bytes(255 - byte for byte in whole[middle:middle + 2000])
    for damaged in (whole[:-10], whole[:50], whole[:middle] + flipped + whole[middle + 2000:]):
        path.write_bytes(damaged)
        refused(path, f"cannot unpack {path}", "undamaged")
    path.write_bytes(b"not a data file")
    refused(path, f"cannot unpack {path}")
    path.unlink()
    refused(path, f"there is no {path}: correct --data")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(make, tmp_path):
    path, _ = make("3dshapes.h5")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name a --cache if nothing can be written beside it"):
        open_dataset(path, cache=tmp_path / "file")


def test_a_fault_of_the_code_keeps_its_traceback(make, monkeypatch):
    path, _ = make("mine.npz")
    monkeypatch.setattr(data, "find_factors", None)
    with pytest.raises(TypeError):
        open_dataset(path)


SOME = np.zeros((48, 64, 64, 3), np.uint8)


@pytest.mark.parametrize("arrays, words", [
    (dict(pictures=SOME), "no `images` or `imgs` but pictures"),
    (dict(images=SOME[:, :32]), "uint8 (48, 32, 64, 3)"),
    (dict(images=np.asfortranarray(SOME)), "Fortran order"),
    (dict(images=np.array([Bomb()], dtype=object)), "object"),
    (dict(images=SOME), "48 images and labels of ()"),
    (dict(images=SOME[1:], labels=grid(GRID)[1:]), "47 images and labels of (2, 3, 2, 4)"),
    (dict(images=SOME[1:], labels=grid(GRID)), "47 images and labels of (2, 3, 2, 4)"),
    (dict(images=SOME, labels=grid(GRID)[::-1]), "all combinations in order"),
    (dict(images=SOME, labels=np.random.rand(48, 2)), "labels of (48, 48)"),
    (dict(images=SOME, labels=grid((6, 8))[:, :1]), "labels of (6,)"),
])
def test_wrong_layouts_are_named(tmp_path, arrays, words):
    save(tmp_path / "x.npz", **arrays)
    refused(tmp_path / "x.npz", "x.npz", words)
