"""The SSD of an earlier Detectron2 fork (Chen-Jianhu/detectron2, projects/SSD)."""

from ssd.checkpoint.lineage import Lineage, flat_extras, heads
from ssd.checkpoint.vgg import vgg_layers

__all__ = ["LINEAGES"]

LINEAGES = [
    Lineage(
        "detectron2_fork",
        "an earlier Detectron2 fork's SSD",
        ("head.cls_subnet.0.weight", "l2norm.weight"),
        {
            **dict(vgg_layers("backbone.features.")),
            **dict(flat_extras("extra_layers.")),
            **dict(heads("head.cls_subnet.{}", "head.bbox_subnet.{}")),
            "l2norm": "backbone.l2_norm.conv4_3",
        },
        input_format="BGR",
        # its normalisation stands in the config, ours too
        prepare=lambda state: {k: x for k, x in state.items() if not k.startswith("pixel_")},
    )
]
