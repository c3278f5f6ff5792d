"""`align-train evaluate` as it is typed: any dual encoder, every exam of configs/exams, and what is refused."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from conftest import WORDS, drawn_image, drawn_pair
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from hydra.core.global_hydra import GlobalHydra
from reading import write_tar
from test_dual_encoder import clip, saved, siglip, vision_text
from transformers import AlignModel, AlignProcessor

from align_train.cli import main
from align_train.cli.scoring import write_result
from align_train.corpus.images import decode
from align_train.corpus.shards import write_shards
from align_train.data import AlignInputs
from align_train.evaluation import published
from align_train.evaluation.measuring import device_name, software
from align_train.evaluation.prompts import load_prompts
from align_train.evaluation.published import PUBLISHED
from align_train.metrics import class_embeddings, classification_ranks, retrieval_ranks, retrieval_recall
from align_train.models.align import normalised
from align_train.records import Pair
from align_train.shipped import config_folder

PAIRS = [drawn_pair(number) for number in range(64, 88)]
IMAGENET = {"n01440764": "tench", "n01443537": "goldfish", "n02930766": "taxicab"}
CLASSES = ("cat", "dog", "tree")


@pytest.fixture(autouse=True)
def _fresh_hydra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["align-train"])
    yield
    GlobalHydra.instance().clear()


def align_train(*words):
    GlobalHydra.instance().clear()
    main([str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps and its export; half of each batch norm's statistics are of the last step, so they are warm.

    It resizes with antialiasing. Without, the export's pixels would be others: transformers knows no other resizing.
    """
    folder, before = tmp_path_factory.mktemp("trained"), os.getcwd()
    write_shards((drawn_pair(number) for number in range(64)), folder / "train")
    write_shards(PAIRS, folder / "test")
    os.chdir(folder)
    try:
        align_train(
            "train", "experiment=tiny", "data=shards", f"hydra.run.dir={folder / 'run'}", "max_steps=6",
            f"data.train.pairs.shards={folder}/train/*.tar", "data.batch_size=16", "data.workers=0",
            "checkpoint_every=6", "trainer.accelerator=cpu", "model.preprocessing.antialias=true",
            "model.batch_norm.momentum=0.9",
        )  # fmt: skip
    finally:
        os.chdir(before)
    return SimpleNamespace(run=folder / "run", export=folder / "run" / "hf", shards=folder / "test")


def class_folders(path, classes=CLASSES, each=4, first=0):
    for place, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for number in range(each):
            (path / name / f"{number}.jpg").write_bytes(drawn_image(first + each * place + number))
    return path


