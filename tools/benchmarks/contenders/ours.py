"""This project."""

import dataclasses
import functools
import itertools
import os
from typing import Callable, Dict, List

import torch
from torch import Tensor, nn

from benchmarks.contenders.base import RATE, Contender, detected, over_threshold
from benchmarks.contenders.evaluation import evaluate_with, register_evaluation
from benchmarks.definitions import config
from benchmarks.inputs import SIZE, training_batch, worst_case_maps
from benchmarks.machine import Work


class Ours(Contender):
    """This project, or another checkout of it."""

    def config(self, *opts):
        spec = self.spec
        dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "bfloat16"}[spec.dtype]
        return config(
            spec.model, spec.device, "SOLVER.AMP.ENABLED", spec.dtype != "fp32",
            "SOLVER.AMP.DTYPE", dtype, "SOLVER.BASE_LR", RATE,
            "TEST.DTYPE", "float32" if spec.dtype == "fp32" else dtype,
            "SOLVER.IMS_PER_BATCH", spec.batch_size, *opts, *spec.opts,
        )  # fmt: skip

    def files_config(self, workers: int):
        """Of the JPEG files as training set."""
        os.environ["DETECTRON2_DATASETS"] = str(self.folder)
        entry = {"FORMAT": "coco", "ROOT": ".", "ANNOTATIONS": "train.json", "IMAGES": "images"}
        return self.config(
            "DATASETS.REGISTER", {"benchmark": entry}, "DATASETS.TRAIN", ("benchmark",),
            "DATASETS.TEST", ("benchmark",), "DATALOADER.NUM_WORKERS", workers,
        )  # fmt: skip

    def model(self, cfg) -> nn.Module:
        from detectron2.modeling import build_model

        model = build_model(cfg)
        model.load_state_dict(self.weights("ours"))
        return model

    def data(self) -> Work:
        from ssd.data.loader import build_train_loader

        dataset = build_train_loader(self.files_config(workers=0)).dataset
        return self.samples(dataset, lambda number, sample: sample["file_name"])

    def _training_model(self, cfg) -> nn.Module:
        from ssd.inference import compile_network

        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK  # as Detectron2's default_setup
        model = self.model(cfg)
        if cfg.MODEL.COMPILE:
            compile_network(model)
        return model

    def _training(self, cfg, loader) -> Work:
        from detectron2.utils.events import EventStorage

        from ssd.engine import Trainer, TrainingStep

        model = self._training_model(cfg)
        optimizer = Trainer.build_optimizer(cfg, model)
        amp, late = cfg.SOLVER.AMP, optimizer.defaults.get("fused", False)
        step = TrainingStep(
            model, loader, optimizer, amp.DTYPE if amp.ENABLED else None, late=bool(late)
        )
        step.iter, step.storage = 0, EventStorage(0)

        def run():
            with step.storage:
                step.run_step()

        def losses():
            return {k: v for k, (v, _) in step.storage.latest().items() if k.startswith("loss_")}

        return Work(run, self.spec.batch_size, losses, queues=True)

    def _batch(self, cfg) -> List[Dict]:
        from detectron2.structures import Boxes, Instances

        size = tuple(cfg.MODEL.SSD.INPUT_SIZE)
        return [
            {
                "image": x["image"], "height": SIZE[0], "width": SIZE[1],
                "file_name": x["file_name"],
                "instances": Instances(size, gt_boxes=Boxes(x["boxes"]), gt_classes=x["classes"]),
            }
            for x in training_batch(self.folder, self.spec.batch_size, size)
        ]  # fmt: skip

    def train_step(self) -> Work:
        cfg = self.config()
        return self._training(cfg, itertools.repeat(self._batch(cfg)))

    def losses(self) -> Work:
        from ssd.memory import keep_freed_memory

        if self.spec.device == "cpu":
            keep_freed_memory()  # as the training step
        cfg = self.config()
        model, batch, found = self._training_model(cfg), self._batch(cfg), {}
        images = model.preprocess_image(batch)
        maps = [
            [x.detach().requires_grad_() for x in levels]
            for levels in self._outputs(model)(images.tensor)
        ]
        gt_instances, leaves = [x["instances"] for x in batch], [x for xs in maps for x in xs]

        def run():
            with self.autocast():
                found.update(model.forward_training(images, [], maps, gt_instances))
            torch.autograd.grad(sum(found.values()), leaves)

        return Work(run, len(batch), lambda: {k: x.item() for k, x in found.items()}, queues=True)

    def train_loop(self) -> Work:
        from ssd.data.loader import build_train_loader

        cfg = self.files_config(self.spec.workers)
        batches = iter(build_train_loader(cfg))
        return dataclasses.replace(self._training(cfg, batches), batches=batches)

    def _inference_model(self) -> nn.Module:
        from ssd.inference import optimize

        cfg = self.config()
        return optimize(self.model(cfg).eval(), cfg)

    def predict(self) -> Work:
        model, images, found = self._inference_model(), self.images(), []
        inputs = [{"image": x, "height": SIZE[0], "width": SIZE[1]} for x in images]

        @torch.no_grad()
        def run():
            found[:] = model(inputs)

        return Work(
            run, len(images),
            lambda: detected([x["instances"].scores for x in found]),
        )  # fmt: skip

    def _outputs(self, model: nn.Module) -> Callable:
        """Images (N, 3, H, W), normalised, to the maps that the head predicts."""

        @torch.no_grad()
        def outputs(images: Tensor):
            with self.autocast():
                features = model.backbone(images)
                return model.head([features[name] for name in model.head_in_features])

        return outputs

    def _as_graph(self, function: Callable) -> Callable:
        """As inference runs it."""
        if self.spec.device != "cuda" or not self.config().TEST.CUDA_GRAPH:
            return function
        try:
            from ssd.cuda_graph import CudaGraph
        except ImportError:  # another checkout
            from ssd.inference import CudaGraph

            return CudaGraph(function)
        return functools.partial(CudaGraph(), function)

    def network(self) -> Work:
        model = self._inference_model()
        images = model.preprocess_image([{"image": x} for x in self.images()]).tensor
        outputs = self._outputs(model)
        run = self._as_graph(lambda images: model.head.flatten(*outputs(images)))
        return Work(lambda: run(images), len(images), queues=True)

    @torch.no_grad()
    def postprocess(self) -> Work:
        from ssd.modeling.postprocessing import output_transform

        model = self._inference_model()
        images = model.preprocess_image([{"image": x} for x in self.images()]).tensor
        predictions = self._outputs(self.model(self.config()).eval())(images)
        if self.spec.case == "worst":
            predictions = worst_case_maps(predictions, model.num_classes)
        sizes, found = [SIZE] * len(images), []
        output = output_transform(sizes, model.input_size).to(self.spec.device)

        def find(logits: Tensor, deltas: Tensor):
            if not hasattr(model, "find"):  # another checkout
                return model.scores(logits), deltas
            return model.find(logits, deltas, output)

        find = self._as_graph(find)

        @torch.no_grad()
        def run():
            logits, deltas, *first = find(*model.head.flatten(*predictions))
            first = {"first": [x.clone() for x in first]} if first else {}
            found[:] = model.detect(logits, deltas, sizes, **first)

        logits = model.head.flatten(*predictions)[0]
        thresh = model.detection["score_thresh"]
        return Work(
            run,
            len(images),
            lambda: over_threshold(thresh, logits, -1) | detected([x.scores for x in found]),
        )

    def eval(self) -> Work:
        from ssd.evaluation import build_evaluator

        register_evaluation(self.folder)
        cfg = self.config("TEST.EVALUATORS", ["coco"])
        evaluator = build_evaluator(cfg, "eval", str(self.folder / self.spec.contender))
        return evaluate_with(evaluator, self.folder)
