"""Count every model of the registry, and write the table `models`.

    python -m bench.models

Parameters and MACs are counted on the built model, not read from the registry.
"""

import sys

import torch

from bench.record import write_results
from host.models.measure import count_macs, count_parameters
from host.models.registry import list_models


def main() -> int:
    rows = []
    for entry in list_models():
        with torch.device("meta"):
            model = entry.create().eval()
        rows.append(
            {
                "family": entry.family,
                "variant": entry.variant,
                "exact": entry.is_exact,
                "parameters": count_parameters(model),
                "macs": count_macs(model, entry.image_size, entry.in_chans),
                "input": f"{entry.in_chans} x {entry.image_size} x {entry.image_size}",
                "classes": entry.num_classes,
                "paper": entry.paper or None,
            }
        )
    write_results(
        "models",
        command="python -m bench.models",
        seed=None,
        data="none: counted on the meta device",
        rows=rows,
        title="Models: parameters and MACs",
        notes=(
            "`exact`: a published configuration, both heads included where it has two; its parameters equal the "
            "specification's integer where there is one. For gcab none is published, and ninformer/mnist has a geometry "
            "that we assume. Otherwise ours. MACs are those of convolutions and matrix products for one image."
        ),
    )
    print(f"{len(rows)} models, {sum(row['exact'] for row in rows)} of them exact")
    return 0


if __name__ == "__main__":
    sys.exit(main())
