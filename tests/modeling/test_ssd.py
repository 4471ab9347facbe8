"""The whole model, small: training step, inference, sizes, errors."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer
from torch._subclasses.fake_tensor import DataDependentOutputException
from trainers import in_two_processes

from ssd.checkpoint import SSDCheckpointer
from ssd.config import load_config
from ssd.modeling import SSDHead
from ssd.modeling.ssd import _as_one

BASES = Path(__file__).parents[2] / "labs/_base_"
# Four levels (12, 6, 3, 2 cells) on 96×96 pixels
SMALL = """MODEL.DEVICE cpu MODEL.WEIGHTS '' MODEL.SSD.INPUT_SIZE [96,96] MODEL.SSD.NUM_CLASSES 3
    MODEL.SSD.EXTRA_LAYERS [[16,32,3,2,1],[16,32,3,2,1]] MODEL.SSD.DEFAULT_BOXES.STEPS []
    MODEL.SSD.DEFAULT_BOXES.MIN_SIZES [12.0,24.0,48.0,72.0] MODEL.SSD.DEFAULT_BOXES.MAX_SIZE 96.0
    MODEL.SSD.DEFAULT_BOXES.ASPECT_RATIOS [[2.0],[2.0],[2.0],[2.0]]""".split()
LITE = """MODEL.MOBILENET.WIDTH_MULT 0.25
    MODEL.SSD.IN_FEATURES ['stage3','stage5']""".split()


@BACKBONE_REGISTRY.register()
class BackboneOfAUser(Backbone):
    """One map of stride 16, and a buffer that state_dict doesn't hold."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.conv = torch.nn.Conv2d(input_shape.channels, 8, 16, 16)
        self.register_buffer("shift", torch.zeros(1, 8, 1, 1), persistent=False)
        self._out_features = ["map"]
        self._out_feature_channels, self._out_feature_strides = {"map": 8}, {"map": 16}

    def forward(self, x):
        return {"map": self.conv(x) + self.shift}


@BACKBONE_REGISTRY.register()
class BackboneWithACache(BackboneOfAUser):
    """Keeps what depends on the map's size."""

    def __init__(self, cfg, input_shape):
        super().__init__(cfg, input_shape)
        self.rows = {}

    def forward(self, x):
        (x,) = super().forward(x).values()
        rows = x.shape[2]
        if rows not in self.rows:
            self.rows[rows] = torch.arange(rows, device=x.device)[:, None]
        return {"map": x + self.rows[rows]}


def make_config(*opts, base="ssdlite_mobilenetv2"):
    lite = LITE if base == "ssdlite_mobilenetv2" else []
    return load_config(str(BASES / f"{base}.yaml"), [*SMALL, *lite, *opts])


def make_model(*opts, base="ssdlite_mobilenetv2"):
    torch.manual_seed(0)
    return build_model(make_config(*opts, base=base))


def make_predictor(*opts):
    """A model whose BatchNorm has seen a batch, so that its scores differ."""
    model = make_model("MODEL.BATCH_NORM.MOMENTUM", "1.0", *opts)
    with torch.no_grad():
        model(batch())
    return model


