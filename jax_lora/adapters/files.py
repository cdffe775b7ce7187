"""JSON and safetensors files, of adapters and of base models.

Files may come from a stranger and may change while they are read. So nothing is unpickled, sizes
are bounded before anything is allocated, and files are read, never mapped: a mapped file that
someone truncates kills the process.
"""

import json
import math
import os
import re
import shlex
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jax_lora.messages import printable, shown

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_JSON_BYTES = 16 << 20  # a model's index of shards has a line for each tensor
_MAX_JSON_MARKS = 1 << 20  # commas and brackets: about 100 bytes of memory each
_MAX_SHARDS = 512
_SPARSE_BYTES = 64 << 20


type JsonObject = dict[str, Any]


class Stored(NamedTuple):
    """Where a tensor lies in the data of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file, whose header has been read and checked."""

    path: Path
    stream: BufferedReader
    data_begin: int
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]

    def read(self, key: str) -> np.ndarray:
        """One tensor.

        Raises:
          ValueError: the file was truncated meanwhile.
        """
        stored = self.tensors[key]
        tensor = np.empty(stored.shape, DTYPES[stored.dtype])
        self.stream.seek(self.data_begin + stored.begin)
        if self.stream.readinto(tensor.reshape(-1).view(np.uint8)) != tensor.nbytes:
            raise ValueError(
                f"{printable(self.path)} became shorter while it was read; save or download it "
                "again"
            )
        return tensor


# ------------------------------------------------------------------------------------------------
# Opening
# ------------------------------------------------------------------------------------------------


def check_folder(folder: Path, name: str) -> None:
    """Raises FileNotFoundError or ValueError if `folder`, which should hold `name`, is none."""
    if not folder.exists():
        raise FileNotFoundError(
            f"no folder {shown(str(folder), 300)}; nothing is downloaded, give a local folder"
        )
    if not folder.is_dir():
        raise ValueError(
            f"{shown(str(folder), 300)} is not a folder; give the folder that holds {name}"
        )


@contextmanager
def open_file(file: Path, *, allow_links: bool) -> Iterator[BufferedReader]:
    """Opens a regular file in a folder, for reading.

    Args:
      file: the folder itself may be, or lie behind, a symbolic link.
      allow_links: whether the file may be a symbolic link to outside of its folder.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no regular file, or a link out of the folder.
    """
    if not file.is_symlink() and not file.exists():
        raise FileNotFoundError(f"{shown(str(file.parent), 300)} has no {printable(file.name)}")
    try:
        target = file.resolve(strict=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{printable(file)} is a link to a file that is missing") from None
    except (OSError, RuntimeError):
        raise ValueError(f"{printable(file)} is a link that can't be followed") from None
    if not (allow_links or target.is_relative_to(file.parent.resolve())):
        raise ValueError(
            f"{printable(file)} is a symbolic link out of its folder, to {printable(target)}; copy "
            "the file there, or give allow_links=True (--allow-links) if you trust who made the "
            "link"
        )
    if not target.is_file():
        raise ValueError(f"{printable(file)} is not a regular file")
    # A link or a pipe that took the file's place since then is neither followed nor waited for.
    descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{printable(file)} is not a regular file")
        yield stream


def refuse_pointer(data: bytes, file: Path) -> None:
    """Raises ValueError if `data`, the start of a file, is that of a Git LFS pointer."""
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{printable(file)} is a pointer of Git LFS, not the file itself; run `git lfs pull` "
            "in its folder, or download the file again"
        )


# ------------------------------------------------------------------------------------------------
# JSON
# ------------------------------------------------------------------------------------------------


def read_json(folder: Path, name: str, *, allow_links: bool = True) -> JsonObject:
    """The object in a JSON file.

    Raises:
      FileNotFoundError: no such folder or file.
      ValueError: not a folder, not a JSON object, or a link (see `open_file`).
    """
    check_folder(folder, name)
    with open_file(folder / name, allow_links=allow_links) as stream:
        return parse_json(read_bounded(stream, folder / name, _MAX_JSON_BYTES), folder / name)


def read_bounded(stream: BinaryIO, file: Path, limit: int) -> bytes:
    """The whole file. ValueError if it has more than `limit` bytes."""
    size = os.fstat(stream.fileno()).st_size
    data = stream.read(limit + 1) if size <= limit else b""
    if max(size, len(data)) > limit:
        raise ValueError(f"{printable(file)} has {size} bytes; at most {limit} are read")
    return data


