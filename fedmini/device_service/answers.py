"""What a device says of itself, as messages; and what a request says, checked."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from fedmini.device import DeviceReceipt, DeviceStatus
from fedmini.device_service import messages
from fedmini.errors import ConfigError

ROLES = ("system", "user", "assistant")
NEW_TOKENS, MOST_NEW_TOKENS = 128, 4096
_HASH = re.compile(r"[0-9a-f]{64}")


def status(found: DeviceStatus) -> Message:
    """A StatusResponse."""
    last = found.last_adapter
    return messages.make(
        "StatusResponse",
        name=found.name,
        is_running=found.is_running,
        is_connected=found.is_connected,
        why_not_training=_text(found.why_not_training),
        problem=_text(found.problem),
        num_examples=found.num_examples,
        key_kept_in=_text(found.key_kept_in),
        runs=[
            messages.make(
                "Run",
                run_id=run.run_id,
                manifest_hash=run.manifest_hash,
                num_contributions=run.num_contributions,
                max_contributions=run.max_contributions,
            )
            for run in found.runs
        ],
        offers=[
            messages.make("Offer", run_id=one.run_id, manifest_hash=one.manifest_hash, terms=one.terms)
            for one in found.offers
        ],
        rounds_joined=found.rounds_joined,
        epsilon_spent=found.epsilon_spent,
        lifetime_epsilon=found.lifetime_epsilon,
        lifetime_delta=found.lifetime_delta,
        last_adapter=None if last is None else messages.make("AdapterPlace", run_id=last[0], round_num=last[1]),
    )


def receipts(found: Sequence[DeviceReceipt]) -> Iterator[Message]:
    """Each one as a Receipt."""
    for one in found:
        yield messages.make(
            "Receipt",
            time=one.time,
            run_id=one.run_id,
            round_num=one.round_num,
            attempt=one.attempt,
            manifest_hash=one.manifest_hash,
            size_bytes=one.size_bytes,
            sha256=one.sha256,
            epsilon=one.epsilon,
        )


def examples(request: Any) -> list[tuple[str | None, str]]:
    """What an AddExamplesRequest brings, (prompt, response) each. Raises ConfigError where that is nothing."""
    if not request.examples:
        raise ConfigError("examples: expected at least one, got none")
    return [(one.prompt if one.HasField("prompt") else None, one.response) for one in request.examples]


def manifest_hash(request: Any) -> str:
    """The hash that a request names. Raises ConfigError for what is none, and does not repeat it: it may be anything."""
    if not _HASH.fullmatch(request.manifest_hash):
        raise ConfigError("manifest_hash: expected 64 hexadecimal digits, as StatusResponse shows it")
    return str(request.manifest_hash)


def prompt(request: Any) -> str | list[Mapping[str, str]]:
    """What a ReplyRequest asks. Raises ConfigError."""
    which = request.WhichOneof("input")
    if which is None:
        raise ConfigError("input: expected a prompt or a conversation, got neither")
    if which == "prompt":
        return _said(request.prompt, "prompt")
    if not request.conversation.messages:
        raise ConfigError("conversation: expected at least one message, got none")
    return [
        {"role": _role(one.role), "content": _said(one.content, "content")} for one in request.conversation.messages
    ]


def max_new_tokens(request: Any) -> int:
    """How long a reply may get. Raises ConfigError."""
    if not request.HasField("max_new_tokens"):
        return NEW_TOKENS
    if not 1 <= request.max_new_tokens <= MOST_NEW_TOKENS:
        raise ConfigError(f"max_new_tokens: expected 1 to {MOST_NEW_TOKENS}, got {request.max_new_tokens}")
    return int(request.max_new_tokens)


def _role(role: str) -> str:
    if role not in ROLES:
        raise ConfigError(f"role: expected one of {', '.join(ROLES)}")
    return role


def _said(text: str, name: str) -> str:
    if not text.strip():
        raise ConfigError(f"{name}: expected a non-empty string, got an empty one")
    return text


def _text(said: str | None) -> str | None:
    """Words of ours, with a mark in place of the bytes of a path that are no UTF-8."""
    return None if said is None else said.encode("utf-8", "replace").decode("utf-8")
