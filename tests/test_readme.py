"""Every command of the README runs as it stands, made small where it would take long."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import drawn_image
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from align_train.cli import main
from align_train.cli.hydra_app import with_quotes
from align_train.shipped import config_folder, sample_metadata_file

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "data.md").read_text()
SHARDS = (ROOT / "docs" / "shards.md").read_text()
SCALE = (ROOT / "docs" / "scale.md").read_text()
EXAMS = (ROOT / "docs" / "exams.md").read_text()
FINETUNING = (ROOT / "docs" / "finetuning.md").read_text()
RECOVERY = (ROOT / "docs" / "recovery.md").read_text()
GUIDES = GUIDE + SHARDS + SCALE + EXAMS + FINETUNING + RECOVERY
SMALL = {
    "model": "align_tiny", "max_steps": "2", "data.batch_size": "16", "data.workers": "0", "trainer.devices": "1",
    "schedule.warmup_steps": "1", "trainer.precision": "32-true", "trainer.accelerator": "cpu", "exams": "none",
    "validate_every": "1", "trainer.log_every_n_steps": "1", "trainer.num_nodes": "1",
    "model.preprocessing.resize": "40", "model.preprocessing.crop": "32",
}  # fmt: skip


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line) for block in blocks("bash", text) for line in block.replace("\\\n", " ").splitlines()]


COMMANDS = commands(README)


def latest_run(name: str) -> str:
    """The last run of that name."""
    return str(max(Path("outputs", name).glob("*")))


def small(words: list[str]) -> list[str]:
    """The command with SMALL's values in the place of its own."""
    given = {word.partition("=")[0]: word for word in words}
    return list((given | {key: f"{key}={value}" for key, value in SMALL.items()}).values())


def write_metadata(folder: Path) -> None:
    """Two files in COYO's schema that the paper's rules keep, with links that need no network."""
    folder.mkdir(parents=True)
    table = pq.read_table(sample_metadata_file("clipart"))
    for name, value in (("width", 400), ("height", 300), ("word_count", 5)):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array([value] * table.num_rows, pa.int32()))
    for number in range(2):
        pq.write_table(table.slice(100 * number, 100), folder / f"{number:05d}.parquet")


def write_test_sets(folder: Path) -> None:
    """COCO's Karpathy split and ImageNet's validation images in little."""
    (folder / "coco" / "val2014").mkdir(parents=True)
    entries = []
    for n in range(12):
        name = f"COCO_val2014_{n:012d}.jpg"
        (folder / "coco" / "val2014" / name).write_bytes(drawn_image(n))
        sentences = [{"raw": f"drawing {n}, told {k} times"} for k in range(5)]
        entries.append({"filepath": "val2014", "filename": name, "split": "test", "cocoid": n, "sentences": sentences})
    (folder / "coco" / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    for number, wnid in enumerate(("n01440764", "n01443537", "n02012849")):
        (folder / "imagenet" / "val" / wnid).mkdir(parents=True)
        for n in range(2):
            (folder / "imagenet" / "val" / wnid / f"{n}.JPEG").write_bytes(drawn_image(10 * number + n))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[str]], None]]:
    """Runs commands one after the other in one folder, as a reader would."""
    folder = tmp_path_factory.mktemp("reader")
    photos = folder / "photos"
    photos.mkdir()
    rows = [{"file_name": f"{n}.jpg", "caption": f"a drawn picture, number {n}"} for n in range(64)]
    for n, row in enumerate(rows):
        (photos / row["file_name"]).write_bytes(drawn_image(n))
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_metadata(folder / "coyo" / "data")
    write_test_sets(folder)
    before, given = Path.cwd(), sys.argv
    os.chdir(folder)

    def run(words: list[str]) -> None:
        GlobalHydra.instance().clear()
        sys.argv = ["align-train"]
        main([re.sub(r"outputs/(\w+)/RUN", lambda found: latest_run(found[1]), word) for word in words])

    yield run
    os.chdir(before)
    sys.argv = given
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words)[:60] for words in COMMANDS])
def test_command(words: list[str], session: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(Path.cwd() / "cache"))
    if words[0] == "make":
        said = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert {"train": "align-train train", "test": "pytest"}[words[1]] in said
    elif words[0] == "sbatch":
        assert (ROOT / words[1]).is_file()
        _run_script(ROOT / words[1], words[2:])
    elif words[1] == "train" and "experiment=tiny" not in words:
        for name, shards in (("cc3m", "clipart/shards"), ("coyo", "clipart")):
            if any(f"shards/{name}/" in word for word in words) and not list(Path("shards").glob(f"{name}/**/*.tar")):
                shutil.rmtree(Path("shards", name), ignore_errors=True)  # what `prepare` left of links that go nowhere
                Path("shards", name).symlink_to(Path("shards/sample", shards).absolute())
        session(["train", *small(words[2:])])
    elif words[1] == "train":
        session(
            [
                *words[1:],
                "max_steps=2",
                "schedule.warmup_steps=1",
                "validate_every=1",
                "trainer.accelerator=cpu",
                "name=sample",
            ]
        )
    elif words[1] == "finetune":
        few = ["max_steps=2", "schedule.warmup_steps=1", "examine_every=1", "forgetting.alphas=[0,1]", "data.workers=0"]
        session([*words[1:], *few, "trainer.accelerator=cpu"])
    elif words[1] == "doctor":
        session([*words[1:], "data.workers=0"])
    else:
        session(words[1:])


