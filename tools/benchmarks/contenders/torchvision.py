"""torchvision's models, transforms and training."""

import dataclasses
import itertools
from typing import Dict, List, Tuple

import torch
from torch import nn

from benchmarks.contenders.base import Contender, Files, detected, endless, over_threshold, sgd
from benchmarks.definitions import config, definition
from benchmarks.inputs import SIZE, read_records, training_batch, worst_case
from benchmarks.machine import Work


class Torchvision(Contender):
    """torchvision's model of the same definition, and its training as in references/detection."""

    def model(self) -> nn.Module:
        cfg = config(self.spec.model, "cpu")
        model = definition(self.spec.model).torchvision(cfg)
        model.load_state_dict(self.weights("torchvision"))
        return model.to(self.spec.device)

    def dataset(self):
        """(image (3, H, W) uint8, {"boxes", "labels"}) of the network's input size."""
        backend = "tensors" if "tensors" in self.spec.contender else "PIL"
        size = tuple(config(self.spec.model, "cpu").MODEL.SSD.INPUT_SIZE)
        preset = definition(self.spec.model).preset
        return TorchvisionFiles(read_records(self.folder), size, preset, backend)

    def _step(self, batches) -> Work:
        model = self.model().train()
        optimizer, values = sgd(model), {}
        to = dict(device=self.spec.device, non_blocking=True)

        def run():
            images, targets = next(batches)
            images = [x.to(**to) / 255 for x in images]
            targets = [{k: v.to(**to) for k, v in x.items()} for x in targets]

            def losses():
                terms = model(images, targets)
                values.update({k: v.detach() for k, v in terms.items()})
                return sum(terms.values())

            self.optimizer_step(losses, optimizer)

        def describe():
            return {
                "loss_cls": float(values["classification"]),
                "loss_box_reg": float(values["bbox_regression"]),
            }

        return Work(run, self.spec.batch_size, describe, queues=True)

    def train_step(self) -> Work:
        size = tuple(config(self.spec.model, "cpu").MODEL.SSD.INPUT_SIZE)
        batch = training_batch(self.folder, self.spec.batch_size, size)
        targets = [{"boxes": x["boxes"], "labels": x["classes"] + 1} for x in batch]
        return self._step(itertools.repeat(([x["image"] for x in batch], targets)))

    def train_loop(self) -> Work:
        batches = endless(self.dataset(), self.spec, lambda batch: tuple(zip(*batch)))
        return dataclasses.replace(self._step(batches), batches=batches)

    def predict(self) -> Work:
        model, images, found = self.model().eval(), self.images(), []

        @torch.no_grad()
        def run():
            with self.autocast():
                found[:] = model([x.to(self.spec.device) / 255 for x in images])

        return Work(
            run, len(images),
            lambda: detected([x["scores"] for x in found]),
        )  # fmt: skip

    @torch.no_grad()
    def network(self) -> Work:
        model = self.model().eval()
        images, _ = model.transform([x.to(self.spec.device) / 255 for x in self.images()])

        @torch.no_grad()
        def run():
            with self.autocast():
                model.head(list(model.backbone(images.tensors).values()))

        return Work(run, len(images.tensors), queues=True)

    @torch.no_grad()
    def postprocess(self) -> Work:
        model = self.model().eval()
        images, _ = model.transform([x.to(self.spec.device) / 255 for x in self.images()])
        with self.autocast():
            features = list(model.backbone(images.tensors).values())
            outputs, anchors = model.head(features), model.anchor_generator(images, features)
        if self.spec.case == "worst":
            real = outputs["cls_logits"]
            logits, offsets = worst_case(real.shape[1], real.shape[2] - 1, real.shape[0])
            outputs = {"cls_logits": logits.roll(1, dims=-1), "bbox_regression": offsets}
            outputs = {k: v.to(real) for k, v in outputs.items()}
        found = []

        @torch.no_grad()
        def run():
            with self.autocast():
                results = model.postprocess_detections(outputs, anchors, images.image_sizes)
            sizes = [SIZE] * len(results)
            found[:] = model.transform.postprocess(results, images.image_sizes, sizes)

        def describe():
            pairs = over_threshold(model.score_thresh, outputs["cls_logits"], 0)
            return pairs | detected([x["scores"] for x in found])

        return Work(run, len(anchors), describe)


class TorchvisionFiles(Files):
    """The JPEG files through the transforms of torchvision's references/detection/presets.py.

    A resize to the input size follows, which there is the model's; the result stays uint8.
    """

    def __init__(self, records: List[Dict], size: Tuple[int, int], preset: str, backend: str):
        from torchvision.transforms import v2

        super().__init__(records)
        self.backend = backend
        transforms = []
        if preset == "ssd":
            fill = tuple(round(255 * x) for x in (0.485, 0.456, 0.406))
            transforms = [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=fill)]
        transforms += [v2.RandomIoUCrop(), v2.RandomHorizontalFlip(0.5), v2.Resize(size)]
        if backend == "PIL":
            transforms.append(v2.PILToTensor())
        self.transform = v2.Compose([*transforms, v2.SanitizeBoundingBoxes(), v2.ToPureTensor()])

    def __getitem__(self, number: int):
        from PIL import Image
        from torchvision import tv_tensors
        from torchvision.io import ImageReadMode, read_image

        record = self.records[number % len(self.records)]
        if self.backend == "PIL":
            with Image.open(record["file_name"]) as file:
                image = file.convert("RGB")
        else:
            image = tv_tensors.Image(read_image(record["file_name"], ImageReadMode.RGB))
        boxes = tv_tensors.BoundingBoxes(record["boxes"], format="XYXY", canvas_size=SIZE)
        return self.transform(image, {"boxes": boxes, "labels": record["classes"] + 1})
