"""The manifest of a checkpoint: size and checksum of every file, written last. A folder without one is not complete."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hybridflow.disk import flush, named, retried
from hybridflow.errors import CheckpointError, DamagedCheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
OWN_CHECKSUM = "crc32"
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What manifest.json says."""

    sequence: int
    """Counts the commits of a run: the newest checkpoint is the one written last, whatever its step."""
    run: str
    """Identity of the run that wrote it (lineage.py); empty in checkpoints of before there were any."""
    sizes: dict[str, int]
    """Bytes of each file, by its path within the checkpoint."""
    checksums: dict[str, int]
    """CRC-32 of each file. It finds damage, not forgery, and unlike SHA-256 it keeps up with a fast disk."""


def write_manifest(folder: Path, *, sequence: int, run: str = "") -> None:
    """Describe all files below `folder`, and flush them, the manifest and the folders to the disk.

    Raises:
        OSError: one of them could not be read or flushed; names it.
    """
    files = _files(folder)
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "crc32": checksum}
        for path, checksum in zip(files, _checksums(files, flushed=True), strict=True)
    }
    content: dict[str, object] = {"format": FORMAT, "sequence": sequence, "run": run, "files": entries}
    (folder / MANIFEST).write_text(json.dumps({**content, OWN_CHECKSUM: _own_checksum(content)}, indent=1))
    flush(folder / MANIFEST)
    for part in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        flush(part)


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of `checkpoint`.

    Raises:
        CheckpointError: there is none, it is damaged, or another version wrote it.
    """
    path = checkpoint / MANIFEST
    content = read_json(path, "the list of files of a complete checkpoint")
    if content.get("format", FORMAT) != FORMAT:
        found = f"{path} has format {content.get('format')!r}, and this version reads format {FORMAT}"
        raise CheckpointError(f"{found}. The version of hybridflow that wrote it reads it")
    if content.get(OWN_CHECKSUM, checksum := _own_checksum(content)) != checksum:
        raise CheckpointError(f"{path} has changed since it was written: its checksum is another")
    files, sequence, run = content.get("files"), content.get("sequence"), content.get("run", "")
    sizes, checksums = _numbers(files, "bytes"), _numbers(files, "crc32")
    if sizes is None or checksums is None or type(sequence) is not int or not isinstance(run, str):
        raise CheckpointError(f"{path} is damaged: it should hold a sequence number, and the size and CRC-32 of each file")
    return Manifest(sequence=sequence, run=run, sizes=sizes, checksums=checksums)


def verify_files(folder: Path) -> None:
    """Compare every file of the checkpoint `folder` with its manifest, and the manifest with the files.

    Raises:
        CheckpointError: names the first file that is missing, unlisted, unreadable, or has another size or checksum.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.sizes.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, so checkpoint {folder} is damaged")
        if (size := path.stat().st_size) != expected:
            raise CheckpointError(f"{path} should have {expected:,} bytes and has {size:,}")
    if unlisted := [path for path in _files(folder) if str(path.relative_to(folder)) not in (*manifest.sizes, MANIFEST)]:
        raise CheckpointError(
            f"{unlisted[0]} is not listed in {folder / MANIFEST}: somebody has put it there since. Move it elsewhere"
        )
    try:
        found = _checksums([folder / name for name in manifest.checksums])
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    for (name, written), read in zip(manifest.checksums.items(), found, strict=True):
        if read != written:
            changed = f"{folder / name} has the checksum {read:08x} instead of {written:08x}: it changed since it was written"
            raise CheckpointError(changed)


def read_json(path: Path, what: str) -> dict[str, object]:
    """The JSON object in a file of a checkpoint; `what` describes it in the errors.

    Raises:
        DamagedCheckpointError: the file is missing, unreadable, or holds something else.
    """
    if path.exists() and not path.is_file():  # reading a pipe would never end
        raise DamagedCheckpointError(f"{path} is no file. It should hold {what}")
    try:
        content = json.loads(retried(path, lambda: path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        missing = f"{path} is missing, which holds {what}, so {path.parent} is no complete checkpoint"
        raise DamagedCheckpointError(missing) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}. It should hold {what}") from error
    if not isinstance(content, dict):
        raise DamagedCheckpointError(f"{path} should hold {what}, and holds a {type(content).__name__}")
    return content


def _numbers(files: object, key: str) -> dict[str, int] | None:
    """The number under `key` of each file; None where one has none."""
    entries = files if isinstance(files, dict) else {"": None}
    numbers: dict[str, int] = {}
    for name, entry in entries.items():
        number = entry.get(key) if isinstance(entry, dict) else None
        if type(number) is not int:
            return None
        numbers[name] = number
    return numbers


def _own_checksum(content: Mapping[str, object]) -> int:
    described = {key: value for key, value in content.items() if key != OWN_CHECKSUM}
    return zlib.crc32(json.dumps(described, sort_keys=True).encode())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def _checksums(files: list[Path], *, flushed: bool = False) -> list[int]:
    """CRC-32 of each file, several at once: zlib lets other threads run."""
    with ThreadPoolExecutor(max_workers=8) as threads:
        return list(threads.map(lambda path: _checksum(path, flushed=flushed), files))


def _checksum(path: Path, *, flushed: bool) -> int:
    """CRC-32 of a file; with `flushed`, its content is on the disk when this returns."""

    def read() -> int:
        checksum = 0
        block = bytearray(_BLOCK_BYTES)
        view = memoryview(block)
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(block):
                checksum = zlib.crc32(view[:size], checksum)
            if flushed:
                os.fsync(file.fileno())
        return checksum

    if not flushed:
        return retried(path, read)
    try:
        return read()
    except OSError as error:  # no second flush: the first failure may have lost what it was to write
        raise named(error, path) from error
