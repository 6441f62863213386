"""Loading: splits, formats, the search order, and files that are damaged."""

import gzip
import io
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from written import TEST, TRAIN, idx_bytes, write_mnist

from tasks.data import load, load_text
from tasks.data.dataset import stratified
from tasks.errors import BadData, MissingData, MissingPackage


def parts(data):
    return data.train, data.validation, data.test


def numbers(images):
    """The numbers that ``numbered`` wrote into the images."""
    pixels = (images[:, 0, 0, :2] * 255).round().long()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


# digits


def test_digits_come_without_any_file():
    data = load("digits")
    assert (data.name, data.classes, data.shape) == ("digits", 10, (1, 8, 8))
    assert [len(labels) for _, labels in parts(data)] == [1079, 359, 359]
    for images, labels in parts(data):
        assert images.shape == (len(labels), 1, 8, 8)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.min() == 0 and images.max() == 1
        counts = torch.bincount(labels, minlength=10) / len(labels)
        assert (counts - 0.1).abs().max() < 0.01


def test_digits_split_is_a_partition_of_the_original():
    from sklearn.datasets import load_digits

    original = torch.from_numpy(load_digits().data) / 16
    data = load("digits", dtype=torch.float64)
    together = torch.cat([images.flatten(1) for images, _ in parts(data)])
    assert sorted(together.tolist()) == sorted(original.tolist())


def test_split_depends_on_its_seed_only():
    torch.manual_seed(1)
    first = load("digits", seed=1)
    torch.manual_seed(2)
    again, other = load("digits", seed=1), load("digits", seed=2)
    assert torch.equal(first.train[0], again.train[0])
    assert not torch.equal(first.train[1], other.train[1])


def test_sizes_and_dtype():
    data = load("digits", sizes=(100, 50, 20), dtype=torch.float64)
    assert [len(labels) for _, labels in parts(data)] == [100, 50, 20]
    assert torch.bincount(data.train[1]).tolist() == pytest.approx([10] * 10, abs=2)
    assert data.train[0].dtype == torch.float64
    for wrong in ((1000, 500, 500), (10, 0, 10)):
        with pytest.raises(ValueError, match=f"parts of {wrong[0]}, {wrong[1]}, {wrong[2]}"):
            load("digits", sizes=wrong)
    with pytest.raises(ValueError, match="sizes are three"):
        load("digits", sizes=(10, 10))
    with pytest.raises(ValueError, match="cannot be torch.int64"):
        load("digits", dtype=torch.int64)


def test_stratified_keeps_rare_classes():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    indices = stratified(labels, (500, 300, 200), seed=0)
    assert sorted(torch.cat(indices).tolist()) == list(range(1000))
    for index in indices:
        expected = torch.tensor([0.9, 0.09, 0.01]) * len(index)
        assert (torch.bincount(labels[index], minlength=3) - expected).abs().max() <= 2


def test_unknown_names_bring_the_nearest():
    with pytest.raises(ValueError, match=r"no data set 'fashion_mnist'.*mean fashion-mnist"):
        load("fashion_mnist")
    with pytest.raises(ValueError, match="use load_text"):
        load("tiny-shakespeare")


def test_without_scikit_learn_digits_say_what_to_install(monkeypatch):
    uninstall(monkeypatch, "sklearn")
    with pytest.raises(MissingPackage, match=r"sklearn, which is not installed; pip install"):
        load("digits")


# mnist


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files_round_trip(tmp_path, name, folder, packed):
    write_mnist(tmp_path, folder, packed)
    data = load(name, tmp_path, download=False)
    assert data.shape == (1, 3, 4) and data.classes == 10
    train, validation, test = (numbers(images) for images, _ in parts(data))
    assert len(validation) == TRAIN // 6
    assert sorted(train + validation) == list(range(TRAIN))
    assert sorted(test) == list(range(TRAIN, TRAIN + TEST))
    pattern = torch.tensor([0, 0, 0, 1, 1, 2])
    for found, (_, labels) in zip((train, validation, test), parts(data), strict=True):
        assert labels.tolist() == [pattern[(n % TRAIN) % 6] for n in found]
        assert torch.bincount(labels).tolist() == pytest.approx(
            [len(found) / 2, len(found) / 3, len(found) / 6], abs=2
        )


