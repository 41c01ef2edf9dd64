"""What a recipe says about quantization: dataclasses only, shared with the converters."""

from dataclasses import dataclass

from host.errors import RecipeError

METHODS = ("minmax",)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSpec:
    """Post-training quantization: per-channel weights, activations calibrated on unlabelled training images.

    `max_accuracy_drop` is the share of validation accuracy that int8 may lose against float before the stage fails.
    """

    method: str = "minmax"
    weight_bits: int = 8
    activation_bits: int = 8
    calibration_images: int = 128
    max_accuracy_drop: float = 0.01

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(f"quantize.method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if (self.weight_bits, self.activation_bits) != (8, 8):
            raise RecipeError("quantize: this version writes 8-bit weights and activations only; set both to 8")
        if not 1 <= self.calibration_images <= 4096:
            raise RecipeError(f"quantize.calibration_images must be 1..4096, got {self.calibration_images}")
        if not 0 <= self.max_accuracy_drop <= 1:
            raise RecipeError(f"quantize.max_accuracy_drop must be 0..1, got {self.max_accuracy_drop}")
