"""The report: what it says, what it never says, and that its files are whole and safe."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from align_train.evaluation import Outcome, Score, Value, take_exams
from align_train.evaluation.measuring import device_name, software
from align_train.evaluation.published import COLUMNS, PUBLISHED, REQUIRED
from align_train.evaluation.report import comparison, comparison_text, scores_text, write_report
from align_train.records import Tally

VOID = {"meta", "img", "br", "hr", "link", "input"}
BENCHMARKS = {
    "imagenet_neighbours": ("neighbours", "imagenet", "r1"),
    "imagenet_zero_shot": ("zero_shot", "imagenet", "top1"),
    "flickr30k_i2t": ("retrieval", "flickr30k", "i2t_r1"),
    "flickr30k_t2i": ("retrieval", "flickr30k", "t2i_r1"),
    "coco_i2t": ("retrieval", "coco", "i2t_r1"),
    "coco_t2i": ("retrieval", "coco", "t2i_r1"),
}


def value(share, low=None, high=None, chance=None):
    return {"value": share, "low": low, "high": high, "chance": chance}


def exam(kind, scores, benchmark=None, **more):
    facts = {"data": f"data/{kind}", "data_sha256": "ab" * 32, "benchmark": benchmark, **more.pop("facts", {})}
    entry = {"kind": kind, "scores": scores, "counts": {"images": 1850}, "dropped": {}, "facts": facts}
    entry["measured"] = {"checkpoint": "runs/1", "preprocessing": {"resize": 48, "antialias": True}, "device": "a GPU"}
    return {**entry, "seconds": 2.5, "taken": "2026-11-21T23:59:00+00:00", **more}


def retrieval(benchmark=None, i2t=0.2354, t2i=0.2541, **more):
    scores = {
        f"{way}_{name}": score
        for way, r1 in (("i2t", i2t), ("t2i", t2i))
        for name, score in (
            ("r1", value(r1, r1 - 0.02, r1 + 0.02, 0.0005)),
            ("r5", value(r1 + 0.1, chance=0.0027)),
            ("r10", value(0.6)),
            ("median_rank", value(8.5, 8.0, 9.0, 925.0)),
        )
    }
    facts = {"ties": "a wrong candidate comes first", "training": {"data": "d", "split_sha256": "ef" * 32}}
    facts |= more.pop("facts", {})
    counts = {"images": 1850, "captions": 9250, "odd_ones": 77}
    return exam("retrieval", scores, benchmark, counts=counts, facts=facts, **more)


def zero_shot(classes=(), benchmark=None):
    scores = {"top1": value(0.412, 0.39, 0.434, 0.11), "top5": value(0.871), "mean_per_class": value(0.378)}
    return exam("zero_shot", scores, benchmark, facts={"templates_sha256": "cd" * 32, "worst_classes": list(classes)})


def result(**more):
    return {
        "name": "sample",
        "seed": 1,
        "steps": 2400,
        "batch_size": 128,
        "pairs_seen": 307200,
        "parameters": 4213377,
        "weights_sha256": "0123456789abcdef" * 4,
        "exams": {"unseen": retrieval()},
        **more,
    }


def write_run(folder, content=None, metrics=True, sheets=()):
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result() if content is None else content))
    if metrics:
        columns = ["step", "loss", "temperature", "learning_rate", "validation/i2t_r1", "exam/unseen/t2i_r1"]
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for step in range(20, 2401, 20):
                row = {"step": step, "loss": 9 * math.exp(-step / 900), "temperature": 0.07 - step / 50_000}
                row["learning_rate"] = "nan" if step == 40 else 0.002
                row |= {"validation/i2t_r1": step / 9000, "exam/unseen/t2i_r1": 0.2} if step % 600 == 0 else {}
                writer.writerow(row)
    for name in sheets:
        Image.new("RGB", (6, 4), (200, 30, 30)).save(folder / f"contact_sheet_{name}.png")
    return folder


def reports(folder):
    return tuple(path.read_text() for path in write_report(folder))


class Page(HTMLParser):
    """Collects the elements of a page, its text, and tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.elements, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    content = result(exams={"unseen": retrieval(), "groups": zero_shot(), "coco": retrieval("coco")})
    _, text = reports(write_run(tmp_path, content, sheets=["unseen"]))
    page = Page(text)
    assert not page.wrong
    assert not page.open
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "iframe", "object"} & set(tags)
    assert tags.count("svg") == 6
    assert tags.count("img") == 1
    for tag, attributes in page.elements:
        for name, says in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "srcset"):
                outside = tag == "a" and says.startswith("https://")
                assert outside or says.startswith(("#", "data:image/png;base64,")), (tag, name)
            assert not name.startswith("on")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "http" not in style
    assert "@import" not in style
    assert set(re.findall(r"url\(([^)]*)\)", text)) == set(re.findall(r"url\((#[^)]*)\)", text))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_numbers_and_facts_of_the_result_are_in_both_reports(tmp_path):
    for text in reports(write_run(tmp_path, sheets=["unseen"])):
        for says in ("23.5", "21.5 to 25.5", "chance 0.05", "8.5", "9,250", "307,200", "4,213,377", "2026-11-21"):
            assert says in text, says
        assert "0123456789abcdef" * 4 in text
        assert "resize 48, antialias yes" in text
        assert "a wrong candidate comes first" in text
        assert "images 1,850, captions 9,250, odd ones 77" in text
        assert "training split, SHA-256" in text
        assert "ef" * 32 in text
        assert "No image was lost" in text
    assert "![unseen](contact_sheet_unseen.png)" in (tmp_path / "report.md").read_text()


