"""Masks: AES-256-CTR key streams added to a vector in place, and the packed form in which a masked vector travels.

Everything is uint32, which wraps at 2**32; modulus_bits (24 or 32) divides it, so that the low bits of any sum are the
sum mod 2**modulus_bits.
"""

import sys
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from fedmini.errors import ConfigError, UpdateError
from fedmini.types import Residues

CHUNK = 2**15  # coordinates at once: a chunk and its key stream stay in the processor's cache; a multiple of 4
MODULI = (24, 32)


def add_mask(total: Residues, key: bytes, *, subtract: bool = False) -> None:
    """Add the mask of one key to a vector in place, or take it away; as `add_masks`."""
    add_masks(total, () if subtract else (key,), (key,) if subtract else ())


def add_masks(total: Residues, added: Sequence[bytes], subtracted: Sequence[bytes]) -> None:
    """Add the masks of some keys to a vector in place, and take others away. Shape (num_coordinates,), uint32, mod 2**32.

    A mask is the AES-256-CTR key stream from counter 0, read as little-endian words: a key serves for one mask.
    """
    streams = _Streams(added, subtracted)
    for start in range(0, len(total), CHUNK):
        streams.add_next(total[start : start + CHUNK])


def mask_and_pack(vector: Residues, added: Sequence[bytes], subtracted: Sequence[bytes], modulus_bits: int) -> bytes:
    """The packed vector under its masks, made a chunk at a time; the vector itself stays as it is.

    Packed is the low `modulus_bits` of every coordinate, little-endian, 3 or 4 bytes each.
    """
    _check_modulus(modulus_bits)
    streams = _Streams(added, subtracted)
    width = modulus_bits // 8
    packed = np.empty((len(vector), width), np.uint8)
    for start in range(0, len(vector), CHUNK):
        part = vector[start : start + CHUNK].astype("<u4")
        streams.add_next(part)
        _pack_into(packed[start : start + CHUNK], part)
    return packed.tobytes()


class _Streams:
    """The key streams of some masks, all at the same place: chunk by chunk, everything stays in the processor's cache."""

    def __init__(self, added: Sequence[bytes], subtracted: Sequence[bytes]) -> None:
        self._added = [_key_stream(key) for key in added]
        self._subtracted = [_key_stream(key) for key in subtracted]
        self._zeros = memoryview(bytes(4 * CHUNK))
        self._buffer = bytearray(4 * CHUNK + 15)  # update_into wants almost a block more than it writes
        self._words = np.frombuffer(self._buffer, "<u4", CHUNK)

    def add_next(self, part: Residues) -> None:
        """Add and take away the next words of all streams, in place; every part but the last has CHUNK coordinates."""
        zeros, words = self._zeros[: 4 * len(part)], self._words[: len(part)]
        for stream in self._added:
            stream.update_into(zeros, self._buffer)
            np.add(part, words, out=part)
        for stream in self._subtracted:
            stream.update_into(zeros, self._buffer)
            np.subtract(part, words, out=part)


def _key_stream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()


def packed_size(num_coordinates: int, modulus_bits: int) -> int:
    """Bytes of a packed vector."""
    _check_modulus(modulus_bits)
    return num_coordinates * modulus_bits // 8


def _pack_into(packed: NDArray[np.uint8], vector: Residues) -> None:
    """The low bytes of every coordinate. Shapes (num_coordinates, width) and (num_coordinates,)."""
    whole = vector.view(np.uint8).reshape(-1, 4)
    for place in range(packed.shape[1]):  # a place at a time: several times faster than a slice of all
        packed[:, place] = whole[:, place]


def add_packed(total: Residues, packed: bytes, modulus_bits: int) -> None:
    """Add a packed vector to a total in place, a chunk at a time. Raises UpdateError where its size is another's.

    Every residue of the right size is a possible one: nothing else about it can be checked, and nothing can be seen.
    """
    expected = packed_size(len(total), modulus_bits)
    if len(packed) != expected:
        raise UpdateError(f"expected a vector of {expected} bytes, got {len(packed)}")
    width = modulus_bits // 8
    for start in range(0, len(total), CHUNK):
        part = total[start : start + CHUNK]
        low = np.frombuffer(packed, np.uint8, len(part) * width, start * width).reshape(-1, width)
        whole = np.zeros((len(part), 4), np.uint8)
        for place in range(width):
            whole[:, place] = low[:, place]
        np.add(part, whole.view("<u4")[:, 0], out=part)


def reduce(total: Residues, modulus_bits: int) -> Residues:
    """The vector mod 2**modulus_bits."""
    residues: Residues = total & np.uint32(2**modulus_bits - 1)
    return residues


def _check_modulus(modulus_bits: int) -> None:
    if modulus_bits not in MODULI:
        raise ConfigError(f"modulus_bits must be 24 or 32, got {modulus_bits}")


if sys.byteorder != "little":  # pragma: no cover: torch has no big-endian build either
    raise ImportError("fedmini needs a little-endian machine")
