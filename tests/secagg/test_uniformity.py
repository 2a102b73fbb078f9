"""What leaves a device says nothing: a masked upload is uniform residues, and two of the same vector share nothing.

Everything is drawn from a known key, so that each run of a test sees the same bytes; the bounds are those of chance at
one in a thousand or less.
"""

import hashlib
import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy import stats

from fedmini.secagg import masks, trust, wire
from fedmini.secagg.messages import MaskedVector, Stage
from fedmini.secagg.trust import Identity
from fedmini.types import DeviceId, Residues
from tests.secagg.cohort import Cohort, a_manifest

NUM_COORDINATES = 2**18
SENDER = "d001"
LEAST_P = 1e-3


class Known:
    """Random bytes that another test run draws again."""

    def __init__(self, label: str) -> None:
        self._label, self._count = label, 0

    def __call__(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(f"{self._label}/{self._count}".encode()).digest(size)


def known_identity(cohort: Cohort, device: DeviceId) -> Identity:
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(device.encode()).digest())
    return Identity(key, trust.certify(cohort.operator, device, key.public_key().public_bytes_raw()))


def upload(label: str, bits: int, round_num: int = 1) -> Residues:
    """The residues of one device's masked vector, among four; its vector is 1, 2, 3, ..."""
    cohort = Cohort(4, a_manifest(NUM_COORDINATES, modulus_bits=bits), round_num, Known(label))
    cohort.identities = {device: known_identity(cohort, device) for device in cohort.devices}
    cohort.owners[SENDER].vector = np.arange(1, NUM_COORDINATES + 1, dtype=np.uint32)
    cohort.begin(cohort.context)
    sent: list[bytes] = []

    def listen(stage: Stage, device: DeviceId, answer: bytes) -> bytes:
        if (stage, device) == (Stage.CONTRIBUTE, SENDER):
            sent.append(wire.decode(answer, MaskedVector, 2**21).packed)
        return answer

    server = cohort.run(change=listen)
    np.testing.assert_array_equal(server.cohort_sum.total, cohort.sum_of(cohort.devices))
    (packed,) = sent
    residues: Residues = np.zeros(NUM_COORDINATES, np.uint32)
    masks.add_packed(residues, packed, bits)
    return masks.reduce(residues, bits)


def p_values(residues: Residues, bits: int) -> dict[str, float]:
    """Chi-square against uniform, 255 and 4095 degrees of freedom: of every byte, and of the twelve highest bits."""
    parts = {f"byte {place}": (residues >> np.uint32(8 * place)) & np.uint32(255) for place in range(bits // 8)}
    found = {name: stats.chisquare(np.bincount(part, minlength=256)).pvalue for name, part in parts.items()}
    high = residues >> np.uint32(bits - 12)
    return found | {"highest bits": stats.chisquare(np.bincount(high, minlength=2**12)).pvalue}


def leave_masks_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither put on by devices, nor taken off by the server."""
    pack = masks.mask_and_pack
    monkeypatch.setattr(masks, "mask_and_pack", lambda vector, added, subtracted, bits: pack(vector, (), (), bits))
    monkeypatch.setattr(masks, "add_masks", lambda total, added, subtracted: None)
    monkeypatch.setattr(masks, "add_mask", lambda total, key, subtract=False: None)


@pytest.mark.parametrize("bits", [24, 32])
def test_the_residues_of_an_upload_are_uniform_in_every_byte(bits):
    found = p_values(upload("one", bits), bits)
    assert len(found) == bits // 8 + 1 and min(found.values()) > LEAST_P and max(found.values()) < 1 - LEAST_P


@pytest.mark.parametrize("bits", [24, 32])
def test_twin_without_masks_the_same_test_rejects(monkeypatch, bits):
    leave_masks_out(monkeypatch)
    found = p_values(upload("one", bits), bits)
    assert found["highest bits"] < 1e-100 and found[f"byte {bits // 8 - 1}"] < 1e-100


def uploads_of_the_same_vector() -> list[Residues]:
    """In one round, in the next with the device's other secrets, and in the first one again with others."""
    return [upload("one", 24), upload("two", 24, round_num=2), upload("three", 24)]


def num_equal(one: Residues, other: Residues) -> int:
    return int(np.count_nonzero(one == other))


def correlation(one: Residues, other: Residues) -> float:
    """In standard deviations of chance."""
    return float(np.corrcoef(one, other)[0, 1] * np.sqrt(len(one)))


def test_two_uploads_of_the_same_vector_share_nothing():
    for one, other in itertools.combinations(uploads_of_the_same_vector(), 2):
        assert num_equal(one, other) <= 2  # 1 / 64 is expected
        assert abs(correlation(one, other)) < 4
        assert min(p_values((one - other) & np.uint32(2**24 - 1), 24).values()) > LEAST_P
        assert min(p_values(one ^ other, 24).values()) > LEAST_P


def test_twin_without_masks_two_uploads_of_the_same_vector_are_the_same(monkeypatch):
    leave_masks_out(monkeypatch)
    for one, other in itertools.combinations(uploads_of_the_same_vector(), 2):
        assert num_equal(one, other) == NUM_COORDINATES
        assert correlation(one, other) > 500


def test_an_upload_shares_nothing_with_its_vector():
    found, vector = upload("one", 24), np.arange(1, NUM_COORDINATES + 1, dtype=np.uint32)
    assert num_equal(found, vector) <= 2 and abs(correlation(found, vector)) < 4
    assert min(p_values((found - vector) & np.uint32(2**24 - 1), 24).values()) > LEAST_P  # the mask itself


def test_twin_without_masks_an_upload_is_its_vector(monkeypatch):
    leave_masks_out(monkeypatch)
    assert num_equal(upload("one", 24), np.arange(1, NUM_COORDINATES + 1, dtype=np.uint32)) == NUM_COORDINATES


def test_the_same_device_in_the_same_round_masks_alike_only_with_the_same_secrets():
    np.testing.assert_array_equal(upload("one", 24), upload("one", 24))
    assert num_equal(upload("one", 24), upload("other", 24)) <= 2
