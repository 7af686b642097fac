"""An edited model folder, streamed from file to file without ever holding the model."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from salve_lm.atomic import atomic_folder, check_writable_target
from salve_lm.edits.plan import Effect, TensorChange
from salve_lm.errors import BadConfig, CorruptFile, NoEffect, OutputUnwritable
from salve_lm.task_vectors.carried import carry_over, declare_dtype, write_index
from salve_lm.task_vectors.changing import Changed, Delta, NamedDeltas, change_tensor
from salve_lm.task_vectors.copying import PIECE, RangeCopier, expect_reading, start_writeback
from salve_lm.task_vectors.digests import weights_digest
from salve_lm.task_vectors.replacing import Replacement, replace_tensor
from salve_lm.task_vectors.safetensors_header import Header, TensorInfo, layout
from salve_lm.task_vectors.tensor_files import TensorFiles

# bytes of unchanged tensors that one thread copies in a row
_RUN = 1 << 27
_HASHED = 1 << 18


@dataclass(frozen=True)
class Written:
    """A folder that was written.

    Attributes:
        path: where it will be, or is.
        changes: how far each changed tensor moved, by its name on disk.
        sha256: of each changed tensor's bytes, before and after.
        base_sha256: `weights_digest` of the base.
        result_sha256: `weights_digest` of the result.
        headers: of the files written.
        bytes_read: of the base, headers included; the edits' own sources not.
        bytes_written: of all safetensors files.
        left_out: files of the base folder that were not carried over.
    """

    path: Path
    changes: Mapping[str, TensorChange]
    sha256: Mapping[str, tuple[str, str]]
    base_sha256: str
    result_sha256: str
    headers: Mapping[str, Header]
    bytes_read: int
    bytes_written: int
    left_out: Sequence[str]


def write_edited(
    base: TensorFiles,
    edits: Sequence[NamedDeltas],
    out: str | Path,
    *,
    replaced: Mapping[str, Replacement] | None = None,
    dtype: torch.dtype | None = None,
    finish: Callable[[Path, Written], None] | None = None,
    threads: int | None = None,
) -> Written:
    """Write the edited model to the new folder `out`: same files, same names, same layout.

    Unchanged tensors are copied by the kernel, changed ones read, changed in float32, cast once and
    written by blocks of rows; every byte of the base is hashed once on the way. Resident memory
    grows by some 10 MB a thread, whatever the size of the model or of a tensor; tensors that are
    `replaced` are held whole, one layer a thread. Everything in the base folder that is not weights
    comes along; the folder appears whole or not at all.

    Args:
        base: the unedited weights.
        edits: applied in order.
        out: must not exist.
        replaced: new tensors by name on disk, which all edits are in already; none of them may be
            among `edits` too, which names the edits and holds the changes of all other tensors.
        dtype: of the changed tensors; that of the base where None. With float32, `config.json`
            says float32 too, so that transformers loads the whole model in it; tensors that did
            not change stay as they are on disk, which loses nothing.
        finish: called with the temporary folder when all weights are in it; what it writes there
            gets its final name together with them.
        threads: that read, compute and write; as many as there are cores, but 2 to 8, where None.

    Raises:
        BadConfig: no edits.
        NameNotFound: a tensor that the base does not have.
        NoEffect: an edit that changes no stored value.
        NotFinite, ShapeMismatch, UnsupportedEdit: see `change_tensor`.
        CorruptFile: a file of the base became shorter meanwhile.
        OutputExists, OutputUnwritable: see `salve_lm.atomic`; too little space is noticed first.
    """
    replaced = replaced or {}
    if not replaced and not any(edit.deltas for edit in edits):
        raise BadConfig("Nothing to write: give at least one edit that changes a tensor.")
    effects = [Effect() for _ in edits]
    deltas: dict[str, list[tuple[Delta, Effect]]] = {}
    for edit, effect in zip(edits, effects, strict=True):
        for name, delta in edit.deltas.items():
            base.info(name)  # a typo is an error before anything is written
            deltas.setdefault(name, []).append((delta, effect))
    for name in replaced:
        base.info(name)
    edited = {*deltas, *replaced}
    headers = {file: _new_header(base, file, edited, dtype) for file in base.files}
    out = check_writable_target(out)
    size = sum(header.size for header in headers.values())
    _check_space(out, size)
    with atomic_folder(out) as folder:
        streams = _Streams(base, headers, deltas, folder, replaced, effects)
        done = streams.run(threads or _threads())
        for edit, effect in zip(edits, effects, strict=True):
            if not effect.stored:
                raise NoEffect(_no_effect(edit.name, effect.computed))
        left_out = carry_over(base.folder, folder)
        if base.index is not None:
            write_index(base.index, _total_size(headers), folder)
        if dtype is not None:
            declare_dtype(folder, str(dtype).removeprefix("torch."))
        changed = {name: done.changed[name] for name in base.names if name in done.changed}
        after = done.copied | {name: c.sha256_after for name, c in changed.items()}
        before = done.copied | {name: c.sha256_before for name, c in changed.items()}
        written = Written(
            path=out,
            changes={name: c.change for name, c in changed.items()},
            sha256={name: (c.sha256_before, c.sha256_after) for name, c in changed.items()},
            base_sha256=weights_digest(base.headers, before),
            result_sha256=weights_digest(headers, after),
            headers=headers,
            bytes_read=sum(header.size for header in base.headers.values()),
            bytes_written=size,
            left_out=left_out,
        )
        if finish is not None:
            finish(folder, written)
    return written


class _Stopped(Exception):
    """Another thread failed, or the user interrupted."""


@dataclass
class _Streams:
    """All files on their way, tensor by tensor and run by run."""

    base: TensorFiles
    headers: Mapping[str, Header]
    deltas: Mapping[str, Sequence[tuple[Delta, Effect]]]
    folder: Path
    replaced: Mapping[str, Replacement]
    effects: Sequence[Effect]
    copied: dict[str, str] = field(default_factory=dict)
    changed: dict[str, Changed] = field(default_factory=dict)
    _errors: list[BaseException] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self, threads: int) -> _Streams:
        with ExitStack() as stack:
            fds = {file: stack.enter_context(self._new_file(file)) for file in self.headers}
            pool = stack.enter_context(_one_core_each(threads))
            try:
                # first all work, then the flushing: a file that is ready flushes beside the others
                jobs = {
                    file: [
                        pool.submit(self._work, file, fds[file], unit) for unit in self._units(file)
                    ]
                    for file in self.headers
                }
                for file, pending in jobs.items():
                    wait(pending)
                    if self._errors:
                        raise self._errors[0]
                    os.fsync(fds[file])
            finally:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        return self

    @contextmanager
    def _new_file(self, file: str) -> Iterator[int]:
        fd = os.open(self.folder / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.ftruncate(fd, self.headers[file].size)
            os.pwrite(fd, self.headers[file].raw, 0)
            yield fd
        finally:
            os.close(fd)

    def _units(self, file: str) -> Iterator[str | list[str]]:
        """Names of changed tensors, and runs of unchanged ones that lie side by side in both."""
        run: list[str] = []
        for name, info in self.base.headers[file].tensors.items():
            if name in self.deltas or name in self.replaced:
                if run:
                    yield run
                run = []
                yield name
                continue
            if run and not self._follows(file, run, info):
                yield run
                run = []
            run.append(name)
        if run:
            yield run

    def _follows(self, file: str, run: list[str], info: TensorInfo) -> bool:
        old, new = self.base.headers[file].tensors, self.headers[file].tensors
        first, last = old[run[0]], new[run[-1]]
        shift = new[run[0]].offset - first.offset
        if info.offset + shift != last.offset + last.nbytes:
            return False
        return info.offset + info.nbytes - first.offset <= _RUN

    def _work(self, file: str, fd: int, unit: str | list[str]) -> None:
        try:
            if isinstance(unit, str):
                self._change(file, fd, unit)
            else:
                self._copy(file, fd, unit)
        except _Stopped:
            pass
        except BaseException as e:
            self._errors.append(e)
            self._stop.set()  # the others end within a block

    def _change(self, file: str, fd: int, name: str) -> None:
        self._proceed()
        target = self.headers[file].tensors[name]
        if name in self.replaced:
            self.changed[name] = replace_tensor(
                name, self.base, target, fd, self.replaced[name], self.effects, self._proceed
            )
        else:
            self.changed[name] = change_tensor(
                name, self.base, target, fd, self.deltas[name], self._proceed
            )

    def _copy(self, file: str, fd: int, names: list[str]) -> None:
        infos = [self.base.headers[file].tensors[name] for name in names]
        start, stop = infos[0].offset, infos[-1].offset + infos[-1].nbytes
        shift = self.headers[file].tensors[names[0]].offset - start
        source = self.base.fileno(file)
        buffer = memoryview(bytearray(_HASHED))
        copier = RangeCopier(source, fd, buffer)
        hashes = _Hashes(self.base, file, list(zip(names, infos, strict=True)), buffer)
        for begin in range(start, stop, PIECE):
            self._proceed()
            end = min(begin + PIECE, stop)
            expect_reading(source, begin, end - begin)
            try:
                copier.copy(begin, begin + shift, end - begin)
            except EOFError as e:
                path = self.base.folder / file
                raise CorruptFile(path, "it became shorter meanwhile", "Fetch it again.") from e
            start_writeback(fd, begin + shift, end - begin)
            hashes.read_to(end)
        self.copied.update(hashes.finished())

    def _proceed(self) -> None:
        if self._stop.is_set():
            raise _Stopped


class _Hashes:
    """SHA-256 of tensors that lie side by side, read piece by piece out of the page cache."""

    def __init__(
        self,
        base: TensorFiles,
        file: str,
        tensors: Sequence[tuple[str, TensorInfo]],
        buffer: memoryview,
    ) -> None:
        self._base, self._file, self._tensors, self._buffer = base, file, tensors, buffer
        self._hashes = [hashlib.sha256() for _ in tensors]
        self._at = tensors[0][1].offset
        self._k = 0

    def read_to(self, end: int) -> None:
        """Read on up to the byte before `end`."""
        while self._at < end:
            info = self._tensors[self._k][1]
            if self._at >= info.offset + info.nbytes:
                self._k += 1
                continue
            n = min(info.offset + info.nbytes - self._at, end - self._at, len(self._buffer))
            self._base.read_into(self._file, self._buffer[:n], self._at)
            self._hashes[self._k].update(self._buffer[:n])
            self._at += n

    def finished(self) -> dict[str, str]:
        """Hashes by name."""
        pairs = zip(self._tensors, self._hashes, strict=True)
        return {name: digest.hexdigest() for (name, _), digest in pairs}


@contextmanager
def _one_core_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads do not each start torch's own; the caller's setting comes back."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "write", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _new_header(
    base: TensorFiles, file: str, edited: Collection[str], dtype: torch.dtype | None
) -> Header:
    header = base.headers[file]
    wanted = {
        name: (dtype if dtype is not None and name in edited else info.dtype, info.shape)
        for name, info in header.tensors.items()
    }
    if all(wanted[name][0] == info.dtype for name, info in header.tensors.items()):
        return header
    return layout(file, wanted, header.metadata)


def _check_space(out: Path, size: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise OutputUnwritable(
            f"Cannot write {out}: it takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free. "
            "Free some space, or choose a folder on another disk."
        )


def _total_size(headers: Mapping[str, Header]) -> int:
    return sum(info.nbytes for h in headers.values() for info in h.tensors.values())


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(2, cores or 2))


def _no_effect(name: str, lost: bool) -> str:
    if lost:
        return (
            f"Edit {name!r} changes nothing: its change is below the resolution of the dtype the "
            "weights are stored in. Raise alpha, or write the changed tensors as float32."
        )
    return (
        f"Edit {name!r} changes nothing: every value stays as it was. Raise alpha from zero, or "
        "choose other layers; for a task vector, check that the fine-tuned weights differ from the "
        "base there."
    )
