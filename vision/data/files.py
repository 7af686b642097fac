"""Image files in a folder or a zip archive: list them, tell them apart, read them as RGB."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from salve_lm.errors import CorruptFile, MissingFile
from salve_lm.hashing import hash_file
from vision.data.transforms import ImageTransform

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
Identity = Literal["content", "size"]


class CorruptImage(CorruptFile):
    """An image file that cannot be read.

    It can be built from a message alone: this is how a DataLoader hands errors of its worker
    processes to the main one, with the worker's traceback in front. Only the last line is kept.
    """

    def __init__(self, path: object, why: str = "", cure: str = "") -> None:
        super().__init__(path, why, cure)
        if not why:
            lines = str(path).strip().splitlines()
            self.args = (lines[-1].partition("CorruptImage: ")[2] or lines[-1],)


class FileTree(Protocol):
    """Files under one root, by their relative names (with `/`)."""

    root: Path

    def names(self) -> list[str]:
        """All files, sorted; empty folders as names that end in `/`."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file."""
        ...

    def identity(self, name: str, by: Identity) -> str:
        """What tells a file from a changed one."""
        ...


def open_tree(root: str | Path) -> FileTree:
    """The files of a folder or of a zip archive (read in place, nothing is extracted).

    Raises:
        MissingFile: nothing at `root`.
        CorruptFile: a file that is no zip archive.
    """
    root = Path(root).expanduser()
    if root.is_dir():
        return Folder(root)
    if not root.is_file():
        raise MissingFile(
            f"There is no folder or zip archive of images at {root}. Check data.init_args.root."
        )
    return Archive(root)


class Folder:
    """Files on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: list[str] | None = None

    def names(self) -> list[str]:
        """All files, sorted; empty folders as names that end in `/`."""
        if self._names is None:
            self._names = self._walk()
        return self._names

    def _walk(self) -> list[str]:
        found = []
        for folder, folders, files in os.walk(self.root, followlinks=True):
            folders.sort()
            relative = Path(folder).relative_to(self.root).as_posix()
            prefix = "" if relative == "." else f"{relative}/"
            found += [prefix + f for f in files]
            if prefix and not files and not folders:
                found.append(prefix)
        return sorted(found)

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return (self.root / name).read_bytes()

    def identity(self, name: str, by: Identity) -> str:
        """SHA-256 of the content, or the size in bytes."""
        path = self.root / name
        return hash_file(path) if by == "content" else str(path.stat().st_size)


class Archive:
    """Files in a zip archive.

    Each process opens it anew: processes that share a file position would mix up their reads.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._handle: zipfile.ZipFile | None = None
        self._pid = 0
        self._entries = {entry.filename: entry for entry in self._zip().infolist()}

    def names(self) -> list[str]:
        """All files, sorted; empty folders as names that end in `/`."""
        parents = {name.rpartition("/")[0] + "/" for name in self._entries if name[-1] != "/"}
        return sorted(n for n in self._entries if n[-1] != "/" or n not in parents)

    def read(self, name: str) -> bytes:
        """The content of a file, checked against its checksum."""
        return self._zip().read(name)

    def identity(self, name: str, by: Identity) -> str:
        """Checksum and size, as the archive's directory has them."""
        entry = self._entries[name]
        return f"{entry.CRC:08x}-{entry.file_size}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}

    def _zip(self) -> zipfile.ZipFile:
        if self._handle is None or self._pid != os.getpid():
            try:
                self._handle = zipfile.ZipFile(self.root)
            except (zipfile.BadZipFile, OSError, ValueError) as e:
                raise CorruptFile(
                    self.root, f"no complete zip archive ({e})", "Copy or download it again."
                ) from e
            self._pid = os.getpid()
        return self._handle


class ImageFiles:
    """Images of one split, read from files when asked for.

    Args:
        tree: where they lie.
        names: one file an image.
        labels: class index of each.
        transform: from RGB image to tensor.
        by: what tells a file from a changed one, see `FileTree.identity`.
    """

    def __init__(
        self,
        tree: FileTree,
        names: Sequence[str],
        labels: Sequence[int],
        transform: ImageTransform,
        by: Identity = "content",
    ) -> None:
        self.labels = labels
        self._tree, self._names, self._transform, self._by = tree, names, transform, by

    def load(self, index: int, draw: int | None) -> Tensor:
        """Image `index`, float32 [3, image_size, image_size].

        Raises:
            CorruptImage: the file cannot be read; names it.
        """
        return self._transform(read_rgb(self._tree, self._names[index]), draw)

    def identity(self) -> object:
        """Names and identities of the files, and the evaluation transform."""
        files = [[name, self._tree.identity(name, self._by)] for name in self._names]
        return [files, self._transform.describe()]

    def describe(self, index: int) -> str:
        """The file's path; inside an archive, behind the archive's."""
        return str(self._tree.root / self._names[index])


def read_rgb(tree: FileTree, name: str) -> Image:
    """Read an image of any kind (greyscale, alpha, palette, 16 bits, CMYK) as RGB.

    Alpha is dropped, not blended, as torchvision's own loader does.

    Raises:
        CorruptImage: truncated, no image, or gone.
    """
    from PIL import Image as pil

    path = tree.root / name
    try:
        image = pil.open(io.BytesIO(tree.read(name)))
        image.load()
        return to_rgb(image)
    except (
        OSError,
        RuntimeError,  # an encrypted archive, or a compression that Python lacks
        SyntaxError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
        pil.DecompressionBombError,
    ) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        if isinstance(e, pil.UnidentifiedImageError):
            reason = "no image, or of an unknown kind"
        raise CorruptImage(path, reason.rstrip("."), "Remove or replace this file.") from e


def to_rgb(image: Image) -> Image:
    """Bring an image of any mode to RGB."""
    from PIL import Image as pil

    if image.mode.startswith("I") or image.mode == "F":
        # Pillow would clip these to 255. Integers have 16 bits, floats mostly end at 1 or 255.
        import numpy as np

        values = np.asarray(image, dtype=np.float64)
        highest = values.max(initial=0)
        top = 65535 if image.mode.startswith("I;16") or highest > 255 else 255
        top = 1 if image.mode == "F" and highest <= 1 else top
        image = pil.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
