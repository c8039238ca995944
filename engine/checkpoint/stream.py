"""Writes the file that `torch.save` writes, one tensor at a time.

torch.save needs all tensors in memory. Here a tree may also hold a `PendingTensor`, whose numbers
are fetched when their turn to be written comes. The bytes are those that torch.save writes for the
same tensors on a CPU, so that any torch program loads the file.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.storage import TypedStorage

from files.atomic import HashedFile

_ALIGNMENT = 64  # of a storage in the file, in bytes: torch's default, which mmap needs


@dataclass(frozen=True, eq=False)
class PendingStorage:
    """The memory of a tensor (and of those tied to it) that is in no single process."""

    dtype: torch.dtype
    numel: int
    fetch: Callable[[], Tensor]
    """Returns its numbers, contiguous from the beginning of a storage on the CPU, until the next
    call of one. Called once, in the order of the file."""

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class PendingTensor:
    """A contiguous tensor whose numbers are fetched when their turn to be written comes."""

    shape: torch.Size
    storage: PendingStorage

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles it as torch.save pickles a tensor: a function that rebuilds it, its storage,
        offset, shape, strides, requires_grad, and backward hooks."""
        strides = torch.empty(self.shape, device="meta").stride()
        hooks: OrderedDict[int, Any] = OrderedDict()
        layout = (0, tuple(self.shape), strides, False, hooks)
        return torch._utils._rebuild_tensor_v2, (self.storage, *layout)


class _Pickler(pickle.Pickler):
    """Puts a reference in place of each storage, and lists the storages in the order met."""

    def __init__(self, out: io.BytesIO) -> None:
        super().__init__(out, protocol=torch.serialization.DEFAULT_PROTOCOL)
        self.storages: list[UntypedStorage | PendingStorage] = []
        self._keys: dict[int, str] = {}

    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        """Returns the reference: class of the storage, name in the file, device, and numbers."""
        # Deprecated, yet what the layout of the file is made of: a storage with a dtype. Those of
        # dtypes younger than that (float8) are plain bytes.
        storage: UntypedStorage | PendingStorage
        if isinstance(obj, TypedStorage):
            storage, identity = obj._untyped_storage, obj._untyped_storage._cdata
            kind, numel = obj._pickle_storage_type(), obj._size()  # type: ignore[no-untyped-call]
        elif isinstance(obj, UntypedStorage):
            storage, kind, identity, numel = obj, "UntypedStorage", obj._cdata, obj.nbytes()
        elif isinstance(obj, PendingStorage):
            kind = torch.storage._dtype_to_storage_type_map()[obj.dtype]
            storage, identity, numel = obj, id(obj), obj.numel
        else:
            return None
        if identity not in self._keys:
            self._keys[identity] = str(len(self._keys))
            self.storages.append(storage)
        return "storage", getattr(torch, kind), self._keys[identity], "cpu", numel


def write_tree(tree: dict[str, Any], out: HashedFile) -> None:
    """Writes nested dicts and lists of tensors, pending tensors and plain values.

    A storage that tensors share is written once. Tensors of a device come to the CPU one by one.
    """
    data = io.BytesIO()
    pickler = _Pickler(data)
    pickler.dump(tree)
    # Without CRC32s, which no torch.load checks and which take as long as our sha256. `unzip`
    # reports such a file as damaged; torch reads it.
    # The writer calls only `write` of its file.
    writer = torch._C.PyTorchFileWriter(out, False, _ALIGNMENT)  # type: ignore[call-overload]
    try:
        _write_records(writer, data.getvalue(), pickler.storages)
    finally:  # also after an error: the writer's destructor would do it, too late to be caught
        writer.write_end_of_file()


def _write_records(
    writer: torch._C.PyTorchFileWriter,
    pickled: bytes,
    storages: list[UntypedStorage | PendingStorage],
) -> None:
    small = {
        "data.pkl": pickled,
        ".format_version": b"1",
        ".storage_alignment": str(_ALIGNMENT).encode(),
        "byteorder": sys.byteorder.encode(),
    }
    for name, content in small.items():
        writer.write_record(name, content, len(content))
    for number, storage in enumerate(storages):
        if isinstance(storage, PendingStorage):
            on_cpu, size = storage.fetch().untyped_storage(), storage.nbytes
        else:
            # Itself, if it is there already.
            on_cpu, size = storage.cpu(), storage.nbytes()  # type: ignore[no-untyped-call]
        writer.write_record(f"data/{number}", on_cpu, size)  # type: ignore[arg-type]
