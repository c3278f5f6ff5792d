"""The sweep between the start of a fine-tuning and its end: its points, the one that is recommended, their report."""

import json
import math
import re
from itertools import combinations

import pytest
import torch
from test_report import Page, reports, result, retrieval, write_run

from align_train.evaluation import Forgetting, Point, as_result, metrics_of, recommend, sweep
from align_train.evaluation.report import finetuning_text, write_report

OWN, GUARD = "exam/own/i2t_r1", "exam/guard/top1"
FACTS = {
    "start": "kakaobrain/align-base",
    "start_weights_sha256": "ab" * 32,
    "pairs": {"images": 412, "captions": 803, "validation_images": 46, "skipped": {"missing": 3}},
}


def settings(**more):
    return Forgetting(**{"new": [OWN], "guard": [GUARD], "alphas": [0, 0.25, 0.5, 0.75, 1], **more})


def points(new, guard=None, **more):
    """Points of evenly spaced alphas, and the settings that gave them."""
    chosen = settings(
        guard=[] if guard is None else [GUARD], alphas=[n / (len(new) - 1) for n in range(len(new))], **more
    )
    scores = [{OWN: x, **({} if guard is None else {GUARD: guard[n]})} for n, x in enumerate(new)]
    return chosen, [chosen.point(alpha, each) for alpha, each in zip(chosen.alphas, scores, strict=True)]


def linear(weight):
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, weight)
    torch.nn.init.zeros_(model.bias)
    return model


def swept(model, known=None, **more):
    """The points, and the weight that each was taken with."""
    seen = []

    def take():
        seen.append(model.weight.item())
        return {OWN: seen[-1] / 8, GUARD: 0.5, "exam/own/i2t_median_rank": 9.0}

    start = {name: tensor.clone() for name, tensor in linear(2).state_dict().items()}
    return sweep(settings(**more), model, start, model.state_dict(), take, known), seen


def test_each_alpha_is_examined_with_its_own_weights_and_the_end_is_left():
    model = linear(6)
    found, seen = swept(model)
    assert seen == [2, 3, 4, 5, 6]
    assert [point.alpha for point in found] == [0, 0.25, 0.5, 0.75, 1]
    assert [point.new for point in found] == [0.25, 0.375, 0.5, 0.625, 0.75]
    assert found[1].scores == {OWN: 0.375, GUARD: 0.5}
    assert model.weight.item() == 6


def test_exams_that_are_known_are_not_taken_again():
    known = {0: {OWN: 0.125, GUARD: 0.5}, 1.0: {OWN: 0.875, GUARD: 0.5}}
    found, seen = swept(linear(6), known)
    assert seen == [3, 4, 5]
    assert [point.new for point in found] == [0.125, 0.375, 0.5, 0.625, 0.875]


def test_after_an_error_the_model_has_the_weights_of_the_end():
    model = linear(6)
    with pytest.raises(
        ValueError, match=r"guard=exam/guard/top5, which no exam gives; there are: .*guard/top1, .*_r1$"
    ):
        swept(model, guard=["exam/guard/top5"])
    assert model.weight.item() == 6


def test_new_and_guard_are_means_of_the_metrics_that_are_named():
    names = {"new": ["exam/own/i2t_r1", "exam/own/t2i_r1"], "guard": ["exam/guard/i2t_r1", "exam/guard/t2i_r1"]}
    metrics = dict(zip([*names["new"], *names["guard"]], (0.1, 0.3, 0.4, 0.8), strict=True))
    point = settings(**names).point(0.5, metrics | {"exam/own/i2t_r5": 0.9})
    assert point == Point(0.5, pytest.approx(0.2), pytest.approx(0.6), metrics)


def test_metrics_are_named_as_exams_give_them():
    metrics = metrics_of({"own": retrieval()})
    assert settings(new=["exam/own/t2i_r1"], guard=[]).point(0, metrics).new == 0.2541


def test_the_best_of_those_that_forget_little_is_recommended():
    chosen, found = points([0.1, 0.2, 0.3, 0.4, 0.5], [0.7, 0.72, 0.691, 0.68, 0.5])
    assert recommend(chosen, found).alpha == 0.5
    assert recommend(chosen, found).because == (
        "of the 5 alphas, 3 lose at most 1 point on the guard set; of these 0.5 is best on the new data"
    )
    chosen, found = points([0.1, 0.2, 0.3, 0.4, 0.5], [0.7, 0.72, 0.691, 0.68, 0.5], most_loss=0.025)
    assert recommend(chosen, found).alpha == 0.75
    assert "4 lose at most 2.5 points" in recommend(chosen, found).because


