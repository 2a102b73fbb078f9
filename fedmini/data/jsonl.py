"""JSON Lines, plain or compressed, read as a stream. Errors name the file and the line, never what stands there."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

import zstandard

from fedmini.data.examples import Record, parse_record
from fedmini.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MAX_LINE_BYTES = 2**20  # a longer line is not one message that a person typed
_ZSTD_INPUT_BYTES = 2**10  # a few bytes can stand for 128 KiB: this bounds what one read unpacks to tens of MiB
_BOM = b"\xef\xbb\xbf"

_Stream: TypeAlias = IO[bytes] | gzip.GzipFile


def read_jsonl(path: Path, needs_client: bool) -> Iterator[Record]:
    """The records of a .jsonl, .jsonl.gz or .jsonl.zst file, one line in memory at a time.

    A byte order mark, CRLF and blank lines are accepted. Anything else that is wrong, from a missing file over
    invalid UTF-8 to a cut archive, raises ConfigError with the file and line number.
    """
    for line_num, line in enumerate(_lines(path), start=1):
        if line_num == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            where = f"{path}, line {line_num}"
            yield parse_record(_parse_json(line, where), where, needs_client)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        stream = _open(path)
    except OSError as error:
        raise ConfigError(f"can't read the data file {path}: {error.strerror or 'it is not a file'}") from error
    with stream:
        line_num = 1
        while line := _read_line(stream, f"{path}, line {line_num}"):
            yield line
            line_num += 1


def _open(path: Path) -> _Stream:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(path.open("rb")))
    return path.open("rb")


def _read_line(stream: _Stream, where: str) -> bytes:
    try:
        line = stream.readline(MAX_LINE_BYTES + 1)
    except EOFError as error:
        raise ConfigError(
            f"{where}: the compressed file ends too early, here or soon after: it was cut, bring it again"
        ) from error
    except (zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise ConfigError(f"{where}: the compressed file is damaged, here or soon after: bring it again") from error
    except OSError as error:
        raise ConfigError(f"{where}: can't read on: {error.strerror}") from error
    if len(line) > MAX_LINE_BYTES:
        raise ConfigError(f"{where}: the line is longer than {MAX_LINE_BYTES} bytes: split it into several examples")
    return line


def _parse_json(line: bytes, where: str) -> object:
    # What json and the codec raise holds the line itself: it must be gone before ours is raised, context included.
    try:
        value: object = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        problem = "it is not UTF-8 text"
    except (ValueError, RecursionError):
        problem = "it is not a JSON object on one line"
    else:
        return value
    raise ConfigError(f"{where}: {problem}: correct or remove the line")


class _ZstdStream(io.RawIOBase):
    """The content of a .zst file of one or more frames; EOFError where the last one is cut.

    zstandard's own stream reader ends silently there.
    """

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_between_frames = True
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer).cast("B")
        while not self._unpacked:
            packed = self._source.read(_ZSTD_INPUT_BYTES)
            if not packed:
                if self._is_between_frames:
                    return 0
                raise EOFError
            self._unpacked = memoryview(self._unpack(packed))
        count = min(len(target), len(self._unpacked))
        target[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def close(self) -> None:
        self._source.close()
        super().close()

    def _unpack(self, packed: bytes) -> bytes:
        pieces = []
        while packed:
            pieces.append(self._frame.decompress(packed))
            packed = self._frame.unused_data
            self._is_between_frames = self._frame.eof
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        return b"".join(pieces)
