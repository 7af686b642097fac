"""Image folders and archives, generated: layouts, kinds of images, names, and every bad input."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from salve_lm.errors import BadConfig, CorruptFile, EmptyClass, MissingFile, NameNotFound
from vision.data import ImageFolder, Imagenette
from vision.data.files import CorruptImage, open_tree, read_rgb

RED = (200, 30, 40)


def image_bytes(colour: tuple[int, int, int] = RED, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (10, 8), colour).save(out, kind)
    return out.getvalue()


def write(root: Path, *names: str) -> Path:
    """Images whose colour tells the file they are from."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if name.endswith("png") else "JPEG"
        (root / name).write_bytes(image_bytes((i, 2 * i, 255 - i), kind))
    return root


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    return write(
        tmp_path / "pets",
        "train/cat/1.png", "train/cat/2.jpg", "train/dog/a.JPEG", "train/dog/b.png",
        "val/cat/3.png", "val/dog/c.png",
    )  # fmt: skip


def data(root: Path, **options: object) -> ImageFolder:
    made = ImageFolder(str(root), image_size=8, batch_size=2, **options)  # type: ignore[arg-type]
    made.setup()
    return made


def files(of: ImageFolder, split: str) -> list[str]:
    n = len(of.eval_dataset(split))  # type: ignore[arg-type]
    root = str(of.locate())
    return [of.describe(split, i)[len(root) + 1 :] for i in range(n)]  # type: ignore[arg-type]


def zipped(folder: Path, inside: str = "", compression: int = zipfile.ZIP_STORED) -> Path:
    path = folder.parent / f"{folder.name}.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{inside}{file.relative_to(folder).as_posix()}")
    return path


def test_train_and_val_folders(two_classes: Path) -> None:
    pets = data(two_classes)
    assert pets.class_names == ["cat", "dog"]
    assert files(pets, "train") == [
        "train/cat/1.png", "train/cat/2.jpg", "train/dog/a.JPEG", "train/dog/b.png"
    ]  # fmt: skip
    assert files(pets, "val") == files(pets, "test") == ["val/cat/3.png", "val/dog/c.png"]
    image, label = pets.eval_dataset("val")[1]
    assert (image.shape, image.dtype, label) == ((3, 8, 8), torch.float32, 1)
    images, labels = next(iter(pets.val_dataloader()))
    assert (images.shape, labels.tolist()) == ((2, 3, 8, 8), [0, 1])


def test_test_folder_is_used(two_classes: Path) -> None:
    write(two_classes, "test/cat/t.png", "test/dog/u.png")
    assert files(data(two_classes), "test") == ["test/cat/t.png", "test/dog/u.png"]


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_val(two_classes: Path, name: str) -> None:
    (two_classes / "val").rename(two_classes / name)
    assert files(data(two_classes), "val") == [f"{name}/cat/3.png", f"{name}/dog/c.png"]


@pytest.mark.parametrize("below", ["", "train/"])
def test_a_share_is_held_out_where_there_is_no_val(tmp_path: Path, below: str) -> None:
    names = [f"{below}{c}/{i}.png" for c in "ab" for i in range(10)]
    flat = data(write(tmp_path / "flat", *names), val_fraction=0.3)
    train, val = files(flat, "train"), files(flat, "val")
    assert sorted(train + val) == sorted(names)
    assert sum(f"{below}a/" in n for n in val) == sum(f"{below}b/" in n for n in val) == 3
    assert files(data(tmp_path / "flat", val_fraction=0.3), "val") == val
    assert files(data(tmp_path / "flat", val_fraction=0.3, split_seed=1), "val") != val


def test_settings_can_be_chosen_without_looking_at_val(two_classes: Path) -> None:
    write(two_classes, "test/cat/9.png", "test/dog/z.png")
    pets = data(two_classes, val_from_train=True, val_fraction=0.5)
    parts = {split: set(files(pets, split)) for split in ("train", "val", "test")}
    assert parts["val"] == parts["test"]
    assert not parts["train"] & parts["val"]
    assert parts["train"] | parts["val"] == set(files(data(two_classes), "train"))
    assert {len(p) for p in parts.values()} == {2}


