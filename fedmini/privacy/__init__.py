"""What a privacy reviewer reads: clip, round, add exact noise, account for it, and write it down before it happens.

No torch and no flwr below this line; docs/accounting.md is the argument that these modules carry out.
"""
