import json
from pathlib import Path

from commands import run
from PIL import Image

TOOL = Path(__file__).parent.parent.parent / "tools" / "plot_metrics.py"


def test_picture_of_a_resumed_run(tmp_path):
    lines = [{"iteration": i, "loss_cls": 5 / (i + 1), "loss_box_reg": 1.0} for i in (0, 19, 19)]
    lines.append({"iteration": 20, "bbox/AP": 12.5, "bbox/AP50": 30.0, "bbox/AP50-$r^$": 20.0})
    metrics, picture = tmp_path / "metrics.json", tmp_path / "curve.png"
    metrics.write_text("\n".join(map(json.dumps, lines)) + "\n")
    run(TOOL, metrics, picture)
    with Image.open(picture) as image:
        assert image.size == (1100, 400)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100  # something is drawn