def table(path, count=12):
    """Images with two captions each."""
    path.mkdir(parents=True)
    with (path / "test.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for number in range(count):
            (path / f"{number}.jpg").write_bytes(drawn_image(number))
            rows.writerows([[f"{number}.jpg", f"{WORDS[number % 8]} {word}"] for word in (f"no {number}", "again")])
    return path / "test.csv"


def karpathy(path, count=6, split="test", captions=6):
    path.mkdir(parents=True)
    entries = []
    for number in range(count):
        (path / f"{number}.jpg").write_bytes(drawn_image(number))
        sentences = [{"raw": f"{WORDS[number % 8]} {number} {line}"} for line in range(captions)]
        entries.append({"filename": f"{number}.jpg", "split": split, "sentences": sentences})
    (path / "dataset.json").write_text(json.dumps({"dataset": "tiny", "images": entries}))
    return path / "dataset.json"


def hub_dataset(path):
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    rows = {"image": [drawn_image(number) for number in range(9)], "label": [0, 1, 2] * 3}
    DatasetDict({"test": Dataset.from_dict(rows, features)}).save_to_disk(path)
    return path


def labelled_shards(path):
    members = []
    for number in range(9):
        members += [(f"s{number:07d}.jpg", drawn_image(number)), (f"s{number:07d}.cls", f"{number % 3}".encode())]
    write_tar(path / "0.tar", members)
    return path


def sample_shards(folder):
    """Shards where the sample corpus has its own, with a column of the sidecar for classes."""
    kinds = ("Flags", "Food & Drink", "Objects")
    for start, name in ((0, "emoji"), (24, "test_unseen_rendering"), (48, "test_unseen_concept")):
        pairs = (drawn_pair(number) for number in range(start, start + 12))
        named = (Pair(p.key, p.image, p.caption, {"category": kinds[n % 3]}) for n, p in enumerate(pairs))
        write_shards(named, folder / "shards" / "sample" / name / "shards")


def evaluate(checkpoint, folder, *words):
    """What result.json says."""
    align_train("evaluate", f"checkpoint={checkpoint}", f"folder={folder}", "device=cpu", *words)
    return json.loads((folder / "result.json").read_text())


def on_shards(shards):
    return ["exams=[retrieval_shards,health_sample]", f"exams.pairs.data.shards={shards}/*.tar",
            f"exams.health.data.shards={shards}/*.tar"]  # fmt: skip


def embeddings(folder, kind):
    (path,) = folder.glob(f"*-{kind}-*.parquet")
    rows = pq.read_table(path)
    return rows["key"].to_pylist(), torch.tensor(rows["embedding"].to_pylist())


def values(result):
    return {
        f"{name}/{score}": each["value"]
        for name, exam in result["exams"].items()
        for score, each in exam["scores"].items()
    }


# A checkpoint, its export, and both by hand


def test_a_checkpoint_its_export_and_plain_transformers_agree(trained, tmp_path):
    classes = class_folders(tmp_path / "photos")
    words = [f"exams.pairs.data.shards={trained.shards}/*.tar", f"exams.folders.data.path={classes}",
             "exams=[retrieval_shards,zero_shot_folders]"]  # fmt: skip
    results = {
        name: evaluate(source, tmp_path / name, *words, f"embed={tmp_path / name / 'kept'}")
        for name, source in (("checkpoint", trained.run), ("export", trained.export))
    }
    ours, theirs = results["checkpoint"], results["export"]
    assert values(ours) == pytest.approx(values(theirs), abs=1e-5)
    assert ours["weights_sha256"] == theirs["weights_sha256"]
    for exams, source in ((ours["exams"], trained.run), (theirs["exams"], trained.export)):
        for exam in exams.values():
            assert exam["measured"]["preprocessing"]["antialias"] is True
            assert exam["measured"]["checkpoint"] == str(source)
    assert ours["pairs_seen"] == 6 * 16
    assert "pairs_seen" not in theirs

    model, processor = (kind.from_pretrained(trained.export) for kind in (AlignModel, AlignProcessor))

    def embed(texts, contents):
        inputs = processor(
            text=texts, images=[decode(content) for content in contents], return_tensors="pt", padding="max_length",
            truncation=True, max_length=16,
        )  # fmt: skip
        with torch.inference_mode():
            text = model.eval().get_text_features(inputs["input_ids"], attention_mask=inputs["attention_mask"])
            image = model.get_image_features(inputs["pixel_values"])
        return normalised(image.pooler_output), normalised(text.pooler_output)

    image, text = embed([pair.caption for pair in PAIRS], [pair.image for pair in PAIRS])
    for result, name in ((ours, "checkpoint"), (theirs, "export")):
        for kind, by_hand in (("images", image), ("texts", text)):
            (path,) = [p for p in (tmp_path / name / "kept").glob(f"*-{kind}-*") if "photos" not in p.name]
            kept = torch.tensor(pq.read_table(path)["embedding"].to_pylist())
            assert (kept - by_hand).abs().max() <= 1e-5
        recall = retrieval_recall(image, text, torch.arange(24))
        scores = {score: each["value"] for score, each in result["exams"]["pairs"]["scores"].items()}
        assert {score: scores[score] for score in recall} == pytest.approx(recall, abs=1e-5)

    prompts = [each.replace("{}", name) for name in CLASSES for each in load_prompts("clip_80").templates]
    photos = [file.read_bytes() for file in sorted(classes.rglob("*.jpg"))]
    image, text = embed(prompts, photos)
    labels = torch.arange(3).repeat_interleave(4)
    ranks = classification_ranks(image, class_embeddings(text.unflatten(0, (3, -1))), labels)
    for result in results.values():
        assert result["exams"]["folders"]["scores"]["top1"]["value"] == pytest.approx(
            (ranks < 1).double().mean().item()
        )


def test_result_and_report_say_how_it_was_measured(trained, tmp_path, capsys):
    result = evaluate(trained.run, tmp_path / "out", *on_shards(trained.shards))
    said = capsys.readouterr()
    entry = result["exams"]["pairs"]
    how = entry["measured"]
    assert result["exams"]["health"]["measured"] == how
    assert how["checkpoint"] == str(trained.run)
    assert (result["name"], result["seed"], result["steps"], result["batch_size"]) == ("tiny", 1, 6, 16)
    assert (how["precision"], how["ranks"], how["batch_norm"]) == ("float32", 1, "running statistics")
    assert how["device"] == device_name(torch.device("cpu"))
    assert how["software"] == software()
    assert not how.keys() & result.keys()
    assert len(result["weights_sha256"]) == 64
    assert result["parameters"] > 100_000
    assert how["preprocessing"] == {
        "resize": 40,
        "crop": 32,
        "antialias": True,
        "max_tokens": 16,
        "interpolation": "bilinear",
        "aspect_ratio": "not kept",
    }
    assert {"python", "align-train", "torch", "transformers"} <= set(how["software"])
    assert entry["counts"] == {"images": 24, "captions": 24}
    assert len(entry["facts"]["data_sha256"]) == len(entry["facts"]["split_sha256"]) == 64
    out = tmp_path / "out"
    assert (out / "contact_sheet_pairs.png").is_file()
    assert f"report: {out}/report.html and report.md" in said.out
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    shown = f"{100 * entry['scores']['t2i_r10']['value']:.1f}"
    for written in (page, text):
        assert shown in written
        assert result["weights_sha256"][:8] in written
    assert "data:image/png;base64" in page  # the contact sheet is in the page
    assert said.err == ""


def test_exams_are_added_to_those_that_the_same_weights_have_taken(trained, tmp_path):
    evaluate(trained.run, tmp_path / "out", *on_shards(trained.shards))
    words = ["exams=[retrieval_table]", f"exams.table.data.path={table(tmp_path / 'table')}"]
    again = evaluate(trained.run, tmp_path / "out", *words)
    assert list(again["exams"]) == ["pairs", "health", "table"]
    folder = tmp_path / "hf"
    saved(clip, folder)
    other = evaluate(folder, tmp_path / "out", *words)
    assert list(other["exams"]) == ["table"]
    assert "pairs_seen" not in other


def test_each_exam_keeps_how_it_was_measured(trained, tmp_path):
    shards = on_shards(trained.shards)
    first = evaluate(trained.run, tmp_path / "out", *shards, "encoding.precision=bf16")
    words = ["exams=[retrieval_table]", f"exams.table.data.path={table(tmp_path / 'table')}"]
    then = evaluate(trained.export, tmp_path / "out", *words)  # of the same weights
    assert list(then["exams"]) == ["pairs", "health", "table"]
    assert then["exams"]["pairs"] == first["exams"]["pairs"]
    how = {name: then["exams"][name]["measured"] for name in ("pairs", "table")}
    assert (how["pairs"]["precision"], how["pairs"]["checkpoint"]) == ("bf16", str(trained.run))
    assert (how["table"]["precision"], how["table"]["checkpoint"]) == ("float32", str(trained.export))
    assert (then["name"], then["pairs_seen"]) == ("tiny", 96)


def changed_run(trained, folder):
    """The run with another last.ckpt, and as best.ckpt the one that it had."""
    run = shutil.copytree(trained.run, folder)
    checkpoints = run / "checkpoints"
    shutil.copy(checkpoints / "last.ckpt", checkpoints / "best.ckpt")
    checkpoint = torch.load(checkpoints / "last.ckpt", weights_only=False)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("text_projection.bias"))
    checkpoint["state_dict"][name] += 1e-3
    torch.save(checkpoint, checkpoints / "last.ckpt")
    return run


