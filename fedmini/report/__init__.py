"""The report of a run: one HTML page that stands alone, and its plots as PNG files."""

from pathlib import Path

from fedmini.errors import StateError
from fedmini.files import replace_synced
from fedmini.report import facts, page, plots
from fedmini.rundir import RunDirectory

__all__ = ["write_report"]


def write_report(directory: Path) -> Path:
    """Write RUN/report.html and RUN/plots/*.png of a finished or running run; gives the page's path.

    The same files in give the same bytes out, and readers see the old page or the new one, never half of one.
    Raises StateError where the directory is no run, where its files are damaged, or where the report can't be written.
    """
    found = facts.read_facts(directory)
    drawn = plots.draw(found)
    run = RunDirectory(directory)
    folder = directory / "plots"
    try:
        folder.mkdir(exist_ok=True)
        for plot in drawn:
            replace_synced(folder / f"{plot.name}.png", plot.png)
        replace_synced(run.report, page.render(found, drawn).encode())
    except OSError as error:
        raise StateError(
            f"can't write the report in {directory}: {error.strerror}; make room or mend the folder, then run `fedmini report`"
        ) from error
    return run.report
