"""A model in stages: what may be trained without what lies below it, and how far each is from the embeddings."""

from itertools import accumulate, pairwise
from math import ceil

from torch import nn
from transformers import AlignModel

Stage = tuple[str, list[nn.Module]]


def stages(model: AlignModel) -> dict[str, list[Stage]]:
    """Each tower, image and text, as its stages from input to output: (name, modules).

    The image tower's are the stem and EfficientNet's 7 groups of blocks, 1 to 8 of arXiv 1905.11946, table 1; the text
    tower's are the embeddings, each layer, and the projection. A parameter is in one of them, but for the temperature,
    which belongs to no tower, and the weights of the text pooler, which ALIGN never uses.
    """
    vision, text = model.vision_model, model.text_model
    layers = [(f"layer {number}", [layer]) for number, layer in enumerate(text.encoder.layer, start=1)]
    return {
        "image": [("stem", [vision.embeddings]), *_block_stages(model)],
        "text": [("embeddings", [text.embeddings]), *layers, ("projection", [model.text_projection])],
    }


def distances(model: AlignModel) -> dict[str, int]:
    """How many stages of its tower lie above a parameter, by the parameter's name.

    0 for the last stage of each tower and for the temperature; the unused text pooler has no number.
    """
    found = {id(model.temperature): 0}
    for tower in stages(model).values():
        for above, (_, modules) in enumerate(reversed(tower)):
            found |= {id(weight): above for module in modules for weight in module.parameters()}
    return {name: found[id(weight)] for name, weight in model.named_parameters() if id(weight) in found}


def _block_stages(model: AlignModel) -> list[Stage]:
    """The image tower's blocks as transformers makes them: each stage's repeats times the depth, rounded up."""
    config, blocks = model.config.vision_config, list(model.vision_model.encoder.blocks)
    ends = accumulate((ceil(config.depth_coefficient * repeats) for repeats in config.num_block_repeats), initial=0)
    return [(f"stage {number}", blocks[start:end]) for number, (start, end) in enumerate(pairwise(ends), start=1)]