def test_results_of_a_run_s_other_checkpoints_have_a_folder_of_their_own(trained, tmp_path):
    run, words = changed_run(trained, tmp_path / "run"), on_shards(trained.shards)
    align_train("evaluate", f"checkpoint={run}", "device=cpu", *words)
    of_last = (run / "result.json").read_bytes()
    align_train("evaluate", f"checkpoint={run}/checkpoints/best.ckpt", "device=cpu", *words)
    assert (run / "result.json").read_bytes() == of_last
    of_best = json.loads((run / "evaluate" / "best" / "result.json").read_text())
    assert of_best["weights_sha256"] != json.loads(of_last)["weights_sha256"]
    for name in ("report.md", "report.html", "contact_sheet_pairs.png"):
        assert (run / "evaluate" / "best" / name).is_file()
    shutil.copy(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt")
    (run / "evaluate" / "best" / "result.json").unlink()
    align_train("evaluate", f"checkpoint={run}/checkpoints/best.ckpt", "device=cpu", *words)  # the same weights now
    assert not (run / "evaluate" / "best" / "result.json").exists()
    entry = json.loads((run / "result.json").read_text())["exams"]["pairs"]
    assert entry["measured"]["checkpoint"].endswith("best.ckpt")


def test_statistics_are_what_the_checkpoint_says_or_cold_ones_whatever_its_path(trained, tmp_path, capsys):
    run = shutil.copytree(trained.run, tmp_path / "run")
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["recipe"], changes = re.subn(r"momentum: 0\.9\b", "momentum: 0.01", checkpoint["recipe"])
    assert changes == 1  # 500 steps would warm it up
    for says, told in (
        ("statistics recalibrated on 2 training batches", "statistics recalibrated on 2 training batches"),
        (None, "running statistics, which so few steps do not warm up"),
    ):
        torch.save(checkpoint | {"statistics": says}, path)
        result = evaluate(run, tmp_path / "out", *on_shards(trained.shards))
        assert result["exams"]["pairs"]["measured"]["batch_norm"] == told
        assert ("note: 6 steps are too few" in capsys.readouterr().out) is (says is None)


def test_evaluations_at_the_same_time_keep_each_other_s_exams(tmp_path):
    facts = {"weights_sha256": "ab" * 32}

    def write(name):
        entry = {"kind": "health", "scores": {}, "measured": {}}
        write_result(tmp_path, {name: entry}, facts, {"checkpoint": "x"})

    names = [f"exam{number}" for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, names))
    result = json.loads((tmp_path / "result.json").read_text())
    assert sorted(result["exams"]) == sorted(names)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