@pytest.mark.parametrize("words", [words for words in commands(GUIDES) if words[0] == "align-train"], ids=" ".join)
def test_command_of_a_guide_composes(words: list[str], tmp_path: Path) -> None:
    overrides = words[2:]
    if overrides[0] == "--config-dir":
        name = re.search(r"# my_configs/(\S+)", blocks("yaml", GUIDE)[0])
        assert name is not None
        (tmp_path / name[1]).parent.mkdir()
        (tmp_path / name[1]).write_text(blocks("yaml", GUIDE)[0])
        overrides = [f"hydra.searchpath=[file://{tmp_path}]", *overrides[2:]]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        assert compose(words[1], [with_quotes(word) for word in overrides])


def test_python_example(session: Callable[[list[str]], None]) -> None:
    run = latest_run("sample")
    Path("cat.png").write_bytes(drawn_image(3, format="PNG"))
    (code,) = blocks("python")
    namespace: dict[str, object] = {}
    exec(code.replace("outputs/sample/RUN", run).replace("\nclassify(", "\nanswer = classify("), namespace)
    assert {row["label"] for row in namespace["answer"]} == {"cat", "dog", "tree"}  # type: ignore[attr-defined]


def jobs() -> list[list[str]]:
    """Verb and overrides of each job in the guide to SLURM, those of a chain one by one."""
    text, found = (ROOT / "slurm" / "README.md").read_text().replace("\\\n", " "), list[list[str]]()
    for line in (line for block in blocks("", text) for line in block.splitlines()):
        words = shlex.split(line.removeprefix("$ "), comments=True)
        scripts = [n for n, word in enumerate(words) if word.endswith(".sbatch")]
        if scripts:
            found.append([Path(words[scripts[0]]).stem, *words[scripts[0] + 1 :]])
        elif words and words[0].endswith("chain.sh"):
            groups = " ".join(["", *words[1:]]).split(" -- ")
            found += [
                [verb, *each.split()] for verb, each in zip(("prepare", "train", "evaluate"), groups, strict=False)
            ]
    return [[word for word in words if word != "--" and not word.startswith("--")] for words in found]


def test_there_are_jobs_in_the_guide() -> None:
    assert {words[0] for words in jobs()} >= {"prepare", "train", "evaluate"}


@pytest.mark.parametrize("words", jobs(), ids=" ".join)
def test_job_of_the_guide_composes(words: list[str]) -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        assert compose(words[0], words[1:])


LINK = r"\]\((?!http)([^)#]+)\)"


@pytest.mark.parametrize(
    "target",
    [ROOT / link for link in re.findall(LINK, README)] + [ROOT / "docs" / link for link in re.findall(LINK, GUIDES)],
)
def test_link(target: Path) -> None:
    assert target.exists()


def _run_script(script: Path, overrides: list[str]) -> None:
    """Run slurm/train.sbatch with Slurm's variables and an srun that runs its command once, here; see tests/slurm."""
    tools = Path("tools").absolute()
    tools.mkdir(exist_ok=True)
    (tools / "srun").write_text('#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n')
    (tools / "scontrol").write_text(f"#!/bin/sh\necho '   Command={script} name=value'\n")
    (tools / "align-train").write_text(f'#!/bin/sh\nexec {sys.executable} -m align_train "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (tools / "bin").mkdir(exist_ok=True)
    (tools / "bin" / "activate").write_text("")
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "ALIGN_TRAIN_ENV": str(tools), "SLURM_NNODES": "1",
        "SLURM_SUBMIT_DIR": str(Path.cwd()), "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job",
    }  # fmt: skip
    more = ["max_steps=2", "schedule.warmup_steps=1", "trainer.accelerator=cpu", "exams=none", "export=false"]
    command = ["bash", str(script), *overrides, *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path("outputs/slurm/job-7/result.json").is_file()
