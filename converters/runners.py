"""Whole artifacts as functions of images, light enough for a child process of `converters.isolate`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from converters.errors import ConversionError

ArrayOf = Callable[[np.ndarray], np.ndarray]


def open_features(path: Path) -> ArrayOf:
    """The `features` signature of a TFLite file, image by image as a board runs it: [N, H, W, C] to [N, D]."""
    from device.engine import Engine

    engine = Engine(path)
    return lambda images: np.stack([engine.features(image[None]) for image in images])


def open_classifier(path: Path) -> ArrayOf:
    """An image-to-logits file, `model.infer.tflite`: float32 [N, H, W, C] to [N, K].

    Raises:
        ConversionError: the file has no `serving_default` signature.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    if "serving_default" not in interpreter.get_signature_list():
        raise ConversionError(f"{path}: has no signature serving_default; export it again")
    runner = interpreter.get_signature_runner("serving_default")
    return lambda images: np.concatenate([runner(images=image[None])["logits"] for image in images])
