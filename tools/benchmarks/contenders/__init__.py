"""The contenders: each builds the work that is timed, a task's method per class.

What a user of the project would write, with the settings of its own definition.
"""

from benchmarks.contenders.decoding import Decoding
from benchmarks.contenders.evaluation import Detectron2, Pycocotools
from benchmarks.contenders.mmdet import MMDetection
from benchmarks.contenders.ours import Ours
from benchmarks.contenders.torchvision import Torchvision
from benchmarks.machine import Spec, Work

CLASSES = {
    "ours": Ours,
    "before": Ours,
    "torchvision": Torchvision,
    "torchvision (PIL)": Torchvision,
    "torchvision (tensors)": Torchvision,
    "mmdet": MMDetection,
    "cv2.imread": Decoding,
    "cv2.imread (memory reused)": Decoding,
    "pycocotools": Pycocotools,
    "detectron2": Detectron2,
}


def build(spec: Spec) -> Work:
    return CLASSES[spec.contender](spec).work()