# Models of others


@pytest.mark.parametrize(
    ("make", "processor", "interpolation"),
    [
        (clip, "CLIPImageProcessorPil", "bicubic"),
        (siglip, "SiglipImageProcessorPil", "bicubic"),
        (vision_text, "ViTImageProcessorPil", "bilinear"),
    ],
)
def test_any_dual_encoder_is_scored_as_plain_transformers_embeds(tmp_path, make, processor, interpolation):
    plain, processing = saved(make, tmp_path / "hf")
    words = ["exams=[retrieval_table,zero_shot_folders]", "exams.folders.templates=plain",
             f"exams.table.data.path={table(tmp_path / 'table')}",
             f"exams.folders.data.path={class_folders(tmp_path / 'photos')}"]  # fmt: skip
    result = evaluate(tmp_path / "hf", tmp_path / "out", *words)
    how = result["exams"]["table"]["measured"]["preprocessing"]
    assert (how["processor"], how["interpolation"], how["antialias"]) == (processor, interpolation, True)
    assert set(how) > {"size", "crop", "mean", "std", "max_tokens", "padding"}
    assert result["exams"]["table"]["measured"]["checkpoint"] == str(tmp_path / "hf")
    assert f"this run: {tmp_path / 'hf'}" in (tmp_path / "out" / "report.md").read_text()
    assert {name: exam["kind"] for name, exam in result["exams"].items()} == {
        "table": "retrieval",
        "folders": "zero_shot",
    }
    assert result["exams"]["table"]["counts"] == {"images": 12, "captions": 24}
    assert result["exams"]["folders"]["counts"] == {"images": 12, "classes": 3, "templates": 1}

    with (tmp_path / "table" / "test.csv").open(newline="") as file:
        texts = [row["caption"] for row in csv.DictReader(file)]
    padding = "max_length" if make is siglip else True
    inputs = processing(
        text=texts,
        images=[decode(drawn_image(number)) for number in range(12)],
        return_tensors="pt",
        padding=padding,
        truncation=True,
        max_length=how["max_tokens"],
    )
    with torch.inference_mode():
        out = plain(**inputs)
    owner = torch.arange(12).repeat_interleave(2)
    ranks = retrieval_ranks(normalised(out.image_embeds), normalised(out.text_embeds), owner)
    found = {name: each["value"] for name, each in result["exams"]["table"]["scores"].items()}
    for way, ranked in zip(("i2t", "t2i"), ranks, strict=True):
        for k in (1, 5, 10):
            assert found[f"{way}_r{k}"] == pytest.approx((ranked < k).double().mean().item())


