"""fedmini as a Flower app, for `flwr run`: the ServerApp and the ClientApp that pyproject.toml names.

What `flwr run` ships holds no code: both apps are those of the fedmini that is installed where they run.
"""