def test_a_loss_of_just_the_bound_is_allowed_and_a_path_may_come_back_into_it():
    chosen, found = points([0.1, 0.2, 0.3], [0.3, 0.29, 0.2])  # 0.3 - 0.29 is above 0.01 by a rounding
    assert recommend(chosen, found).alpha == 0.5
    chosen, found = points([0.1, 0.2, 0.3], [0.7, 0.6, 0.695])
    assert recommend(chosen, found).alpha == 1


def test_of_equal_alphas_the_one_nearest_to_the_start_is_recommended():
    chosen, found = points([0.1, 0.1 + 0.2, 0.3, 0.3], [0.7] * 4)
    assert recommend(chosen, found).alpha == pytest.approx(1 / 3)
    chosen, found = points([0.3, 0.2, 0.3], [0.7] * 3)
    assert recommend(chosen, found).alpha == 0
    assert recommend(chosen, found).because.endswith("none is better on the new data than 0, the start itself")


def test_without_a_guard_the_best_is_recommended_and_it_is_said_that_nothing_was_guarded():
    chosen, found = points([0.1, 0.4, 0.3])
    assert found[0].guard is None
    assert recommend(chosen, found).alpha == 0.5
    assert recommend(chosen, found).because == (
        "of the 3 alphas, 0.5 is best on the new data; no guard set was named, so nothing says what was forgotten"
    )
    assert recommend(*points([0.4, 0.4, 0.3])).because.startswith("none of the 3 alphas is better")


def test_when_all_forget_too_much_the_start_is_recommended_with_what_to_do():
    chosen, found = points([0.1, 0.2, 0.3], [0.7, 0.6, 0.5])
    assert recommend(chosen, found).alpha == 0
    assert recommend(chosen, found).because.startswith("every alpha above 0 loses more than 1 point on the guard set")
    assert "forgetting.most_loss" in recommend(chosen, found).because


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 8.5])
def test_a_score_that_is_no_share_is_refused_with_its_alpha(value):
    with pytest.raises(ValueError, match=rf"^{GUARD} is {value} at alpha 0.25, no share of 1"):
        settings().point(0.25, {OWN: 0.5, GUARD: value})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"new": []}, "new=[] names no metric"),
        ({"new": OWN}, f"new={OWN} is no list: write forgetting.new=[{OWN}]"),
        ({"new": ["own/i2t_r1"]}, "new names own/i2t_r1: a metric is exam/NAME/VALUE"),
        ({"new": ["validation/i2t_r1"]}, "new names validation/i2t_r1"),
        ({"guard": ["exam/guard/i2t_median_rank"]}, "guard names exam/guard/i2t_median_rank, which is no share"),
        ({"guard": ["exam/health/alignment"]}, "no share of 1 of which more is better"),
        ({"guard": ["exam/health/uniformity_image"]}, "no share of 1 of which more is better"),
        ({"guard": [OWN]}, f"name {OWN} twice"),
        ({"most_loss": 1}, "most_loss=1 is no share of 1: 0.01 is one point"),
        ({"most_loss": -0.1}, "most_loss=-0.1"),
        ({"alphas": []}, "alphas=[]: give numbers that go up from 0 to 1"),
        ({"alphas": 0.5}, "alphas=[0.5]"),
        ({"alphas": [0, 0.5]}, "alphas=[0, 0.5]"),
        ({"alphas": [0.5, 1]}, "alphas=[0.5, 1]"),
        ({"alphas": [0, 1, 0.5]}, "alphas=[0, 1, 0.5]"),
        ({"alphas": [0, 0.5, 0.5, 1]}, "alphas=[0, 0.5, 0.5, 1]"),
        ({"alphas": [-1, 0, 1]}, "alphas=[-1, 0, 1]"),
        ({"alphas": [0, 1, 2]}, "alphas=[0, 1, 2]"),
    ],
)
def test_wrong_settings_are_refused_by_their_key(wrong, says):
    with pytest.raises(ValueError, match=re.escape(f"{says}")) as error:
        settings(**wrong)
    assert "forgetting." in str(error.value)


def test_metrics_of_exams_that_are_not_taken_are_refused_before_any_is():
    settings().check_names(["own", "guard", "third"])
    with pytest.raises(ValueError, match=f"forgetting.guard={GUARD}, but no exam has that name; there are: more, own"):
        settings().check_names(["own", "more"])


def finetuned(new, guard=None, **more):
    """A result with a fine-tuning in it, and the recommendation."""
    chosen, found = points(new, guard, **more)
    recommended = recommend(chosen, found)
    content = result(finetuning=as_result(chosen, found, recommended, FACTS), exams={"own": retrieval()})
    return json.loads(json.dumps(content)), recommended