# Every exam of configs/exams


def data_of_every_exam(tmp_path):
    """Overrides that give each option of configs/exams its data, in the form that it asks for."""
    sample_shards(tmp_path)
    photos = class_folders(tmp_path / "imagenet", IMAGENET)
    more = class_folders(tmp_path / "imagenet-training", IMAGENET, first=20)
    annotations = {name: karpathy(tmp_path / name) for name in ("coco", "flickr30k", "flickr8k")}
    of_karpathy = {
        f"retrieval_{name}": [f"exams.{name}.data.annotations={path}", f"exams.{name}.data.images={path.parent}"]
        for name, path in annotations.items()
    }
    return of_karpathy | {
        "concepts_sample": [],
        "guard_sample": [],
        "health_sample": [],
        "linear_probe_imagenet": [f"exams.imagenet_probe.{way}.path={path}" for way, path in
                                  (("train", more), ("test", photos))],
        "linear_probe_sample": [],
        "neighbours_imagenet": [f"exams.imagenet_neighbours.{way}.path={path}" for way, path in
                                (("train", more), ("test", photos))],
        "neighbours_sample": [],
        "none": [],
        "retrieval_sample": [],
        "retrieval_shards": [f"exams.pairs.data.shards={tmp_path}/shards/sample/emoji/shards/*.tar"],
        "retrieval_table": [f"exams.table.data.path={table(tmp_path / 'table')}"],
        "zero_shot_dataset": [f"exams.dataset.data.path={hub_dataset(tmp_path / 'hub')}"],
        "zero_shot_folders": [f"exams.folders.data.path={class_folders(tmp_path / 'photos')}"],
        "zero_shot_imagenet": [f"exams.imagenet.data.path={photos}"],
        "zero_shot_sample": [],
        "zero_shot_shards": [f"exams.shards.data.shards={labelled_shards(tmp_path / 'wds')}"],
    }  # fmt: skip


