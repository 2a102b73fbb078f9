"""Device: what an app embeds. A person's examples stay in it; it takes part in runs that its owner agreed to."""

import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

from fedmini import operator_keys
from fedmini.conditions import DailyUsage, DeviceConditions, LinuxConditions, Policy
from fedmini.conditions.policy import local_time
from fedmini.config import ConditionsSection, DeviceConfig
from fedmini.device import kept_adapter, loaded_base, participation, settings
from fedmini.device.diary import About, Diary
from fedmini.device.examples import Examples
from fedmini.device.hidden_cache import HiddenCache
from fedmini.device.interruption import Interruption
from fedmini.device.loaded_base import LoadedBase
from fedmini.device.membership import Membership
from fedmini.device.participation import RECEIPTS, Means
from fedmini.device.receipts import DeviceReceipt, Receipts
from fedmini.device.standing import DeviceStatus
from fedmini.device.worker import Worker, WorkerParts
from fedmini.enrolment import records
from fedmini.errors import ConfigError, FedMiniError, StateError
from fedmini.events import Emit, nowhere
from fedmini.model import runtime
from fedmini.randomness import FROM_OS, Randomness
from fedmini.store import StoredExample, os_keyring
from fedmini.store.key_places import FindKeyring
from fedmini.types import Adapter, Manifest

USAGE, LOCK = "usage.json", "device.lock"