def test_places_in_order(tmp_path, monkeypatch):
    root, env, cache = tmp_path / "root", tmp_path / "env", tmp_path / "cache" / "bilevel"
    root.mkdir(), env.mkdir()
    with pytest.raises(MissingData) as nowhere:
        load("mnist", root, download=False)
    assert str(root) in str(nowhere.value) and str(cache) in str(nowhere.value)
    assert "BILEVEL_DATA" in str(nowhere.value) and "train-images-idx3-ubyte" in str(nowhere.value)
    assert isinstance(nowhere.value, FileNotFoundError)
    for place in (cache, env, root):  # each found before the one written earlier
        raw = write_mnist(place)
        monkeypatch.setenv("BILEVEL_DATA", str(env))
        marked = torch.full((TEST, 3, 4), len(str(place)), dtype=torch.uint8)
        (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(marked)))
        pixels = load("mnist", root, download=False).test[0] * 255
        assert pixels.unique().round().tolist() == [len(str(place))]


def test_named_folders_must_exist(tmp_path, monkeypatch):
    with pytest.raises(MissingData, match="the root names .*nothing, which does not exist"):
        load("mnist", tmp_path / "nothing")
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path / "void"))
    with pytest.raises(MissingData, match=r"\$BILEVEL_DATA names .*void, which does not exist"):
        load("mnist", download=False)


def test_incomplete_sets_count_as_missing(tmp_path):
    raw = write_mnist(tmp_path)
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(MissingData, match="looked for MNIST/raw"):
        load("mnist", tmp_path, download=False)


GOOD = idx_bytes(torch.zeros(TRAIN, 3, 4, dtype=torch.uint8))
DAMAGE = {
    "wrong magic": (gzip.compress(b"\x00\x00\x09\x03" + GOOD[4:]), "begins with 00 00 09 03"),
    "labels for images": (
        gzip.compress(idx_bytes(torch.zeros(9, dtype=torch.uint8))),
        "begins with 00 00 08 01 instead of 00 00 08 03",
    ),
    "cut content": (gzip.compress(GOOD[:-7]), "holds 1433 bytes where its header promises 1440"),
    "too much content": (gzip.compress(GOOD + b"x"), "holds 1441 bytes"),
    "cut gzip": (gzip.compress(GOOD)[:-20], "damaged or cut short"),
    "broken gzip": (gzip.compress(GOOD)[:12] + b"\xff" * 20, "damaged or cut short"),
    "false checksum": (gzip.compress(GOOD)[:-8] + b"\0" * 8, "damaged or cut short"),
    "empty": (b"", "begins with nothing"),
    "cut header": (GOOD[:9], "no idx file"),
    "a web page": (b"<html>not found</html>", "begins with 3c 68 74 6d"),
    "no image": (idx_bytes(torch.zeros(0, 3, 4, dtype=torch.uint8)), "is empty"),
    "other count": (idx_bytes(torch.zeros(6, 3, 4, dtype=torch.uint8)), "6 images .* 120 labels"),
}


@pytest.mark.parametrize("content, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_files_are_named(tmp_path, content, message):
    path = write_mnist(tmp_path) / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(BadData, match=message) as error:
        load("mnist", tmp_path, download=False)
    assert str(path) in str(error.value)


def test_labels_beyond_the_classes_are_refused(tmp_path):
    path = write_mnist(tmp_path) / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(torch.full((TEST,), 77, dtype=torch.uint8))))
    with pytest.raises(BadData, match="label 77"):
        load("mnist", tmp_path, download=False)


