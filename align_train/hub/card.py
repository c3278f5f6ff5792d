"""The model card of an export."""

from collections.abc import Mapping
from typing import Any

TEMPLATE = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [align, image-text-retrieval]
---

# {name}

An ALIGN dual encoder (EfficientNet + BERT, [arXiv 2102.05918](https://arxiv.org/abs/2102.05918)), trained with
align_train {version} and loaded by plain `transformers`:

```python
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="path/to/this/folder")
classify("image.png", candidate_labels=["a cat", "a dog"])
```

## Data

{data}

## Recipe

{recipe}

## Scores

{scores}

## Limits

The model knows what its data shows, and carries the biases of the web it comes from. Do not use it to identify or judge
people. Text other than the training data's language is not understood.
"""


def model_card(name: str, version: str, data: str, recipe: Mapping[str, Any], scores: str) -> str:
    """Fill in the card.

    Args:
        name: of the run.
        version: of align_train.
        data: what it was trained on, with licences.
        recipe: settings by name, as a list in the card.
        scores: the table of exams, as text.
    """
    settings = "\n".join(f"- {key}: {value}" for key, value in recipe.items())
    return TEMPLATE.format(name=name, version=version, data=data, recipe=settings, scores=f"```\n{scores}\n```")
