"""amdegroot/ssd.pytorch, whose VGG layout lufficc, qfgaohao and others took over."""

from ssd.checkpoint.lineage import Lineage, flat_extras, heads
from ssd.checkpoint.vgg import vgg_layers

__all__ = ["LINEAGES"]

LINEAGES = [
    Lineage(
        "amdegroot",
        "amdegroot's SSD",
        ("vgg.0.weight", "conf.0.weight", "L2Norm.weight"),
        {
            **dict(vgg_layers("vgg.")),
            **dict(flat_extras("extras.")),
            **dict(heads("conf.{}", "loc.{}")),
            "L2Norm": "backbone.l2_norm.conv4_3",
        },
        background_first=True,
    )
]
