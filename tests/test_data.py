"""data.py: the built-in world's geometry and colours, and files in DeepMind's layout, good and bad."""
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import data
from data import FACTOR_VALUES, open_dataset

ROOT = Path(__file__).resolve().parent.parent
SIZES = (2, 3, 2, 3, 2, 4)                                          # of the small files: 288 images


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
    import colorsys
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


# ---- files ----------------------------------------------------------------------------------------

def write(path, images=None, labels=None, **options):
    """A file in DeepMind's layout: h5py's automatic chunks and gzip, unless the options say otherwise."""
    n = int(np.prod(SIZES))
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (n, 64, 64, 3), dtype=np.uint8)
    if labels is None:
        grid = np.indices(SIZES).reshape(6, -1).T
        labels = np.stack([values[f] for values, f in zip(FACTOR_VALUES, grid.T)], 1)
    with h5py.File(path, "w") as file:
        for name, array in (("images", images), ("labels", labels)):
            if array is not False:
                file.create_dataset(name, data=array, **({"chunks": True, "compression": "gzip"} | options))
    return images


@pytest.mark.parametrize("options", [{}, {"chunks": None, "compression": None}, {"chunks": (100, 8, 8, 3)}])
def test_a_file_reads_as_it_was_written(tmp_path, monkeypatch, options):
    monkeypatch.setattr(data, "SLAB", 50 * 64 * 64 * 3)             # several slabs, the last one not full
    images = write(tmp_path / "3dshapes.h5", **({} if "chunks" in options and options["chunks"] else options))
    if options.get("chunks"):                                       # chunks that cut pictures into pieces
        with h5py.File(tmp_path / "3dshapes.h5", "a") as file:
            del file["images"]
            file.create_dataset("images", data=images, compression="gzip", **options)
    ds = open_dataset(tmp_path / "3dshapes.h5")
    assert len(ds) == 288 and ds.factor_sizes == SIZES
    assert ds.name == "3dshapes" and ds.factor_names[0] == "factor_0"                   # not the real one's sizes
    monkeypatch.setattr(data, "FACTOR_SIZES", SIZES)
    ds = open_dataset(tmp_path / "3dshapes.h5")
    assert ds.name == "Shapes3D" and ds.factor_names[0] == "floor_hue"
    index = torch.randperm(288)[:50]
    assert np.array_equal(((ds.images(index) + 1) * 127.5).round().byte().permute(0, 2, 3, 1), images[index])
    assert torch.equal(ds.index(ds.factors(index)), index)


def test_the_copy_is_made_once_and_follows_its_source(tmp_path, monkeypatch):
    path = tmp_path / "3dshapes.h5"
    write(path)
    open_dataset(path)
    copy, = tmp_path.glob("*.npy")
    monkeypatch.setattr(data, "unpack", None)                       # must not be called again
    open_dataset(path)
    monkeypatch.undo()
    images = write(path, images=np.full((288, 64, 64, 3), 77, np.uint8))
    assert open_dataset(path).pixels(np.arange(288)).max() == 77 == images.max()
    assert not copy.exists() and len(list(tmp_path.glob("*.npy"))) == 1
    elsewhere = tmp_path / "cache"
    elsewhere.mkdir()
    open_dataset(path, cache=elsewhere)
    assert len(list(elsewhere.iterdir())) == 1


def test_a_copy_that_was_cut_short_is_named(tmp_path):
    write(tmp_path / "3dshapes.h5")
    ds = open_dataset(tmp_path / "3dshapes.h5")
    copy, = tmp_path.glob("*.npy")
    with open(copy, "r+b") as file:
        file.truncate(copy.stat().st_size - 5)
    ds.images([0])
    with pytest.raises(OSError, match="ends before picture 287: delete it"):
        ds.images([287])


def test_an_interruption_leaves_nothing_half_made(tmp_path, monkeypatch):
    write(tmp_path / "3dshapes.h5")
    monkeypatch.setattr(data, "SLAB", 50 * 64 * 64 * 3)

    class Stops(data.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "tqdm", Stops)
    with pytest.raises(KeyboardInterrupt):
        open_dataset(tmp_path / "3dshapes.h5")
    assert [p.name for p in tmp_path.iterdir()] == ["3dshapes.h5"]


def test_too_little_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    write(tmp_path / "3dshapes.h5")
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="needs 0.0 GB.*free"):
        open_dataset(tmp_path / "3dshapes.h5")
    assert [p.name for p in tmp_path.iterdir()] == ["3dshapes.h5"]


LABELS = np.indices(SIZES).reshape(6, -1).T.astype(float)
SOME = np.zeros((288, 64, 64, 3), np.uint8)


@pytest.mark.parametrize("contents, word", [
    (dict(images=False), "`images`"), (dict(labels=False), "`labels`"),
    (dict(images=SOME[:, :32]), "(288, 32, 64, 3)"), (dict(images=SOME[..., 0]), "(288, 64, 64)"),
    (dict(images=SOME.astype(np.float32)), "float32"), (dict(images=SOME[:100]), "100 images and 288 labels"),
    (dict(labels=LABELS[::-1]), "in order"), (dict(labels=np.random.rand(288, 6)), "every combination")])
def test_wrong_layouts_are_named(tmp_path, contents, word):
    write(tmp_path / "bad.h5", **contents)
    with pytest.raises(ValueError) as error:
        open_dataset(tmp_path / "bad.h5")
    assert word in str(error.value) and "bad.h5" in str(error.value) and not list(tmp_path.glob("*.npy"))


def test_missing_truncated_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no data file"):
        open_dataset(tmp_path / "no.h5")
    with pytest.raises(FileNotFoundError, match="there is no data file"):
        open_dataset(tmp_path)
    write(tmp_path / "cut.h5")
    whole = (tmp_path / "cut.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[:len(whole) * 2 // 3])
    (tmp_path / "text.h5").write_text("not a data file")
    for name in ("cut.h5", "text.h5"):
        with pytest.raises(ValueError, match="not an HDF5 file or was cut short"):
            open_dataset(tmp_path / name)


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
    assert ds.name == "built-in world" and ds.factor_names == world.factor_names
    index = torch.arange(0, 2880, 7)
    assert torch.equal(ds.images(index), world.images(world.index(ds.factors(index))))
    with pytest.raises(ValueError, match="exists"):
        data.write_world(tmp_path / "shapes3d.h5")


def test_writing_where_nothing_can_be_written(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "data.py"), str(tmp_path / "no" / "folder.h5")],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "could not write" in done.stderr and "Traceback" not in done.stderr