class Device:
    """A device: its folder, its examples, and background threads that take part in runs.

    One `Device` opens a folder at a time. Methods may be called from any thread, an app's log and conditions included.
    Only our own errors come out of them (FedMiniError), and nothing that goes wrong in the background ends, signals or
    blocks the process. `close` it, or use it as a context manager: every method raises StateError afterwards.
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
        Raises ConfigError, or StateError where the folder is in use or damaged. Where only the examples can't be read,
        it opens: `status` says why, and `forget` begins anew without them.
        """
        self.folder = settings.folder_at(folder)
        self._lock = threading.RLock()
        self._held = ExitStack()
        with settings.taken_from(self.folder), ExitStack() as held:
            config = settings.device_config(self.folder, config)
            self._server = settings.server_of(server, server_key, config)
            if not self.folder.exists():
                operator_keys.create_device(self.folder)
            _lock_folder(self.folder, held)
            self._diary = Diary(emit)
            self._usage = DailyUsage(self.folder / USAGE, local_time)
            self._conditions = conditions if conditions is not None else LinuxConditions()
            self._config, self._randomness = config, randomness
            if config.training.small_heap:
                runtime.keep_heap_small()
            self._examples = Examples(self.folder / "examples", config.store, find_keyring)
            held.callback(self._examples.close)
            max_hidden_bytes = config.training.max_hidden_bytes
            self._hidden = HiddenCache(self.folder / "hidden", max_hidden_bytes, self._examples.sealer)
            self._base = LoadedBase(
                config.base, config.training, lambda note: self._diary.tell("device.note", note=note)
            )
            self._membership = Membership(self.folder, config, self._examples)
            held.callback(self._membership.close)
            self._held = held.pop_all()
        self._worker: Worker | None = None
        self._why_idle = "it was not started"
        self._is_open = True

    def __repr__(self) -> str:
        return f"Device({str(self.folder)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_example(self, response: str, prompt: str | None = None) -> None:
        """Keep an example: what was answered, and to what. It stays here. The oldest go where the caps are reached."""
        self.add_examples([(prompt, response)])

    def add_examples(self, examples: Iterable[tuple[str | None, str]]) -> int:
        """Keep several, (prompt, response) each, all or none; how many."""
        self._check_open()
        try:
            stored = [StoredExample(response, prompt) for prompt, response in examples]
        except (TypeError, ValueError):  # its text would quote what was given
            raise ConfigError("expected examples as pairs: the prompt, or None, and the response") from None
        return self._examples.add_many(stored)

    @property
    def public_keys(self) -> bytes:
        """What to give an operator, who enrols this device with it: the folder's device.pub."""
        self._check_open()
        return operator_keys.read_file(self.folder / records.PUBLIC_KEYS)

    def enrol(self, certificate: bytes, operator_key: bytes) -> None:
        """Take the certificate that the operator made of `public_keys`, with the operator's public key (operator.pub).

        The same again is fine. Raises ProtocolError where they don't belong together, or to this device.
        """
        self._while_stopped([partial(self._membership.enrol, certificate, operator_key)])

    def start(self) -> None:
        """Begin to take part, in the background. Called twice, it goes on. Raises ConfigError where no server is named."""
        with self._lock:
            self._check_open()
            if self._worker is not None and self._worker.is_running:
                return
            if self._server is None:
                raise ConfigError(
                    f'which server? name it as Device(..., server="https://HOST:PORT"), or in {self.folder / records.CONFIG} '
                    "as server under [device]"
                )
            self._server.tls()  # a certificate that can't be read is said now
            interruption = Interruption(self._config.training)
            means = Means(self._base, self._randomness, interruption, self._usage, self._hidden)
            limits = self._config.conditions
            during = limits.model_copy(update={"max_contributions_per_day": None})  # the last one is brought to its end
            self._worker = Worker(
                WorkerParts(
                    self._membership, means, self._policy(limits), self._policy(during), self._server, self._diary
                )
            )
            self._worker.start()

    def _policy(self, limits: ConditionsSection) -> Policy:
        return Policy(limits, self._conditions, self._usage, local_time)

    def stop(self) -> None:
        """End taking part: training stops within a second, and the round goes on without this device."""
        with self._lock:
            self._check_open()
            self._stop()

    def _stop(self) -> bool:
        worker, self._worker = self._worker, None
        if worker is None:
            return False
        was_running = worker.is_running
        worker.stop()
        self._why_idle = "it was stopped"
        return was_running

    def close(self) -> None:
        """Stop, and let go of the folder. Closing twice is fine."""
        with self._lock:
            self._is_open = False
            self._base.forget()
            self._stop()
            self._held.close()

    def status(self) -> DeviceStatus:
        """How this device stands: what it spent, and why it is not training right now."""
        self._check_open()
        own, worker, kept = self._membership.enrolment, self._worker, kept_adapter.newest(self.folder)
        is_running = worker is not None and worker.is_running
        num_examples, key_kept_in = self._examples.standing()
        rounds_joined, epsilon_spent = participation.spent(own) if own is not None else (0, {})
        runs = self._membership.runs()
        return DeviceStatus(
            name=own.identity.certificate.device_id if own is not None else None,
            is_running=is_running,
            is_connected=worker is not None and worker.is_connected,
            why_not_training=self._diary.why if is_running else self._why_idle,
            problem=self._examples.problem or self._diary.problem,
            num_examples=num_examples,
            key_kept_in=key_kept_in,
            runs=runs,
            offers=self._membership.offers(),
            rounds_joined=rounds_joined,
            epsilon_spent=epsilon_spent,
            lifetime_epsilon=self._config.device.lifetime_epsilon,
            lifetime_delta=self._config.device.lifetime_delta,
            last_adapter=(kept.run_id, kept.round_num)
            if kept is not None and kept.manifest_hash in {run.manifest_hash for run in runs}
            else None,
        )

    def receipts(self) -> tuple[DeviceReceipt, ...]:
        """What left this device: when, how many bytes, their hash, and the epsilon after it. The oldest first."""
        self._check_open()
        return Receipts(self.folder / RECEIPTS).read()

    def consent(self, manifest_hash: str) -> None:
        """Agree to a run that was offered, by the hash of its manifest. A changed manifest is another run, and asks again.

        Raises ConfigError for one that was never offered; the operator's signature and this device's limits are checked.
        """
        self._check_open()
        self._membership.consent(manifest_hash)
        if (worker := self._worker) is not None:
            worker.ask_again()

    def withdraw(self, manifest_hash: str) -> None:
        """Leave a run, for good; what was spent in it stays spent."""
        self._check_open()
        self._membership.withdraw(manifest_hash)
        if (worker := self._worker) is not None:
            worker.leave("its owner has left the run")
        self._hidden.erase()

    def reply(self, prompt: str | Sequence[Mapping[str, str]], max_new_tokens: int = 128) -> str:
        """The model's reply to a prompt, or to a conversation of {"role", "content"}, with the newest adapter; all here."""
        return "".join(self.reply_in_pieces(prompt, max_new_tokens))

    def reply_in_pieces(self, prompt: str | Sequence[Mapping[str, str]], max_new_tokens: int = 128) -> Iterator[str]:
        """The same, as it is made. It ends with StateError where `forget` or `close` comes before its end."""
        self._check_open()
        messages = loaded_base.conversation(prompt, max_new_tokens)
        return self._base.reply(self._adapter(), messages, max_new_tokens)

    def _adapter(self) -> tuple[Manifest, Adapter] | None:
        """The newest adapter of a run that this device is in, and that run."""
        own, kept = self._membership.enrolment, kept_adapter.newest(self.folder)
        manifest = own.manifests.get(kept.manifest_hash) if own is not None and kept is not None else None
        adapter = kept_adapter.load(self.folder, manifest) if manifest is not None else None
        return (manifest, adapter) if manifest is not None and adapter is not None else None

    def forget(self) -> None:
        """Erase every example, adapter and cache here. The enrolment, receipts and counters of what was spent stay.

        What has left this device is in sums of many, and can't be taken back. All of it that can be erased is; raises
        StateError where something could not be.
        """
        forget_adapters = partial(kept_adapter.forget, self.folder)
        erasures = (self._examples.erase, self._hidden.erase, forget_adapters)
        self._while_stopped((self._membership.forget, *erasures, self._base.forget))
        self._diary.went_well(About.ROUND)

    def _while_stopped(self, steps: Sequence[Callable[[], None]]) -> None:
        """Every step, then go on as before. Raises the first failure, once all were tried."""
        with self._lock:
            self._check_open()
            was_running = self._stop()
            failures: list[FedMiniError] = []
            for step in steps:
                try:
                    step()
                except FedMiniError as error:
                    failures.append(error)
            if was_running:
                self.start()
            if failures:
                raise failures[0]

    def _check_open(self) -> None:
        if not self._is_open:
            raise StateError(f"the device {self.folder} was closed: open it again")


def _lock_folder(folder: Path, held: ExitStack) -> None:
    """Keep every other Device out of the folder. Raises ConfigError for what is no device's, StateError where one is in."""
    if not (folder / records.PUBLIC_KEYS).exists() and not records.is_enrolled(folder):
        raise ConfigError(f"{folder} is there already, and no device's folder: choose one that is not there yet")
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        held.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StateError(
            f"{folder} is open in another Device: close that one, or wait until its process ends"
        ) from error
    except OSError as error:
        raise StateError(f"can't lock {folder}: {error.strerror}; let the user who runs this own the folder") from error
