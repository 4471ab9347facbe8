"""The contenders: each builds the work that is timed, a task's method per class.

What a user of the project would write, with the settings of its own definition.
"""

import contextlib
import importlib.util
import itertools
import os
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.definitions import config, definition
from benchmarks.inputs import (
    SIZE,
    photographs,
    read_records,
    training_batch,
    worst_case,
)
from benchmarks.machine import TORCH, Spec, Work

RATE = 1e-12  # learning rate: the losses stay those of the first step


class Contender:
    """One project's side of every task that it knows."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.folder = Path(spec.folder)
        self.scaler = torch.amp.GradScaler(enabled=spec.dtype == "fp16")
        if spec.task == "data":
            torch.set_num_threads(1)
            cv2.setNumThreads(0)

    def work(self) -> Work:
        return getattr(self, self.spec.task.replace("-", "_"))()

    def autocast(self):
        if self.spec.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.spec.device, TORCH[self.spec.dtype])

    def weights(self, side: str) -> Dict[str, Tensor]:
        path = self.folder / f"{self.spec.model}_{side}.pth"
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def images(self) -> List[Tensor]:
        return photographs(self.folder, self.spec.batch_size)

    def samples(self, dataset, file_name: Callable, count: int = 32) -> Work:
        """``count`` further samples of a data set at a time, asked for as torch's loaders do."""
        numbers, files = itertools.count(), []
        read = getattr(dataset, "__getitems__", None) or (lambda batch: [dataset[n] for n in batch])

        def run():
            batch = list(itertools.islice(numbers, count))
            files.extend(map(file_name, batch, read(batch)))

        return Work(
            run, count, lambda: {"files_read": len(files), "distinct_files": len(set(files))}
        )

    def optimizer_step(self, losses: Callable[[], Tensor], optimizer) -> None:
        with self.autocast():
            loss = losses()
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()


def detected(scores: Sequence[Tensor]) -> Dict:
    """Of each image's detections: how many, and how sure."""
    joined = torch.cat(list(scores)).float()
    return {
        "detections_per_image": len(joined) / len(scores),
        "mean_score": float(joined.mean()) if len(joined) else 0.0,
    }


def over_threshold(thresh: float, logits: Tensor, background: int) -> Dict:
    """The (box, class) pairs of an image, of logits (N, R, K + 1)."""
    scores = logits.detach().float().softmax(dim=-1)
    scores[..., background] = 0
    return {"pairs_per_image": int((scores > thresh).sum()) / len(scores)}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4)


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
            model, loader, optimizer, amp.DTYPE if amp.ENABLED else "", late=bool(late)
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
        return self._training(cfg, build_train_loader(cfg))

    def _inference_model(self) -> nn.Module:
        cfg = self.config()
        model = self.model(cfg).eval()
        if importlib.util.find_spec("ssd.inference"):
            from ssd.inference import optimize

            model = optimize(model, cfg)
        return model

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
        if self.spec.device != "cuda":
            return function
        from ssd.inference import CudaGraph

        return CudaGraph(function)

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
            maps = ([], [])
            shape = len(model.default_boxes), model.num_classes, len(images)
            for flat, levels in zip(worst_case(*shape), maps):
                parts = flat.split(model.boxes_per_level, dim=1)
                for part, like in zip(parts, predictions[1]):
                    grid = part.reshape(len(images), *like.shape[-2:], -1)
                    levels.append(grid.permute(0, 3, 1, 2).to(like.device))
            predictions = maps
        sizes, found = [SIZE] * len(images), []
        output = output_transform(sizes, model.input_size).to(self.spec.device)

        def find(logits: Tensor, deltas: Tensor):
            if not hasattr(model, "find"):  # another checkout
                return model.scores(logits), deltas
            return model.find(logits, deltas, output)

        find = self._as_graph(find)

        @torch.no_grad()
        def run():
            scores, deltas, *first = find(*model.head.flatten(*predictions))
            first = {"first": [x.clone() for x in first]} if first else {}
            found[:] = model.detect(scores, deltas, sizes, **first)

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

    def data(self) -> Work:
        dataset = self.dataset()
        return self.samples(dataset, lambda number, sample: dataset.file_name(number))

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
        return self._step(endless(self.dataset(), self.spec, lambda batch: tuple(zip(*batch))))

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
        features = list(model.backbone(images.tensors).values())
        outputs, anchors = model.head(features), model.anchor_generator(images, features)
        if self.spec.case == "worst":
            shape = outputs["cls_logits"].shape
            logits, offsets = worst_case(shape[1], shape[2] - 1, shape[0])
            outputs = {"cls_logits": logits.roll(1, dims=-1), "bbox_regression": offsets}
            outputs = {k: v.to(self.spec.device) for k, v in outputs.items()}
        found = []

        @torch.no_grad()
        def run():
            results = model.postprocess_detections(outputs, anchors, images.image_sizes)
            sizes = [SIZE] * len(results)
            found[:] = model.transform.postprocess(results, images.image_sizes, sizes)

        def describe():
            pairs = over_threshold(model.score_thresh, outputs["cls_logits"], 0)
            return pairs | detected([x["scores"] for x in found])

        return Work(run, len(anchors), describe)


