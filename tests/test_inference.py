"""What inference does to a model changes its speed, not its results."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from torch import nn
from torch.nn.utils import prune

from ssd import model_zoo
from ssd.config import load_config
from ssd.cuda_graph import CudaGraph
from ssd.engine import Trainer
from ssd.inference import compile_network, fold_batch_norm, fuse_relu, optimize
from ssd.modeling.blocks import conv_block

LABS = {
    "ssdlite_mobilenetv2_size320_600e": "MODEL.MOBILENET.WIDTH_MULT 0.25",
    "ssdlite_mobilenetv3_size320_voc0712": "MODEL.MOBILENET.WIDTH_MULT 0.25",
    "ssd_resnet50_size300": "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64",
}


def make(lab, *opts):
    """(config, model in evaluation mode) with BatchNorm statistics that matter."""
    small = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *LABS.get(lab, "").split()]
    cfg = load_config(model_zoo.get_config_file(lab), [*small, *opts])
    torch.manual_seed(0)
    model = build_model(cfg)
    for module in model.modules():
        if hasattr(module, "running_var"):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.1)
    return cfg, model.eval()


def outputs(model, dtype=torch.float64):
    image = torch.rand(1, 3, *model.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, deltas = model.to(dtype).head(list(model.backbone(image.to(dtype)).values()))
    return [*logits, *deltas]


@pytest.mark.parametrize(
    "lab, frozen", [*((lab, False) for lab in LABS), ("ssdlite_mobilenetv3_size320_voc0712", True)]
)
def test_folded_network_has_the_same_outputs(lab, frozen):
    opts = "MODEL.RESNETS.NORM FrozenBN MODEL.MOBILENET.NORM FrozenBN MODEL.SSD.NORM FrozenBN"
    cfg, model = make(lab, *(opts.split() if frozen else []))
    fast = optimize(model, cfg)
    left = [x for x in fast.modules() if isinstance(x, Conv2d) and x.norm is not None]
    assert not left and fast is not model and not fast.training
    before = model.state_dict()
    for expected, actual in zip(outputs(model), outputs(fast), strict=True):
        assert expected.abs().mean() > 1e-3, "something must be seen"
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().mean())
    assert before.keys() == model.state_dict().keys(), "the trained model stays as it is"


def test_folding_keeps_the_memory_format():
    _, model = make("ssdlite_mobilenetv2_size320_600e")
    fold_batch_norm(model)
    weight = model.backbone.bottom_up.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_strided_convolutions_are_fused_with_their_relu_too():
    settings = {"norm": "", "activation": "ReLU"}
    model = nn.Sequential(*(conv_block(8, 8, 3, stride=x, **settings) for x in (1, 2)))
    fuse_relu(model)
    assert type(model[0]) is type(model[1]) is not Conv2d


def test_a_model_without_norm_is_not_copied():
    cfg, model = make("ssd_vgg16_size300_120e")
    assert optimize(model.train(), cfg) is model and model.training
    wrapped = nn.Module()
    wrapped.module = model  # as DistributedDataParallel has it
    assert optimize(wrapped, cfg) is model
    assert optimize(other := nn.BatchNorm2d(3), cfg) is other


def detections(model, size=(96, 96)):
    image = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model([{"image": image.to(torch.uint8)}])[0]["instances"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_detections_in_each_type(tiny_cfg, dtype):
    cfg = tiny_cfg("TEST.DTYPE", dtype, "MODEL.SSD.SCORE_THRESH_TEST", "0.1")
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    expected, actual = detections(model), detections(optimize(model, cfg))
    assert len(expected) > 20 and actual.scores.dtype == torch.float32
    scores = [x.scores[: min(len(expected), len(actual))] for x in (expected, actual)]
    tolerance = 1e-6 if dtype == "float32" else 0.01
    torch.testing.assert_close(*scores, rtol=0, atol=tolerance)
    assert (dtype == "bfloat16") == (not torch.equal(*scores)) or dtype == "float32"
    # training isn't in that type
    assert optimize(model, cfg).inference_dtype == (None if dtype == "float32" else torch.bfloat16)
    assert model.inference_dtype is None


class StandardisedConv(Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self.norm(torch.nn.functional.conv2d(x, weight))


@pytest.mark.parametrize("kind", ["subclass", "pruned", "norm without statistics"])
def test_what_cannot_be_folded_stays(kind):
    cls = StandardisedConv if kind == "subclass" else Conv2d
    norm = nn.BatchNorm2d(4, track_running_stats=kind != "norm without statistics")
    conv = cls(3, 4, 1, norm=norm)
    if kind == "pruned":
        prune.l1_unstructured(conv, "weight", amount=0.5)
    if norm.running_var is not None:
        norm.running_var.fill_(0.3)
    model, x = nn.Sequential(conv).eval(), torch.rand(2, 3, 5, 5)
    expected = model(x)
    fold_batch_norm(model)
    assert conv.norm is norm and torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["hook", "graph"])
def test_a_model_that_cannot_be_copied_is_evaluated_as_it_is(tiny_cfg, kind, caplog):
    model = build_model(tiny_cfg())
    if kind == "hook":  # tied to this one
        model.backbone.register_forward_hook(lambda *_: None)
    else:
        model.seen = 2 * next(model.parameters())
    assert optimize(model, tiny_cfg()) is model
    assert "it runs as it is, without TEST.DTYPE" in caplog.text


def test_an_unknown_type_names_the_key(tiny_cfg):
    cfg = tiny_cfg("TEST.DTYPE", "half")
    with pytest.raises(ValueError, match="TEST.DTYPE must be one of .*'half'"):
        optimize(build_model(cfg), cfg)


class SharedResults:
    """What a CUDA graph is to threads: all runs write to the same tensors."""

    def __init__(self):
        self.turn, self._results = CudaGraph.turn, None

    def __call__(self, function, *args):
        self._results = self._results or function(*args)
        for shared, x in zip(self._results, function(*args)):
            shared.copy_(x)
            time.sleep(1e-3)  # another thread's turn, if there were no lock
        return self._results


def test_threads_that_share_a_graph_get_their_own_detections(tiny_cfg):
    torch.manual_seed(0)
    model = build_model(tiny_cfg("MODEL.SSD.SCORE_THRESH_TEST", "0.1")).eval()
    images = [torch.full((3, 96, 96), 60.0 * i) for i in range(4)]

    def scores(image):
        with torch.no_grad():
            return model([{"image": image}])[0]["instances"].scores

    expected = [scores(image) for image in images]
    assert len({len(x) and x[0].item() for x in expected}) == len(images)
    model.cuda_graph = SharedResults()
    with ThreadPoolExecutor(len(images)) as threads:
        for found in [list(threads.map(scores, images)) for _ in range(10)]:
            assert all(map(torch.equal, found, expected))


def test_evaluation_uses_it_and_training_goes_on(tiny_cfg, monkeypatch):
    cfg = tiny_cfg("TEST.EVAL_PERIOD", "2", "SOLVER.MAX_ITER", "3")
    trainer = Trainer(cfg)
    seen = []
    monkeypatch.setattr(
        "ssd.engine.optimize", lambda model, cfg: seen.append(optimize(model, cfg)) or seen[-1]
    )
    trainer.train()
    assert len(seen) == 2 and trainer.model.training
    assert all(x.norm is None for x in seen[0].modules() if isinstance(x, Conv2d))


def test_compiled_network_has_the_same_detections(tiny_cfg):
    """Needs a C++ compiler; without one torch runs the network as it is, and says so."""
    few_layers = (
        "MODEL.SSD.BOTTOM_UP build_mobilenetv1_backbone MODEL.SSD.HEAD conv "
        "MODEL.SSD.EXTRA_BLOCK conv MODEL.SSD.IN_FEATURES ['stage1'] MODEL.SSD.EXTRA_LAYERS [] "
        "MODEL.SSD.DEFAULT_BOXES.MIN_SIZES [16.0] MODEL.SSD.DEFAULT_BOXES.ASPECT_RATIOS [[2.0]]"
    )
    cfg = tiny_cfg(
        "MODEL.COMPILE", "True", "MODEL.SSD.SCORE_THRESH_TEST", "0.1", *few_layers.split()
    )
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    fast = optimize(model, cfg)
    assert fast.backbone._compiled_call_impl is not None
    expected, actual = detections(model), detections(fast)
    assert len(expected) == len(actual) > 20
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-5)
    assert model.backbone._compiled_call_impl is None


def test_what_cannot_be_compiled_runs_as_it_is_and_says_why_once(tiny_cfg, caplog):
    def fails(*args):
        raise RuntimeError("no compiler")

    compile_network(build_model(tiny_cfg()))
    for value in (1, 2):
        add = torch.compile(lambda x: x + value, backend=fails)
        assert add(torch.zeros(1)) == value
    (record,) = (x for x in caplog.records if x.levelname == "WARNING")
    assert record.name == "ssd.inference"
    assert record.message.endswith("no compiler (TORCH_LOGS=+dynamo says more)")
