"""A device like any other, but that the shares it seals for its peers are broken: nobody but their holders can see that."""

from fedmini.secagg import keys
from tests.deployment import device_process


def main(settings: dict) -> None:
    honest = keys.seal
    keys.seal = lambda key, content, about: honest(key, bytes([content[0] ^ 1]) + content[1:], about)
    device_process.main(settings)
