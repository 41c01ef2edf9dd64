"""What a recipe says about quantization: dataclasses only, shared with the converters."""

from dataclasses import dataclass

from host.errors import RecipeError

METHODS = ("minmax",)
INT8, DYNAMIC, HALF, FLOAT = "int8", "dynamic", "float16", "float32"
PRECISIONS = (INT8, DYNAMIC, HALF, FLOAT)
"""Of TFLite artifacts: int8 throughout but for float islands; int8 weights and float activations; float16 weights;
float32."""
COREML_FORMS = (HALF, "w8", "w8a8", "palette6")
"""Of the Core ML package: float16; int8 weights; int8 weights and activations; weights as 6-bit indices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSpec:
    """Post-training quantization: per-channel weights, activations calibrated on unlabelled training images.

    `precisions` are the artifacts that ship, of which every board keeps the fastest that it measures (`PRECISIONS`);
    float32 is always among them, since the others are checked against it.
    `max_accuracy_drop` is the share of validation accuracy that one of them may lose against float: one that loses more
    does not ship, and the stage fails when none but the float ones is left.
    """

    method: str = "minmax"
    weight_bits: int = 8
    activation_bits: int = 8
    calibration_images: int = 128
    max_accuracy_drop: float = 0.01
    precisions: tuple[str, ...] = (INT8, FLOAT)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(f"quantize.method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if (self.weight_bits, self.activation_bits) != (8, 8):
            raise RecipeError("quantize: this version writes 8-bit weights and activations only; set both to 8")
        if not 1 <= self.calibration_images <= 4096:
            raise RecipeError(f"quantize.calibration_images must be 1..4096, got {self.calibration_images}")
        unknown = [name for name in self.precisions if name not in PRECISIONS]
        if unknown or FLOAT not in self.precisions or len(set(self.precisions)) != len(self.precisions):
            raise RecipeError(
                f"quantize.precisions must hold {FLOAT!r}, and may hold each of {', '.join(PRECISIONS)} once, "
                f"got {list(self.precisions)}"
            )
        if not 0 <= self.max_accuracy_drop <= 1:
            raise RecipeError(f"quantize.max_accuracy_drop must be 0..1, got {self.max_accuracy_drop}")
