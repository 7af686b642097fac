"""Run a network over data once and keep what passes one site, on disk."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from salve_lm import __version__
from salve_lm.activations.hooks import run_to
from salve_lm.activations.key import make_key
from salve_lm.activations.shard import DTYPES, StoreDtype
from salve_lm.activations.shard_writer import ShardWriter
from salve_lm.activations.sites import Site, parse_site
from salve_lm.activations.store import (
    FORMAT,
    VERSION,
    ActivationStore,
    Index,
    SplitEntry,
    write_index,
)
from salve_lm.atomic import atomic_folder, check_writable_target
from salve_lm.data.labelled import LabelledData, Split
from salve_lm.errors import BadConfig, EmptyClass, NotFinite
from salve_lm.modules.studied import StudiedModel

logger = logging.getLogger(__name__)


def harvest(
    studied: StudiedModel,
    data: LabelledData,
    site: str,
    out: str | Path,
    splits: Sequence[Split] = ("train", "val"),
    dtype: StoreDtype = "float32",
    shard_rows: int = 65536,
    batch_size: int | None = None,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> ActivationStore:
    """Write the activations of `studied.model` at `site` over `splits` of `data` to a new store.

    The samples are those of `data.eval_dataset` in its order, each once; the forward pass stops at
    the site; the model is in eval mode, and afterwards back in its own mode and on its own device.

    Args:
        studied: the network, frozen for this.
        data: where the samples come from; must be set up.
        site: where to read, see `parse_site`.
        out: folder of the store; must not exist. It appears when everything is written.
        splits: splits to harvest.
        dtype: of the stored activations; float32 keeps their bits.
        shard_rows: rows a file.
        batch_size: samples a forward pass; `data.batch_size` where None.
        device: where to run; "auto" takes CUDA where there is one.
        progress: show a progress bar for each split.

    Raises:
        OutputExists, OutputUnwritable: `out` is there already; cannot be written; the disk is full.
        NotFinite: NaN or infinity; names site and sample.
        EmptyClass: a class has no samples in one of the splits.
        NameNotFound: no such site.
        BadConfig: sizes below 1, no such device, a label outside of the classes.
    """
    where = parse_site(site, studied)
    batch_size = data.batch_size if batch_size is None else batch_size
    if shard_rows < 1 or batch_size < 1:
        raise BadConfig("shard_rows and batch_size must be at least 1.")
    run_on = _device(device)
    check_writable_target(out)  # before the hashing, which reads all weights
    key = make_key(studied, data, where, splits, dtype)
    entries: dict[str, SplitEntry] = {}
    d_in = 0
    with atomic_folder(out) as folder, _moved(studied.model, run_on):
        for split in splits:
            writer = _SplitWriter(folder, split, DTYPES[dtype], shard_rows, where)
            _run_split(studied.model, data, where, split, batch_size, run_on, writer, progress)
            entries[split] = writer.finish(data.class_names)
            d_in = writer.d_in
        index: Index = {
            "format": FORMAT,
            "version": VERSION,
            "key": key,
            "class_names": list(data.class_names),
            "d_in": d_in,
            "dtype": dtype,
            "splits": entries,
            "versions": {"salve_lm": __version__, "torch": str(torch.__version__)},
        }
        write_index(folder, index)
    logger.info("Harvested %s to %s", ", ".join(splits), out)
    return ActivationStore(out)


def _run_split(
    model: nn.Module,
    data: LabelledData,
    site: Site,
    split: Split,
    batch_size: int,
    device: torch.device,
    writer: _SplitWriter,
    progress: bool,
) -> None:
    from tqdm import tqdm

    dataset = data.eval_dataset(split)
    n = len(dataset)  # type: ignore[arg-type]
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=data.num_workers,
        generator=torch.Generator(),  # a loader without its own draws from the global random state
    )
    first = 0
    with tqdm(total=n, desc=f"harvest {split}", unit="sample", disable=not progress) as bar:
        for inputs, labels in loader:
            describe = _describer(data, split, first)
            x = run_to(model, {"site": site}, inputs.to(device), describe)["site"]
            if first == 0:
                writer.check_space(n * len(x) // len(inputs), x.shape[1])
            writer.add(x, torch.as_tensor(labels), first, describe)
            first += len(inputs)
            bar.update(len(inputs))


def _describer(data: LabelledData, split: Split, first: int) -> Callable[[int], str]:
    """Row of a batch that begins at sample `first` -> where that sample comes from."""
    return lambda row: data.describe(split, first + row)


class _SplitWriter:
    """Checks rows of one split, numbers their samples and hands them to a `ShardWriter`."""

    def __init__(
        self, folder: Path, split: str, dtype: torch.dtype, shard_rows: int, site: Site
    ) -> None:
        self.d_in = 0
        self._split, self._dtype, self._site = split, dtype, site
        self._shards = ShardWriter(folder, split, dtype, shard_rows)
        self.check_space = self._shards.check_space
        self._samples = 0
        self._seen: set[int] = set()

    def add(
        self, x: Tensor, label: Tensor, first_sample: int, describe: Callable[[int], str]
    ) -> None:
        """Take in rows `x` of the samples with `label` [n], numbered from `first_sample`."""
        self.d_in = x.shape[1]
        stored = x.to(self._dtype).cpu()
        if not bool(stored.isfinite().all()):
            bad = int((~stored.isfinite().all(dim=1)).nonzero()[0])
            raise NotFinite(
                str(self._site),
                f"{describe(bad * len(label) // len(x))}, as {self._dtype}",
                "It does not fit this dtype; store as bfloat16 or float32.",
            )
        positions = len(x) // len(label)
        sample = torch.arange(first_sample, first_sample + len(label))
        self._samples += len(label)
        self._seen.update(label.tolist())
        self._shards.add(
            stored,
            label.to(torch.int64).repeat_interleave(positions),
            sample.repeat_interleave(positions),
        )

    def finish(self, class_names: Sequence[str]) -> SplitEntry:
        """Write what is left and say what was written."""
        foreign = self._seen - set(range(len(class_names)))
        if foreign:
            raise BadConfig(
                f"Label {min(foreign)} in split {self._split!r} is not one of the "
                f"{len(class_names)} classes. Mend the data's labels or class_names."
            )
        for label, name in enumerate(class_names):
            if label not in self._seen:
                raise EmptyClass(name, f"split {self._split!r}")
        shards = self._shards.finish()
        return {
            "samples": self._samples,
            "rows": sum(s["rows"] for s in shards),
            "shards": shards,
        }


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadConfig(
            f"Device {device} was asked for, but torch finds {torch.cuda.device_count()} CUDA "
            "devices. Use another device (cpu works everywhere), or install a CUDA build of torch."
        )
    return device


@contextlib.contextmanager
def _moved(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Have `model` on `device` inside the block, and back on its own after."""
    home = next((t.device for t in (*model.parameters(), *model.buffers())), device)
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
