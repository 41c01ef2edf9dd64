"""Whole artifacts as functions of images, light enough for a child process of `converters.isolate`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ConversionError
from converters.quiet import quiet

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


def open_outputs(path: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Every output of `serving_default` by name, image by image: float32 [N, H, W, C] to [N, ...] each."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=str(path), num_threads=1).get_signature_runner("serving_default")

    def answer(images: np.ndarray) -> dict[str, np.ndarray]:
        found = [runner(images=image[None]) for image in images]
        return {name: np.concatenate([outputs[name] for outputs in found]) for name in found[0]}

    return answer


def open_in_litert(path: Path) -> ArrayOf:
    """A TFLite file in our own LiteRT, by the same code as in the runtimes below: [N, H, W, C] to features or logits."""
    from ai_edge_litert.interpreter import Interpreter

    return _answers(Interpreter, path, "LiteRT")


def open_in_tflite_runtime(path: Path) -> ArrayOf:
    """The same in tflite-runtime, which boards without a LiteRT wheel have; needs its environment."""
    from tflite_runtime.interpreter import Interpreter

    return _answers(Interpreter, path, "tflite-runtime")


def open_in_tensorflow(path: Path) -> ArrayOf:
    """The same in `tf.lite`, with TensorFlow's plain kernels; needs the environment that has it.

    LiteRT computes with XNNPACK, so other kernels say more. TensorFlow 2.19's own XNNPACK refuses depthwise convolutions
    with float16 weights, and makes NaN of others.
    """
    with quiet():
        import tensorflow as tf

        resolver = tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return _answers(partial(tf.lite.Interpreter, experimental_op_resolver_type=resolver), path, "tf.lite")


def _answers(make_interpreter: Callable[..., Any], path: Path, runtime: str) -> ArrayOf:
    """What a file's signature `features`, or else `serving_default`, gives first: [N, H, W, C] to [N, D] or [N, K].

    Raises:
        ConversionError: the runtime cannot load or run the file; the message names it and the operation.
    """
    try:
        with quiet():
            interpreter = make_interpreter(model_path=str(path), num_threads=1)
            name = next(name for name in ("features", "serving_default") if name in interpreter.get_signature_list())
            run = interpreter.get_signature_runner(name)
    except StopIteration:
        raise ConversionError(f"{path}: has no signature features or serving_default; export it again") from None
    except (ValueError, RuntimeError, OSError) as error:
        raise _unable(runtime, path, error) from error
    (source,), target = run.get_input_details(), next(iter(run.get_output_details()))

    def answer(images: np.ndarray) -> np.ndarray:
        try:
            return np.concatenate([run(**{source: image[None]})[target] for image in images])
        except (ValueError, RuntimeError) as error:
            raise _unable(runtime, path, error) from error

    return answer


def _unable(runtime: str, path: Path, error: Exception) -> ConversionError:
    return ConversionError(f"{path}: {runtime} cannot run it ({' '.join(str(error).split())})")
