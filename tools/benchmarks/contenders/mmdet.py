"""MMDetection's models, pipelines and training."""

import dataclasses
import itertools
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import torch
from torch import Tensor, nn

from benchmarks.contenders.base import Contender, Files, detected, endless, over_threshold, sgd
from benchmarks.definitions import config, definition
from benchmarks.inputs import SIZE, read_records, training_batch, worst_case_maps
from benchmarks.machine import Spec, Work


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

        batches = endless(self.dataset(), self.spec, pseudo_collate)
        return dataclasses.replace(self._step(batches), batches=batches)

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
        batch = self._batch(model)
        with self.autocast():
            maps = model.bbox_head(model.extract_feat(batch))
        num_outputs = model.bbox_head.cls_out_channels
        if self.spec.case == "worst":
            maps = worst_case_maps(maps, num_outputs - 1)
        meta = {"img_shape": size, "ori_shape": SIZE, "scale_factor": self._scale(size)}
        found = []

        @torch.no_grad()
        def run():
            with self.autocast():
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
