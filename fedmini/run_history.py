"""Where a run stands: the state that it goes on from, and the line that each round leaves in its metrics."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from fedmini import checkpoint
from fedmini.errors import StateError
from fedmini.model import runtime
from fedmini.privacy.ledger import Ledger
from fedmini.rundir import RunDirectory
from fedmini.types import Adapter, LedgerPosition, Manifest, RoundReport, ServerState

POSITION = "evaluation_ledger"  # in a round's line: where the evaluations' ledger stood when it was written


@contextmanager
def opened_ledgers(directory: RunDirectory, manifest: Manifest) -> Iterator[tuple[Ledger, Ledger | None]]:
    """A run's ledger, and that of its evaluations on devices where it has any; both locked, and closed at the end."""
    with Ledger.open(directory.ledger, manifest.run_id) as ledger:
        if manifest.for_evaluation is None:
            yield ledger, None
            return
        with Ledger.open(directory.evaluation_ledger, manifest.for_evaluation.run_id) as evaluation_ledger:
            yield ledger, evaluation_ledger


def starting_point(
    manifest: Manifest,
    initial_adapter: Callable[[], Adapter],
    directory: RunDirectory,
    ledger: Ledger,
    evaluation_ledger: Ledger | None,
) -> tuple[ServerState, list[dict[str, Any]]]:
    """The state to go on from, and the metrics so far: the newest checkpoint's, or those of a run that begins.

    Raises StateError where the checkpoints are gone, another run's, or know more of a ledger than is there.
    """
    found = checkpoint.load(directory.checkpoints)
    if found is None:
        if ledger.position.seq > 0 or directory.metrics.exists():  # round 0 is committed before either
            raise StateError(
                f"{directory.path} has trained before, but its checkpoints are gone: bring {directory.checkpoints} back, "
                "or begin anew in another folder"
            )
        return ServerState(0, initial_adapter(), 0, None, None, {}, ledger.position), []
    if found.manifest_hash != manifest.hash:
        raise StateError(f"{directory.checkpoints} belongs to another run than {directory.manifest}")
    ledger.verify(found.state.ledger)
    known = [line[POSITION] for line in found.history if line.get(POSITION) is not None]
    if known and evaluation_ledger is not None:
        evaluation_ledger.verify(LedgerPosition(**known[-1]))
    return found.state, list(found.history)


def check_saved_together(directory: RunDirectory) -> None:
    """Raise StateError where the weights are there and what they cost is not: a new ledger would say nothing was spent."""
    if directory.checkpoints.exists() and not directory.ledger.exists():
        raise StateError(
            f"the ledger {directory.ledger} is gone: bring it back, or begin anew in another folder; "
            "what this run has spent is unknown without it"
        )


def metrics_line(report: RoundReport) -> dict[str, Any]:
    """A round as it stands in metrics.jsonl."""
    line = asdict(report)
    return {"round": line.pop("round_num"), **line, "peak_memory_bytes": runtime.peak_memory_bytes()}


def report_of_round_zero(manifest: Manifest) -> RoundReport:
    """What stands in the metrics before any training."""
    return RoundReport(
        round_num=0,
        num_sampled=0,
        num_survivors=0,
        upload_bytes_per_device=0,
        download_bytes_per_device=0,
        seconds=0.0,
        noise_to_signal=None,
        epsilon={unit.unit: 0.0 for unit in manifest.release.units},
    )
