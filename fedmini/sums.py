"""What a cohort's sum means: what it is divided by, how much noise is in it, and how many bytes it took to get there."""

import math

from fedmini import vectors
from fedmini.types import Manifest


def mean_denominator(manifest: Manifest) -> float:
    """The public constant that a sum is divided by: it must not depend on who came, or on anybody's data."""
    release = manifest.release
    return release.cohort_size * (manifest.local.expected_batch_size if release.sums_examples else 1.0)


def noise_std_of_sum(manifest: Manifest, num_devices: int) -> float:
    """Standard deviation of the noise in each coordinate of a decoded sum, per coordinate, given that many survivors."""
    release = manifest.release
    variance = 0.0
    for unit in release.units:
        if unit.noise == "shared":
            variance += unit.noise_variance / unit.scale**2 * num_devices
        elif unit.noise == "server":
            variance += unit.noise_variance / unit.scale**2
        elif manifest.local.optimizer == "sgd":  # local: full noise in every step of every device
            step = manifest.local.learning_rate / manifest.local.expected_batch_size
            variance += unit.noise_variance / unit.scale**2 * step**2 * manifest.local.num_steps * num_devices
        else:
            return math.nan  # through a local Adam the noise has no fixed size
    return math.sqrt(variance)


def upload_bytes(manifest: Manifest) -> int:
    """What one device's vector takes, packed to the manifest's modulus; secure aggregation adds some kB of keys and shares."""
    return math.ceil(manifest.num_coordinates * manifest.release.modulus_bits / 8)


def download_bytes(manifest: Manifest) -> int:
    """What one device receives in a round: the adapter, 4 bytes a number."""
    return 4 * vectors.num_parameters(manifest.template)
