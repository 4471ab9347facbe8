#!/usr/bin/env python
"""Trains or evaluates an SSD. In a lab: python ../../train_net.py --config-file ./config.yaml"""

import logging
import os

# GNU OpenMP's waiting threads spin by default; on CPUs they would take the loaders' cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from detectron2.evaluation import verify_results  # noqa: E402
from detectron2.utils import comm  # noqa: E402

from ssd.checkpoint import SSDCheckpointer  # noqa: E402
from ssd.engine import Trainer, draw_detections, setup  # noqa: E402
from ssd.launch import argument_parser, launch  # noqa: E402
from ssd.summary import write_summary  # noqa: E402


def main(args):
    cfg = setup(args)
    trainer = None
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = SSDCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg, strict=True)
        if args.resume and not checkpointer.has_checkpoint():
            logging.getLogger("ssd").warning(
                "--resume: no checkpoint in %s, MODEL.WEIGHTS is evaluated", cfg.OUTPUT_DIR
            )
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
        model = trainer.evaluated_model
    if comm.is_main_process():
        write_summary(cfg, results, trainer)
        if cfg.TEST.VIS_IMAGES:
            draw_detections(cfg, model)
        if args.eval_only:  # a training has done so
            verify_results(cfg, results)
    return results


if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    print("Command Line Args:", arguments)
    launch(main, arguments)
