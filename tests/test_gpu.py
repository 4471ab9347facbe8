"""What only a GPU can show; skipped without one."""

import copy
import gc
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from ssd.cuda_graph import CudaGraph
from ssd.data.loader import build_train_loader
from ssd.engine import Trainer, TrainingStep
from ssd.inference import optimize
from ssd.modeling import VGG16
from ssd.modeling.postprocessing import _nms_per_class, _nms_without_waiting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def model(tiny_cfg):
    torch.manual_seed(0)
    cfg = tiny_cfg("MODEL.DEVICE", "cuda", "MODEL.SSD.SCORE_THRESH_TEST", "0.1")
    return cfg, build_model(cfg).eval()


def images(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [
        {"image": torch.randint(0, 256, (3, *size), generator=generator).to(torch.uint8),
         "height": 120, "width": 90}
        for size in sizes
    ]  # fmt: skip


@torch.no_grad()
def test_graph_and_cpu_give_the_same_detections(model, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    cfg, slow = model
    fast = optimize(slow, cfg)
    assert fast.cuda_graph
    for sizes in ([(96, 96)], [(64, 80)] * 3, [(96, 96), (50, 70)], [(96, 96)]):
        inputs = images(*sizes)
        on_gpu, recorded = slow(inputs), [fast(inputs) for _ in range(2)][-1]
        on_cpu = slow.cpu()(inputs)
        slow.cuda()
        for a, b, c in zip(on_cpu, on_gpu, recorded):
            a, b, c = (x["instances"].to("cpu") for x in (a, b, c))
            assert len(a) == len(b) == len(c) > 20
            torch.testing.assert_close(b.scores, a.scores, rtol=0, atol=1e-4)
            torch.testing.assert_close(c.scores, a.scores, rtol=0, atol=1e-4)
            assert c.image_size == (120, 90)
    assert len(fast.cuda_graph._graphs) == 3 and all(fast.cuda_graph._graphs.values())


@pytest.mark.parametrize("device", range(torch.cuda.device_count()))
def test_a_graph_serves_all_modes_on_any_device(device):
    graph, x = CudaGraph(), torch.arange(3.0, device=f"cuda:{device}")
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        x = x + 1
        with mode():
            assert torch.equal(graph(lambda x: (x * 2,), x)[0], x * 2)
    assert all(graph._graphs.values())


@torch.no_grad()
def test_graphs_of_many_sizes_need_the_memory_of_the_largest(model):
    cfg, slow = model
    used = []
    for sizes in ([8], range(1, 9)):
        fast, before = optimize(slow, cfg), torch.cuda.memory_reserved()
        for size in sizes:
            fast(images(*[(96, 96)] * size))
        used.append(torch.cuda.memory_reserved() - before)
        del fast
        gc.collect()
        torch.cuda.empty_cache()
    assert used[1] < 2 * used[0]


@torch.no_grad()
def test_a_used_model_can_be_optimised_copied_and_moved(model):
    cfg, slow = model
    fast, inputs = optimize(slow, cfg), images((96, 96))
    expected = fast(inputs)[0]["instances"]
    for other in (optimize(fast, cfg), copy.deepcopy(fast)):
        found = other(inputs)[0]["instances"]
        graphs = other.cuda_graph._graphs
        assert other.cuda_graph is not fast.cuda_graph and graphs and all(graphs.values())
        assert torch.equal(found.scores, expected.scores)
    del found, other
    assert len(fast.cpu()(inputs)[0]["instances"]) == len(expected)
    fast.cuda()
    assert not fast.cuda_graph._graphs  # they read where the weights were
    assert torch.equal(fast(inputs)[0]["instances"].scores, expected.scores)


def test_threads_that_share_a_graph_get_their_own_detections(model):
    cfg, slow = model
    fast, inputs = optimize(slow, cfg), images(*[(96, 96)] * 4)

    def scores(x):
        with torch.no_grad():
            return fast([x])[0]["instances"].scores.cpu()

    expected = [scores(x) for x in inputs]
    assert fast.cuda_graph and len({x[0].item() for x in expected}) == 4
    with ThreadPoolExecutor(len(inputs)) as threads:
        for found in [list(threads.map(scores, inputs)) for _ in range(20)]:
            assert all(map(torch.equal, found, expected))


def test_nms_without_waiting():
    generator = torch.Generator("cuda").manual_seed(0)
    corner = torch.rand(5, 800, 2, generator=generator, device="cuda") * 200
    size = torch.rand(5, 800, 2, generator=generator, device="cuda") * 150
    boxes = torch.cat([corner, corner + size], dim=-1)
    cls = torch.randint(0, 3, (5, 800), generator=generator, device="cuda")
    valid = torch.rand(5, 800, generator=generator, device="cuda") > 0.1
    kept, settled = _nms_without_waiting(boxes, cls, valid, 0.45)
    assert settled.all() and torch.equal(kept, _nms_per_class(boxes, cls, valid, 3, 0.45))


def test_batches_arrive_in_pinned_memory(tiny_cfg):
    slow = next(iter(build_train_loader(tiny_cfg())))
    cfg = tiny_cfg("MODEL.DEVICE", "cuda", "DATALOADER.NUM_WORKERS", 1)
    model = build_model(cfg)
    batch = next(iter(build_train_loader(cfg)))
    assert all(x["image"].is_pinned() for x in batch)
    expected = torch.stack([x["image"] for x in slow])
    assert torch.equal(model._stack([x["image"] for x in batch]).cpu(), expected)
    for fast, x in zip(batch, slow):
        assert torch.equal(fast["instances"].gt_boxes.tensor, x["instances"].gt_boxes.tensor)


def training(cfg, dtype, bad):
    """A step whose batch number ``bad`` is not finite."""
    torch.manual_seed(0)
    model = build_model(cfg)

    def batches():
        number = 0
        while True:
            value = float("nan") if number == bad else 100.0
            instances = Instances((96, 96), gt_classes=torch.tensor([1]))
            instances.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 50.0, 60.0]]))
            sample = {"image": torch.full((3, 96, 96), value), "instances": instances}
            yield [{**sample, "file_name": f"{number}.jpg"}] * 4
            number += 1

    step = TrainingStep(model, batches(), Trainer.build_optimizer(cfg, model), dtype, late=True)
    step.iter, step.storage = 0, EventStorage()
    return step


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_a_step_never_waits_and_masks_its_own_update(tiny_cfg, dtype):
    step = training(tiny_cfg("MODEL.DEVICE", "cuda", "SOLVER.BASE_LR", 1e-4), dtype, bad=6)
    with step.storage:
        for _ in range(5):
            step.run_step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step.run_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not [str(w.message) for w in caught if "synchroniz" in str(w.message)]
        before = [x.clone() for x in step.model.parameters()]
        step.run_step()
        assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters()))
        with pytest.raises(FloatingPointError, match="6.jpg"):
            step.run_step()


