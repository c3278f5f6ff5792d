"""The model card of an export."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TEMPLATE = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [align, image-text-retrieval]
{base}---

# {name}

An ALIGN dual encoder (EfficientNet + BERT, [arXiv 2102.05918](https://arxiv.org/abs/2102.05918)), trained with
align_train {version} and loaded by plain `transformers`:

```python
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="path/to/this/folder")
classify("image.png", candidate_labels=["a cat", "a dog"])
```

{sections}## Limits

The model knows what its data shows, and carries the biases of the web it comes from. Do not use it to identify or judge
people. Text other than the training data's language is not understood.
"""

ONNX = """`onnx/image.onnx` and `onnx/text.onnx` are the two towers for onnxruntime. Their rows have length 1, so a dot
product is a cosine; divide it by the temperature of the recipe, as the model does, before a softmax.

```python
import onnxruntime
from PIL import Image
from transformers import AlignProcessor

folder = "path/to/this/folder"
processor = AlignProcessor.from_pretrained(folder)
inputs = processor(text=["a cat", "a dog"], images=[Image.open("image.png")], return_tensors="np")
image = onnxruntime.InferenceSession(f"{folder}/onnx/image.onnx")
text = onnxruntime.InferenceSession(f"{folder}/onnx/text.onnx")
image_embeds = image.run(None, {"pixel_values": inputs["pixel_values"]})[0]
text_embeds = text.run(None, {name: inputs[name] for name in ("input_ids", "attention_mask")})[0]
cosines = image_embeds @ text_embeds.T
```"""


def model_card(
    name: str,
    version: str,
    data: str,
    recipe: Mapping[str, Any],
    scores: str,
    finetuning: Mapping[str, Any] | None = None,
    onnx: bool = False,
) -> str:
    """Fill in the card.

    Args:
        name: of the run.
        version: of align_train.
        data: what it was trained on, with licences.
        recipe: settings by name, as a list in the card.
        scores: the table of exams, as text.
        finetuning: that of result.json; None where the model was trained from nothing.
        onnx: the folder holds the towers as ONNX files.
    """
    sections = {
        "Fine-tuning": fine_tuned(finetuning) if finetuning else "",
        "Data": data,
        "Recipe": "\n".join(f"- {key}: {value}" for key, value in recipe.items()),
        "Scores": f"```\n{scores}\n```",
        "ONNX": ONNX if onnx else "",
    }
    bases = base_models(finetuning["sources"]) if finetuning else []
    return TEMPLATE.format(
        base=f"base_model: [{', '.join(bases)}]\n" if bases else "",
        name=name,
        version=version,
        sections="".join(f"## {title}\n\n{text}\n\n" for title, text in sections.items() if text),
    )


def base_models(sources: Sequence[str]) -> list[str]:
    """The hub ids among what a fine-tuning started from, for the card's metadata; local starts are absolute paths."""
    return [source for source in sources if not Path(source).is_absolute()]


def named_start(sources: Sequence[str]) -> str:
    """Hub ids as they are; of folders their names alone, since cards are published and paths are nobody's business."""
    hub = base_models(sources)
    return " and ".join(f"`{each}`" if each in hub else f"a local model, `{Path(each).name}`" for each in sources)


def fine_tuned(finetuning: Mapping[str, Any]) -> str:
    """From where, on what, and which mixture of start and end this is."""
    pairs = finetuning["pairs"]
    skipped = ", ".join(f"{why} {count:,}" for why, count in pairs["skipped"].items())
    told = (
        f"Fine-tuned from {named_start(finetuning['sources'])} with {pairs['images']:,} images and "
        f"{pairs['captions']:,} captions; {pairs['validation_images']:,} of the images were kept out for validation."
    )
    return f"{told}{f' Left out: {skipped}.' if skipped else ''}\n\n{_mixture(finetuning)}"


def _mixture(finetuning: Mapping[str, Any]) -> str:
    """The alpha of the weights, and the scores of the start, the recommended alpha and the end."""
    chosen, recommended = finetuning.get("exported", finetuning["recommended"]), finetuning["recommended"]
    points = {point["alpha"]: point for point in finetuning["points"]}
    names: dict[float, list[str]] = {alpha: [] for alpha in sorted({0, recommended, chosen, 1})}
    end = f"end, step {finetuning['end_step']:,}"
    for alpha, name in ((0, "before"), (recommended, "recommended"), (1, end), (chosen, "this model")):
        names[alpha].append(name)
    sets = {"new": "new data", "guard": "guard set"} if finetuning["guard"] else {"new": "new data"}
    rows = [["weights", "alpha", *sets.values()], ["---", *["---:"] * (len(sets) + 1)]]
    for alpha, says in names.items():
        rows.append([", ".join(says), f"{alpha:g}", *(f"{100 * points[alpha][name]:.1f}" for name in sets)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    means = "; ".join(f"{title}: mean of {', '.join(finetuning[name])}" for name, title in sets.items())
    return (
        f"The weights lie at alpha {chosen:g} of the way from the start, 0, to the end of training, 1 (WiSE-FT, "
        f"[arXiv 2109.01903](https://arxiv.org/abs/2109.01903)). Recommended is {recommended:g}: "
        f"{finetuning['because']}.\n\n{table}\n\n"
        f"In percent; {means}. The recommended alpha was chosen by these scores, so they flatter it a little."
    )
