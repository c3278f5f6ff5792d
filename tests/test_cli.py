"""The command line: help at once, words that are wrong, errors in one line, and a whole session in a folder."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from align_train.cli import PLANNED, VERBS, main
from align_train.cli.attempts import read_attempts
from align_train.cli.hydra_app import with_quotes
from align_train.cli.resuming import continued


@pytest.fixture(autouse=True)
def _fresh_hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["align-train"])
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(words)
    message = capsys.readouterr().err or str(stop.value.code)
    return (stop.value.code if isinstance(stop.value.code, int) else 1), message


@pytest.mark.parametrize("words", [["--help"], *[[verb, "--help"] for verb in VERBS]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"import sys; from align_train.cli import main; main({words}); print(sorted(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = said.splitlines()[-1]
    assert not {"'torch'", "'hydra'", "'lightning'", "'transformers'", "'pyarrow'"} & set(
        modules.strip("[]").split(", ")
    )
    assert said.count("  align-train ") >= 2


def test_every_verb_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    said = capsys.readouterr().out
    assert all(f"  {verb}" in said for verb in [*VERBS, *PLANNED])


def test_an_unknown_verb_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "trian") == (2, "align-train: no verb 'trian', did you mean train?\n")


@pytest.mark.parametrize(
    ("word", "given"),
    [
        ("data.train.pairs.shards=s3://b/{00000..00099}.tar", 'data.train.pairs.shards="s3://b/{00000..00099}.tar"'),
        ("a=x/{a,b}-{1..2}.tar", 'a="x/{a,b}-{1..2}.tar"'),
        ("a={b: 1}", "a={b: 1}"),
        ("a=[x/{1..2}.tar]", "a=[x/{1..2}.tar]"),
        ("a=${b.c}/x", "a=${b.c}/x"),
        ("a='x{1..2}'", "a='x{1..2}'"),
        ("a=x", "a=x"),
        ("--cfg", "--cfg"),
    ],
)
def test_brace_ranges_are_quoted_for_hydra(word, given):
    assert with_quotes(word) == given


@pytest.mark.parametrize("verb", PLANNED)
def test_a_planned_verb_says_so(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = fails(capsys, verb)
    assert code == 1
    assert "not built yet" in message


def test_missing_shards_name_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    code, message = fails(capsys, "train", "experiment=tiny")
    assert code == 1
    assert "no shard matches 'shards/sample/clipart/shards/*.tar'" in message
    assert "align-train prepare" in message
    assert "Traceback" not in message


def test_a_typo_in_an_override_names_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    code, message = fails(capsys, "train", "data.batchsize=2")
    assert code == 1
    assert "batchsize" in message


def test_a_width_mismatch_names_both_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    _, message = fails(capsys, "train", "experiment=tiny", "model.projection_dim=64")
    assert "tower is 32 wide" in message
    assert "model.projection_dim is 64" in message


def test_a_device_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["prepare"])
    GlobalHydra.instance().clear()
    code, message = fails(capsys, "train", "experiment=tiny", "trainer.accelerator=cpu", "trainer.devices=0")
    assert code == 1
    assert "align-train train: MisconfigurationException" in message
    assert "Traceback" not in message


def test_ctrl_c_where_no_step_can_be_finished_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("align_train.cli.finetune.load_start", interrupted)
    words = ["finetune", "pairs.path=x.csv", "start.model=y"]
    assert fails(capsys, *words) == (130, "align-train finetune: interrupted\n")


def test_a_value_without_default_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    _, message = fails(capsys, "evaluate")
    assert "these settings have no default, give them: checkpoint=..." in message


def test_resume_needs_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    _, message = fails(capsys, "train", "resume=nowhere")
    assert "nowhere/.hydra/overrides.yaml is missing" in message


def test_resume_repeats_the_settings_and_lets_new_ones_win(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- experiment=tiny\n- max_steps=3\n")
    words = continued(["max_steps=5", f"resume={tmp_path}"])
    assert words == ["experiment=tiny", "max_steps=5", f"resume={tmp_path}", f"hydra.run.dir={tmp_path}"]


def test_train_resume_evaluate_export(
    tiny_run: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in tiny_run() if not word.startswith("folder=")]
    main(["train", *words, "max_steps=3"])
    run = tmp_path / "run"
    GlobalHydra.instance().clear()
    main(["train", f"resume={run}", "max_steps=5"])
    GlobalHydra.instance().clear()
    main(["train", f"resume={run}", "max_steps=6"])
    assert json.loads((run / "result.json").read_text())["steps"] == 6
    record = (run / ".hydra" / "overrides.yaml").read_text()  # the new settings are remembered, and Hydra's are not
    assert "- max_steps=6\n" in record
    assert "hydra." not in record
    assert "max_steps: 6\n" in (run / ".hydra" / "config.yaml").read_text()
    GlobalHydra.instance().clear()
    main(["export", f"checkpoint={run}"])
    assert (run / "hf" / "model.safetensors").is_file()
    exam = (
        "{_target_: align_train.evaluation.Retrieval, data: {_target_: align_train.data.testsets.ShardPairs, SHARDS}}"
    )
    exam = exam.replace("SHARDS", f"shards: '{tmp_path}/validation/*.tar'")
    scores = {}
    for name, source in (("checkpoint", run), ("export", run / "hf")):
        GlobalHydra.instance().clear()
        main(
            [
                "evaluate",
                f"checkpoint={source}",
                "exams=none",
                f"+exams.drawn={exam}",
                f"folder={tmp_path / name}",
            ]
        )
        scores[name] = json.loads((tmp_path / name / "result.json").read_text())["exams"]["drawn"]
        assert (tmp_path / name / "contact_sheet_drawn.png").is_file()
    GlobalHydra.instance().clear()
    main(["evaluate", f"checkpoint={tmp_path}", "exams=none", f"+exams.drawn={exam}"])  # the newest run of a folder
    result = json.loads((run / "result.json").read_text())
    assert result["exams"]["drawn"]["scores"] == scores["checkpoint"]["scores"]
    assert result["pairs_seen"] == 6 * 16  # what training wrote is still there
    how = result["exams"]["drawn"]["measured"]
    assert how["batch_norm"] == "statistics recalibrated on 5 training batches"
    assert how["checkpoint"] == str(run)
    assert scores["checkpoint"]["counts"] == {"images": 24, "captions": 24}
    assert "exam" in capsys.readouterr().out
    recalls = {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert set(scores["export"]["scores"]) == recalls | {"i2t_median_rank", "t2i_median_rank"}


def test_two_processes_train_as_one_and_go_on(tiny_run: Callable[..., list[str]], tmp_path: Path) -> None:
    """Launched by Lightning itself, with the words that begin a run and go on with it."""
    words = [word for word in tiny_run("both") if not word.startswith(("folder=", "hydra."))]
    words += ["model.batch_norm.statistics=cross_rank", "trainer.precision=64-true", "centre_captions=true"]
    words += ["model.vision.stochastic_depth=0.0", "model.text.dropout=0.0", "schedule.total_steps=6"]
    folders = {"one": tmp_path / "one", "two": tmp_path / "two=2"}
    main(["train", *words, f"hydra.run.dir={folders['one']}", "trainer.devices=1"])
    more = [f"hydra.run.dir={folders['two']}", "trainer.devices=2", "resume=auto"]
    for steps in (4, 6):
        command = [sys.executable, "-m", "align_train", "train", *words, *more, f"max_steps={steps}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    starts = [(each.first_step, each.reached, each.how) for each in read_attempts(folders["two"])]
    assert starts == [(0, 4, "done"), (4, 6, "done")]
    losses = {}
    for name, folder in folders.items():
        lines = (folder / "metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("loss")
        losses[name] = [float(value) for line in lines[1:] if (value := line.split(",")[column])]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)
    assert len(losses["one"]) == 6