def plots_of(html):
    return re.findall(r'<svg[^>]*aria-label="Path of .*?</svg>', html, flags=re.DOTALL)


def test_the_report_compares_start_recommended_and_end(tmp_path):
    content, recommended = finetuned([0.18, 0.3, 0.4, 0.45, 0.5], [0.7, 0.71, 0.695, 0.6, 0.5])
    markdown, html = reports(write_run(tmp_path, content, metrics=False))
    section = markdown[markdown.index("## Fine-tuning") : markdown.index("## Scores")]
    assert f"Recommended is alpha 0.5: {recommended.because}." in section
    assert "recommended, alpha 0.5 score" in section
    assert "| new | own, image to text R@1 | 18.0 | 40.0 | +22.0 | 50.0 | +32.0 |" in section
    assert "| guard | guard, top-1 | 70.0 | 69.5 | -0.5 | 50.0 | -20.0 |" in section
    assert "| **0.5** | 40.0 | 69.5 |" in section
    assert "images 412, captions 803, validation images 46, skipped missing 3" in section
    assert "- start: kakaobrain/align-base" in section
    assert "- data of own: data/retrieval" in section
    assert "- data of guard: not recorded" in section
    assert "chosen by the scores on new data and guard" in section
    assert "finetuning" not in markdown[markdown.index("## Scores") :]
    (plot,) = plots_of(html)
    for label in ("start, alpha 0", "recommended, alpha 0.5", "end, alpha 1", "guard, mean, percent"):
        assert plot.count(f">{label}<") == 1, label
    assert "left of the dotted line more is lost than allowed" in html
    page = Page(html)
    assert not page.wrong
    assert not page.open


def test_the_same_table_is_there_for_a_terminal():
    content, recommended = finetuned([0.18, 0.3, 0.4, 0.45, 0.5], [0.7, 0.71, 0.695, 0.6, 0.5])
    lines = finetuning_text(content).splitlines()
    assert max(map(len, lines[:4])) <= 112
    assert " ".join(lines[2].split()) == "new own, image to text R@1 18.0 40.0 +22.0 50.0 +32.0"
    assert " ".join(lines[3].split()) == "guard guard, top-1 70.0 69.5 -0.5 50.0 -20.0"
    assert f"Recommended is alpha 0.5: {recommended.because}." in lines


def test_without_a_guard_the_path_is_over_alpha_and_one_place_has_one_label(tmp_path):
    content, _ = finetuned([0.18, 0.3, 0.5])
    markdown, html = reports(write_run(tmp_path, content, metrics=False))
    assert "| guard |" not in markdown
    assert "nothing says what was forgotten" in markdown
    (plot,) = plots_of(html)
    assert ">end and recommended, alpha 1<" in plot
    assert "over alpha" in plot
    assert "dotted line more is lost" not in html


@pytest.mark.parametrize("spread", [0.0, 0.0004, 0.02])
def test_labels_do_not_overlap_however_near_the_points_are(tmp_path, spread):
    content, _ = finetuned([0.2, 0.2 + spread, 0.2 + spread / 2], [0.6, 0.6 - spread / 3, 0.6 - spread / 2])
    (plot,) = plots_of(reports(write_run(tmp_path, content, metrics=False))[1])
    boxes = []
    for style, x, y, text in re.findall(
        r'<text style="([^"]*)" x="([-\d.]+)" y="([-\d.]+)"[^>]*>([^<]*alpha \d[^<]*)</text>', plot
    ):
        half = 2.8 * len(text)  # of letters of 10 points, half their width
        assert "middle" in style
        boxes.append((float(x) - half, float(x) + half, float(y) - 10, float(y)))
    assert len(boxes) == (2 if spread == 0 else 3)
    for one, other in combinations(boxes, 2):
        assert one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] or other[3] <= one[2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ([1], "is no object"),
        ({"points": None}, "has `points` that are no list"),
        ({"points": [{"alpha": 0}]}, "has a point without `alpha` or `scores`"),
        ({"points": [{"alpha": 0, "new": None, "scores": {}}]}, "has no means for alpha 0"),
        ({"recommended": 0.33}, "has no point for alpha 0.33"),
    ],
)
def test_a_fine_tuning_that_cannot_be_reported_is_named(tmp_path, change, says):
    content, _ = finetuned([0.1, 0.2, 0.3])
    content["finetuning"] = content["finetuning"] | change if isinstance(change, dict) else change
    with pytest.raises(ValueError, match=f"result.json: `finetuning` {says}"):
        write_report(write_run(tmp_path, content, metrics=False))