@pytest.mark.parametrize("inside", ["", "pets/", "outer/pets/"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_give_what_the_folder_gives(
    two_classes: Path, inside: str, compression: int
) -> None:
    folder, archive = data(two_classes), data(zipped(two_classes, inside, compression))
    assert archive.class_names == folder.class_names
    assert files(archive, "train") == [inside + f for f in files(folder, "train")]
    for split in ("train", "val"):
        for (a, i), (b, j) in zip(
            folder.eval_dataset(split),
            archive.eval_dataset(split),
            strict=True,  # type: ignore
        ):
            assert torch.equal(a, b) and i == j


def test_archives_are_read_by_worker_processes(two_classes: Path) -> None:
    archive = zipped(two_classes)
    alone, helped = (data(archive, num_workers=n) for n in (0, 2))
    next(iter(alone.val_dataloader()))  # the archive is open before the processes start
    next(iter(helped.eval_dataset("train")))  # type: ignore[call-overload]
    for a, b in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert torch.equal(a[0], b[0])
    copy = pickle.loads(pickle.dumps(helped.eval_dataset("val")))
    assert torch.equal(copy[0][0], helped.eval_dataset("val")[0][0])


def test_images_deeper_in_a_class_and_other_files(two_classes: Path) -> None:
    write(two_classes, "train/cat/images/deep.png")
    for junk in (
        "train/cat/notes.txt",
        "train/.DS_Store",
        ".git/x.png",
        "__MACOSX/train/cat/._1.png",
    ):
        (two_classes / junk).parent.mkdir(parents=True, exist_ok=True)
        (two_classes / junk).write_bytes(b"junk")
    assert files(data(two_classes), "train")[:3] == [
        "train/cat/1.png", "train/cat/2.jpg", "train/cat/images/deep.png"
    ]  # fmt: skip


def odd(mode: str) -> Image.Image:
    """A two-colour image in `mode`, dark on the left."""
    grey = np.tile(np.array([0, 0, 0, 0, 255, 255, 255, 255], dtype=np.uint8), (8, 1))
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255)
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32))
    image = Image.fromarray(grey)
    if mode == "P":
        return image.convert("RGB").convert("P")
    return image.convert("RGBA" if mode == "RGBA" else mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"),
        ("RGB", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("I;16", "PNG"), ("I", "TIFF"),
        ("F", "TIFF"),
    ],
)  # fmt: skip
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str, kind: str) -> None:
    path = tmp_path / f"x.{kind.lower()}"
    odd(mode).save(path, kind)
    image = read_rgb(open_tree(tmp_path), path.name)
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    assert (pixels[:, :3] < 40).all() and (pixels[:, 5:] > 215).all()


def test_palette_with_transparency(tmp_path: Path) -> None:
    palette = odd("P")
    palette.save(tmp_path / "x.png", transparency=bytes([0, 255] + [255] * 254))
    assert Image.open(tmp_path / "x.png").mode == "P"
    assert read_rgb(open_tree(tmp_path), "x.png").mode == "RGB"


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "gone"])
@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_are_named(two_classes: Path, damage: str, workers: int) -> None:
    path = two_classes / "val" / "dog" / "c.png"
    pets = data(two_classes, num_workers=workers)
    if damage == "gone":
        path.unlink()
    else:
        whole = io.BytesIO()
        Image.effect_noise((40, 40), 90).save(whole, "PNG")
        content = {"cut": whole.getvalue()[:900], "text": b"no image", "empty": b""}[damage]
        path.write_bytes(content)
    with pytest.raises(CorruptImage) as caught:
        list(pets.val_dataloader())
    # one line, without the traceback of the worker process
    assert str(caught.value).startswith(f"Cannot read {path}: ")
    assert str(caught.value).endswith("Remove or replace this file.")