def test_every_exam_runs_and_published_numbers_stand_in_rows_of_their_own(trained, tmp_path, monkeypatch, capsys):
    small = {"images": 12, "training_images": 12, "classes": 3, "templates": 80}
    for (kind, benchmark), counts in published.REQUIRED.items():  # as if the papers had so little data
        few = {name: small[name] for name in counts} if benchmark == "imagenet" else {"images": 6, "captions": 30}
        monkeypatch.setitem(published.REQUIRED, (kind, benchmark), few)
    options = data_of_every_exam(tmp_path)
    there = {path.stem for path in (config_folder() / "exams").glob("*.yaml")}
    assert set(options) == {name for name in there if not name.startswith("own_")}  # those are of fine-tuning runs
    words = [word for of in options.values() for word in of]
    result = evaluate(trained.run, tmp_path / "out", f"exams=[{','.join(options)}]", *words)
    kinds = {name: exam["kind"] for name, exam in result["exams"].items()}
    assert kinds == {
        **dict.fromkeys(("coco", "flickr30k", "flickr8k", "pairs", "table"), "retrieval"),
        **dict.fromkeys(("unseen_rendering", "unseen_rendering_no_flags", "unseen_concept"), "retrieval"),
        **dict.fromkeys(("guard", "new_concept"), "retrieval"),
        **dict.fromkeys(("dataset", "folders", "imagenet", "shards", "category_zero_shot"), "zero_shot"),
        **dict.fromkeys(("imagenet_neighbours", "category_neighbours"), "neighbours"),
        **dict.fromkeys(("imagenet_probe", "category_probe"), "linear_probe"),
        "health": "health",
    }
    assert result["exams"]["imagenet"]["facts"]["class_names"] == "imagenet"
    assert {each["name"] for each in result["exams"]["imagenet"]["facts"]["worst_classes"]} == set(IMAGENET.values())
    assert result["exams"]["coco"]["counts"] == {"images": 6, "captions": 30}
    assert result["exams"]["coco"]["dropped"] == {}
    assert result["exams"]["coco"]["facts"]["left_out"] == {"further_caption": 6}
    assert result["exams"]["unseen_rendering_no_flags"]["counts"] == {"images": 8, "captions": 8}
    assert result["exams"]["category_neighbours"]["counts"]["classes"] == 3
    benchmarks = {name: exam["facts"].get("benchmark") for name, exam in result["exams"].items()}
    assert {name: benchmark for name, benchmark in benchmarks.items() if benchmark} == {
        "coco": "coco",
        "flickr30k": "flickr30k",
        "imagenet": "imagenet",
        "imagenet_neighbours": "imagenet",
    }

    said = capsys.readouterr().out
    for title in ("retrieval", "zero-shot classification", "nearest neighbours", "linear probe", "health of the"):
        assert f"\n{title}" in f"\n{said}"
    own, others = rows_of_comparison(said)
    measured = [("imagenet_neighbours", "r1"), ("imagenet", "top1"), ("flickr30k", "i2t_r1"), ("flickr30k", "t2i_r1"),
                ("coco", "i2t_r1"), ("coco", "t2i_r1")]  # fmt: skip
    wanted = {f"{100 * result['exams'][name]['scores'][score]['value']:.1f}" for name, score in measured}
    assert set(numbers(own)) - {"96"} == wanted  # 96 pairs seen
    for row, model in zip(others, PUBLISHED, strict=True):
        assert row.startswith(model.model)
        assert "published: " in row
        assert {f"{score:.1f}" for score in model.scores.values()} <= set(numbers(row))


def rows_of_comparison(said):
    """The line of this run and those of others."""
    lines = said.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("this run: "))
    return lines[first], lines[first + 1 : first + 1 + len(PUBLISHED)]


def numbers(line):
    return [word for word in line.split() if word.replace(".", "").isdigit()]


def test_a_run_without_such_an_exam_has_no_number_beside_published_ones(trained, tmp_path, capsys):
    evaluate(trained.run, tmp_path / "out", *on_shards(trained.shards))
    assert "published" not in capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text().replace("|", " ").replace("*", "")
    own, others = rows_of_comparison("\n".join(line.strip() for line in report.splitlines()))
    assert numbers(own) == ["96"]
    assert "no such exam taken" in own
    assert all("published: " in row for row in others)


def test_a_small_set_that_claims_to_be_a_benchmark_is_not_compared(trained, tmp_path, capsys):
    words = coco(karpathy(tmp_path / "coco"))
    result = evaluate(trained.run, tmp_path / "out", *words)
    facts = result["exams"]["coco"]["facts"]
    says = (
        "Not the test that the published scores of coco are of: 6 images instead of 5,000; 30 captions instead of "
        "25,000."
    )
    assert (facts["benchmark"], facts["not_compared"]) == (None, says)
    said = capsys.readouterr().out
    assert f"coco: {says}" in said
    assert "published: " not in said
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"coco: {says}" in report
    assert "no such exam taken" in report


# Embeddings that are kept


