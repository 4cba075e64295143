"""A role's state on disk, written by all its ranks together and read by any number of ranks.

A thin layer over torch.distributed.checkpoint: each rank writes the pieces that it holds, one `.metadata` file says
where every piece of every tensor is, and reading shards the tensors anew for whatever layout asks.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hybridflow.config.tree import leaves
from hybridflow.disk import free_bytes
from hybridflow.errors import CheckpointError, DamagedCheckpointError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

METADATA = ".metadata"
_DESCRIBING = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_DESCRIBING, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_DESCRIBING, f"{name}StorageMetadata") for name in ("Tensor", "Bytes", "Chunk")),
    *((_DESCRIBING, "TensorProperties"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")),
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("collections", "OrderedDict")),
}
"""What a metadata file is made of, beside the names of dtypes. Unpickling anything else might run code."""


def save_sharded(folder: str, state: dict[str, object], group: ProcessGroup | None) -> None:
    """Write `state`, a nested dict of tensors, DTensors and picklable values, to `folder`. Every rank of `group` calls this.

    What has the same key on several ranks is written once, from any of them, so a value that differs between ranks,
    such as a random state, needs a key of its own per rank. `group` is None where there is one process.

    Raises:
        CheckpointError: on every rank, when any rank could not write.
    """
    with _explained("written", Path(folder)):
        metadata = save(state, checkpoint_id=folder, process_group=group, no_dist=_is_alone(group))
    if _is_alone(group) or dist.get_rank(group) == 0:
        _check_shared(Path(folder), metadata)


def load_sharded(folder: str, state: dict[str, object], group: ProcessGroup | None) -> None:
    """Replace the contents of `state` by what `save_sharded` wrote: tensors in place, other values in their dict.

    `state` says what is read: it may hold fewer keys than were written, in any layout and dtype.

    Raises:
        CheckpointError: on every rank, when a file is missing or damaged, or a part of `state` was not saved or
            has another shape.
    """
    read_metadata(folder)
    with _explained("read", Path(folder)):
        load(state, storage_reader=_Reader(folder), process_group=group, no_dist=_is_alone(group))


def check_same_parts(folder: str, state: Mapping[str, object]) -> None:
    """See that `folder` holds exactly the parts of `state`, in the same shapes: neither fewer nor more.

    Raises:
        CheckpointError: it does not; says how many of each, and names the first.
    """
    entries = read_metadata(folder).state_dict_metadata.items()
    saved = {name: tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None for name, entry in entries}
    held = {name: value for name, value in leaves(state) if not isinstance(value, Mapping)}
    wanted = {name: tuple(value.shape) if isinstance(value, torch.Tensor) else None for name, value in held.items()}
    if saved == wanted:
        return
    only_saved, only_wanted = sorted(saved.keys() - wanted.keys()), sorted(wanted.keys() - saved.keys())
    other_shape = sorted(name for name in saved.keys() & wanted.keys() if saved[name] != wanted[name])
    found = [
        f"{len(only_saved)} saved parts have no place in it, the first is {only_saved[0]}" if only_saved else "",
        f"{len(only_wanted)} of its parts were not saved, the first is {only_wanted[0]}" if only_wanted else "",
        *(f"{name} was saved as {saved[name]} and is {wanted[name]}" for name in other_shape[:1]),
    ]
    raise CheckpointError(f"{folder} is of another model: {'; '.join(filter(None, found))}")


def read_metadata(folder: str) -> Metadata:
    """What was written to `folder`: shapes, dtypes and places of all tensors.

    Raises:
        CheckpointError: `folder` holds no sharded state, or its metadata file is damaged.
    """
    path = Path(folder)
    if not (path / METADATA).is_file():
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else ["no such folder"]
        found = ", ".join(names[:8]) or "nothing"
        raise CheckpointError(
            f"{path} should hold the sharded state of a role, with a file {METADATA}; found {found}. "
            "Give the checkpoint of a run whose configuration has this role"
        )
    with _explained("read", path / METADATA):
        return _Reader(folder).read_metadata()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which describes no tensor")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """torch's, but that the metadata cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, METADATA).open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _check_shared(folder: Path, metadata: Metadata) -> None:
    """Every rank's file must be visible here: a folder on each node's own disk would be an incomplete checkpoint."""
    names = {str(place.relative_path) for place in (metadata.storage_data or {}).values()}
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} files that the ranks wrote are not visible on this node, the first is "
            f"{missing[0]}. Checkpoints need a folder that all nodes share; set run.folder to one"
        )


def _is_alone(group: ProcessGroup | None) -> bool:
    return group is None and not dist.is_initialized()


@contextmanager
def _explained(action: str, folder: Path) -> Iterator[None]:
    """Turn what torch raises into a CheckpointError; its CheckpointException is no `Exception`, so callers would miss it."""
    try:
        with warnings.catch_warnings():
            # One process without torch.distributed is a supported way to run, not an oversight.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except CheckpointException as error:
        raise _could_not_be(action, folder, _causes(error)) from error
    except Exception as error:  # what unpickling damaged bytes ends in is open: EOFError, ValueError, ImportError and more
        raise _could_not_be(action, folder, _one_line(error)) from error


def _could_not_be(action: str, folder: Path, found: str) -> CheckpointError:
    kind = DamagedCheckpointError if action == "read" else CheckpointError
    return kind(f"{folder} could not be {action}: {found}{_free_space(action, folder)}")


def _causes(error: CheckpointException) -> str:
    """The first line of each distinct failure, with its ranks."""
    ranks: dict[str, list[int]] = {}
    failures: Mapping[int, tuple[BaseException, object]] = error.failures
    for rank, (cause, _) in sorted(failures.items()):
        ranks.setdefault(_one_line(cause), []).append(rank)
    return "; ".join(f"{cause} (rank {', '.join(map(str, where))})" for cause, where in ranks.items())


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no further words'}"[:400]


def _free_space(action: str, folder: Path) -> str:
    """torch reports a full disk as a wrong position in a file, so every failed write says how much was free."""
    if action != "written":
        return ""
    return f"; {free_bytes(folder):,} bytes are free there"
