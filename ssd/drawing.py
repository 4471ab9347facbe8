"""Boxes drawn on images, the same way everywhere, with Detectron2's Visualizer.

Its own drawing of instances has random, half transparent colours, hard to tell apart on small
images.
"""

import os
from typing import Sequence

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from matplotlib.patheffects import withStroke

__all__ = ["class_name", "draw_boxes", "draw_instances", "write_image"]


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: Sequence[int],
    labels: Sequence[str],
    scale: float = 1.0,
) -> np.ndarray:
    """The RGB image (H, W, 3) uint8 with M boxes (M, 4) XYXY, a colour for each class.

    Args:
        labels: texts above the boxes.
        scale: of the picture's sides to the image's.
    """
    height, width = image.shape[:2]
    picture = Visualizer(image, Metadata(), scale=scale)
    font = max((height * width) ** 0.5 / 90, 10 / scale)  # points
    line, letter = 1.8 * font, 0.9 * font  # the text's height and a letter's width, in pixels
    colors = colormap(rgb=True, maximum=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for i in np.argsort(-areas):  # small ones on top
        color = colors[classes[i] % len(colors)]
        color = color / max(color.max(), 0.1)  # bright
        picture.draw_box(boxes[i], alpha=1, edge_color=color)
        text = labels[i].replace("$", r"\$")  # two would begin and end a formula
        x = min(boxes[i][0], width - letter * len(labels[i]))
        y = boxes[i][1] - line if boxes[i][1] > line else boxes[i][1]
        picture.draw_text(
            text, (max(x, 0), y), font_size=font, color=color, horizontal_alignment="left"
        )
    for patch in picture.output.ax.patches:  # black edges are seen on any image
        edge = withStroke(linewidth=patch.get_linewidth() + 2, foreground="black")
        patch.set_path_effects([edge])
    return picture.output.get_image()


def draw_instances(image: np.ndarray, instances: Instances, metadata: Metadata) -> np.ndarray:
    """The BGR image (H, W, 3) uint8 with boxes, classes and scores in per cent."""
    classes = instances.pred_classes.tolist()
    labels = [
        f"{class_name(metadata, label)} {score:.0%}"
        for label, score in zip(classes, instances.scores.tolist())
    ]
    boxes = instances.pred_boxes.tensor.numpy()
    return draw_boxes(image[:, :, ::-1], boxes, classes, labels)[:, :, ::-1]


def class_name(metadata: Metadata, label: int) -> str:
    """Of a class from 0; "class 3" if there are no names."""
    names = metadata.get("thing_classes")
    return names[label] if names else f"class {label}"


def write_image(path: str, image: np.ndarray) -> str:
    """Writes a BGR image, as PNG if OpenCV can't write the name's format; returns the file's name.

    Raises:
        OSError: it can't be written.
    """
    if os.path.dirname(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    extension = os.path.splitext(path)[1].lower()
    # OpenCV never gets the name: one that isn't UTF-8 would end the program
    writable = extension.isascii() and cv2.haveImageWriter(f"x{extension}")
    if not writable or extension in (".pbm", ".pgm"):  # these are without colour
        path, extension = f"{path}.png", ".png"
    written, data = cv2.imencode(extension, image)
    if not written:
        raise OSError(f"{path} can't be written")
    with open(path, "wb") as file:
        file.write(data)
    return path
