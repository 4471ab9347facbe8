#!/usr/bin/env python
"""Writes weights as another project's file: convert.py IN OUT --to FORMAT

IN is any file that MODEL.WEIGHTS can be: ours, another project's, or zoo://NAME. Formats:
detectron2 (ours, as MODEL.WEIGHTS), safetensors (the same), mmdet (since 2.14), mmdet-old (2.0 to
2.13), torchvision, and pytorch-ssd (qfgaohao's). Only parameters are converted: the target has to
have the same default boxes and normalisation, whose values are printed if IN's project is known.
"""

import argparse
import logging
import os
import sys

from detectron2.utils.file_io import PathManager

import ssd.model_zoo  # noqa: F401  registers zoo://
from ssd.checkpoint.checkpointer import write_atomically
from ssd.checkpoint.convert import FORMATS, encode, read_ours, write_as


def convert(source: str, target: str, args: argparse.Namespace) -> None:
    path = PathManager.get_local_path(source)
    if os.path.exists(target) and os.path.samefile(path, target):
        raise ValueError(f"{target} is the file to read: choose another name to write")
    detector = read_ours(path, args.input_format, args.ema)
    content = encode(write_as(detector, args.to), args.to)
    write_atomically(target, lambda file: file.write(content))
    averaged = ", averaged" if args.ema else ""
    print(f"Found {detector.lineage.title}{averaged}; wrote {args.to} to {target}")
    if found := detector.definition():
        weights, values = found
        opts = f" with {' '.join(map(str, weights.opts))}" if weights.opts else ""
        mean, std = values["MODEL.PIXEL_MEAN"], values["MODEL.PIXEL_STD"]
        lab = f"default boxes as in labs/{weights.lab}{opts}"
        print(f"It needs RGB in [0, 255] minus {mean}, divided by {std}; {lab}")
    elif detector.lineage.input_std:
        print("Its first layer is for RGB in [0, 255] and MODEL.PIXEL_STD [1.0, 1.0, 1.0]")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN")
    parser.add_argument("target", metavar="OUT")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--ema", action="store_true", help="the averaged weights of IN")
    parser.add_argument(
        "--input-format", default="", choices=("RGB", "BGR"),
        help="order of channels that IN was trained with (INPUT.FORMAT); default: RGB for files of "
        "ours, else that of IN's project. What is written is for RGB",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        convert(args.source, args.target, args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    main()
