"""What a server's own file may say: where it listens, with which certificate, how much it takes and how long it waits."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from fedmini.config.sections import Count, Positive, Section

_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


def _host(value: str) -> str:
    """A host name, or an address as `ipaddress` writes it."""
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        pass
    if len(value) > 253 or not all(_LABEL.fullmatch(label) for label in value.split(".")):
        raise ValueError("expected a host's name or address, such as fl.example.org, without a scheme or a port")
    if value.rpartition(".")[2].isdecimal():
        raise ValueError("expected a host's name or address: this is neither")
    return value


Host = Annotated[str, AfterValidator(_host)]


class ServerSection(Section):
    """Under which names devices reach this server, and how it logs."""

    host: Host  # what devices are told
    other_hosts: tuple[Host, ...] = ()  # further names that the certificate is for
    listen: Host = "0.0.0.0"  # "::" for IPv6 too
    port: Annotated[int, Field(ge=1, le=65535)] = 9092
    log_format: Literal["text", "json"] = "text"


class TlsSection(Section):
    """A certificate that somebody else issued; without one, the folder's own is used."""

    certificate: Path | None = None  # PEM, with what leads to its root
    private_key: Path | None = None  # PEM, not encrypted

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("give both of certificate and private_key, or neither")
        return self


class LimitsSection(Section):
    """What one client may ask of this server."""

    max_body_bytes: Annotated[int, Field(ge=2**16, le=2**30)] = 8 * 2**20
    max_connections: Count = 1000


class TimingSection(Section):
    """How long the server waits for a round's devices, stage by stage; who is late is left out."""

    advertise_s: Positive = 30.0
    share_s: Positive = 60.0
    contribute_s: Positive = 900.0
    agree_s: Positive = 60.0
    unmask_s: Positive = 60.0
    poll_s: Positive = 0.5  # between two looks at what has come
    wait_s: Positive = 30.0  # before a round is tried again that too few devices came to


class ServerConfig(Section):
    """One server, as its TOML file describes it."""

    server: ServerSection
    tls: TlsSection = TlsSection()
    limits: LimitsSection = LimitsSection()
    timing: TimingSection = TimingSection()
