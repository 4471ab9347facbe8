"""Installs the package ``ssd`` into an environment that has torch; the README says how.

Detectron2 is not on the package index: ``tools/install_detectron2.py`` installs it.
"""

from setuptools import find_packages, setup

setup(
    name="ssd-detectron2",
    version="0.1.0",
    description="SSD, the Single Shot MultiBox Detector, for Detectron2",
    license="Apache-2.0",
    # The labs' configs, for ssd.model_zoo: in a wheel they lie within the package.
    packages=[*find_packages(include=["ssd", "ssd.*"]), "ssd.labs"],
    package_dir={"ssd.labs": "labs"},
    package_data={"ssd.labs": ["_base_/*.yaml", "*/config.yaml"]},
    python_requires=">=3.10",
    # Ranges that whichever torch is there satisfies, so that pip never brings a second one.
    install_requires=[
        "torch>=2.3",
        "torchvision>=0.18",
        "numpy",
        "fvcore>=0.1.5",
        "pycocotools>=2.0.2",
    ],
    extras_require={
        # Needed, but not required above: four distributions provide cv2, and pip would put
        # opencv-python over an opencv-python-headless that is there. Detectron2 does the same.
        "opencv": ["opencv-python"],
        "safetensors": ["safetensors"],
        "test": ["pytest>=7.3", "pytest-xdist", "ruff", "safetensors"],
        "wandb": ["wandb"],
    },
)
