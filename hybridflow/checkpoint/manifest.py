"""The manifest of a checkpoint: size and checksum of every file, written last. A folder without one is not complete."""

from __future__ import annotations

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hybridflow.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What manifest.json says."""

    sequence: int
    """Counts the commits of a run's folder: the newest checkpoint is the one written last, whatever its step, so that a
    second run in the same folder does not continue from a checkpoint of the first."""
    sizes: dict[str, int]
    """Bytes of each file, by its path within the checkpoint."""
    checksums: dict[str, int]
    """CRC-32 of each file. It finds damage, not forgery, and unlike SHA-256 it keeps up with a fast disk."""


def write_manifest(folder: Path, *, sequence: int) -> None:
    """Describe all files below `folder`, and flush them, the manifest and the folders to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "crc32": checksum}
        for path, checksum in zip(files, _checksums(files, flush=True), strict=True)
    }
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "sequence": sequence, "files": entries}, indent=1))
    _checksum(folder / MANIFEST, flush=True)
    for part in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        flush_folder(part)


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of `checkpoint`.

    Raises:
        CheckpointError: there is none, it is damaged, or another version wrote it.
    """
    path = checkpoint / MANIFEST
    content = read_json(path, "the list of files of a complete checkpoint")
    files = content.get("files")
    if content.get("format") != FORMAT or not isinstance(files, dict):
        found = f"{path} has format {content.get('format')!r}, and this version reads format {FORMAT}"
        raise CheckpointError(f"{found}. Resume with the version of hybridflow that wrote it")
    return Manifest(
        sequence=int(str(content["sequence"])),
        sizes={name: int(entry["bytes"]) for name, entry in files.items()},
        checksums={name: int(entry["crc32"]) for name, entry in files.items()},
    )


def verify_files(folder: Path) -> None:
    """Compare every file of the checkpoint `folder` with its manifest.

    Raises:
        CheckpointError: names the first file that is missing, has another size, or another checksum.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.sizes.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, so checkpoint {folder} is damaged. {other_checkpoint(folder)}")
        if (size := path.stat().st_size) != expected:
            raise CheckpointError(f"{path} should have {expected:,} bytes and has {size:,}. {other_checkpoint(folder)}")
    found = _checksums([folder / name for name in manifest.checksums])
    for (name, written), read in zip(manifest.checksums.items(), found, strict=True):
        if read != written:
            changed = f"{folder / name} has the checksum {read:08x} instead of {written:08x}: it changed since it was written"
            raise CheckpointError(f"{changed}. {other_checkpoint(folder)}")


def read_json(path: Path, what: str) -> dict[str, object]:
    """The JSON object in a file of a checkpoint; `what` describes it in the errors.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        missing = f"{path} is missing, which holds {what}, so {path.parent} is no complete checkpoint"
        raise CheckpointError(f"{missing}. {other_checkpoint(path.parent)}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. It should hold {what}. {other_checkpoint(path.parent)}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} should hold {what}, and holds a {type(content).__name__}. {other_checkpoint(path.parent)}"
        )
    return content


def flush_folder(folder: Path) -> None:
    """Put the entries of `folder` on the disk: until then a power cut may undo a rename or a new file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def other_checkpoint(damaged: Path) -> str:
    """What to do about a damaged checkpoint: the newest other one beside it, where there is one."""
    others = [path for path in damaged.parent.glob("step_*") if path.name != damaged.name and (path / MANIFEST).is_file()]
    if not others:
        return "There is no other checkpoint beside it; start anew with checkpoint.resume=never"
    newest = max(others, key=lambda path: (path / MANIFEST).stat().st_mtime)  # reading it might fail likewise
    return f"Resume from the one before it by checkpoint.resume={newest}"


def _checksums(files: list[Path], *, flush: bool = False) -> list[int]:
    """CRC-32 of each file, several at once: zlib lets other threads run."""
    with ThreadPoolExecutor(max_workers=8) as threads:
        return list(threads.map(lambda path: _checksum(path, flush=flush), files))


def _checksum(path: Path, *, flush: bool = False) -> int:
    """CRC-32 of a file; with `flush`, its content is on the disk when this returns."""
    checksum = 0
    block = bytearray(_BLOCK_BYTES)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            checksum = zlib.crc32(view[:size], checksum)
        if flush:
            os.fsync(file.fileno())
    return checksum
