"""What a model card says of fine-tuning, in text for people and in metadata for the Hub."""

import pytest
from huggingface_hub import ModelCard

from align_train.hub import model_card

STORY = {
    "sources": ["kakaobrain/align-base"],
    "end_step": 1200,
    "pairs": {"images": 1412, "captions": 1803, "validation_images": 46, "skipped": {"missing": 3, "empty": 1}},
    "new": ["exam/own/i2t_r1", "exam/own/t2i_r1"],
    "guard": ["exam/guard/t2i_r1"],
    "points": [
        {"alpha": 0.0, "new": 0.18, "guard": 0.24},
        {"alpha": 0.6, "new": 0.312, "guard": 0.236},
        {"alpha": 1.0, "new": 0.333, "guard": 0.1},
    ],
    "recommended": 0.6,
    "because": "of 3 alphas, 2 lose at most 1.0 point",
}


def card_of(**changes):
    return ModelCard(model_card("birds", "1.2.3", "birds", {"steps": 10}, "no exam", {**STORY, **changes}))


def table_of(card):
    return [line for line in card.text.splitlines() if line.startswith("|")]


def test_it_tells_start_pairs_and_scores_before_between_and_after():
    card = card_of()
    assert "Fine-tuned from `kakaobrain/align-base` with 1,412 images and 1,803 captions; 46 of the images" in card.text
    assert "Left out: missing 3, empty 1." in card.text
    assert "Recommended is 0.6: of 3 alphas, 2 lose at most 1.0 point." in card.text
    assert table_of(card) == [
        "| weights | alpha | new data | guard set |",
        "| --- | ---: | ---: | ---: |",
        "| before | 0 | 18.0 | 24.0 |",
        "| recommended, this model | 0.6 | 31.2 | 23.6 |",
        "| end, step 1,200 | 1 | 33.3 | 10.0 |",
    ]
    assert "new data: mean of exam/own/i2t_r1, exam/own/t2i_r1; guard set: mean of exam/guard/t2i_r1" in card.text
    titles = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert titles == ["## Fine-tuning", "## Data", "## Recipe", "## Scores", "## Limits"]


def test_the_end_may_be_recommended_and_nothing_be_guarded():
    points = [{**point, "guard": None} for point in STORY["points"]]
    card = card_of(recommended=1.0, guard=[], points=points, pairs={**STORY["pairs"], "skipped": {}})
    assert table_of(card)[2:] == ["| before | 0 | 18.0 |", "| recommended, end, step 1,200, this model | 1 | 33.3 |"]
    assert "guard" not in card.text
    assert "Left out" not in card.text


def test_an_alpha_that_was_asked_for_is_told_beside_the_recommended_one():
    points = sorted([*STORY["points"], {"alpha": 0.55, "new": 0.3, "guard": 0.238}], key=lambda point: point["alpha"])
    card = card_of(exported=0.55, points=points)
    assert "The weights lie at alpha 0.55 of the way" in card.text
    assert "Recommended is 0.6" in card.text
    assert "| this model | 0.55 | 30.0 | 23.8 |" in table_of(card)


@pytest.mark.parametrize(
    ("sources", "base", "told"),
    [
        (["kakaobrain/align-base"], ["kakaobrain/align-base"], "`kakaobrain/align-base` with"),
        (["google/eff-b7", "bert-base"], ["google/eff-b7", "bert-base"], "`google/eff-b7` and `bert-base` with"),
        (["/home/me/secret/align"], None, "a local model, `align` with"),
        (["google/eff-b7", "/home/me/bert"], ["google/eff-b7"], "`google/eff-b7` and a local model, `bert` with"),
    ],
)
def test_what_it_started_from_is_named_without_paths(sources, base, told):
    card = card_of(sources=sources)
    assert card.data.to_dict().get("base_model") == base
    assert f"Fine-tuned from {told}" in card.text
    assert "/home" not in card.content
    assert card.data.to_dict()["pipeline_tag"] == "zero-shot-image-classification"


def test_a_model_that_was_not_fine_tuned_says_nothing_of_it():
    card = ModelCard(model_card("birds", "1.2.3", "birds", {"steps": 10}, "no exam"))
    assert "base_model" not in card.data.to_dict()
    assert "Fine-tun" not in card.text