def parse_json(data: bytes, file: Path) -> JsonObject:
    """The object in `data`, the JSON text of `file`, in bounded time and memory.

    Raises:
      ValueError: it is none, too large, or has a key twice.
    """
    refuse_pointer(data, file)
    try:
        return _json_object(data)
    except ValueError as error:
        raise ValueError(
            f"{printable(file)} is truncated or not JSON ({error}); save or download it again"
        ) from None


def _json_object(data: bytes) -> JsonObject:
    marks = sum(map(data.count, (b",", b"[", b"{")))
    if marks > _MAX_JSON_MARKS:
        raise ValueError(f"it has {marks} commas and brackets, at most {_MAX_JSON_MARKS} are read")
    try:
        values = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(printable(str(error))) from None
    if not isinstance(values, dict):
        raise ValueError(f"it must hold a JSON object, got {type(values).__name__}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has {shown(twice)} twice")
    return values


# ------------------------------------------------------------------------------------------------
# Reading safetensors
# ------------------------------------------------------------------------------------------------


def read_safetensors(folder: Path, stem: str, *, allow_links: bool = True) -> dict[str, np.ndarray]:
    """All tensors of `stem.safetensors`, or of its shards, in the files' dtypes.

    Raises:
      FileNotFoundError: no such file, or a shard is missing.
      ValueError: a file is truncated or malformed, a tensor is not float32, float16 or bfloat16,
        or there is only a pickle.
    """
    with open_safetensors(folder, stem, allow_links=allow_links) as files:
        return {key: file.read(key) for file in files for key in file.tensors}


@contextmanager
def open_safetensors(folder: Path, stem: str, *, allow_links: bool) -> Iterator[list[TensorFile]]:
    """Opens `stem.safetensors`, or its shards, and reads the headers only.

    Raises: as `read_safetensors`.
    """
    names, expected = _file_names(folder, stem, allow_links)
    files: list[TensorFile] = []
    seen: set[str] = set()
    with ExitStack() as stack:
        for name in names:
            if not os.path.lexists(folder / name):
                raise FileNotFoundError(
                    f"{shown(str(folder), 300)} lacks the shard {printable(name)}, one of "
                    f"{len(names)}"
                )
            stream = stack.enter_context(open_file(folder / name, allow_links=allow_links))
            files.append(_read_header(folder / name, stream))
            if twice := seen & files[-1].tensors.keys():
                raise ValueError(
                    f"{printable(folder / name)} holds {shown(min(twice))}, which another shard "
                    "holds too"
                )
            seen |= files[-1].tensors.keys()
        _refuse_holes(folder, [os.fstat(file.stream.fileno()) for file in files])
        if missing := expected - seen:
            raise ValueError(
                f"{printable(folder)}: the index lists {shown(min(missing))}, which no shard "
                "holds; save the model again"
            )
        yield files


