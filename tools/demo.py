#!/usr/bin/env python
"""Detections of images, folders, a video or a webcam: shown, drawn to files, saved as JSON or CSV.

In a lab::

    python ../../tools/demo.py --config-file config.yaml --input photos/ --output pictures/ \\
        --opts MODEL.WEIGHTS output/model_final.pth
"""

import argparse
import copy
import itertools
import os
import sys
from pathlib import Path

import cv2
from detectron2.data import Metadata
from detectron2.utils.logger import setup_logger
from detectron2.utils.video_visualizer import VideoVisualizer
from tqdm import tqdm

from ssd import Predictor, load_config, model_zoo
from ssd.drawing import draw_instances, write_image
from ssd.predict import (
    batches,
    can_show,
    find_images,
    image_ids,
    output_paths,
    prepare_file,
    print_any_name,
    read_images,
    save_records,
    to_records,
)

WINDOW = "SSD detections (Esc ends)"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config-file", metavar="FILE", help="a lab's; needs MODEL.WEIGHTS")
    model.add_argument("--model", metavar="NAME", help="published weights of ssd.model_zoo")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--webcam", action="store_true", help="take images from the first camera")
    source.add_argument("--video-input", metavar="FILE", help="a video file")
    source.add_argument(
        "--input", nargs="+", metavar="IMAGE", help="files, folders or glob patterns"
    )
    parser.add_argument(
        "--output",
        help="a file or folder for pictures or the video; without it and --save-detections they "
        "are shown in a window",
    )
    parser.add_argument(
        "--save-detections",
        metavar="FILE",
        help="FILE.json: COCO's result format, with file_name and category; or FILE.csv. A "
        "video's image_id is the frame's number, from 0",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        help="least score of what is drawn and saved",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images that are detected at once"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config overrides as KEY VALUE pairs"
    )
    return parser


def build_predictor(args) -> Predictor:
    opts = [*args.opts, "MODEL.SSD.SCORE_THRESH_TEST", args.confidence_threshold]
    if args.model:
        return Predictor(model_zoo.get_config(args.model, trained=True, opts=opts))
    return Predictor(load_config(args.config_file, opts))


def detect(predictor: Predictor, images, batch_size: int):
    """(name, image, instances) of each (name, image)."""
    for batch in batches(images, batch_size):
        outputs = predictor.batch([image for _, image in batch])
        for (name, image), output in zip(batch, outputs):
            yield name, image, output["instances"].to("cpu")


def show(picture, milliseconds: int) -> bool:
    """False if Esc was pressed; 0 milliseconds: waits for a key."""
    cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
    cv2.imshow(WINDOW, picture)
    return cv2.waitKey(milliseconds) != 27


def run_images(args, parser) -> tuple:
    """Number of images that were read, their records, and whether Ctrl-C ended it."""
    paths = find_images(args.input)
    try:
        pictures = output_paths(paths, args.output) if args.output else {}
    except ValueError as error:
        parser.error(str(error))
    predictor = build_predictor(args)
    metadata = getattr(predictor, "metadata", Metadata())
    ids = image_ids(paths, metadata) if args.save_detections else {}
    count, records = 0, []
    images = read_images(tqdm(paths, unit="image"))
    try:
        for path, image, instances in detect(predictor, images, args.batch_size):
            count += 1
            records += to_records(instances, path, ids.get(path), metadata)
            if args.output:
                write_image(pictures[path], draw_instances(image, instances, metadata))
            elif not args.save_detections:
                if not show(draw_instances(image, instances, metadata), 0):
                    break
    except KeyboardInterrupt:
        return count, records, True
    return count, records, False


def run_video(args, parser) -> tuple:
    """Number of frames that were read, their records, and whether Ctrl-C ended it."""
    source = 0 if args.webcam else args.video_input
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        print(f"{'the camera' if args.webcam else source} can't be read", file=sys.stderr)
        return 0, [], False
    path = "webcam.mp4" if args.webcam else args.video_input
    output = args.output
    if output and (os.path.isdir(output) or not os.path.splitext(output)[1]):
        output = os.path.join(output, f"{Path(path).stem}.mp4")
    if output and os.path.realpath(output) == os.path.realpath(path):
        parser.error(f"--output {args.output} would overwrite the video {path}")
    predictor = build_predictor(args)
    metadata = getattr(predictor, "metadata", Metadata())
    drawn = copy.copy(metadata)
    if names := drawn.get("thing_classes"):  # matplotlib takes what is between two $ for a formula
        drawn.__dict__["thing_classes"] = [name.replace("$", r"\$") for name in names]
    visualizer, writer = VideoVisualizer(drawn), None
    total = 0 if args.webcam else int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    count, records, interrupted = 0, [], False
    try:
        frames = tqdm(read_frames(capture), unit="frame", total=max(total, 0) or None)
        for number, frame, instances in detect(predictor, frames, args.batch_size):
            count += 1
            records += to_records(instances, path, number, metadata)
            if args.save_detections and not output:
                continue
            picture = visualizer.draw_instance_predictions(frame[:, :, ::-1], instances)
            picture = picture.get_image()[:, :, ::-1]
            if not output:
                if not show(picture, 1):
                    break
                continue
            if writer is None:
                writer = open_writer(output, capture.get(cv2.CAP_PROP_FPS), picture.shape)
            writer.write(picture)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    return count, records, interrupted


def read_frames(capture: cv2.VideoCapture):
    """(number, frame) from 0."""
    for number in itertools.count():
        found, frame = capture.read()
        if not found:
            return
        yield number, frame


def open_writer(path: str, fps: float, shape) -> cv2.VideoWriter:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    size = shape[1], shape[0]
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), fps or 25.0, size)
    if not writer.isOpened():
        raise OSError(f"video {path} can't be written; .mp4 or .mkv works")
    return writer


def main(argv=None) -> int:
    parser = get_parser()
    args = parser.parse_args(argv)
    print_any_name()
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.save_detections:
        if args.save_detections == args.output:
            parser.error("--output and --save-detections are the same file")
        try:
            prepare_file(args.save_detections)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    if not (args.output or args.save_detections or can_show()):
        parser.error("no display, or OpenCV without windows: use --output or --save-detections")
    setup_logger(name="ssd")
    run = run_images if args.input else run_video
    count, records, interrupted = run(args, parser)
    if not count:
        print("interrupted" if interrupted else "nothing could be read", file=sys.stderr)
        return 130 if interrupted else 1
    if interrupted:
        print("interrupted: what has been detected is saved", file=sys.stderr)
    if args.save_detections:
        save_records(args.save_detections, records)
    print(f"{len(records)} detections in {count} {'images' if args.input else 'frames'}")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
