"""ALIGN for training: transformers' AlignModel, repaired, with uint8 pixels in and normalised embeddings out."""

import torch
from torch import Tensor
from transformers import AlignConfig, AlignModel

from align_train.models.length_chunks import in_length_chunks
from align_train.models.stages import distances
from align_train.records import Preprocessing


class Align(AlignModel):
    """A dual encoder whose state dict is AlignModel's, key by key. `build` makes a repaired one.

    Args:
        config: transformers' own; its vision width must equal `projection_dim`.
        preprocessing: how a pair becomes input; travels with the model into the exported processor.
        temperature_bounds: lowest and highest temperature that `clamp_temperature` leaves.

    Attributes:
        text_chunks: parts of like length in which captions are encoded; 1 takes the batch as it comes.
        text_multiple: number of token columns is a multiple of this; more than 1 for few static shapes.

    Raises:
        ValueError: the image tower's width is not the projection width, or the bounds leave out the start value.
    """

    def __init__(
        self,
        config: AlignConfig,
        preprocessing: Preprocessing,
        temperature_bounds: tuple[float, float] = (0.01, 10.0),
    ) -> None:
        width = vision_width(config.vision_config.width_coefficient, config.vision_config.depth_divisor)
        if width != config.projection_dim:
            raise ValueError(
                f"the image tower is {width} wide (320 x width {config.vision_config.width_coefficient}), but "
                f"model.projection_dim is {config.projection_dim}: AlignModel has no projection on the image side, "
                f"so set model.projection_dim={width}"
            )
        lower, upper = temperature_bounds
        if not 0 < lower <= config.temperature_init_value <= upper:
            raise ValueError(
                f"model.temperature starts at {config.temperature_init_value}, outside its bounds {lower} to {upper}: "
                "the bounds must be positive and contain the start value"
            )
        super().__init__(config)
        self.preprocessing = preprocessing
        self.temperature_bounds = (lower, upper)
        self.text_chunks = 1
        self.text_multiple = 1

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed images: (B, 3, H, W) to (B, D), rows of length 1.

        uint8 pixels are scaled to x / 127.5 - 1 here, on their device; floating ones are taken as scaled already.
        """
        if not pixels.is_floating_point():
            pixels = pixels.to(self.temperature.dtype) / 127.5 - 1.0
        return normalised(self.get_image_features(pixels).pooler_output)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed captions: ids and mask (B, L) to (B, D), rows of length 1; see `in_length_chunks`."""
        if self.text_chunks == self.text_multiple == 1:
            return normalised(self._project_text(input_ids, attention_mask))
        return normalised(
            in_length_chunks(self._project_text, input_ids, attention_mask, self.text_chunks, self.text_multiple)
        )

    def _project_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.get_text_features(input_ids, attention_mask).pooler_output

    def distances(self) -> dict[str, int]:
        """How many stages of its tower lie above a parameter, by its name; see `align_train.models.stages`."""
        return distances(self)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Bring the temperature, a raw divisor, back within its bounds; called after every optimizer step."""
        self.temperature.clamp_(*self.temperature_bounds)


def normalised(embeddings: Tensor) -> Tensor:
    """Rows (B, D) at length 1: x * rsqrt(max(sum x^2, 1e-12)), as tf.math.l2_normalize; float32 or better."""
    if embeddings.dtype in (torch.bfloat16, torch.float16):
        embeddings = embeddings.float()
    return embeddings * torch.rsqrt((embeddings * embeddings).sum(-1, keepdim=True).clamp_min(1e-12))


def vision_width(width_coefficient: float, divisor: int = 8) -> int:
    """Channels of the last EfficientNet block, 320 scaled and rounded as in arXiv 1905.11946's code."""
    scaled = 320 * width_coefficient
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded
