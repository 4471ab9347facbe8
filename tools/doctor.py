#!/usr/bin/env python
"""Says before training what is wrong with the environment and with a lab's data sets.

    python tools/doctor.py                                  # the environment
    python tools/doctor.py --config-file config.yaml        # and the data sets of DATASETS
    python tools/doctor.py --config-file config.yaml --fix cleaned.json

ERROR: it stops the training or makes its result wrong. WARNING: it costs accuracy or is probably a
mistake. Exit code 1 with an ERROR, with --strict also with a WARNING. Nothing is changed in place:
--fix writes a copy of the annotations in COCO's format and says what it left out and changed.
"""

import argparse
import json
import logging
import os
import shutil
import sys

import check_environment


def check_machine():
    """(level, text, advice) of the packages, as tools/check_environment.py, and of the GPUs."""
    problems = list(check_environment.check_python())
    if not problems:
        problems += check_environment.check_torch()
    if not problems:
        problems += check_environment.check_module("cv2", "opencv-python-headless")
        problems += check_environment.check_module("pycocotools.mask", "pycocotools")
    if not problems:  # Detectron2 needs them: name the cause, not the effect
        problems += check_environment.check_detectron2()
    if problems:
        for line in problems:
            text, _, mend = line.partition("; mend it with: ")
            yield "ERROR", text, f"Mend it with: {mend}"
        return
    names = ("torch", "torchvision", "detectron2", "cv2")
    versions = [f"{name} {sys.modules[name].__version__}" for name in names]
    yield "OK", ", ".join([f"Python {sys.version.split()[0]}", *versions]), ""
    yield from check_gpu()


def check_gpu():
    """(level, text, advice): whether torch and torchvision can use the GPUs that are there."""
    import torch
    import torchvision

    built = f"torch is built for CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            yield "WARNING", "torch is built without CUDA", "Install torch's CUDA build."
        elif shutil.which("nvidia-smi"):
            yield "WARNING", f"{built}, but finds no GPU", "Compare the driver in nvidia-smi."
        else:
            yield "OK", "no GPU: MODEL.DEVICE becomes cpu", ""
        return
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    try:
        box = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device="cuda")
        torchvision.ops.nms(box, box[:, 2], 0.5)
    except Exception as error:  # kernels for other GPUs, or a torchvision without CUDA
        text = f"torchvision's NMS fails on the GPU: {check_environment.first_line(error)}"
        yield "ERROR", text, f"Install a torchvision of the same build; {built}."
    names = ", ".join(f"{d.name} of {d.total_memory / 2**30:.0f} GiB" for d in devices)
    yield "OK", f"{names}; {built}", ""


class Report:
    """Prints verdicts and counts their levels.

    Args:
        show: file names of each verdict at most.
    """

    def __init__(self, show):
        self.show, self.counts = show, {"OK": 0, "WARNING": 0, "ERROR": 0}

    def add(self, level, text, places=(), advice=""):
        self.counts[level] += 1
        print(f"  {level:7}  {text}")
        for place in list(places)[: self.show]:
            print(f"             {place}")
        if len(places) > self.show:
            print(f"             and {len(places) - self.show} more (--show {len(places)})")
        if advice:
            print(f"           > {advice}")


def check_lab(args, report):
    """Checks the data sets of args.config_file, and writes args.fix."""
    from dataset_checks import checks
    from dataset_checks.reading import read_dataset
    from detectron2.data import DatasetCatalog

    from ssd import load_config

    print(args.config_file)
    try:
        cfg = load_config(args.config_file, args.opts)
    except Exception as error:  # whatever training would stop with
        report.add("ERROR", f"{type(error).__name__}: {error}")
        return
    names = dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    names = [name for name in names if name in DatasetCatalog]
    chosen = [args.dataset] if args.dataset else cfg.DATASETS.TRAIN
    if args.fix and not (len(chosen) == 1 and chosen[0] in names):
        given = repr(args.dataset) if args.dataset else f"none, and DATASETS.TRAIN is {chosen}"
        report.add("ERROR", f"--fix needs a --dataset of {names}, got {given}")
        return
    known, leaks = {}, {}
    for name in names:
        known[name], findings = read_dataset(name, cfg.DATASETS.REGISTER.get(name, {}))
        check_dataset(cfg, known[name], findings, report)
    print("training and test")
    if not cfg.DATASETS.TRAIN:
        report.add("ERROR", "DATASETS.TRAIN is empty")
    check_classes(cfg, [name for name, data in known.items() if data.loads], report)
    trained = [known[name] for name in cfg.DATASETS.TRAIN if name in known]
    for finding in checks.check_training(trained):
        report.add(*finding)
    for train in filter(known.get, cfg.DATASETS.TRAIN):
        for test in filter(known.get, cfg.DATASETS.TEST):
            if not (known[train].records and known[test].records):
                continue
            findings, same = checks.check_leaks(known[train], known[test])
            leaks.setdefault(train, []).extend(same)
            for finding in findings:
                report.add(*finding)
    if args.fix:
        write_copy(known[chosen[0]], leaks.get(chosen[0], []), args, report)


def check_classes(cfg, names, report):
    """Whether the named data sets have the model's classes."""
    from ssd.data.datasets import check_class_count

    cfg = cfg.clone()
    cfg.defrost()
    for key in ("TRAIN", "TEST"):
        cfg.DATASETS[key] = tuple(name for name in cfg.DATASETS[key] if name in names)
    try:
        check_class_count(cfg)
    except ValueError as error:
        report.add("ERROR", str(error))
    else:
        if names:
            number = cfg.MODEL.SSD.NUM_CLASSES
            report.add("OK", f"MODEL.SSD.NUM_CLASSES {number} fits {', '.join(names)}")


def check_dataset(cfg, data, findings, report):
    from dataset_checks import checks

    use = [key.lower() for key in ("TRAIN", "TEST") if data.name in cfg.DATASETS[key]]
    total = sum(len(record["annotations"]) for record in data.records)
    print(f"{data.name} ({', '.join(use)}): {len(data.records)} images, {total} boxes, {data.root}")
    findings, table = list(findings), []
    if data.records:
        objects, table = checks.check_objects(data, cfg)
        findings += checks.check_files(data) + checks.check_boxes(data) + objects
    for finding in findings:
        report.add(*finding)
    for line in table:
        print(f"  {line}")


def write_copy(data, leaked, args, report):
    """Writes args.fix, says what has changed, and how to use it."""
    from dataset_checks import cleaning

    content, changes = ({}, []) if data.changes is None else cleaning.clean(data, leaked)
    if not content.get("images"):
        text = f"--fix: {data.name} can't be copied until the ERRORs above are corrected"
        report.add("ERROR", text)
        return
    with open(args.fix, "x", encoding="utf-8") as f:
        json.dump(content, f)
    images, annotations = content["images"], content["annotations"]
    print(f"{args.fix}: {data.name} with {len(images)} images and {len(annotations)} boxes")
    for line in changes[:100]:
        print(f"  {line}")
    if len(changes) > 100:
        path = f"{args.fix}.changes.txt"
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as f:
            f.writelines(f"{line}\n" for line in changes)
        print(f"  … and {len(changes) - 100} more: all are in {path}")
    if not changes:
        print("  nothing had to be changed")
    root, folder = os.path.split(os.path.abspath(data.root))
    entry = {"FORMAT": "coco", "ROOT": root, "ANNOTATIONS": os.path.abspath(args.fix)}
    entry = json.dumps({**entry, "IMAGES": folder}, ensure_ascii=False)  # which is YAML, too
    print(f"  use it in DATASETS.REGISTER with {data.name}: {entry}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="of a lab")
    parser.add_argument("--strict", action="store_true", help="exit code 1 with a WARNING, too")
    parser.add_argument("--show", type=int, default=5, help="file names of each verdict at most")
    parser.add_argument("--fix", metavar="OUT.json", help="write a cleaned copy, a new file")
    parser.add_argument(
        "--dataset", metavar="NAME", help="which --fix copies; default: the one of DATASETS.TRAIN"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE … for the config")
    args = parser.parse_args()
    if args.fix and not args.config_file:
        parser.error("--fix needs --config-file")
    for path in (args.fix, f"{args.fix}.changes.txt") if args.fix else ():
        if os.path.exists(path):
            parser.error(f"--fix: {path} exists; nothing is changed in place: give another name")
    if args.fix and not os.path.isdir(os.path.dirname(args.fix) or "."):
        parser.error(f"--fix {args.fix}: there is no such folder")
    if hasattr(sys.stdout, "reconfigure"):  # not in notebooks
        sys.stdout.reconfigure(errors="backslashreplace")  # for any file name

    report = Report(args.show)
    print("environment")
    for level, text, advice in check_machine():
        report.add(level, text, (), advice)
    if args.config_file and not report.counts["ERROR"]:
        logging.disable(logging.WARNING)  # what the readers log is said here
        check_lab(args, report)
    print(f"{report.counts['ERROR']} ERROR, {report.counts['WARNING']} WARNING")
    return int(bool(report.counts["ERROR"] or args.strict and report.counts["WARNING"]))


if __name__ == "__main__":
    sys.exit(main())
