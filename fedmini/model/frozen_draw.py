"""The first values of LoRA's A: drawn from a key stream, so that every device and every version draws the same."""

import hashlib
import json

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray


def kaiming_uniform(seed: int, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Uniform in [-b, b) with b = 1 / sqrt(num_inputs), PEFT's own bound for A. Shape (lora_rank, num_inputs).

    The bits come from AES-256 in counter mode under SHA-256 of the seed and the tensor's name: torch's generator may
    give other numbers in another version. The values depend on seed, name and shape alone.
    """
    words = np.frombuffer(_key_stream(seed, name, 4 * shape[0] * shape[1]), dtype="<u4")
    unit = (words >> 8).astype(np.float64) / 2**24  # in [0, 1), exact
    values: NDArray[np.float32] = ((2 * unit - 1) / np.sqrt(shape[1])).astype(np.float32)
    return values.reshape(shape)


def _key_stream(seed: int, name: str, size_bytes: int) -> bytes:
    key = hashlib.sha256(json.dumps(["fedmini frozen A", seed, name]).encode()).digest()
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(size_bytes))