def image(height=96, width=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def ground_truth(boxes, classes, size=(96, 96)):
    result = Instances(size)
    result.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return result


def batch(last_class=2):
    two = ground_truth([[5, 5, 60, 50], [40, 30, 52, 45]], [0, last_class])
    return [
        {"image": image(), "instances": two},
        {"image": image(seed=1), "instances": ground_truth([], [])},
        {"image": image(seed=2), "instances": ground_truth([[0, 0, 96, 90]], [last_class])},
    ]  # fmt: skip


def test_images_of_one_memory_are_a_batch_without_a_copy():
    memory = torch.arange(4 * 3 * 6 * 5, dtype=torch.uint8).view(4, 3, 6, 5)
    for images in (list(memory), list(memory[1:3]), [memory[2]]):
        found = _as_one(images)
        assert torch.equal(found, torch.stack(images)) and found.data_ptr() == images[0].data_ptr()
    array = memory.numpy()
    for images in (
        [memory[1], memory[0]], [memory[0], memory[2]], [memory[0], memory[0]],
        [memory[0], torch.zeros(3, 6, 5, dtype=torch.uint8)],
        [torch.from_numpy(array[0]), torch.from_numpy(array)[1]],  # one memory, of two lengths
        list(memory.transpose(2, 3)), list(memory[:, :, :, ::2]), list(memory.transpose(0, 1)),
        list(memory.float().requires_grad_()),
    ):  # fmt: skip
        assert _as_one(images) is None


def test_steps_beside_the_input(caplog):
    fits = make_model(*"MODEL.SSD.DEFAULT_BOXES.STEPS [8,16,32,51]".split())
    assert torch.equal(fits.default_boxes[: 12 * 12 * 4], make_model().default_boxes[: 12 * 12 * 4])
    assert "STEPS" not in caplog.text
    make_model(*"MODEL.SSD.DEFAULT_BOXES.STEPS [8,16,32,64]".split())  # strides, of 2 cells in 96
    assert "level 3, 2 rows and 2 columns, around x and y [64.0, 64.0]" in caplog.text
    with pytest.raises(ValueError, match=r"DEFAULT_BOXES.STEPS put the boxes of level 0, 12 rows"):
        make_model(*"MODEL.SSD.DEFAULT_BOXES.STEPS [16,16,32,48]".split())


@pytest.mark.parametrize("base, num_classes", [
    ("ssd300_vgg16", 1),
    *(("ssdlite_mobilenetv2", number) for number in (1, 3, 80)),
])  # fmt: skip
def test_training_step_of_any_number_of_classes(base, num_classes):
    model = make_model("MODEL.SSD.NUM_CLASSES", str(num_classes), base=base)
    losses = model(batch(num_classes - 1))
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(p.grad.any() for p in model.backbone.bottom_up.parameters())


@pytest.mark.parametrize("num_classes", [1, 3])
def test_steps_lower_the_loss(num_classes):
    model = make_model("MODEL.SSD.NUM_CLASSES", str(num_classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    values = []
    for _ in range(12):
        loss = sum(model(batch(num_classes - 1)).values())
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("normalizer", ["image", "batch", "each"])
def test_batch_without_objects_trains(normalizer):
    model = make_model("MODEL.SSD.LOSS.NORMALIZER", normalizer)
    losses = model([{"image": image(), "instances": ground_truth([], [])}] * 2)
    assert [loss.item() for loss in losses.values()] == [0, 0]
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_batch_without_objects_teaches_negatives_if_asked_for():
    model = make_model("MODEL.SSD.LOSS.NEGATIVES_WITHOUT_POSITIVES", "5")
    losses = model([{"image": image(), "instances": ground_truth([], [])}] * 2)
    assert losses["loss_cls"] > 0 and losses["loss_box_reg"] == 0


def test_one_image_trains_where_a_map_has_one_cell():
    model = make_model(
        *"MODEL.SSD.IN_FEATURES ['stage5'] MODEL.SSD.HEAD lite".split(),
        *"MODEL.SSD.EXTRA_LAYERS [[16,32,3,2,1],[16,32,3,2,1],[16,32,3,2,1]]".split(),
    )
    assert model.boxes_per_level[-1] == 4
    losses = model(batch()[:1])
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


WITHOUT_NORM = "MODEL.SSD.NORM '' MODEL.MOBILENET.NORM ''".split()  # images don't mix


@torch.no_grad()
def losses_of_every_normalizer(inputs):
    """(normalizers, 2): the losses of the classes and of the boxes."""
    model, losses = make_model(*WITHOUT_NORM), []
    for model.loss_normalizer in ("image", "batch", "each"):
        losses.append(torch.stack(list(model(inputs).values())))
    return torch.stack(losses)


def test_two_processes_have_the_loss_of_one(tmp_path):
    inputs = [*batch(), batch()[0]]

    def half(rank):
        losses = losses_of_every_normalizer(inputs[2 * rank : 2 * rank + 2])
        torch.distributed.all_reduce(losses)
        torch.save(losses / 2, tmp_path / str(rank))  # DistributedDataParallel takes the mean

    in_two_processes(half, tmp_path)
    expected = losses_of_every_normalizer(inputs)
    assert len(expected[:, 0].unique()) == 3
    torch.testing.assert_close(torch.load(tmp_path / "0"), expected, rtol=1e-4, atol=1e-5)


def test_normalizer_each_is_the_mean_of_the_images_own_losses():
    model = make_model(*WITHOUT_NORM)
    model.loss_normalizer = "batch"
    alone = [model([x]) for x in batch()]
    model.loss_normalizer = "each"
    for name, loss in model(batch()).items():
        values = [losses[name].item() for losses in alone]
        assert values[0] > 0 and values[1] == 0
        assert loss.item() == pytest.approx(sum(values) / 3, rel=1e-4)


def test_sigmoid_scores():
    model = make_predictor(*"MODEL.SSD.SCORE_FUNCTION sigmoid MODEL.SSD.HEAD conv".split())
    losses = model(batch())
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    (result,) = detect(model, {"image": image()})
    images = model.preprocess_image([{"image": image()}])
    with torch.no_grad():
        features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
        logits, _ = model.head.flatten(*model.head(features))
    expected = logits[0].double().sigmoid()
    assert not torch.allclose(expected.sum(-1), torch.ones(()).double())
    # the best box of each class, but never of the background
    for number in range(3):
        best = result.scores[result.pred_classes == number].max().item()
        assert best == pytest.approx(expected[:, number].max().item(), rel=1e-5)


def test_loss_keys_have_an_effect():
    def losses(*opts):
        return {name: loss.item() for name, loss in make_model(*opts)(batch()).items()}

    plain = losses()
    weighted = losses("MODEL.SSD.LOSS.BOX_WEIGHT", "2.0")
    assert weighted["loss_box_reg"] == pytest.approx(2 * plain["loss_box_reg"])
    assert weighted["loss_cls"] == pytest.approx(plain["loss_cls"])
    assert losses("MODEL.SSD.LOSS.NEG_POS_RATIO", "1.0")["loss_cls"] < plain["loss_cls"]
    beta = losses("MODEL.SSD.LOSS.SMOOTH_L1_BETA", "0.1")
    assert beta["loss_box_reg"] > plain["loss_box_reg"]
    # the image without objects counts as one match
    assert losses("MODEL.SSD.LOSS.NORMALIZER", "batch")["loss_cls"] > plain["loss_cls"]


def test_ground_truth_of_another_size_is_scaled():
    model = make_model()
    big = {
        "image": image(192, 48),
        "instances": ground_truth([[5, 20, 30, 100], [20, 50, 26, 70]], [0, 2], (192, 48)),
    }
    resized = F.interpolate(big["image"][None].float(), (96, 96), mode="bilinear")[0]
    small = {
        "image": resized,
        "instances": ground_truth([[10, 10, 60, 50], [40, 25, 52, 35]], [0, 2]),
    }
    assert {k: v.item() for k, v in model([big]).items()} == pytest.approx(
        {k: v.item() for k, v in model([small]).items()}
    )


def detect(model, *inputs):
    model.eval()
    with torch.no_grad():
        return [result["instances"] for result in model(list(inputs))]


def test_boxes_come_back_in_the_image_s_own_size():
    (result,) = detect(make_predictor(), {"image": image(120, 240)})
    assert result.image_size == (120, 240) and len(result) > 0
    boxes = result.pred_boxes.tensor
    assert (boxes >= 0).all() and (boxes[:, 0::2] <= 240).all() and (boxes[:, 1::2] <= 120).all()
    assert boxes[:, 2].max() > 120  # not in the input's 96 pixels


def test_boxes_come_back_in_the_callers_size():
    model, x = make_predictor(), image(120, 240)
    (own,) = detect(model, {"image": x})
    (asked,) = detect(model, {"image": x, "height": 60, "width": 480})
    assert asked.image_size == (60, 480) and len(asked) == len(own) > 0
    scale = torch.tensor([2, 0.5, 2, 0.5])
    torch.testing.assert_close(asked.pred_boxes.tensor, own.pred_boxes.tensor * scale)
    assert torch.equal(asked.scores, own.scores)


def test_resizing_is_bilinear_without_antialiasing():
    model, x = make_predictor(), image(200, 150)
    resized = F.interpolate(x[None].float(), (96, 96), mode="bilinear", align_corners=False)[0]
    first, second = detect(model, {"image": x}, {"image": resized, "height": 200, "width": 150})
    assert len(first) == len(second) > 0
    torch.testing.assert_close(first.scores, second.scores)
    torch.testing.assert_close(first.pred_boxes.tensor, second.pred_boxes.tensor)


def test_sizes_and_dtypes_may_differ_in_a_batch():
    model = make_predictor()
    inputs = [
        {"image": image()},
        {"image": image(50, 70)},
        {"image": image(seed=1).float()},
        {"image": image(96, 200).double()},
    ]
    for one, together in zip(inputs, detect(model, *inputs)):
        (alone,) = detect(model, one)
        assert len(alone) == len(together) > 0
        assert together.image_size == tuple(one["image"].shape[1:])
        torch.testing.assert_close(alone.scores, together.scores, rtol=1e-4, atol=1e-5)


def test_a_whole_model_in_a_file(tmp_path):
    model = make_model().eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    (expected,), (found,) = detect(model, {"image": image()}), detect(loaded, {"image": image()})
    assert len(expected) and torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_half_precision_takes_images_of_any_size():
    model = make_model().eval().to(torch.bfloat16)
    for size in ((96, 96), (60, 120)):
        assert len(detect(model, {"image": image(*size)})[0])


def test_default_boxes_keep_their_precision():
    exact, model = make_model().default_boxes, make_model()
    assert torch.equal(model.to(torch.bfloat16).default_boxes, exact)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert torch.equal(make_model().half().float().bfloat16().half().default_boxes, exact)
    losses, expected = model(batch()), make_model()(batch())
    for name, loss in losses.items():  # the same matches and targets
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.03)
    assert model.default_boxes.dtype == make_model().double().float().default_boxes.dtype
    double = make_model().double().default_boxes
    assert double.dtype == torch.float64 and torch.equal(double, exact.double())
    moved = make_model().to("meta", torch.bfloat16).default_boxes
    assert moved.is_meta and moved.dtype == torch.float32


def test_the_callers_autocast_counts():
    model, dtypes = make_model().eval(), []
    model.head.register_forward_pre_hook(lambda head, inputs: dtypes.append(inputs[0][0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        detect(model, {"image": image()})
    detect(model, {"image": image()})
    assert dtypes == [torch.bfloat16, torch.float32]


def test_detections_with_gradients_may_be_scaled():
    model = make_predictor().eval()
    instances = model([{"image": image()}])[0]["instances"]
    assert instances.pred_boxes.tensor.requires_grad
    scaled = detector_postprocess(instances, 192, 96)
    expected = detect(model, {"image": image(), "height": 192})[0].pred_boxes.tensor
    torch.testing.assert_close(scaled.pred_boxes.tensor, expected)
    scaled.scores.sum().backward()


def test_tracing_says_what_can_be_traced():
    model = make_model().eval().requires_grad_(False)
    with pytest.raises(RuntimeError, match="trace backbone and head"):
        torch.jit.trace(lambda x: model([{"image": x}])[0]["instances"].scores, image())
    traced = torch.jit.trace(model.backbone, torch.zeros(1, 3, 96, 96), strict=False)
    x = torch.rand(1, 3, 96, 96)
    for name, feature in model.backbone(x).items():
        torch.testing.assert_close(traced(x)[name], feature)

    def head(*features):
        return model.head.flatten(*model.head(list(features)))

    one, four = (tuple(model.backbone(torch.rand(n, 3, 96, 96)).values()) for n in (1, 4))
    for found, expected in zip(torch.jit.trace(head, one)(*four), head(*four)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_classes_that_the_head_does_not_have(wrong):
    with pytest.raises(ValueError, match=f"0 to 2 .MODEL.SSD.NUM_CLASSES is 3., got {wrong}"):
        make_model()(batch(last_class=wrong))
    ignored = batch()
    ignored[0]["instances"] = ground_truth([[5, 5, 5, 50]], [wrong])  # without area
    assert all(map(torch.isfinite, make_model()(ignored).values()))


def test_training_needs_objects():
    for inputs in ([{"image": image()}], [*batch(), {"image": image()}]):
        with pytest.raises(ValueError, match="'instances'.*eval"):
            make_model()(inputs)


def test_classes_may_be_of_any_integer_type():
    model, samples = make_model(), batch()
    expected = model(samples)
    for sample in samples:
        sample["instances"].gt_classes = sample["instances"].gt_classes.int()
    losses = model(samples)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_a_config_without_a_lab_says_what_is_missing():
    with pytest.raises(ValueError, match="MODEL.ANCHOR_GENERATOR.NAME 'DefaultAnchorGenerator'"):
        make_model("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator")


def test_input_may_be_wider_than_high():
    model = make_predictor("MODEL.SSD.INPUT_SIZE", "[64,160]")
    # levels of stride 8, 16, 32, 64
    assert model.boxes_per_level == [8 * 20 * 4, 4 * 10 * 4, 2 * 5 * 4, 1 * 3 * 4]
    assert all(loss.isfinite() for loss in model.train()(batch()).values())
    (result,) = detect(model, {"image": image(64, 160)})
    assert len(result) > 0 and result.image_size == (64, 160)


@BACKBONE_REGISTRY.register()
class BackboneThatReadsNumbers(BackboneOfAUser):
    def forward(self, x):
        assert torch.zeros(1, device=self.conv.weight.device).item() == 0
        return super().forward(x + torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize(
    "name", ["BackboneOfAUser", "BackboneThatReadsNumbers", "BackboneWithACache"]
)
def test_a_backbone_of_ones_own(name):
    model = make_model(
        *f"MODEL.SSD.BOTTOM_UP {name} MODEL.SSD.IN_FEATURES ['map']".split(),
        *"MODEL.SSD.EXTRA_LAYERS [[4,8,3,2,1],[4,8,3,2,1],[4,8,3,2,1]]".split(),
    )
    assert model.boxes_per_level == [6 * 6 * 4, 3 * 3 * 4, 2 * 2 * 4, 1 * 1 * 4]
    losses = model(batch())
    sum(losses.values()).backward()
    assert model.backbone.bottom_up.conv.weight.grad.any()


RESNET18 = "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64"
BY_CONFIG = {
    "mobilenetv1": """MODEL.SSD.BOTTOM_UP build_mobilenetv1_backbone
        MODEL.SSD.IN_FEATURES ['stage3','stage4'] MODEL.SSD.SAME_PADDING True
        MODEL.SSD.EXTRA_BLOCK conv MODEL.SSD.HEAD conv""",
    "mobilenetv2": """MODEL.SSD.IN_FEATURES ['stage6_expand','conv2'] MODEL.SSD.HEAD lite_last_1x1
        MODEL.SSD.EXTRA_BLOCK inverted""",
    "mobilenetv3": """MODEL.SSD.BOTTOM_UP build_mobilenetv3_backbone
        MODEL.SSD.IN_FEATURES ['stage6_expand','conv2'] MODEL.MOBILENET.REDUCED_TAIL True
        MODEL.SSD.EXTRA_BLOCK inverted_se MODEL.SSD.EXTRA_ACTIVATION Hardswish""",
    "regnet": """MODEL.SSD.BOTTOM_UP build_regnet_backbone
        MODEL.SSD.IN_FEATURES ['s2','s3']""",
    "resnet": f"""MODEL.SSD.BOTTOM_UP build_resnet_backbone {RESNET18}
        MODEL.RESNETS.OUT_FEATURES ['res3','res4'] MODEL.SSD.IN_FEATURES ['res3','res4']""",
    "resnet-fpn": f"""MODEL.SSD.BOTTOM_UP build_resnet_fpn_backbone {RESNET18}
        MODEL.RESNETS.OUT_FEATURES ['res3','res4','res5']
        MODEL.FPN.IN_FEATURES ['res3','res4','res5'] MODEL.FPN.OUT_CHANNELS 32
        MODEL.SSD.IN_FEATURES ['p3','p4','p5','p6'] MODEL.SSD.EXTRA_LAYERS []""",
}
SIDES = {"mobilenetv2": [6, 3, 2, 1], "mobilenetv3": [6, 3, 2, 1]}


@pytest.mark.parametrize("name", BY_CONFIG)
def test_backbones_by_config_alone(name):
    model = make_predictor(*BY_CONFIG[name].split())
    sides = SIDES.get(name, [12, 6, 3, 2])
    assert model.boxes_per_level == [side * side * 4 for side in sides]
    sum(model(batch()).values()).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:  # Detectron2 freezes a ResNet's first stages
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.bottom_up.parameters())
    (result,) = detect(model, {"image": image()})
    assert len(result) > 0 and result.pred_boxes.tensor.isfinite().all()


def test_same_padding_reaches_backbone_and_extra_layers():
    plain = make_predictor().eval().requires_grad_(False)
    same = make_model("MODEL.SSD.SAME_PADDING", "True").eval().requires_grad_(False)
    same.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 96, 96)
    for name, expected in plain.backbone(x).items():
        output = same.backbone(x)[name]
        assert output.shape == expected.shape and not torch.allclose(output, expected), name
    layers = [model.backbone.extra_layers[1] for model in (same, plain)]
    x = torch.randn(1, 32, 4, 4) * 10
    assert not torch.allclose(layers[0](x), layers[1](x))
    x = x[:, :, :3, :3]  # an odd size is padded evenly
    torch.testing.assert_close(layers[0](x), layers[1](x))


def test_weights_are_in_the_memory_format():
    for flag, memory_format in (("True", torch.channels_last), ("False", torch.contiguous_format)):
        weight = make_model("MODEL.SSD.CHANNELS_LAST", flag).backbone.bottom_up.conv1.weight
        assert weight.is_contiguous(memory_format=memory_format)


def test_memory_format_changes_no_result():
    results = [
        detect(make_predictor("MODEL.SSD.CHANNELS_LAST", flag), {"image": image()})[0]
        for flag in ("True", "False")
    ]
    assert len(results[0]) == len(results[1])
    torch.testing.assert_close(results[0].scores, results[1].scores, rtol=1e-4, atol=1e-5)


def test_batch_norm_keys_reach_every_layer():
    opts = "MODEL.SSD.L2_NORM BN MODEL.SSD.L2_NORM_FEATURES ['stage5']".split()
    model = make_model("MODEL.BATCH_NORM.EPS", "0.007", "MODEL.BATCH_NORM.MOMENTUM", "0.2", *opts)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(layers) > 30 and model.backbone.l2_norm["stage5"] in layers
    assert {(m.eps, m.momentum) for m in layers} == {(0.007, 0.2)}
    frozen = make_model("MODEL.BATCH_NORM.EPS", "0.007", "MODEL.MOBILENET.NORM", "FrozenBN")
    layers = [m for m in frozen.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(layers) > 20 and {m.eps for m in layers} == {0.007}


@pytest.mark.parametrize("name, feature", [
    ("mobilenetv1", "stage4"), ("mobilenetv2", "stage4"), ("mobilenetv3", "stage4"),
    ("regnet", "s4"), ("ssd_resnet", "res4"), ("ssd", "stage4"),
])  # fmt: skip
def test_batch_norm_keys_reach_our_backbones_in_other_models(name, feature):
    opts = "MODEL.BATCH_NORM.EPS 0.007 MODEL.RESNETS.NORM BN MODEL.BACKBONE.FREEZE_AT 0".split()
    cfg = make_config(*opts, "MODEL.SSD.IN_FEATURES", f"['{feature}']")
    backbone = BACKBONE_REGISTRY.get(f"build_{name}_backbone")(cfg, ShapeSpec(3))
    layers = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(layers) > 20 and {m.eps for m in layers} == {0.007}


@pytest.mark.parametrize("base, best, normalizer", [  # each value once: nothing joins them
    ("ssd300_vgg16", "argmax", "image"),
    ("ssdlite_mobilenetv2", "bipartite", "batch"),
    ("ssdlite_mobilenetv2", "argmax", "each"),
])  # fmt: skip
def test_losses_on_a_gpu_never_wait_for_it(base, best, normalizer, fake_gpu, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)  # there is none without a GPU
    monkeypatch.setattr("ssd.modeling.ssd._check_classes", lambda *args: None)  # on the host
    opts = ("MODEL.SSD.MATCHING.BEST", best, "MODEL.SSD.LOSS.NORMALIZER", normalizer)
    model = make_model(*opts, base=base)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with fake_gpu:
        state = {name: torch.empty_like(x, device="cuda") for name, x in tensors}
        inputs = [{**x, "image": torch.empty_like(x["image"], device="cuda")} for x in batch()]
        losses = torch.func.functional_call(model, state, (inputs,))
        with pytest.raises(DataDependentOutputException):
            float(losses["loss_cls"])
    assert {x.device.type for x in losses.values()} == {"cuda"}


def test_default_boxes_are_a_buffer_that_no_checkpoint_holds():
    model = make_model()
    assert "default_boxes" in dict(model.named_buffers())
    assert "default_boxes" not in model.state_dict()


def test_head_that_does_not_fit_the_default_boxes():
    model = make_model()
    shapes = list(model.backbone.output_shape().values())
    model.head = SSDHead([s.channels for s in shapes], [3, 4, 4, 4], model.num_classes)
    # 144 · 3 + (36 + 9 + 4) · 4 = 628 of (144 + 36 + 9 + 4) · 4 = 772
    with pytest.raises(ValueError, match="628 boxes.* 772 default boxes"):
        detect(model, {"image": image()})


@pytest.mark.parametrize(
    "key, value",
    [
        ("NUM_CLASSES", "0"),
        ("INPUT_SIZE", "[96,-96]"),
        ("INPUT_SIZE", "[96]"),
        ("INPUT_SIZE", "[8,8]"),
        ("INPUT_SIZE", "[128,64]"),  # the last map would be 2x0
        ("TOPK_PER", "box"),
        ("BBOX_REG_CLAMP", "lower"),
        ("MATCHING.BEST", "greedy"),
        ("LOSS.NORMALIZER", "boxes"),
        ("LOSS.NEG_POS_RATIO", "-1.0"),
        ("LOSS.NEG_POS_RATIO", "float('inf')"),
        ("LOSS.NEGATIVES_WITHOUT_POSITIVES", "-1"),
        ("LOSS.SMOOTH_L1_BETA", "-1.0"),
        ("LOSS.BOX_WEIGHT", "-1.0"),
        ("MATCHING.IOU_THRESHOLD", "-1.0"),
        ("SCORE_THRESH_TEST", "2.0"),
        ("NMS_THRESH_TEST", "1.5"),
        ("TOPK_CANDIDATES_TEST", "-1"),
        ("BBOX_REG_WEIGHTS", "[10.0,10.0,5.0]"),
        ("BBOX_REG_WEIGHTS", "[10.0,10.0,5.0,0.0]"),
        ("SCORE_FUNCTION", "relu"),
        ("HEAD", "heavy"),
        ("EXTRA_BLOCK", "residual"),
        ("EXTRA_ACTIVATION", "relu"),
        ("NORM", "bn"),
        ("DEFAULT_BOXES.CLIP", "corners"),
        ("DEFAULT_BOXES.MIN_SIZES", "[12.0,12.0,48.0,72.0]"),
        ("DEFAULT_BOXES.MIN_SIZES", "[12.0,24.0,48.0]"),
        ("DEFAULT_BOXES.ASPECT_RATIOS", "[[2.0],[-2.0],[2.0],[2.0]]"),
        ("IN_FEATURES", "['stage6_expand']"),
        ("IN_FEATURES", "['res3']"),
    ],
)
def test_wrong_value_is_an_error_before_training(key, value):
    extra = ["MODEL.SSD.EXTRA_LAYERS", "[[16,32,3,2,1],[16,32,3,1,0]]"]
    with pytest.raises(ValueError, match=rf"MODEL\.SSD\.{key}"):
        make_model(f"MODEL.SSD.{key}", value, *(extra if key == "INPUT_SIZE" else []))


@pytest.mark.parametrize(
    "key, value",
    [
        ("TEST.DETECTIONS_PER_IMAGE", "-1"),  # Detectron2's "no limit" would be none at all
        ("TEST.DETECTIONS_PER_IMAGE", "0"),
        ("MODEL.PIXEL_STD", "[1.0,0.0,1.0]"),
        ("MODEL.PIXEL_MEAN", "[100.0]"),
        ("MODEL.BATCH_NORM.MOMENTUM", "2.0"),
        ("MODEL.BATCH_NORM.EPS", "0.0"),
    ],
)
def test_wrong_value_of_detectron2s_keys(key, value):
    with pytest.raises(ValueError, match=re.escape(key)):
        make_model(key, value)


def test_detectron2s_predictor_and_visualizer(tmp_path):
    cfg = make_config("MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    model = make_predictor()
    SSDCheckpointer(model, str(tmp_path)).save("model")
    array = image(120, 160).permute(1, 2, 0).contiguous().numpy()  # BGR, as cv2 reads

    result = DefaultPredictor(cfg)(array)["instances"]

    rgb = torch.from_numpy(array[:, :, ::-1].copy()).permute(2, 0, 1)
    (expected,) = detect(model, {"image": rgb})
    assert result.image_size == (120, 160) and len(result) == len(expected) > 0
    torch.testing.assert_close(result.scores, expected.scores)
    torch.testing.assert_close(result.pred_boxes.tensor, expected.pred_boxes.tensor)
    metadata = MetadataCatalog.get("test_ssd").set(thing_classes=["a", "b", "c"])
    drawn = Visualizer(array[:, :, ::-1], metadata).draw_instance_predictions(result[:5])
    assert drawn.get_image().shape == array.shape
    assert (drawn.get_image() != array[:, :, ::-1]).any()