class Files(torch.utils.data.Dataset):
    """JPEG files and their boxes, over again if more are asked for."""

    def __init__(self, records: List[Dict]):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def file_name(self, number: int) -> str:
        return self.records[number % len(self.records)]["file_name"]


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


def endless(dataset, spec: Spec, collate: Callable):
    """Shuffled batches, epoch after epoch."""
    loader = torch.utils.data.DataLoader(
        dataset, spec.batch_size, shuffle=True, num_workers=spec.workers, collate_fn=collate,
        drop_last=True, pin_memory=spec.device == "cuda", persistent_workers=spec.workers > 0,
    )  # fmt: skip
    while True:
        yield from loader


class MMDetection(Contender):
    """MMDetection 3.3's own config, pipelines and model."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        import mmdet
        from mmdet.utils import register_all_modules
        from mmengine.config import Config

        register_all_modules()
        package = Path(mmdet.__file__).parent
        name = f"ssd/{definition(spec.model).mmdet}.py"
        folders = (package / ".mim/configs", package.parent / "configs")
        path = next(x / name for x in folders if (x / name).is_file())
        self.cfg = Config.fromfile(str(path))

    def model(self) -> nn.Module:
        from mmdet.registry import MODELS

        model = MODELS.build(self.cfg.model)
        model.bbox_head.loss_cls = None  # 3.3.0 can't predict without
        model.load_state_dict(self.weights("mmdet"))
        return model.to(self.spec.device)

    def dataset(self) -> "MMDetectionFiles":
        from mmengine.dataset import Compose

        dataset = self.cfg.train_dataloader.dataset
        while "pipeline" not in dataset:  # in a RepeatDataset
            dataset = dataset.dataset
        return MMDetectionFiles(read_records(self.folder), Compose(dataset.pipeline))

    def data(self) -> Work:
        dataset = self.dataset()
        return self.samples(dataset, lambda number, sample: dataset.file_name(number))

    def _step(self, batches) -> Work:
        model = self.model().train()
        optimizer, values = sgd(model), {}

        def run():
            data = model.data_preprocessor(next(batches), True)

            def losses():
                terms = model(**data, mode="loss")
                values.update({k: torch.stack([*v]).detach().sum() for k, v in terms.items()})
                return model.parse_losses(terms)[0]

            self.optimizer_step(losses, optimizer)

        def describe():
            names = {"loss_cls": "loss_cls", "loss_bbox": "loss_box_reg"}
            return {ours: float(values[theirs]) for theirs, ours in names.items()}

        return Work(run, self.spec.batch_size, describe, queues=True)

    def train_step(self) -> Work:
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

        size = tuple(config(self.spec.model, "cpu").MODEL.SSD.INPUT_SIZE)
        images, samples = [], []
        for x in training_batch(self.folder, self.spec.batch_size, size):
            images.append(x["image"].flip(0).contiguous())  # BGR
            shape = {"img_shape": size, "ori_shape": SIZE, "img_id": x["image_id"]}
            sample = DetDataSample(metainfo={**shape, "scale_factor": self._scale(size)})
            # of torchvision's 90 ids its own definition has 80 classes
            labels = x["classes"] % self.cfg.model.bbox_head.num_classes
            sample.gt_instances = InstanceData(bboxes=x["boxes"], labels=labels)
            samples.append(sample)
        return self._step(itertools.repeat({"inputs": images, "data_samples": samples}))

    def train_loop(self) -> Work:
        from mmengine.dataset import pseudo_collate

        return self._step(endless(self.dataset(), self.spec, pseudo_collate))

    def predict(self) -> Work:
        from mmengine.dataset import Compose, pseudo_collate

        steps = [x for x in self.cfg.test_pipeline if x["type"] != "LoadAnnotations"]
        pipeline = Compose([{"type": "mmdet.LoadImageFromNDArray"}, *steps[1:]])
        model, found = self.model().eval(), []
        arrays = [x.flip(0).permute(1, 2, 0).contiguous().numpy() for x in self.images()]

        @torch.no_grad()
        def run():
            data = [pipeline({"img": x, "img_id": i}) for i, x in enumerate(arrays)]
            with self.autocast():
                found[:] = model.test_step(pseudo_collate(data))

        return Work(run, len(arrays), lambda: detected([x.pred_instances.scores for x in found]))

    def _batch(self, model) -> Tensor:
        """Normalised, of the network's input size."""
        size = tuple(config(self.spec.model, "cpu").MODEL.SSD.INPUT_SIZE)
        images = [nn.functional.interpolate(x[None].float(), size)[0] for x in self.images()]
        preprocessor = model.data_preprocessor
        mean, std = preprocessor.mean.cpu(), preprocessor.std.cpu()
        return ((torch.stack(images) - mean) / std).to(self.spec.device)

    def network(self) -> Work:
        model = self.model().eval()
        batch = self._batch(model)

        @torch.no_grad()
        def run():
            with self.autocast():
                model.bbox_head(model.extract_feat(batch))

        return Work(run, len(batch), queues=True)

    @torch.no_grad()
    def postprocess(self) -> Work:
        model, images = self.model().eval(), self.images()
        size = tuple(config(self.spec.model, "cpu").MODEL.SSD.INPUT_SIZE)
        maps = model.bbox_head(model.extract_feat(self._batch(model)))
        shapes = [tuple(x.shape[-2:]) for x in maps[0]]
        num_outputs = model.bbox_head.cls_out_channels
        per_level = [x[0].numel() // num_outputs for x in maps[0]]
        if self.spec.case == "worst":
            flat = worst_case(sum(per_level), num_outputs - 1, len(images))
            maps = [
                [
                    part.reshape(len(images), *shape, -1).permute(0, 3, 1, 2).to(self.spec.device)
                    for part, shape in zip(x.split(per_level, dim=1), shapes)
                ]
                for x in flat
            ]
        meta = {"img_shape": size, "ori_shape": SIZE, "scale_factor": self._scale(size)}
        found = []

        @torch.no_grad()
        def run():
            found[:] = model.bbox_head.predict_by_feat(
                *maps, batch_img_metas=[meta] * len(images), rescale=True
            )

        logits = torch.cat(
            [x.permute(0, 2, 3, 1).reshape(len(x), -1, num_outputs) for x in maps[0]], dim=1
        )
        thresh = self.cfg.model.test_cfg.score_thr
        return Work(
            run,
            len(images),
            lambda: over_threshold(thresh, logits, -1) | detected([x.scores for x in found]),
        )

    def _scale(self, size: Tuple[int, int]) -> Tuple[float, float]:
        return size[1] / SIZE[1], size[0] / SIZE[0]


class MMDetectionFiles(Files):
    """The JPEG files through a pipeline of MMDetection's."""

    def __init__(self, records: List[Dict], pipeline: Callable):
        super().__init__(records)
        self.pipeline = pipeline

    def __getitem__(self, number: int):
        record = self.records[number % len(self.records)]
        instances = [
            {"bbox": box, "bbox_label": label, "ignore_flag": 0}
            for box, label in zip(record["boxes"].tolist(), record["classes"].tolist())
        ]
        while True:  # the pipeline gives None for an image that lost all its boxes
            sample = self.pipeline(
                {
                    "img_path": record["file_name"], "img_id": record["image_id"],
                    "height": SIZE[0], "width": SIZE[1],
                    "instances": [dict(x) for x in instances],
                }
            )  # fmt: skip
            if sample is not None:
                return sample


class Decoding(Contender):
    """The limit of ``data``: cv2.imread and nothing else.

    A program that only calls cv2.imread spends a third of the time or more on new memory; without
    that it is the limit.
    """

    def data(self) -> Work:
        if "reused" in self.spec.contender:
            from ssd.memory import keep_freed_memory

            keep_freed_memory()
        records = read_records(self.folder)
        names = [record["file_name"] for record in records]

        class Files:
            def __getitem__(self, number):
                return cv2.imread(names[number % len(names)])

        return self.samples(Files(), lambda number, image: names[number % len(names)])


def detections(folder: Path) -> Tuple[List[Dict], List[Dict]]:
    """Inputs and outputs of a detector for the synthetic images of ``eval``."""
    from detectron2.structures import Boxes, Instances

    inputs, outputs = [], []
    with np.load(folder / "eval.npz") as file:
        values = torch.from_numpy(file["arr_0"])
    for number, x in enumerate(values):
        instances = Instances(SIZE, pred_boxes=Boxes(x[:, :4]), scores=x[:, 4])
        instances.pred_classes = x[:, 5].long()
        inputs.append({"image_id": number, "file_name": f"{number}.jpg"})
        outputs.append({"instances": instances})
    return inputs, outputs


def register_evaluation(folder: Path) -> None:
    """As "eval" in Detectron2's catalogs."""
    from detectron2.data.datasets import register_coco_instances

    register_coco_instances("eval", {}, str(folder / "eval.json"), "")


def evaluate_with(evaluator, folder: Path) -> Work:
    """Detectron2's protocol: 8 images at a time, then the results."""
    inputs, outputs = detections(folder)
    results = {}

    def run():
        evaluator.reset()
        for i in range(0, len(inputs), 8):
            evaluator.process(inputs[i : i + 8], outputs[i : i + 8])
        results.update(evaluator.evaluate()["bbox"])

    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    return Work(run, len(inputs), lambda: {name: float(results[name]) for name in names})


class Pycocotools(Contender):
    """pycocotools from the same detections, without what Detectron2 adds."""

    def eval(self) -> Work:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth = COCO(str(self.folder / "eval.json"))
        inputs, outputs = detections(self.folder)
        stats = []

        def run():
            found = []
            for record, output in zip(inputs, outputs):
                instances = output["instances"]
                boxes = instances.pred_boxes.tensor.clone()
                boxes[:, 2:] -= boxes[:, :2]
                fields = boxes, instances.scores, instances.pred_classes
                found += [
                    {
                        "image_id": record["image_id"], "bbox": box, "score": score,
                        "category_id": label + 1,
                    }
                    for box, score, label in zip(*(x.tolist() for x in fields))
                ]  # fmt: skip
            evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            stats[:] = evaluation.stats[:6]

        names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        return Work(
            run, len(inputs), lambda: {name: 100 * float(x) for name, x in zip(names, stats)}
        )


class Detectron2(Contender):
    """Detectron2's evaluator with its compiled COCOeval_opt."""

    def eval(self) -> Work:
        from detectron2.data import DatasetCatalog
        from detectron2.evaluation import COCOEvaluator

        register_evaluation(self.folder)
        DatasetCatalog.get("eval")  # the ids of its classes are known once it has been read
        evaluator = COCOEvaluator(
            "eval", ("bbox",), output_dir=str(self.folder / "detectron2"), use_fast_impl=True
        )
        return evaluate_with(evaluator, self.folder)


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
