"""How much memory a device's process will hold at most, before there is one: from the shapes of a packed base and a plan.

Counted are the tensors that one training step keeps for backward, and what is computed of them; measured is what a process
takes before its first step, with the libraries that it imports. simulations/benchmarks/device_memory.py measures both.
"""

from dataclasses import dataclass

from fedmini.config import RunConfig
from fedmini.config.device_sections import TrainingSection
from fedmini.model import shapes
from fedmini.model.runtime import LOGITS_TOKENS, PIECE_WORDS
from fedmini.model.shapes import Dimensions
from fedmini.types import LoraShape, Manifest

PROCESS_BYTES = 432 * 2**20  # libraries, tokenizer, the accountant's numbers: without weights, before the first step
# For each coordinate: the adapter and the vector that leaves, held through a round; the sum and what is added to it next.
HELD_BYTES, SUM_BYTES = 20, 24
LEFT_IN_PIECES = 0.5  # of what training took: glibc's own heap keeps it where nothing else fits, as measured
NUMBER_BYTES = {"bfloat16": 2, "float32": 4}
LONG_TOKENS = 256  # above, attention keeps its output for backward


@dataclass(frozen=True, slots=True)
class Step:
    """What is computed with at once: examples of a length in tokens, in numbers of 2 (bfloat16) or 4 bytes."""

    batch_size: int
    length: int
    number_bytes: int
    checkpointing: bool = False


def peak_bytes(base: Dimensions, lora: LoraShape, num_coordinates: int, step: Step, *, small_heap: bool) -> int:
    """The most that a device's process holds resident, with its heap kept small ([training] small_heap) or left as it is.

    Within 15 % of what was measured; where examples are shorter than `length`, less is held. For a device with a compiler:
    without compiled kernels a step keeps half as much again.
    """
    gradients = 4 * step.batch_size * num_coordinates
    training = _kept_for_backward(base, lora, step) + _at_once(base, step) + gradients
    most = max(training, gradients + SUM_BYTES * num_coordinates)
    if not small_heap:
        most += int(LEFT_IN_PIECES * training)
    return PROCESS_BYTES + base.weights_bytes + HELD_BYTES * num_coordinates + most


def sentence(config: RunConfig, manifest: Manifest) -> str | None:
    """What `fedmini plan` says of it, with the settings of a device's own file left as they are; None: not a packed base."""
    base = shapes.dimensions(config.base)
    if base is None:
        return None
    training = TrainingSection()
    batch_size = min(training.physical_batch_size, config.data.max_examples_per_device)
    wanted = {"float32": ("float32",), "bfloat16": ("bfloat16",), "auto": ("bfloat16", "float32")}
    said = []
    for dtype in wanted[config.base.compute_dtype]:
        step = Step(batch_size, manifest.local.max_length, NUMBER_BYTES[dtype])
        small, as_it_is = (
            peak_bytes(base, manifest.lora, manifest.num_coordinates, step, small_heap=small_heap) / 1e6
            for small_heap in (True, False)
        )
        said.append(f"{small:,.0f} MB in {dtype} ({as_it_is:,.0f} MB in an app)")
    return (
        f"up to {', or '.join(said)}, with {batch_size} examples of {manifest.local.max_length} tokens at once; "
        "an app's heap is not kept small unless training.small_heap says so"
    )


def _kept_for_backward(base: Dimensions, lora: LoraShape, step: Step) -> int:
    """What the layers from the lowest adapted one on keep of every token, where compiled kernels compute them."""
    num_layers = base.num_layers - min(lora.layers or (0,))
    tokens = step.batch_size * step.length
    kept, state = tokens * _in_layer(base, lora, step), tokens * step.number_bytes * base.hidden_size
    if not step.checkpointing:
        return num_layers * kept + state
    return kept + num_layers * state + state


def _in_layer(base: Dimensions, lora: LoraShape, step: Step) -> int:
    """Bytes that one layer keeps of one token."""
    numbers = 2 * base.hidden_size + base.query_size + 2 * base.key_size + 2 * base.inner_size
    if step.length > LONG_TOKENS:
        numbers += base.query_size
    if lora.trained == "AB":
        numbers += sum(_inputs_of(base)[name] for name in _distinct(lora.target_modules))
    return step.number_bytes * numbers + 4 * (2 + lora.lora_rank * len(lora.target_modules))


def _distinct(targets: tuple[str, ...]) -> set[str]:
    """One of the modules that read the same tensor, for each such tensor."""
    same = {
        "q_proj": "q_proj",
        "k_proj": "q_proj",
        "v_proj": "q_proj",
        "gate_proj": "gate_proj",
        "up_proj": "gate_proj",
    }
    return {same.get(name, name) for name in targets}


def _inputs_of(base: Dimensions) -> dict[str, int]:
    hidden = base.hidden_size
    return {"q_proj": hidden, "o_proj": base.query_size, "gate_proj": hidden, "down_proj": base.inner_size}


def _at_once(base: Dimensions, step: Step) -> int:
    """The logits, the piece of the head and the dequantised layer that are there when most is kept."""
    logits = step.number_bytes * base.num_words * min(LOGITS_TOKENS, step.batch_size * step.length)
    is_whole = step.batch_size * step.length > LOGITS_TOKENS
    piece = step.number_bytes * (base.num_words if is_whole else min(PIECE_WORDS, base.num_words)) * base.hidden_size
    return logits + piece + step.number_bytes * base.hidden_size * base.inner_size
