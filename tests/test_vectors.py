"""An adapter becomes one flat vector and comes back the same; whatever else it holds is refused by name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmini import vectors
from fedmini.errors import UpdateError

TEMPLATE = (("a.lora_B.weight", (3, 2)), ("b.lora_B.weight", (4, 1)))


def an_adapter() -> dict[str, np.ndarray]:
    return {
        "b.lora_B.weight": np.arange(4, dtype=np.float32).reshape(4, 1),
        "a.lora_B.weight": np.arange(10, 16, dtype=np.float32).reshape(3, 2),
    }


def test_the_flat_order_is_the_templates_not_the_dictionarys() -> None:
    assert vectors.flatten(an_adapter(), TEMPLATE).tolist() == [10, 11, 12, 13, 14, 15, 0, 1, 2, 3]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=10, max_size=10))
def test_unflatten_undoes_flatten_bit_for_bit(values: list[float]) -> None:
    flat = np.array(values, np.float32)
    assert vectors.flatten(vectors.unflatten(flat, TEMPLATE), TEMPLATE).tobytes() == flat.tobytes()


def test_unflattened_tensors_are_copies() -> None:
    flat = np.zeros(10, np.float32)
    vectors.unflatten(flat, TEMPLATE)["a.lora_B.weight"][:] = 1
    assert not flat.any()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"a.lora_B.weight": None}, "expected float32, got NoneType"),
        ({"a.lora_B.weight": np.zeros((2, 3), np.float32)}, r"expected shape \(3, 2\), got \(2, 3\)"),
        ({"a.lora_B.weight": np.zeros((3, 2))}, "expected float32, got float64"),
        ({"a.lora_B.weight": np.full((3, 2), np.nan, np.float32)}, "not finite"),
        ({"c": np.zeros(1, np.float32)}, "c: not a tensor of this run"),
    ],
)
def test_an_adapter_that_is_not_the_templates_is_refused_and_the_tensor_named(change: dict, complaint: str) -> None:
    with pytest.raises(UpdateError, match=complaint):
        vectors.flatten(an_adapter() | change, TEMPLATE)


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(UpdateError, match=r"b\.lora_B\.weight: expected a tensor of shape \(4, 1\), it is missing"):
        vectors.flatten({"a.lora_B.weight": np.zeros((3, 2), np.float32)}, TEMPLATE)


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(UpdateError, match=r"expected a vector of shape \(10,\), got \(9,\)"):
        vectors.unflatten(np.zeros(9, np.float32), TEMPLATE)
