"""The server that an operator runs: one command, two processes under it, and a folder from which everything goes on.

`supervisor` starts the gate (Flower's SuperLink) and the coordinator (the rounds), starts again what dies, and ends with
both. The coordinator's state is in the run's folder; the gate's, in state/, only says who is connected.
"""
