"""SSD for Detectron2. Importing this package registers everything with Detectron2."""

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "ssd needs Detectron2: run `python tools/install_detectron2.py`, or see "
        "https://detectron2.readthedocs.io/tutorials/install.html"
    ) from error

from ssd import modeling  # noqa: F401  registers architecture, backbones and default boxes
from ssd.config import add_ssd_config, load_config
from ssd.predictor import Predictor  # its model zoo registers zoo:// with PathManager

__all__ = ["Predictor", "add_ssd_config", "load_config"]
