"""A trained classifier beside the exported model whose image embeddings it takes."""

from pathlib import Path
from typing import Any

from align_train.files import atomic_write
from align_train.models.class_head import WEIGHTS, ClassHead

CARD = """
## Classifier

`classifier.safetensors` is a linear classifier on this model's image embeddings, trained together with the image tower;
`classes.json` names its CLASSES classes. The text tower is as it was before, so that zero-shot use goes on as above.

```python
import json, pathlib, torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AlignModel, AlignProcessor

folder = pathlib.Path("path/to/this/folder")
model, processor = AlignModel.from_pretrained(folder), AlignProcessor.from_pretrained(folder)
head, classes = load_file(folder / "classifier.safetensors"), json.loads((folder / "classes.json").read_text())
features = model.get_image_features(**processor(images=Image.open("image.png"), return_tensors="pt")).pooler_output
logits = torch.nn.functional.normalize(features) @ head["weight"].T + head["bias"]
print(classes[logits.argmax()], logits.softmax(-1).max().item())
```
"""


def export_classifier(head: ClassHead, folder: Path) -> dict[str, Any]:
    """Write a head into the folder of its exported model, and a section about it into the model card.

    Returns:
        What result.json says of it.
    """
    head.write(folder)
    card = folder / "README.md"
    section = CARD.replace("CLASSES", f"{len(head.classes):,}")
    told = card.read_text(encoding="utf-8") + section
    with atomic_write(card) as file:
        file.write(told.encode())
    return {"classifier": str(folder / WEIGHTS), "classes": len(head.classes)}