def test_the_same_files_give_the_same_reports(tmp_path):
    first = reports(write_run(tmp_path / "a", sheets=["unseen"]))
    assert first == reports(write_run(tmp_path / "b", sheets=["unseen"]))
    assert first == reports(tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "contact_sheet_unseen.png",
        "metrics.csv",
        "report.html",
        "report.md",
        "result.json",
    ]


def test_what_was_dropped_is_loud(tmp_path):
    content = result(exams={"unseen": retrieval(dropped={"undecodable image": 3, "no caption": 1})})
    markdown, html = reports(write_run(tmp_path, content))
    says = "unseen could not use 4 (undecodable image 3, no caption 1): its scores are of the rest."
    assert f"**Attention: {says}**" in markdown
    assert f'<p class="loud">{says}</p>' in html
    assert "No image was lost" not in markdown + html
    assert scores_text(content["exams"]).splitlines()[-1] == says


def test_what_a_protocol_leaves_out_is_told_quietly(tmp_path):
    content = result(exams={"unseen": retrieval(facts={"left_out": {"further_caption": 10, "excluded": 3}})})
    markdown, html = reports(write_run(tmp_path, content))
    assert "- left out: further caption 10, excluded 3" in markdown
    assert "No image was lost" in markdown
    assert "Attention" not in markdown
    assert 'class="loud"' not in html


def test_each_exam_says_how_it_was_measured_and_what_is_equal_is_said_once(tmp_path):
    exams = {"coco": retrieval(), "near": exam("neighbours", {"r1": value(0.5)})}
    exams["near"]["measured"] |= {"device": "a CPU", "preprocessing": {"resize": 64, "antialias": False}}
    markdown, _ = reports(write_run(tmp_path, result(exams=exams)))
    how = markdown[markdown.index("## How it was measured") : markdown.index("## Training")]
    shared, coco, near = how.split("### ")[1:]
    assert "- checkpoint: runs/1" in shared
    assert "device" not in shared
    assert "- device: a GPU" in coco
    assert "- preprocessing: resize 48, antialias yes" in coco
    assert "- device: a CPU" in near
    assert "- preprocessing: resize 64, antialias no" in near
    assert "device" not in markdown.replace(how, "")


def test_contact_sheets_of_exams_that_are_not_in_the_result_are_not_shown(tmp_path):
    markdown, html = reports(write_run(tmp_path, sheets=["unseen", "of_other_weights"]))
    assert "of_other_weights" not in markdown + html
    assert html.count("<img") == 1


def test_a_model_without_a_run_is_called_by_where_its_weights_were(tmp_path):
    content = result(name=None)
    markdown, _ = reports(write_run(tmp_path, content))
    assert markdown.startswith("# runs/1: report")
    assert (comparison(content)[0].model, comparison(content)[0].data) == ("this run: runs/1", "-")


