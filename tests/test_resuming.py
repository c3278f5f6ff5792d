"""`resume=...`: folders of any name, flags beside it, and what is written down when."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from align_train.cli import main
from align_train.cli.attempts import attempt, read_attempts
from align_train.cli.hydra_app import split_flags
from align_train.cli.resuming import continued, quoted, record_settings, value_of
from align_train.shipped import config_folder

NAMES = [
    "süß",
    "lr=0.1",
    "x(1)",
    "a[1]",
    "n{1}",
    "a'b",
    'a"b',
    "#1",
    "a,b",
    "a b",
    "jörg/x",
    "a\\",
    "a:b",
    "a\\'b",
    "1",
]


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["align-train"])
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a checkpoint, by name."""
    return stopped(tmp_path / "run")


def stopped(folder: Path) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text("- max_steps=3\n")
    return folder


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_any_folder_comes_through_hydra(name: str, tmp_path: Path) -> None:
    folder = stopped(tmp_path / name)
    words = continued([f"resume={name}"])
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", words, return_hydra_config=True)
    assert (config.resume, config.hydra.run.dir, config.max_steps) == (str(folder), str(folder), 3)
    words = continued([f"hydra.run.dir={name}", "resume=auto"])
    assert value_of(words, "hydra.run.dir") == str(folder)
    assert continued([f"hydra.run.dir={quoted(folder)}", "resume=auto"]) == words


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ('a="/abs/d2"', "/abs/d2"),
        ("+a='x y'", "x y"),
        (r"a=x\ y", "x y"),
        ("a=1e3", "1e3"),
        ("a=null", None),
        ("~a", None),
    ],
)
def test_a_value_is_read_as_hydra_does(word: str, value: str | None) -> None:
    assert value_of(["a=0", "b=2", word], "a") == value


def test_an_interpolated_folder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes no hydra\.run\.dir with an interpolation .*write the folder out"):
        continued(["hydra.run.dir=outputs/${name}", "resume=auto"])


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("a=1 --cfg job b=2", "--cfg job"),
        ("--config-dir my=own a=1 -cn x b=2", "--config-dir my=own -cn x"),
        ("--info a=1 b=2", "--info"),
        ("a=1 --info defaults b=2", "--info defaults"),
        ("a=1 --cfg=job -m --resolve b=2", "--cfg=job -m --resolve"),
    ],
)
def test_flags_are_told_from_overrides(words: str, flags: str) -> None:
    assert split_flags(words.split()) == (["a=1", "b=2"], flags.split())


@pytest.mark.parametrize("folder", ["run", "new"])
def test_a_look_writes_nothing(folder: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(run.parent)
    main(["train", "resume=auto", "--cfg", "job", f"hydra.run.dir={folder}", "seed=7"])
    printed = capsys.readouterr().out
    assert "seed: 7\n" in printed
    assert ("max_steps: 3\n" in printed) == (folder == "run")
    assert files(run.parent) == before


def test_a_look_in_a_job_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NAME", "b7")
    main(["train", "--cfg", "job", "resume=auto"])
    assert "resume: auto\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_folder_of_settings_works_beside_resume(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run.parent / "own" / "experiment").mkdir(parents=True)
    (run.parent / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 11\n")
    main(["train", "--config-dir", "own", f"resume={run}", "experiment=mine", "--cfg", "job"])
    assert "seed: 11\n" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["resume=run", "max_steps=5"], ["resume=run", "max_stepz=5"], ["hydra.run.dir=run"]])
def test_a_start_that_is_refused_leaves_no_settings_behind(
    words: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*given: object) -> None:
        raise ValueError("another process is at the run")

    before = files(run / ".hydra")
    monkeypatch.setattr("align_train.cli.hydra_app.attempt", refused)
    with pytest.raises(SystemExit):
        main(["train", *words])
    assert "another process" in capsys.readouterr().err or "max_stepz=5" in words
    assert files(run / ".hydra") == before


def test_the_settings_are_written_once_training_can_begin(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(run / ".hydra")
    with pytest.raises(SystemExit):
        main(["train", "resume=run", "max_steps=0"])
    assert files(run / ".hydra") == before
    monkeypatch.setattr("align_train.cli.train.train", record_settings)
    main(["train", "resume=run", "max_steps=5"])
    assert (run / ".hydra" / "overrides.yaml").read_text() == f"- max_steps=5\n- resume={run}\n"


def test_an_end_before_hydra_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's first start saved a checkpoint, and then its record was lost."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NAME", "b7")
    monkeypatch.setattr("align_train.cli.train.train", lambda config: None)
    main(["train", "resume=auto"])
    GlobalHydra.instance().clear()
    folder = tmp_path / "outputs" / "slurm" / "b7-7"
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(SystemExit):
        main(["train", "resume=auto"])
    last = read_attempts(folder)[-1]
    assert last.ended is not None
    assert last.for_good
    assert "no settings, FileNotFoundError" in last.how
    with attempt(folder, None, 3):
        pass
