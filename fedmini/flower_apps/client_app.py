"""The ClientApp: a simulated device in Flower's simulation, and a refusal anywhere else."""

import sys
from collections.abc import Callable

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedmini.errors import FedMiniError
from fedmini.flower_apps import messages
from fedmini.flower_apps.messages import Partition

PARTITION_ID, NUM_PARTITIONS = "partition-id", "num-partitions"
REFUSAL = (
    "a fedmini device never runs code that a server sent, so this ClientApp trains in Flower's simulation only: "
    "embed fedmini.Device in an application instead"
)


class SimulatedOnly(ClientApp):
    """A ClientApp that answers every message with a refusal, whatever its type, where it is not in a simulation."""

    def __init__(self, is_simulated: Callable[[Context], bool]) -> None:
        super().__init__()
        self._is_simulated = is_simulated
        self.query(messages.PARTITION)(tell_partition)
        self.train(messages.CONTRIBUTE)(contribute)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        if not self._is_simulated(context):
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, REFUSAL), reply_to=message)
        return super().__call__(message, context)


def in_simulation(context: Context) -> bool:
    """Whether this is a worker of Flower's simulation engine, which runs ClientApps as actors of Ray.

    A partition-id alone says nothing: whoever starts a real node may give it one.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or PARTITION_ID not in context.node_config:
        return False
    return ray.get_runtime_context().get_actor_id() is not None


def tell_partition(message: Message, context: Context) -> Message:
    """Which partition this node is: only the node knows."""
    return Message(messages.pack_partition(_partition(context)), reply_to=message)


def contribute(message: Message, context: Context) -> Message:
    """One device's contribution to a round; the reason of an error never holds what somebody typed."""
    try:
        from fedmini.flower_apps import simulated_devices

        task = messages.unpack_task(message.content)
        contribution = simulated_devices.contribute(task, _partition(context).index)
    except FedMiniError as error:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
    except Exception as error:  # a foreign library's, whose text may quote what it read
        reason = f"training failed ({type(error).__name__}); `fedmini simulate` shows where"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
    return Message(messages.pack_vector(contribution.vector), reply_to=message)


def _partition(context: Context) -> Partition:
    return Partition(int(context.node_config[PARTITION_ID]), int(context.node_config[NUM_PARTITIONS]))


app = SimulatedOnly(in_simulation)