def test_the_comparison_says_what_a_run_was_trained_on():
    assert comparison(result(effective_epochs={"coyo": 1.5, "cc3m": 2}))[0].data == "coyo, cc3m"
    assert comparison(result(effective_epochs={"stream": 1}))[0].data == "sample"


HOSTILE = '<script>alert(1)</script> & "a|b" [x](javascript:y)\nsecond `code` *line*'


def test_what_comes_from_data_cannot_become_markup(tmp_path):
    classes = [{"name": HOSTILE, "images": 50, "correct": 0.12, "taken_for": [[HOSTILE, 0.6]]}]
    content = result(name=HOSTILE, checkpoint=HOSTILE, exams={HOSTILE: retrieval(), "groups": zero_shot(classes)})
    folder = write_run(tmp_path, content)
    (folder / "resolved.yaml").write_text(f"name: {HOSTILE}\n```\n# heading")
    markdown, html = reports(folder)
    page = Page(html)
    assert not page.wrong
    assert not page.open
    assert not {"script", "b|b"} & {tag for tag, _ in page.elements}
    assert "".join(page.text).count("<script>alert(1)</script>") >= 4
    outside_code = re.sub(r"^````\n.*?^````$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in outside_code
    assert "](javascript" not in outside_code.replace(r"\](javascript", "")
    assert "# heading" not in outside_code
    for block in re.findall(r"(?:^\|.*\n)+", outside_code, flags=re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block


def cells(rows, column):
    return [row.scores[column] for row in rows]


@pytest.mark.parametrize("column", COLUMNS)
def test_a_published_number_never_stands_in_our_row_nor_ours_among_theirs(column):
    kind, benchmark, score = BENCHMARKS[column]
    nothing_taken = comparison(result())
    assert [row.published for row in nothing_taken] == [False] + [True] * len(PUBLISHED)
    assert set(nothing_taken[0].scores.values()) == {"-"}
    sentinel = 0.1234567  # no one has published 12.3
    taken = result(exams={"one": exam(kind, {score: value(sentinel, 0.1, 0.15)}, benchmark)})
    rows = comparison(taken)
    assert rows[0].scores == {**dict.fromkeys(COLUMNS, "-"), column: "12.3"}
    assert rows[0].intervals == {column: "10.0 to 15.0"}
    assert rows[1:] == nothing_taken[1:]
    published = [f"{model.scores[column]:.1f}" if column in model.scores else "-" for model in PUBLISHED]
    assert cells(rows[1:], column) == published
    assert "12.3" not in published


def test_a_score_on_other_data_or_of_another_kind_is_not_compared():
    exams = {
        "mine": retrieval(),
        "probe": exam("linear_probe", {"top1": value(0.7)}, "imagenet"),
        "health": exam("health", {"r1": value(0.7)}, "imagenet"),
        "empty": exam("neighbours", {"r1": value(None)}, "imagenet"),
    }
    text = comparison_text(result(exams=exams))
    assert set(comparison(result(exams=exams))[0].scores.values()) == {"-"}
    assert "took none of these exams" in text
    assert "70.0" not in text


class Taking:
    """An exam whose score is known; draws what it is told to."""

    def __init__(self, kind, counts, draw=None, lost=(), **facts):
        self.score = Score(kind, {"r1": Value(0.5)}, counts, Tally(lost), facts)
        self.draw = draw

    def take(self, encoder):
        return Outcome(self.score, self.draw)


ENCODER = SimpleNamespace(
    inputs=SimpleNamespace(facts=lambda: {"resize": 48}),
    encoding=SimpleNamespace(precision="bf16"),
    device=torch.device("cpu"),
)


def facts_taken(kind, counts, **more):
    return take_exams({"it": Taking(kind, counts, **more)}, ENCODER).entries["it"]["facts"]


@pytest.mark.parametrize(("kind", "benchmark"), REQUIRED)
def test_published_numbers_stand_beside_scores_of_their_very_test_alone(kind, benchmark):
    wanted = REQUIRED[kind, benchmark]
    found = facts_taken(kind, {**wanted, "others": 3}, benchmark=benchmark, excluded={})
    assert (found["benchmark"], found["not_compared"]) == (benchmark, None)
    for name, count in wanted.items():
        for counts in ({**wanted, name: count - 1}, {other: n for other, n in wanted.items() if other != name}):
            found = facts_taken(kind, counts, benchmark=benchmark)
            assert found["benchmark"] is None
            says = f"{counts.get(name, 0):,} {name.replace('_', ' ')} instead of {count:,}."
            assert found["not_compared"] == f"Not the test that the published scores of {benchmark} are of: {says}"


def test_lost_and_excluded_images_and_unknown_benchmarks_are_not_compared_either():
    wanted = REQUIRED["retrieval", "coco"]
    found = facts_taken("retrieval", wanted, benchmark="coco", lost={"corrupt_image": 2})
    assert found["benchmark"] is None
    assert "2 images could not be used." in found["not_compared"]
    found = facts_taken("retrieval", wanted, benchmark="coco", excluded={"category": ["Flags"]})
    assert found["benchmark"] is None
    assert "images were excluded by category." in found["not_compared"]
    found = facts_taken("retrieval", wanted, benchmark="koko")
    assert found["benchmark"] is None
    assert "known: flickr30k, coco" in found["not_compared"]
    assert "not_compared" not in facts_taken("retrieval", wanted, benchmark=None)


def test_the_report_says_why_published_numbers_do_not_stand_beside_a_score(tmp_path):
    says = "Not the test that the published scores of coco are of: 6 images instead of 5,000."
    content = result(exams={"small": retrieval(facts={"not_compared": says}), "coco": retrieval("coco", 0.141)})
    for text in (*reports(write_run(tmp_path, content)), comparison_text(content)):
        assert f"small: {says}" in text


def test_an_entry_says_how_it_was_measured():
    entry = take_exams({"it": Taking("health", {"pairs": 3})}, ENCODER).entries["it"]
    assert entry["measured"] == {
        "preprocessing": {"resize": 48},
        "precision": "bf16",
        "device": device_name(torch.device("cpu")),
        "ranks": 1,
        "software": software(),
    }


def test_a_picture_that_cannot_be_drawn_is_a_warning_and_no_older_one_stays(tmp_path, caplog):
    def fails(path):
        raise OSError(28, "No space left on device")

    exams = {"full": Taking("health", {}, fails), "fine": Taking("health", {}, lambda path: path.write_bytes(b"x"))}
    (tmp_path / "contact_sheet_full.png").write_bytes(b"of other weights")
    taken = take_exams(exams, ENCODER)
    assert list(taken.entries) == ["full", "fine"]
    assert [path.name for path in tmp_path.iterdir()] == [
        "contact_sheet_full.png"
    ]  # nothing is drawn before it is asked
    taken.draw(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["contact_sheet_fine.png"]
    assert "contact_sheet_full.png could not be drawn: OSError: [Errno 28] No space left on device" in caplog.text


def test_two_exams_on_one_benchmark_are_two_rows_of_this_run():
    rows = comparison(result(exams={"a": retrieval("coco", 0.111, 0.112), "b": retrieval("coco", 0.113, 0.114)}))
    ours = [row for row in rows if not row.published]
    assert cells(ours, "coco_i2t") == ["11.1", "11.3"]
    assert [row.source for row in ours] == ["measured: a", "measured: b"]


def test_every_published_row_prints_its_source_and_ours_none(tmp_path):
    content = result(exams={"coco": retrieval("coco", 0.141)})
    markdown, _ = reports(write_run(tmp_path, content))
    text = comparison_text(content)
    for model in PUBLISHED:
        for says in (markdown, text):
            (line,) = [line for line in says.splitlines() if re.search(rf"^\|? ?{re.escape(model.model)} ", line)]
            assert f"published: {model.source.name}" in line
        assert model.source.link in markdown
        assert model.source.link in text
    (ours,) = [line for line in markdown.splitlines() if "this run: sample" in line]
    assert "published" not in ours
    assert "14.1" in ours
    assert "307,200" in ours
    assert "took none" not in markdown
    assert "95 % interval of COCO R@1 I2T: 12.1 to 16.1" in text


def test_the_scores_for_a_terminal_have_aligned_columns_and_the_known_form():
    exams = {
        "unseen_rendering_no_flags": retrieval(),
        "groups": zero_shot(),
        "near": exam("neighbours", {f"r{k}": value(0.62, 0.6, 0.64, 0.1) for k in (1, 5, 10, 20)}),
        "probe": exam("linear_probe", {"top1": value(0.66), "top5": value(None)}),
        "health": exam("health", {"alignment": value(0.8312), "effective_rank_image": value(61.44)}),
        "odd": exam("riddles", {"solved": value(3)}),
    }
    text = scores_text(exams)
    assert max(map(len, text.splitlines())) <= 112
    parts = text.split("\n\n")
    assert [part.splitlines()[0] for part in parts[:3]] == [
        "retrieval",
        "zero-shot classification",
        "nearest neighbours",
    ]
    groups, heads, row, note = parts[0].splitlines()[1:]
    assert re.search(r"image to text .* text to image", groups)
    assert heads.split() == ["exam", "images", "captions", *["R@1", "R@5", "median"] * 2]
    assert "23.5 (0.05)" in row
    assert len(row) == len(heads)
    assert note == "percent; in brackets what a random order gives; ties count against the model"
    assert "41.2 (39.0-43.4)" in parts[1]
    assert "0.831" in parts[4]
    assert "61.44" in parts[4]
    assert "numbers as they are" in parts[5]
    assert scores_text({}) == "no exam was taken"


def test_a_run_with_little_in_it_is_reported_and_says_what_it_lacks(tmp_path):
    content = {"name": None, "exams": {"odd": {"kind": "riddles", "scores": {"solved": None, "told": {"value": 3}}}}}
    markdown, _ = reports(write_run(tmp_path, content, metrics=False))
    assert "a kind of exam that this report does not know" in markdown.lower()
    assert "no metrics.csv" in markdown
    assert "- pairs seen in training: not recorded" in markdown
    markdown, html = reports(write_run(tmp_path, {"exams": {}}, metrics=False))
    assert "No exam was taken." in markdown
    assert "took none of these exams" in html


def test_curves_without_a_batch_size_are_over_steps_and_missing_ones_are_named(tmp_path):
    folder = write_run(tmp_path, result(batch_size=None), metrics=False)
    (folder / "metrics.csv").write_text("step,loss\n20,9.5\n40,\n60,nan\n80,inf\n100,8.5\n120")
    markdown, html = reports(folder)
    assert "the curves are over steps" in markdown
    assert 'aria-label="Loss over step"' in html
    assert "says nothing of: temperature, learning rate, validation recall, exam scores" in markdown


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not there"),
        ("{", "is not JSON"),
        ("[]", "no object `exams`"),
        ('{"name": "x"}', "no object `exams`"),
        ('{"exams": {"a": {"recall": {}, "pairs": 3}}}', "the exam a has no `kind`"),
        ('{"exams": {"a": {"kind": "retrieval"}}}', "the exam a has no `scores`"),
        ('{"exams": {"a": {"kind": "retrieval", "scores": {"i2t_r1": 0.3}}}}', "score i2t_r1 without a `value`"),
        ('{"exams": {"a": {"kind": "retrieval", "scores": {}, "facts": []}}}', None),
        ('{"exams": {"a": {"kind": "retrieval", "scores": {}, "counts": 3}}}', "`counts` that is no object"),
    ],
)
def test_a_file_that_is_no_result_is_named_with_the_remedy(tmp_path, content, says):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    if says is None:  # empty is as good as absent
        write_report(tmp_path)
        return
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        write_report(tmp_path)
    assert str(tmp_path / "result.json") in str(error.value)
    assert "align-train evaluate" in str(error.value)
    assert not list(tmp_path.glob("report.*"))


def test_metrics_of_something_else_are_refused(tmp_path):
    folder = write_run(tmp_path, metrics=False)
    (folder / "metrics.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(ValueError, match="no column `step`"):
        write_report(folder)


def test_worst_classes_say_what_they_were_taken_for(tmp_path):
    classes = [{"name": "sunglass", "images": 50, "correct": 0.12, "taken_for": [["sunglasses", 0.6], ["mask", 0.04]]}]
    markdown, html = reports(write_run(tmp_path, result(exams={"groups": zero_shot(classes)})))
    assert "| sunglass | 50 | 12.0 % | sunglasses 60.0 %, mask 4.0 % |" in markdown
    assert "--share: 12.0%" in html