def _file_names(folder: Path, stem: str, allow_links: bool) -> tuple[list[str], frozenset[str]]:
    """The files of the tensors, and the tensors that an index promises."""
    if os.path.lexists(folder / f"{stem}.safetensors"):
        return [f"{stem}.safetensors"], frozenset()
    index = folder / f"{stem}.safetensors.index.json"
    if os.path.lexists(index):
        where = read_json(folder, index.name, allow_links=allow_links).get("weight_map")
        if not (isinstance(where, dict) and all(isinstance(v, str) for v in where.values())):
            raise ValueError(
                f"{printable(index)} has no weight_map from tensors to files; save the model again"
            )
        names = sorted(set(where.values()))
        for name in names:
            if not re.fullmatch(r"[\w.-]{1,240}\.safetensors", name, re.ASCII):
                raise ValueError(
                    f"{printable(index)} names {shown(name)}; a shard must be a .safetensors file "
                    "in the same folder"
                )
        _check_count(folder, len(names))
        return names, frozenset(where)
    shard = re.compile(re.escape(stem) + r"-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
    counts = {m[2] for file in folder.iterdir() if (m := shard.fullmatch(file.name))}
    if not counts:
        _refuse_pickle(folder, stem)
        raise FileNotFoundError(f"{shown(str(folder), 300)} has no {stem}.safetensors")
    if len(counts) > 1:
        raise ValueError(
            f"{printable(folder)} holds several sets of shards, of {shown(sorted(counts))} files; "
            "remove the stale ones"
        )
    (count,) = counts
    _check_count(folder, int(count))
    return [f"{stem}-{i:05}-of-{count}.safetensors" for i in range(1, int(count) + 1)], frozenset()


def _refuse_holes(folder: Path, files: list[os.stat_result]) -> None:
    # A file of holes takes no disk and no upload, but all of its size in memory.
    size = sum(status.st_size for status in files)
    on_disk = sum(status.st_blocks * 512 for status in files)
    if size > _SPARSE_BYTES and 0 < on_disk < size // 4:
        raise ValueError(
            f"{printable(folder)}: the weights have {size} bytes, of which only {on_disk} are on "
            "the disk; if this is meant, copy the files with `cp --sparse=never`"
        )


def _check_count(folder: Path, count: int) -> None:
    if count == 0:
        raise ValueError(f"{printable(folder)} names no shards; save the model again")
    if count > _MAX_SHARDS:  # all are open together
        raise ValueError(
            f"{printable(folder)} names {count} shards; at most {_MAX_SHARDS} are read"
        )


def _refuse_pickle(folder: Path, stem: str) -> None:
    for name in (f"{stem}.bin", f"{stem}.pt", f"{stem}.pth", "pytorch_model.bin"):
        if (source := folder / name).is_file():
            code = (
                "import sys, torch; from safetensors.torch import save_file; "
                "weights = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
                "save_file({k: v.clone().contiguous() for k, v in weights.items()}, sys.argv[2])"
            )
            files = (source, folder / f"{stem}.safetensors")
            paths = " ".join(shlex.quote(printable(file, 4096)) for file in files)
            raise ValueError(
                f"{printable(source)} is a pickle, which can run code when it is opened, and is "
                f'not read. Convert it with:\npython -c "{code}" {paths}'
            )


def _read_header(path: Path, stream: BufferedReader) -> TensorFile:
    status = os.fstat(stream.fileno())
    start = stream.read(8)
    refuse_pointer(start + stream.read(32), path)
    try:
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(status.st_size - 8, _MAX_JSON_BYTES):
            raise ValueError(
                f"its header should have {length} bytes; the file has room for "
                f"{max(status.st_size - 8, 0)}, and at most {_MAX_JSON_BYTES} are read"
            )
        stream.seek(8)
        header = _json_object(stream.read(length))
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata  # MLX writes null
        if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
            raise ValueError("its __metadata__ must map text to text")
        tensors = _tensors(header, status.st_size - 8 - length)
    except ValueError as error:
        raise ValueError(
            f"{printable(path)} ({status.st_size} bytes) is truncated or not a safetensors file "
            f"({error}); save or download it again"
        ) from None
    for key, stored in tensors.items():
        if stored.dtype not in DTYPES:
            raise ValueError(
                f"{printable(path)}: {shown(key, 200)} has dtype {printable(stored.dtype)}; save "
                f"it as one of {', '.join(DTYPES)}"
            )
        if 0 in stored.shape:
            raise ValueError(
                f"{printable(path)}: {shown(key, 200)} is empty, {[*stored.shape]}; DeepSpeed "
                "ZeRO-3 and FSDP must gather weights before saving"
            )
    return TensorFile(path, stream, 8 + length, tensors, metadata)


def _tensors(header: JsonObject, size: int) -> dict[str, Stored]:
    """The header's entries. ValueError if they don't fill the data of `size` bytes exactly."""
    tensors: dict[str, Stored] = {}
    for key, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
                numbers = [*shape, begin, end]
            case _:
                numbers = [None]
        # Not isinstance: True is an int.
        if len(numbers) > 34 or any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
            raise ValueError(f"the entry of {shown(key)} is malformed: {shown(entry, 200)}")
        if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise ValueError(
                f"{shown(key)} is {dtype} {shown(shape)}, which doesn't take bytes {begin} to {end}"
            )
        tensors[key] = Stored(dtype, tuple(shape), begin, end)
    at = 0
    for begin, end in sorted((stored.begin, stored.end) for stored in tensors.values()):
        if begin != at or end < begin:
            raise ValueError(f"a tensor takes bytes {begin} to {end}, but should begin at {at}")
        at = end
    if at != size:
        raise ValueError(f"its tensors take {at} bytes of data, and it has {size}")
    return tensors


# ------------------------------------------------------------------------------------------------
# Writing safetensors
# ------------------------------------------------------------------------------------------------


def write_safetensors(
    stream: BinaryIO, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes contiguous arrays, the widest dtype first, so that each is aligned."""
    order = sorted(tensors, key=lambda key: (-tensors[key].itemsize, key))
    header: JsonObject = {"__metadata__": dict(metadata)}
    at = 0
    for key in order:
        tensor = tensors[key]
        header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    for key in order:
        stream.write(tensors[key].reshape(-1).view(np.uint8))
