"""What the last line of a SLURM job's log says is to be submitted, and whether Slurm would queue the job again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from align_train.cli import again
from align_train.cli.attempts import attempt, begin
from align_train.cli.jobs import Job
from align_train.processes import check_job_name

Says = Callable[..., tuple[int, str]]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Job:
    """A job whose scontrol says what is in the file `said`, and fails without it."""
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_CLUSTER_NAME", "SLURM_SUBMIT_DIR", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\ncat {tmp_path}/said\n")
    (tmp_path / "scontrol").chmod(0o755)
    made = Job.current()
    assert made is not None
    return made


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    """Exit status and last line, for the status of the run and its folder."""

    def told(status: int, folder: Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            again.main([str(status), "resume=auto", f"hydra.run.dir='{folder}'"])
        return int(end.value.code or 0), capsys.readouterr().out

    return told


def stopped(folder: Path, job: Job) -> None:
    with pytest.raises(SystemExit), attempt(folder, job, 3):
        raise SystemExit(75)


def saved(folder: Path) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()


@pytest.mark.parametrize("ending", [stopped, begin])  # too many starts without gain, and a failure
def test_resume_is_named_only_where_a_checkpoint_is(
    job: Job, says: Says, tmp_path: Path, ending: Callable[[Path, Job], None]
) -> None:
    folder = tmp_path / "a run"
    for _ in range(10):
        ending(folder, job)
    code, text = says(1, folder)
    assert code == 1
    assert ", and submit the same words again; run folder" in text
    saved(folder)
    assert f", and submit with resume='{folder}'; run folder" in says(1, folder)[1]


def test_a_job_that_slurm_may_not_queue_again_says_how_to_go_on(job: Job, says: Says, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    saved(folder)
    stopped(folder, job)
    (tmp_path / "said").write_text("JobId=7 JobName=x Requeue=0 Restarts=0\n")
    code, text = says(75, folder)
    assert code == 1
    assert text.startswith("again: no, stopped before training (REQUEUE); --no-requeue, or this cluster, forbids")
    assert f"submit with resume={folder};" in text
    (tmp_path / "said").write_text("JobId=7 JobName=x Requeue=1 Restarts=0\n")
    code, text = says(75, folder)
    assert code == 0
    assert text.startswith("again: yes, stopped before training (REQUEUE); run folder")
    assert text.endswith(f"if Slurm does not queue it: submit with resume={folder}\n")


def test_a_job_goes_on_where_slurm_cannot_be_asked(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert again.may_be_queued(job)  # it fails
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert again.may_be_queued(job)  # it is not there


def test_a_name_that_lightning_takes_for_a_shell_is_mended_in_srun_or_in_sbatch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"SLURM_JOB_NAME": "bash", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"give srun --job-name=align, or sbatch --job-name=align where"):
        check_job_name()