def test_corrupt_images_in_archives(two_classes: Path) -> None:
    archive = zipped(two_classes)
    content = bytearray(archive.read_bytes())
    at = content.index((two_classes / "val/dog/c.png").read_bytes())
    content[at + 45] ^= 255
    archive.write_bytes(content)
    with pytest.raises(CorruptImage, match=r"pets.zip/val/dog/c.png: Bad CRC-32"):
        list(data(archive).val_dataloader())


def test_broken_archives(two_classes: Path) -> None:
    archive = zipped(two_classes)
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(CorruptFile, match=r"pets.zip: no complete zip archive"):
        data(archive)


def test_missing_roots(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="no folder or zip archive of images at"):
        data(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFile, match=r"no images in class folders. Expected root/train/CLASS"):
        data(tmp_path / "empty")
    with pytest.raises(MissingFile, match="no images in class folders"):
        data(write(tmp_path / "flat", "a.png", "b.png"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_classes(two_classes: Path, split: str) -> None:
    shutil.rmtree(two_classes / split / "cat")
    (two_classes / split / "cat").mkdir()
    with pytest.raises(EmptyClass, match=f"Class 'cat' has no samples in {split}/") as caught:
        data(two_classes)
    assert caught.value.class_name == "cat"
    assert data(two_classes, classes=["dog"]).class_names == ["dog"]


def test_train_without_any_image(two_classes: Path) -> None:
    shutil.rmtree(two_classes / "train")
    (two_classes / "train" / "cat").mkdir(parents=True)
    (two_classes / "train" / "dog").mkdir()
    with pytest.raises(EmptyClass, match="Class 'cat' has no samples in train/"):
        data(two_classes)


def test_encrypted_archives(two_classes: Path) -> None:
    archive = zipped(two_classes)
    content = bytearray(archive.read_bytes())
    for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(magic, at + 1)) >= 0:
            content[at + flags] |= 1
    archive.write_bytes(content)
    with pytest.raises(CorruptImage, match="is encrypted"):
        list(data(archive).val_dataloader())


def test_a_class_in_one_split_only(two_classes: Path) -> None:
    write(two_classes, "train/emu/1.png")
    with pytest.raises(EmptyClass, match="Class 'emu' has no samples in val/"):
        data(two_classes)
    shutil.rmtree(two_classes / "train/emu")
    write(two_classes, "val/emu/1.png")
    with pytest.raises(BadConfig, match=r"class 'emu' in val/ and none in train/"):
        data(two_classes)


def test_one_image_cannot_be_divided(tmp_path: Path) -> None:
    root = write(tmp_path / "flat", "a/1.png", "a/2.png", "b/1.png")
    with pytest.raises(EmptyClass, match="Class 'b' has no samples in the held-out share"):
        data(root)


def test_classes_are_chosen_and_ordered(two_classes: Path) -> None:
    (two_classes / "classes.json").write_text(json.dumps({"cat": "Felis", "dog": "Canis"}))
    assert data(two_classes).class_names == ["Felis", "Canis"]
    chosen = data(two_classes, classes=["dog", "Felis"])
    assert chosen.class_names == ["Canis", "Felis"]
    assert files(chosen, "val") == ["val/dog/c.png", "val/cat/3.png"]
    assert [y for _, y in chosen.eval_dataset("val")] == [0, 1]  # type: ignore[attr-defined]
    with pytest.raises(NameNotFound, match=r"No class named 'Cannis'\. Did you mean 'Canis'"):
        data(two_classes, classes=["Cannis"])
    with pytest.raises(BadConfig, match="`classes` is empty"):
        data(two_classes, classes=[])


def test_class_names_beside_an_archive_and_synonyms(two_classes: Path) -> None:
    archive = zipped(two_classes)
    names = {"cat": {"name": "crane, bird"}, "dog": "crane, machine", "emu": "not here"}
    (archive.parent / "classes.json").write_text(json.dumps(names))
    assert data(archive).class_names == ["crane, bird", "crane, machine"]
    names["dog"] = "dog, Canis familiaris"
    (archive.parent / "classes.json").write_text(json.dumps(names))
    assert data(archive).class_names == ["crane", "dog"]
    assert data(two_classes).class_names == ["cat", "dog"]  # beside a folder lies anything


def test_class_names_file_errors(two_classes: Path, tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    with pytest.raises(MissingFile, match="No class_names_file at"):
        data(two_classes, class_names_file=str(file))
    file.write_text("{cat")
    with pytest.raises(CorruptFile, match=r"names.json: no JSON of class folder -> name"):
        data(two_classes, class_names_file=str(file))
    file.write_text('{"cat": "Cat"}')
    with pytest.raises(NameNotFound, match="'dog'"):
        data(two_classes, class_names_file=str(file))
    file.write_text('{"cat": "pet", "dog": "pet"}')
    with pytest.raises(BadConfig, match="Two classes are named 'pet'"):
        data(two_classes, class_names_file=str(file))


def test_fingerprints_follow_content_labels_and_transform(two_classes: Path) -> None:
    first = data(two_classes).fingerprint("train")
    assert data(two_classes, augment="flip", seed=3).fingerprint("train") == first
    assert data(two_classes, mean=(0, 0, 0)).fingerprint("train") != first
    assert data(two_classes, classes=["dog", "cat"]).fingerprint("train") != first
    path = two_classes / "train/cat/1.png"
    changed = bytearray(path.read_bytes())
    changed[-20] ^= 1  # same size
    size = data(two_classes, identity="size").fingerprint("train")
    path.write_bytes(bytes(changed))
    assert data(two_classes).fingerprint("train") != first
    assert data(two_classes, identity="size").fingerprint("train") == size


def test_fingerprints_of_archives_follow_content(two_classes: Path) -> None:
    first = data(zipped(two_classes)).fingerprint("train")
    assert data(zipped(two_classes)).fingerprint("train") == first
    (two_classes / "train/cat/1.png").write_bytes(image_bytes())
    assert data(zipped(two_classes)).fingerprint("train") != first


def imagenette(root: Path) -> Path:
    wnids = ("n01440764", "n03028079")
    return write(
        root, *(f"{s}/{w}/{i}.JPEG" for s in ("train", "val") for w in wnids for i in "ab")
    )


@pytest.mark.parametrize("where", ["", "imagenette2-160"])
def test_imagenette_in_torchvisions_place_or_as_it_is(tmp_path: Path, where: str) -> None:
    imagenette(tmp_path / where)
    nette = Imagenette(str(tmp_path), image_size=8)
    nette.prepare_data()
    nette.setup()
    assert nette.class_names == ["tench", "church"]
    assert len(nette.eval_dataset("val")) == 4  # type: ignore[arg-type]


def test_imagenette_classes_by_name(tmp_path: Path) -> None:
    nette = Imagenette(str(imagenette(tmp_path)), image_size=8, classes=["church"])
    nette.setup()
    assert nette.class_names == ["church"]


def test_imagenette_missing_and_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    from torchvision import datasets

    with pytest.raises(MissingFile, match=r"no Imagenette \(imagenette2-160/.*download: true"):
        Imagenette(str(tmp_path)).setup()

    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(datasets.imagenette, "download_and_extract_archive", offline)
    with pytest.raises(MissingFile, match=r"not usable: .*no route.*complete copy"):
        Imagenette(str(tmp_path), download=True).prepare_data()

    def online(url: str, root: Path, md5: str) -> None:
        imagenette(Path(root) / "imagenette2-160")

    monkeypatch.setattr(datasets.imagenette, "download_and_extract_archive", online)
    nette = Imagenette(str(tmp_path), download=True)
    nette.prepare_data()
    nette.setup()
    assert nette.class_names == ["tench", "church"]
