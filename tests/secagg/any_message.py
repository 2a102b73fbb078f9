"""hypothesis strategies: any message of the protocol that has its one form on the wire."""

from hypothesis import strategies as st

from fedmini.secagg import bindings, shamir, signatures
from fedmini.secagg.messages import (
    MAX_DEVICES,
    Advert,
    Agreement,
    Context,
    Invitation,
    KeyList,
    MaskedVector,
    Message,
    Outcome,
    Revealed,
    SealedShares,
    Unmasking,
    Work,
)
from fedmini.secagg.trust import Certificate, Revocations

# Printable characters of one to four bytes: 32 of them are at most 128 bytes.
ids = st.text('abcdefghijklmnopqrstuvwxyz0123456789-_. "\\\u00e9\u00df\u4e2d\u2020\U0001f600', min_size=1, max_size=32)
counts = st.integers(0, 2**31 - 1) | st.sampled_from([0, 127, 128, 255, 256, 2**16, 2**31 - 1])


def _bytes(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size) | st.integers(0, 255).map(lambda byte: bytes([byte]) * size)


digests = _bytes(32)
public_keys = _bytes(32)
signed = _bytes(signatures.SIGNATURE_BYTES)


def _rows(*columns: st.SearchStrategy[bytes], max_size: int = 5) -> st.SearchStrategy[tuple]:
    """One row for each of some devices, sorted; without columns, the devices themselves."""
    names = st.lists(ids, unique=True, max_size=max_size).map(sorted)
    if not columns:
        return names.map(tuple)
    return names.flatmap(lambda found: st.tuples(*(st.tuples(st.just(name), *columns) for name in found)))


contexts = st.builds(Context, ids, counts, counts, digests, digests, _rows(max_size=30))
certificates = st.builds(Certificate, ids, public_keys, signed)
revocations = st.builds(
    Revocations, counts, st.lists(public_keys, unique=True, max_size=20).map(lambda keys: tuple(sorted(keys))), signed
)
adverts = st.builds(Advert, digests, ids, public_keys, public_keys, certificates, signed)
_advert_lists = st.lists(adverts, unique_by=lambda advert: advert.sender, max_size=4).map(
    lambda found: tuple(sorted(found, key=lambda advert: advert.sender))
)
_shares = _rows(_bytes(shamir.SHARE_BYTES))
_sealed = _bytes(bindings.SEALED_BYTES)

MESSAGES: dict[type[Message], st.SearchStrategy[Message]] = {
    Invitation: st.builds(Invitation, contexts),
    Advert: adverts,
    KeyList: st.builds(KeyList, digests, st.integers(1, MAX_DEVICES), _advert_lists, st.none() | revocations),
    SealedShares: st.builds(SealedShares, digests, ids, digests, st.binary(max_size=700), _rows(_sealed)),
    Work: st.builds(Work, digests, _rows(_sealed, _bytes(bindings.COMMITMENTS_BYTES)), st.binary(max_size=400)),
    MaskedVector: st.builds(MaskedVector, digests, ids, st.binary(max_size=400)),
    Outcome: st.builds(Outcome, digests, _rows(), _rows()),
    Agreement: st.builds(Agreement, digests, ids, signed),
    Unmasking: st.builds(Unmasking, digests, _rows(signed)),
    Revealed: st.builds(Revealed, digests, ids, _shares, _shares),
}
KINDS = tuple(MESSAGES)
REQUESTS = (Invitation, KeyList, Work, Outcome, Unmasking)
messages = st.one_of(*MESSAGES.values())