def test_unreadable_files_and_folders_are_named(tmp_path, monkeypatch):
    path = write_mnist(tmp_path) / "train-images-idx3-ubyte.gz"
    path.unlink(), path.mkdir()  # a folder of that name: no permission can be read past it
    with pytest.raises(BadData, match=r"cannot read .*train-images-idx3-ubyte.gz: .*directory"):
        load("mnist", tmp_path, download=False)

    def denied(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.stat", denied)
    with pytest.raises(BadData, match=f"cannot read {tmp_path}: Permission denied"):
        load("mnist", tmp_path, download=False)


def test_the_real_mnist(real_data):
    start = time.perf_counter()
    data = load("mnist", real_data, download=False)
    seconds = time.perf_counter() - start
    assert [images.shape for images, _ in parts(data)] == [
        (n, 1, 28, 28) for n in (50_000, 10_000, 10_000)
    ]
    first, second = (torch.bincount(labels) / len(labels) for _, labels in parts(data)[:2])
    assert (first - second).abs().max() < 3e-4
    hashes = [
        {row.numpy().tobytes() for row in (images * 255).round().byte()}
        for images, _ in parts(data)
    ]
    assert len(hashes[0] & hashes[1]) == 0  # MNIST's training images are all different
    assert len(hashes[0]) == 50_000
    assert 0.13 < data.train[0].mean() < 0.131
    assert seconds < 10  # about one second on a free core


# omniglot


def png(shade, size=(105, 105)):
    from PIL import Image

    image = Image.new("L", size, 255)
    image.paste(shade, (0, 0, size[0] // 2, size[1]))
    content = io.BytesIO()
    image.save(content, format="png")
    return content.getvalue()


def members(characters, top="", shade=0):
    return {
        f"{top}{alphabet}/{character}/{i}.png": png(shade)
        for alphabet, character in characters
        for i in range(3)
    }


def write_zip(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def write_folder(path, content):
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


TEN = [("Greek", f"character{i:02}") for i in range(6)] + [
    ("Latin", f"character{i:02}") for i in range(4)
]


@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_any_zip_or_folder_of_alphabet_character_image(tmp_path, write):
    source = tmp_path / ("x.zip" if write is write_zip else "x")
    noise = {"Greek/character00/readme.txt": b"text", "Greek/character00/._1.png": b"junk"}
    write(source, {**members(TEN, "" if write is write_folder else "some/where/"), **noise})
    data = load("omniglot", source, download=False)
    assert data.classes == 10 and data.shape == (1, 28, 28)
    labels = [set(labels.tolist()) for _, labels in parts(data)]
    assert [len(found) for found in labels] == [7, 1, 2]
    assert set.union(*labels) == set(range(10))
    assert all(torch.bincount(part[1]).max() == 3 for part in parts(data))
    image = data.train[0][0, 0]
    assert (image[:, :13] == 1).all() and (image[:, 15:] == 0).all()  # the black half is ink


def test_omniglot_archives_are_joined_and_doubles_dropped(tmp_path):
    folder = tmp_path / "omniglot-py"
    write_zip(
        folder / "images_background_small1.zip", members(TEN[:6], "images_background_small1/")
    )
    write_folder(folder / "images_background_small2", members(TEN[4:], shade=255))
    data = load("omniglot", tmp_path, download=False)
    assert data.classes == 10
    assert sum(len(labels) for _, labels in parts(data)) == 30
    blank = {
        label
        for images, labels in parts(data)
        for image, label in zip(images, labels.tolist(), strict=True)
        if image.max() == 0
    }
    assert blank == {6, 7, 8, 9}  # those of the first archive were taken from there


def test_omniglot_sizes_are_of_characters(tmp_path):
    write_folder(tmp_path, members(TEN))
    data = load("omniglot", tmp_path, sizes=(4, 3, 2), download=False)
    assert [len(labels.unique()) for _, labels in parts(data)] == [4, 3, 2]
    with pytest.raises(ValueError, match="from 10 characters"):
        load("omniglot", tmp_path, sizes=(8, 3, 2), download=False)


def test_damaged_omniglot_is_named(tmp_path):
    source = tmp_path / "omniglot-py" / "images_background.zip"
    write_zip(source, members(TEN))
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadData, match="images_background.zip is damaged"):
        load("omniglot", tmp_path, download=False)
    at = whole.index(b"IDAT") + 8
    source.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    with pytest.raises(BadData, match=r"Greek/character00/0.png in .*no readable image.*CRC"):
        load("omniglot", tmp_path, download=False)
    write_zip(source, {"a/b/c.png": b"no picture"})
    with pytest.raises(BadData, match="a/b/c.png in .* is no readable image"):
        load("omniglot", tmp_path, download=False)
    write_zip(source, {"a/c.png": png(0)})
    with pytest.raises(BadData, match="no image at alphabet/character/image"):
        load("omniglot", tmp_path, download=False)


def test_missing_omniglot_says_how_to_get_it(tmp_path):
    with pytest.raises(MissingData, match=r"images_background .*\.zip.* --root any zip or folder"):
        load("omniglot", tmp_path, download=False)


def test_the_real_omniglot(real_data):
    data = load("omniglot", real_data, download=False)
    labels = [set(labels.tolist()) for _, labels in parts(data)]
    assert len(set.union(*labels)) == sum(map(len, labels)) == data.classes
    assert data.classes in (242, 964, 1623)  # the small sets, the background, everything
    assert all((torch.bincount(part)[part] == 20).all() for _, part in parts(data))
    assert 0.05 < data.train[0].mean() < 0.12  # ink is 1 and rare


# text


def test_text_round_trip(tmp_path):
    path = tmp_path / "words.txt"
    content = "zwölf Boxkämpfer\njagen 🦊\n" * 10
    path.write_text(content, encoding="utf-8")
    text = load_text(path, validation=0.25)
    assert text.vocabulary == "".join(sorted(set(content)))
    assert len(text.validation) == round(len(content) / 4)
    assert text.decode(torch.cat([text.train, text.validation])) == content
    assert text.train.dtype == torch.int64


def test_tiny_shakespeare_by_name(tmp_path, monkeypatch):
    with pytest.raises(MissingData, match=r"tiny_shakespeare.txt in .*save https://"):
        load_text()
    (tmp_path / "tiny_shakespeare.txt").write_text("to be or not to be")
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    assert load_text().decode(load_text().train).startswith("to be")


def test_unusable_texts_are_named(tmp_path):
    path = tmp_path / "words.txt"
    with pytest.raises(MissingData, match="there is no text file .*words.txt"):
        load_text(path)
    path.write_bytes(b"abc\xff\xfe")
    with pytest.raises(BadData, match="words.txt is no UTF-8 text: .* at byte 3"):
        load_text(path)
    path.write_text("x")
    with pytest.raises(BadData, match="1 characters: too few"):
        load_text(path)
    with pytest.raises(ValueError, match="not 1.5"):
        load_text(path, validation=1.5)
    with pytest.raises(BadData, match="cannot read .*directory"):
        load_text(tmp_path)


# torchvision


def fake_torchvision(monkeypatch, source, tmp_path):
    package = tmp_path / "packages" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source.get("__init__", ""))
    (package / "datasets.py").write_text(source.get("datasets", ""))
    forget(monkeypatch)
    monkeypatch.syspath_prepend(package.parent)


def forget(monkeypatch, package="torchvision"):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


def uninstall(monkeypatch, package):
    """Make the import of a package fail as if it were not installed."""

    class Nothing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    forget(monkeypatch, package)
    monkeypatch.setattr(sys, "meta_path", [Nothing, *sys.meta_path])


def test_without_torchvision_the_error_says_where_and_how(monkeypatch):
    uninstall(monkeypatch, "torchvision")
    with pytest.raises(MissingData, match=r"looked for .*torchvision, which is not installed.*pip"):
        load("mnist")


def test_torchvision_that_fails_on_import_is_told_from_a_missing_one(monkeypatch, tmp_path):
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    fake_torchvision(monkeypatch, {"__init__": broken}, tmp_path)
    with pytest.raises(MissingData) as error:
        load("mnist")
    told = str(error.value)
    assert "RuntimeError: operator torchvision::nms does not exist" in told
    assert "cannot be imported" in told and "belongs to the installed torch" in told


def test_torchvision_is_not_touched_where_the_files_are_at_hand(monkeypatch, tmp_path):
    fake_torchvision(monkeypatch, {"__init__": "raise RuntimeError('touched')"}, tmp_path)
    write_mnist(tmp_path)
    assert len(load("mnist", tmp_path).test[1]) == TEST


DOWNLOADER = """
import sys
sys.path.insert(0, {here!r})
from written import write_mnist
def MNIST(root, download):
    write_mnist(root)
"""


def test_a_download_lands_in_the_cache_and_is_found_again(monkeypatch, tmp_path):
    source = DOWNLOADER.format(here=str(Path(__file__).parent))
    fake_torchvision(monkeypatch, {"datasets": source}, tmp_path)
    cache = tmp_path / "cache" / "bilevel"
    assert len(load("mnist").test[1]) == TEST
    assert [item.name for item in cache.iterdir()] == ["MNIST"]
    assert len(load("mnist", download=False).test[1]) == TEST


def test_a_failed_download_leaves_nothing_and_says_why(monkeypatch, tmp_path):
    source = (
        "import pathlib\n"
        "def MNIST(root, download):\n"
        "    pathlib.Path(root, 'MNIST').mkdir()\n"
        "    raise OSError('no route to host')\n"
    )
    fake_torchvision(monkeypatch, {"datasets": source}, tmp_path)
    with pytest.raises(MissingData, match="download failed .OSError: no route to host"):
        load("mnist")
    assert list((tmp_path / "cache" / "bilevel").iterdir()) == []
