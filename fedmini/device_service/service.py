"""The calls that a device answers. Each ends in an answer or in a status of fedmini's own words; nothing else gets out."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message

from fedmini.device import Device
from fedmini.device_service import answers, messages, service_token
from fedmini.device_service.messages import Method
from fedmini.errors import (
    ConfigError,
    FedMiniError,
    LinkError,
    PrivacyBudgetError,
    ProtocolError,
    UpdateError,
)
from fedmini.events import Emit

MAX_MESSAGE_BYTES = 4 * 2**20  # what gRPC's clients expect of each other, where nothing else was agreed
MAX_CALLS = 16
MAX_WORDS = 1000  # of a status
READS = frozenset({"Status", "Receipts", "PublicKeys"})  # not logged where they go well: apps ask all the time

CODES = (  # the first that fits
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (UpdateError, grpc.StatusCode.INVALID_ARGUMENT),
    (ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
    (PrivacyBudgetError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (LinkError, grpc.StatusCode.UNAVAILABLE),
    (FedMiniError, grpc.StatusCode.FAILED_PRECONDITION),
)

Call: TypeAlias = Any  # a grpc.ServicerContext, and grpc ships no types
Answer = Callable[[Any], Iterable[Message]]


class DeviceService(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers calls with a device. `token`: what every call has to show; None where the socket's mode keeps others out."""

    def __init__(self, device: Device, emit: Emit, token: str | None = None) -> None:
        self._device, self._emit, self._token = device, emit, token
        self._answers: dict[str, Answer] = {
            "AddExamples": self._add_examples,
            "Status": lambda request: (answers.status(device.status()),),
            "Reply": self._reply,
            "Receipts": lambda request: answers.receipts(device.receipts()),
            "Consent": self._consent,
            "Withdraw": self._withdraw,
            "Forget": self._forget,
            "PublicKeys": lambda request: (messages.make("PublicKeysResponse", public_keys=device.public_keys),),
            "Enrol": self._enrol,
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """What answers a call, by its full name; None: gRPC answers that there is no such method."""
        if self._token is not None and not service_token.is_shown(
            handler_call_details.invocation_metadata, self._token
        ):
            # As a stream: it is refused before anything of it is read.
            return grpc.stream_unary_rpc_method_handler(self._refuse)
        service, _, name = handler_call_details.method.removeprefix("/").partition("/")
        method = messages.METHODS.get(name) if service == messages.SERVICE else None
        if method is None:
            return None
        if method.is_streaming:
            return grpc.unary_stream_rpc_method_handler(lambda request, call: self._answer(method, request, call))
        return grpc.unary_unary_rpc_method_handler(lambda request, call: b"".join(self._answer(method, request, call)))

    def _refuse(self, requests: Iterator[bytes], call: Call) -> None:
        self._emit("service.refused", code="UNAUTHENTICATED")
        call.abort(
            grpc.StatusCode.UNAUTHENTICATED,
            f"show the token, as the metadata {service_token.HEADER}: it is in its file",
        )

    def _answer(self, method: Method, content: bytes, call: Call) -> Iterator[bytes]:
        began, code, words = time.monotonic(), grpc.StatusCode.OK, ""
        try:
            for message in self._answers[method.name](messages.parse(method, content)):
                yield message.SerializeToString()
        except GeneratorExit:  # who called went away, or its deadline passed
            code = grpc.StatusCode.CANCELLED
            raise
        except FedMiniError as error:
            code = next(code for kind, code in CODES if isinstance(error, kind))
            words = str(error).encode("utf-8", "replace").decode("utf-8")[:MAX_WORDS]
        except Exception as error:  # a library's failure: its message may hold anything
            code, words = grpc.StatusCode.INTERNAL, f"a failure inside: {type(error).__name__}"
        finally:
            if method.name not in READS or code is not grpc.StatusCode.OK:
                seconds = round(time.monotonic() - began, 3)
                self._emit("service.answered", method=method.name, code=code.name, seconds=seconds)
        if code is not grpc.StatusCode.OK:
            call.abort(code, words)

    def _add_examples(self, request: Any) -> Iterable[Message]:
        return (messages.make("AddExamplesResponse", num_added=self._device.add_examples(answers.examples(request))),)

    def _reply(self, request: Any) -> Iterable[Message]:
        pieces = self._device.reply_in_pieces(answers.prompt(request), answers.max_new_tokens(request))
        return (messages.make("ReplyPiece", text=piece) for piece in pieces)

    def _consent(self, request: Any) -> Iterable[Message]:
        self._device.consent(answers.manifest_hash(request))
        return (messages.make("ConsentResponse"),)

    def _withdraw(self, request: Any) -> Iterable[Message]:
        self._device.withdraw(answers.manifest_hash(request))
        return (messages.make("WithdrawResponse"),)

    def _forget(self, request: Any) -> Iterable[Message]:
        self._device.forget()
        return (messages.make("ForgetResponse"),)

    def _enrol(self, request: Any) -> Iterable[Message]:
        self._device.enrol(request.certificate, request.operator_key)
        return (messages.make("EnrolResponse"),)