@pytest.mark.parametrize("training", [True, False])
def test_pools_of_a_training_keep_no_indices(training):
    vgg, kept = VGG16().cuda().train(training), set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add(x.dtype) or x, lambda x: x):
        outputs = vgg(torch.randn(1, 3, 64, 64, device="cuda"))
    assert (torch.int64 in kept) == (not training)
    sum(x.sum() for x in outputs.values()).backward()


def test_a_first_update_that_is_masked_leaves_finite_weights(tiny_cfg):
    """float16's scale is too large at first, and the optimizer's momentum isn't there yet."""
    step = training(tiny_cfg("MODEL.DEVICE", "cuda", "SOLVER.BASE_LR", 1e-4), "float16", bad=-1)
    step.grad_scaler = torch.amp.GradScaler(init_scale=2.0**60)
    with step.storage:
        for _ in range(60):
            step.run_step()
    assert step.grad_scaler.get_scale() < 2.0**60
    assert all(x.isfinite().all() for x in step.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fused_relu_ignores_what_its_memory_held(dtype):
    x, weight = torch.ones(1, 8, 64, 64), torch.ones(16, 8, 3, 3)
    x, weight = (t.cuda().to(dtype, memory_format=torch.channels_last) for t in (x, weight))
    torch.full((1, 16, 64, 64), float("nan"), dtype=dtype, device="cuda")  # freed at once
    bias, one = torch.zeros(16, dtype=dtype, device="cuda"), (1, 1)
    assert torch.cudnn_convolution_relu(x, weight, bias, one, one, one, 1).isfinite().all()


# the last test here: torch doesn't free the memory of a recording that failed
@torch.no_grad()
def test_what_cannot_be_recorded_runs_as_it_is(caplog):
    graph = CudaGraph()
    for values in ([1.0, -1.0, 2.0], [-1.0, -1.0, 3.0]):
        x = torch.tensor(values, device="cuda")
        assert torch.equal(graph(lambda x: (x[x > 0],), x)[0], x[x > 0])
    assert "TEST.CUDA_GRAPH isn't used" in caplog.text and "waits for the GPU" in caplog.text
    torch.rand(1, device="cuda")  # a failed recording would break its generator
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
