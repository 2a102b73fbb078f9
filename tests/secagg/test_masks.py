"""Key streams against published vectors, packing against the plainest code there is, and masks that cancel."""

import itertools
import os
import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmini.errors import ConfigError, UpdateError
from fedmini.secagg import masks
from fedmini.secagg.masks import CHUNK, MODULI

LENGTHS = [*range(71), *range(CHUNK - 5, CHUNK + 6), 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK + 7]
moduli = pytest.mark.parametrize("modulus_bits", MODULI)
keys = st.binary(min_size=32, max_size=32)


def key_stream(key: bytes, first: int, num_bytes: int) -> bytes:
    """AES-256 of the counters from `first`, block by block: what counter mode means (NIST SP 800-38A, 6.5)."""
    encryptor = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    counters = b"".join((first + block).to_bytes(16, "big") for block in range(-(-num_bytes // 16)))
    return encryptor.update(counters)[:num_bytes]


def mask(key: bytes, num_coordinates: int) -> np.ndarray:
    total = np.zeros(num_coordinates, np.uint32)
    masks.add_mask(total, key)
    return total


def residues(num_coordinates: int) -> np.ndarray:
    """Any 32 bits, the largest value and zero among them."""
    found = np.frombuffer(bytearray(os.urandom(4 * num_coordinates)), np.uint32)
    found[:1], found[3:4] = 2**32 - 1, 0
    return found


def pack(vector: np.ndarray, modulus_bits: int) -> bytes:
    return masks.mask_and_pack(vector, (), (), modulus_bits)


def packed(vector: np.ndarray, modulus_bits: int) -> bytes:
    """One coordinate after the other, little-endian, its low bytes only."""
    return vector.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : modulus_bits // 8].tobytes()


# Masks


def test_the_reference_key_stream_is_the_one_of_nist_sp_800_38a():
    # F.5.5, CTR-AES256: the output blocks
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    first = 0xF0F1F2F3F4F5F6F7F8F9FAFBFCFDFEFF
    assert key_stream(key, first, 64).hex() == (
        "0bdf7df1591716335e9a8b15c860c502"
        "5a6e699d536119065433863c8f657b94"
        "1bc12c9c01610d5d0d8bd6a3378eca62"
        "2956e1c8693536b1bee99c73a31576b6"
    )


def test_a_mask_begins_with_the_blocks_that_are_published_for_a_key_of_zeros():
    # "The Galois/Counter Mode of Operation", test cases 13 and 14: AES-256 of 0 (there H), 1 (the tag) and 2 (what
    # sixteen zeros become)
    published = (
        "dc95c078a2408989ad48a21492842087" "530f8afbc74536b9a963b4f1c4cb738b" "cea7403d4d606b6e074ec5d3baf39d18"
    )  # fmt: skip
    assert mask(bytes(32), 12).astype("<u4").tobytes().hex() == published


@pytest.mark.parametrize("num_coordinates", LENGTHS)
def test_a_mask_is_the_aes_256_ctr_key_stream_from_counter_0(num_coordinates):
    key = os.urandom(32)
    expected = np.frombuffer(key_stream(key, 0, 4 * num_coordinates), "<u4")
    np.testing.assert_array_equal(mask(key, num_coordinates), expected)


@given(keys, st.integers(0, 100), st.booleans())
def test_a_mask_is_added_to_what_is_there_and_wraps(key, num_coordinates, subtract):
    total = residues(num_coordinates)
    sign = -1 if subtract else 1
    expected = [
        (int(old) + sign * int(new)) % 2**32 for old, new in zip(total, mask(key, num_coordinates), strict=True)
    ]
    masks.add_mask(total, key, subtract=subtract)
    assert total.tolist() == expected


@pytest.mark.parametrize("num_coordinates", [0, 1, 7, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_a_mask_is_taken_away_by_the_same_key(num_coordinates):
    key, vector = os.urandom(32), residues(num_coordinates)
    total = vector.copy()
    masks.add_mask(total, key)
    masks.add_mask(total, key, subtract=True)
    np.testing.assert_array_equal(total, vector)


def test_masks_of_two_keys_share_nothing_and_are_uniform():
    first, second = mask(os.urandom(32), 200_000), mask(os.urandom(32), 200_000)
    assert np.count_nonzero(first == second) < 5  # 5e-5 are expected
    for shift in (0, 8, 16, 24):
        for found in (first, second, first - second):
            assert stats.chisquare(np.bincount((found >> np.uint32(shift)) & 255, minlength=256)).pvalue > 1e-9


@moduli
@settings(max_examples=25)
@given(st.integers(2, 6), st.integers(0, 40), st.data())
def test_masks_in_pairs_cancel_in_the_sum_of_packed_vectors(modulus_bits, num_devices, num_coordinates, data):
    vectors = [residues(num_coordinates) for _ in range(num_devices)]
    masked = [vector.copy() for vector in vectors]
    for one, other in itertools.combinations(range(num_devices), 2):
        key = data.draw(keys)
        masks.add_mask(masked[one], key)
        masks.add_mask(masked[other], key, subtract=True)
    total = np.zeros(num_coordinates, np.uint32)
    for vector in masked:
        masks.add_packed(total, pack(vector, modulus_bits), modulus_bits)
    expected = sum(vector.astype(object) for vector in vectors) % 2**modulus_bits
    assert masks.reduce(total, modulus_bits).tolist() == expected.tolist()


def test_a_mask_takes_the_memory_of_a_chunk_whatever_its_length():
    total, key = np.zeros(32 * CHUNK, np.uint32), os.urandom(32)
    tracemalloc.start()
    try:
        masks.add_mask(total, key)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * 4 * CHUNK


# Packing


@moduli
@pytest.mark.parametrize("num_coordinates", LENGTHS)
def test_a_packed_vector_is_the_low_bytes_of_each_coordinate(num_coordinates, modulus_bits):
    vector = residues(num_coordinates)
    found = pack(vector, modulus_bits)
    assert found == packed(vector, modulus_bits)
    assert len(found) == masks.packed_size(num_coordinates, modulus_bits) == num_coordinates * modulus_bits // 8


@moduli
@pytest.mark.parametrize("num_coordinates", LENGTHS)
def test_what_was_packed_is_added_mod_the_modulus(num_coordinates, modulus_bits):
    before, vector = residues(num_coordinates), residues(num_coordinates)
    total = before.copy()
    masks.add_packed(total, packed(vector, modulus_bits), modulus_bits)
    expected = (before.astype(np.uint64) + vector) % 2**modulus_bits
    np.testing.assert_array_equal(masks.reduce(total, modulus_bits), expected.astype(np.uint32))


@moduli
def test_a_hundred_and_fifty_vectors_of_the_largest_residues_are_summed_exactly(modulus_bits):
    total = np.zeros(9, np.uint32)
    largest = np.full(9, 2**modulus_bits - 1, np.uint32)
    for _ in range(150):
        masks.add_packed(total, pack(largest, modulus_bits), modulus_bits)
    assert masks.reduce(total, modulus_bits).tolist() == [2**modulus_bits - 150] * 9


@moduli
@given(st.lists(st.integers(0, 2**32 - 1), max_size=70))
def test_reducing_keeps_the_low_bits(modulus_bits, values):
    found = masks.reduce(np.array(values, np.uint32), modulus_bits)
    assert found.dtype == np.uint32
    assert found.tolist() == [value % 2**modulus_bits for value in values]


@moduli
def test_packing_leaves_the_vector_as_it_was_and_takes_a_view(modulus_bits):
    vector = residues(2 * 69)
    before = vector.copy()
    assert pack(vector[::2], modulus_bits) == packed(before[::2], modulus_bits)
    np.testing.assert_array_equal(vector, before)


@moduli
@given(st.integers(0, 30), st.integers(0, 130))
def test_a_vector_of_another_size_is_refused_and_nothing_is_added(modulus_bits, num_coordinates, num_bytes):
    total = residues(num_coordinates)
    before, expected = total.copy(), num_coordinates * modulus_bits // 8
    if num_bytes == expected:
        num_bytes += 1
    with pytest.raises(UpdateError, match=f"expected a vector of {expected} bytes, got {num_bytes}"):
        masks.add_packed(total, b"\xff" * num_bytes, modulus_bits)
    np.testing.assert_array_equal(total, before)


@pytest.mark.parametrize("modulus_bits", [0, 8, 16, 23, 25, 31, 33, 64, -24])
def test_another_modulus_is_refused(modulus_bits):
    vector = np.zeros(4, np.uint32)
    for use in (
        lambda: pack(vector, modulus_bits),
        lambda: masks.add_packed(vector, b"", modulus_bits),
        lambda: masks.packed_size(4, modulus_bits),
    ):
        with pytest.raises(ConfigError, match=f"24 or 32, got {modulus_bits}"):
            use()


@moduli
def test_adding_a_packed_vector_takes_the_memory_of_a_chunk(modulus_bits):
    content = os.urandom(masks.packed_size(32 * CHUNK, modulus_bits))
    total = np.zeros(32 * CHUNK, np.uint32)
    tracemalloc.start()
    try:
        masks.add_packed(total, content, modulus_bits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * 4 * CHUNK
