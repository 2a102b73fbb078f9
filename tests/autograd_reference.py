"""The slow way to a gradient: autograd through the adapted model, one mean loss at a time, nothing recorded."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedmini.model import loss
from fedmini.model.lora import LoraModel
from fedmini.types import EncodedExample


def mean_loss_gradient(model: LoraModel, examples: Sequence[EncodedExample]) -> NDArray[np.float64]:
    """Set each `.grad` to the gradient of the examples' mean loss; give the losses, nats a token, (num_examples,)."""
    for tensor in model.parameters():
        tensor.grad = torch.zeros_like(tensor)
    losses = np.zeros(len(examples))
    for members, length in model.by_prefix(examples) if examples else []:
        batch = loss.batch_of([examples[index] for index in members], model.base.accelerator)
        with model._checkpointing.on():
            means = batch.mean_of_each(model._target_losses(batch, length))
            (means.sum() / len(examples)).backward()
        losses[members] = means.detach().double().cpu().numpy()
    return losses
