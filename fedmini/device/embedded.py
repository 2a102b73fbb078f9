"""Device: what an app embeds. A person's examples stay in it; it takes part in runs that its owner agreed to."""

import ssl
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from fedmini import config as configuration
from fedmini import operator_keys
from fedmini.conditions import DailyUsage, DeviceConditions, LinuxConditions, Policy
from fedmini.conditions.policy import local_time
from fedmini.config import DeviceConfig
from fedmini.device import kept_adapter, participation
from fedmini.device.interruption import Interruption
from fedmini.device.loaded_base import LoadedBase
from fedmini.device.membership import Membership
from fedmini.device.randomness import FROM_OS, Randomness
from fedmini.device.receipts import DeviceReceipt, Receipts
from fedmini.device.standing import DeviceStatus, RunStatus
from fedmini.device.worker import Worker, WorkerParts
from fedmini.enrolment import records
from fedmini.errors import ConfigError
from fedmini.events import Emit, nowhere
from fedmini.flower.fleet import tls_context
from fedmini.flower.gate import is_loopback
from fedmini.phrases import quoted
from fedmini.store import ExampleStore, StoredExample, os_keyring
from fedmini.store.key_places import FindKeyring

RECEIPTS, USAGE = "receipts.jsonl", "usage.json"


class Device:
    """A device: its folder, its examples, and a background thread that takes part in runs.

    One process opens a folder at a time. Methods may be called from any thread. Only our own errors come out of them
    (FedMiniError), and nothing that goes wrong in the background ends, signals or blocks the process. `close` it, or use
    it as a context manager.
    """

    def __init__(
        self,
        folder: Path | str,
        server: str | None = None,
        server_key: Path | str | None = None,
        *,
        conditions: DeviceConditions | None = None,
        config: DeviceConfig | Mapping[str, Any] | None = None,
        emit: Emit = nowhere,
        randomness: Randomness = FROM_OS,
        find_keyring: FindKeyring = os_keyring.find,
    ) -> None:
        """Open a device's folder; it is made, with keys of its own, where there is none.

        `server`: https://HOST:PORT. `server_key`: the certificate (PEM, or a file of it) that the server's is checked
        against, such as its tls/ca.crt; without it the system's authorities are. Both, and all limits, may stand in
        the folder's device.toml instead; `config` replaces that file. `conditions`: what the device knows about itself,
        where Linux's own files don't say it. `find_keyring`: where the key of the examples is kept.
        Raises ConfigError, or StateError where the folder is in use or damaged.
        """
        self.folder = Path(folder).expanduser()
        if not self.folder.exists():
            operator_keys.create_device(self.folder)
        self._config = _config_of(self.folder, config)
        self._server = server or self._config.device.server
        if self._server is not None:
            _check_server(self._server)
        self._server_key = server_key if server_key is not None else self._config.device.server_key
        self._emit, self._randomness = emit, randomness
        self._lock = threading.RLock()
        self._usage = DailyUsage(self.folder / USAGE, local_time)
        self._policy = Policy(
            self._config.conditions,
            conditions if conditions is not None else LinuxConditions(),
            self._usage,
            local_time,
        )
        self._store = ExampleStore.open(self.folder / "examples", self._config.store, find_keyring=find_keyring)
        try:
            self._base = LoadedBase(
                self._config.base, self._config.training, lambda note: emit("device.note", note=note)
            )
            self._membership = Membership(self.folder, self._config, self._store, self._base)
        except BaseException:
            self._store.close()
            raise
        self._worker: Worker | None = None

    def __repr__(self) -> str:
        return f"Device({str(self.folder)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_example(self, response: str, prompt: str | None = None) -> None:
        """Keep an example: what was answered, and to what. It stays here. The oldest go where the caps are reached."""
        self._store.add(response, prompt)

    def add_examples(self, examples: Iterable[tuple[str | None, str]]) -> int:
        """Keep several, (prompt, response) each, all or none; how many."""
        return self._store.add_many([StoredExample(response, prompt) for prompt, response in examples])

    @property
    def public_keys(self) -> bytes:
        """What to give an operator, who enrols this device with it: the folder's device.pub."""
        return operator_keys.read_file(self.folder / records.PUBLIC_KEYS)

    def enrol(self, certificate: bytes, operator_key: bytes) -> None:
        """Take the certificate that the operator made of `public_keys`, with the operator's public key (operator.pub).

        The same again is fine. Raises ProtocolError where they don't belong together, or to this device.
        """
        with self._lock:
            was_running = self._stop()
            self._membership.enrol(certificate, operator_key)
            if was_running:
                self.start()

    def start(self) -> None:
        """Begin to take part, in the background. Called twice, it goes on. Raises ConfigError where no server is named."""
        with self._lock:
            if self._worker is not None and self._worker.is_running:
                return
            if self._server is None:
                raise ConfigError(
                    f'which server? name it as Device(..., server="https://HOST:PORT"), or in {self.folder / "device.toml"} '
                    "as server under [device]"
                )
            interruption = Interruption(self._config.training)
            parts = WorkerParts(
                self._membership,
                self._policy,
                self._usage,
                interruption,
                self._randomness,
                self._server,
                self._tls,
                self._emit,
            )
            self._tls()  # a certificate that can't be read is said now
            self._worker = Worker(parts)
            self._worker.start()

    def stop(self) -> None:
        """End taking part: training stops within a second, and the round goes on without this device."""
        with self._lock:
            self._stop()

    def _stop(self) -> bool:
        worker, self._worker = self._worker, None
        if worker is None:
            return False
        was_running = worker.is_running
        worker.stop()
        return was_running

    def close(self) -> None:
        """Stop, and let go of the folder. Closing twice is fine."""
        with self._lock:
            self._stop()
            self._membership.close()
            self._store.close()

    def status(self) -> DeviceStatus:
        """How this device stands: what it spent, and why it is not training right now."""
        own, worker = self._membership.enrolment, self._worker
        newest = kept_adapter.newest(self.folder)
        runs: tuple[RunStatus, ...] = ()
        rounds_joined = 0
        if own is not None:
            with own.ledger() as ledger:
                rounds_joined = len(ledger.releases())
                runs = tuple(
                    RunStatus(one.run_id, name, ledger.num_participations(one.run_id), one.release.max_releases)
                    for name, one in own.manifests.items()
                )
        return DeviceStatus(
            name=own.identity.certificate.device_id if own is not None else None,
            is_running=worker is not None and worker.is_running,
            is_connected=worker is not None and worker.is_connected,
            why_not_training=worker.why_not if worker is not None else "it was not started",
            problem=worker.problem if worker is not None else None,
            num_examples=self._store.num_examples,
            key_kept_in=self._store.key_kept_in,
            runs=runs,
            offers=self._membership.offers(),
            rounds_joined=rounds_joined,
            epsilon_spent=participation.spent(own) if own is not None else {},
            lifetime_epsilon=self._config.device.lifetime_epsilon,
            lifetime_delta=self._config.device.lifetime_delta,
            last_adapter=(newest.run_id, newest.round_num) if newest is not None else None,
        )

    def receipts(self) -> tuple[DeviceReceipt, ...]:
        """What left this device: when, how many bytes, their hash, and the epsilon after it. The oldest first."""
        return Receipts(self.folder / RECEIPTS).read()

    def consent(self, manifest_hash: str) -> None:
        """Agree to a run that was offered, by the hash of its manifest. A changed manifest is another run, and asks again.

        Raises ConfigError for one that was never offered; the operator's signature and this device's limits are checked.
        """
        self._membership.consent(manifest_hash)
        if self._worker is not None:
            self._worker.reconnect()

    def withdraw(self, manifest_hash: str) -> None:
        """Leave a run, for good; what was spent in it stays spent."""
        self._membership.withdraw(manifest_hash)

    def reply(self, prompt: str | Sequence[Mapping[str, str]], max_new_tokens: int = 128) -> str:
        """The model's reply to a prompt, or to a conversation of {"role", "content"}, with the newest adapter; all here."""
        return "".join(self.reply_in_pieces(prompt, max_new_tokens))

    def reply_in_pieces(self, prompt: str | Sequence[Mapping[str, str]], max_new_tokens: int = 128) -> Iterator[str]:
        """The same, as it is made."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        own, kept = self._membership.enrolment, kept_adapter.newest(self.folder)
        manifest = own.manifests.get(kept.manifest_hash) if own is not None and kept is not None else None
        adapter = kept_adapter.load(self.folder, kept, manifest) if kept is not None and manifest is not None else None
        yield from self._base.reply(manifest, adapter, messages, max_new_tokens)

    def forget(self) -> None:
        """Erase every example, adapter and cache here. The enrolment, receipts and counters of what was spent stay.

        What has left this device is in sums of many, and can't be taken back.
        """
        with self._lock:
            was_running = self._stop()
            self._membership.forget()
            self._store.erase()
            kept_adapter.forget(self.folder)
            self._base.forget()
            if was_running:
                self.start()

    def _tls(self) -> ssl.SSLContext | None:
        assert self._server is not None
        if self._server.startswith("http://"):
            return None
        return tls_context(_key_content(self._server_key))


def _config_of(folder: Path, given: DeviceConfig | Mapping[str, Any] | None) -> DeviceConfig:
    if isinstance(given, DeviceConfig):
        return given
    if given is not None:
        return configuration.parse_device_config(given, "Device(config=...)")
    path = folder / records.CONFIG
    return configuration.load_device_config(path) if path.exists() else DeviceConfig()


def _check_server(server: str) -> None:
    """Raise ConfigError for what is no server's address, and for one without TLS that is not on this machine."""
    configuration.parse_device_config({"device": {"server": server}}, "Device(server=...)")
    host = urlsplit(server).hostname or ""
    if server.startswith("http://") and not is_loopback(host):
        raise ConfigError(f"server: {server} has no TLS, and {host} is not this machine: expected https://HOST:PORT")


def _key_content(server_key: Path | str | None) -> bytes | None:
    """PEM as it is, or the content of a file of it."""
    if server_key is None:
        return None
    if isinstance(server_key, str) and "-----BEGIN CERTIFICATE-----" in server_key:
        return server_key.encode("utf-8", "replace")
    path = Path(server_key).expanduser()
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"server_key: can't read {quoted(path)}: {error.strerror}") from error
