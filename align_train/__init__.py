"""Train ALIGN, a dual encoder of EfficientNet and BERT, on noisy image and alt-text pairs."""

__version__ = "0.1.0"
