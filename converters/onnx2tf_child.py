"""What runs inside the onnx2tf environment (`make onnx2tf-env`): one ONNX file to one TFLite file, then the end.

    PYTHON -I onnx2tf_child.py MODEL.onnx MODEL.tflite SIGNATURE

`converters.second_route` starts it in an empty directory of its own, and reads what it prints when it fails. Nothing of ours
is imported: this environment has another NumPy and none of our packages.
"""

import sys
from pathlib import Path
from typing import Any

CALIBRATION_SAMPLE = "calibration_image_sample_data_20x128x128x3_float32.npy"
"""onnx2tf fetches this file from the network for every model, unless the working directory has it."""
INPUT = "images"


def main(onnx_path: str, tflite_path: str, signature: str) -> None:
    """Convert with built-in operations only: `images` [1, H, W, C] to the outputs that the ONNX file names."""
    import numpy as np
    import onnx

    np.save(CALIBRATION_SAMPLE, np.zeros((20, 128, 128, 3), np.float32))
    names = [output.name for output in onnx.load(onnx_path).graph.output]
    Path(tflite_path).write_bytes(_to_tflite(_to_keras(onnx_path), names, signature))


def _to_keras(onnx_path: str) -> Any:
    import onnx2tf

    return onnx2tf.convert(input_onnx_file_path=onnx_path, disable_model_save=True, verbosity="error")


def _to_tflite(model: Any, names: list[str], signature: str) -> bytes:
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    (images,) = model.inputs
    spec = tf.TensorSpec(images.shape, images.dtype, name=INPUT)
    # constants first: onnx2tf's layers hold variables that Keras does not know of, so the model cannot be saved as it is
    frozen = convert_variables_to_constants_v2(tf.function(model, input_signature=[spec]).get_concrete_function())
    module = tf.Module()
    module.frozen = frozen

    def call(images: Any) -> dict[str, Any]:
        return dict(zip(names, frozen(images), strict=True))

    call = tf.function(call, input_signature=[spec])
    tf.saved_model.save(module, "saved_model", signatures={signature: call.get_concrete_function()})
    converter = tf.lite.TFLiteConverter.from_saved_model("saved_model", signature_keys=[signature])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return bytes(converter.convert())


if __name__ == "__main__":
    main(*sys.argv[1:])
