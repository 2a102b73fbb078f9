"""The network: the only place that imports flwr. Its internals move in every release, so each use of them is here."""