def test_kept_embeddings_are_used_again_by_the_same_weights_alone(trained, tmp_path, monkeypatch):
    words = [*on_shards(trained.shards), f"embed={tmp_path / 'kept'}"]
    first = evaluate(trained.run, tmp_path / "first", *words)
    keys, rows = embeddings(tmp_path / "kept", "images")
    assert keys == [pair.key for pair in PAIRS]
    assert rows.shape == (24, 32)
    assert rows.norm(dim=1).tolist() == pytest.approx([1] * 24, abs=1e-5)
    assert embeddings(tmp_path / "kept", "texts")[0] == [pair.caption for pair in PAIRS]
    files = sorted((tmp_path / "kept").iterdir())

    decoded = []
    plain = AlignInputs.image
    monkeypatch.setattr(AlignInputs, "image", lambda *given: decoded.append(given[-1]) or plain(*given))
    again = evaluate(trained.run, tmp_path / "again", *words)
    assert not decoded
    assert sorted((tmp_path / "kept").iterdir()) == files
    for timeless in (first, again):
        for exam in timeless["exams"].values():
            del exam["seconds"], exam["taken"]
    assert again["exams"] == first["exams"]

    other = evaluate(changed_run(trained, tmp_path / "other"), tmp_path / "third", *words)
    assert other["weights_sha256"] != first["weights_sha256"]
    assert len([where for where in decoded if "pair-" in where]) == 24
    assert len(list((tmp_path / "kept").iterdir())) == 2 * len(files)


# Several processes


