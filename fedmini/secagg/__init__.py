"""Secure aggregation as pure state machines: bytes in, bytes out; the server learns a sum and nothing else.

docs/secure-aggregation.md has the threat model, the protocol and the reason for each check.
"""