def test_two_processes_score_as_one(trained, tmp_path):
    sample_shards(tmp_path)
    exams = "retrieval_sample,zero_shot_sample,neighbours_sample,linear_probe_sample,health_sample"
    words = [f"exams=[{exams}]", "encoding.batch_size=5"]
    one = evaluate(trained.run, tmp_path / "one", *words)
    command = [
        sys.executable, "-m", "align_train", "evaluate", f"checkpoint={trained.run.parent}", "device=cpu", "devices=2",
        f"folder={tmp_path / 'two'}", f"hydra.run.dir={tmp_path / 'log'}", *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert [{exam["measured"]["ranks"] for exam in each["exams"].values()} for each in (one, two)] == [{1}, {2}]
    assert values(two) == pytest.approx(values(one), abs=1e-6, rel=1e-6)
    assert {name: exam["facts"]["data_sha256"] for name, exam in two["exams"].items()} == {
        name: exam["facts"]["data_sha256"] for name, exam in one["exams"].items()
    }
    assert [exam["counts"] for exam in two["exams"].values()] == [exam["counts"] for exam in one["exams"].values()]
    assert done.stdout.count("report: ") == done.stdout.count("health of the embeddings") == 1
    written = sorted(path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("result.json"))
    assert written == ["one", "two"]


# What is refused


def gone(folder):
    path = table(folder / "table")
    (folder / "table" / "3.jpg").unlink()
    return ["exams=[retrieval_table]", f"exams.table.data.path={path}"], (
        f"ValueError: exam table: {path}: 1 of 12 image files are missing: 3.jpg. Put them under"
    )


def image_without_caption(folder):
    path = table(folder / "table")
    with path.open("a") as file:
        file.write('4.jpg,"  "\n')
    return ["exams=[retrieval_table]", f"exams.table.data.path={path}"], "1 of 12 images have an empty caption: 4.jpg."


def caption_without_image(folder):
    path = table(folder / "table")
    with path.open("a") as file:
        file.write(",a cat\n")
    return ["exams=[retrieval_table]", f"exams.table.data.path={path}"], "1 of 25 rows have no image: row 25."


def coco(path):
    return ["exams=[retrieval_coco]", f"exams.coco.data.annotations={path}", f"exams.coco.data.images={path.parent}"]


def empty_split(folder):
    path = karpathy(folder / "coco", split="train")
    return coco(path), f"exam coco: {path} has no image in the split test: its splits are train (6)"


def duplicate_names(folder):
    path = karpathy(folder / "coco")
    document = json.loads(path.read_text())
    document["images"].append(document["images"][2])
    path.write_text(json.dumps(document))
    return coco(path), f"exam coco: {path}: 1 of 6 image names come more than once: 2.jpg. Name each image once"


def photos(folder, **settings):
    words = [f"exams.folders.{name}={value}" for name, value in settings.items()]
    return ["exams=[zero_shot_folders]", f"exams.folders.data.path={folder / 'photos'}", *words]


def no_placeholder(folder):
    class_folders(folder / "photos")
    (folder / "templates.json").write_text('["a photo of a {}.", "a photo"]')
    return photos(folder, templates=folder / "templates.json"), (
        f"exam folders: 1 of 2 templates in {folder}/templates.json have not exactly one placeholder {{}}: 'a photo'"
    )


def one_class(folder):
    class_folders(folder / "photos", ("cat",))
    return photos(folder), f"exam folders: {folder}/photos: all 4 images are of one class, 'cat'"


def class_without_images(folder):
    class_folders(folder / "photos")
    (folder / "photos" / "boat").mkdir()
    return photos(folder), "1 of 4 classes have no image: boat. Add images, take the classes out, or set allow_empty"


def names_of_other_classes(folder):
    class_folders(folder / "photos")
    return photos(folder, names="imagenet"), "imagenet has no name for 3 of 3 classes: 'cat', 'dog', 'tree'."


def broken_image(folder):
    class_folders(folder / "photos")
    (folder / "photos" / "dog" / "2.jpg").write_bytes(b"<html>")
    return photos(folder), (
        "ValueError: exam folders: 1 of the 12 images of photos cannot be used (corrupt_image 1), the first are "
        "dog/2.jpg: mend them, or leave them out and count them with skip_unusable=true"
    )


def no_exam(folder):
    return ["exams=none"], "no exam is chosen: give exams=[retrieval_sample]"


def no_shards(folder):
    words = ["exams=[retrieval_shards]", f"exams.pairs.data.shards={folder}/nowhere/*.tar"]
    return words, f"OSError: exam pairs: no shard matches '{folder}/nowhere/*.tar'"


def no_such_device(folder):
    class_folders(folder / "photos")
    return [*photos(folder), "device=tpu"], "device is 'tpu', but this machine has cpu"


def name_of_a_path(folder):
    exam = "{_target_: align_train.evaluation.Health, data: null}"
    return [
        "exams=none",
        f"+exams={{a/b: {exam}}}",
    ], "an exam is named 'a/b', but files and metrics are called after it"


def bad_result(folder):
    class_folders(folder / "photos")
    (folder / "out").mkdir()
    (folder / "out" / "result.json").write_text("{")
    return photos(folder, templates="nowhere.json"), (  # found out before the exam is begun
        f"ValueError: {folder}/out/result.json is not JSON (Expecting property name enclosed in double quotes: line 1 "
        "column 2 (char 1)): move it away, or write to another folder"
    )


def no_path(folder):
    return ["exams=[zero_shot_folders]"], "these settings have no default, give them: exams.folders.data.path=..."


REFUSED = [gone, image_without_caption, caption_without_image, empty_split, duplicate_names, no_placeholder, one_class,
           class_without_images, names_of_other_classes, broken_image, no_exam, no_shards, no_such_device,
           no_path, name_of_a_path, bad_result]  # fmt: skip


@pytest.mark.parametrize("make", REFUSED, ids=[make.__name__ for make in REFUSED])
def test_what_cannot_be_scored_is_refused_in_one_line_with_names_and_counts(trained, tmp_path, capsys, make):
    words, message = make(tmp_path)
    with pytest.raises(SystemExit) as stop:
        align_train("evaluate", f"checkpoint={trained.run}", f"folder={tmp_path / 'out'}", *words)
    assert stop.value.code == 1
    told, hint = capsys.readouterr().err.splitlines()
    assert told.startswith("align-train evaluate: ")
    assert message in told
    assert hint == "(set ALIGN_TRAIN_TRACEBACK=1 for the traceback)"
    out = tmp_path / "out"
    assert not out.exists() or all(path.read_text() == "{" for path in out.iterdir())


def test_an_image_that_cannot_be_used_is_skipped_and_counted_if_asked_for(trained, tmp_path, capsys):
    words, _ = broken_image(tmp_path)
    result = evaluate(trained.run, tmp_path / "out", *words, "exams.folders.skip_unusable=true")
    assert result["exams"]["folders"]["dropped"] == {"corrupt_image": 1}
    assert result["exams"]["folders"]["counts"]["images"] == 11
    assert "folders could not use 1 (corrupt_image 1): its scores are of the rest." in capsys.readouterr().out
