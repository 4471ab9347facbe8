"""Schedules in epochs, against the schedulers of torch that the published recipes chain."""

import logging
import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR

from ssd.config import add_ssd_config
from ssd.solver import build_lr_scheduler, epoch_length, schedule_in_iterations

BASE_LR = 0.02


def config(**solver):
    cfg = get_cfg()
    add_ssd_config(cfg)
    for key, value in {"BASE_LR": BASE_LR, "IMS_PER_BATCH": 4, "WARMUP_ITERS": 0, **solver}.items():
        cfg.SOLVER[key] = value
    cfg.freeze()
    return cfg


def optimizer(lr=BASE_LR):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def run(sgd, schedulers, iterations):
    """The rate of each iteration; after iteration i steps each scheduler that ``schedulers(i)``
    gives."""
    rates = []
    for i in range(iterations):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        for scheduler in schedulers(i):
            scheduler.step()
    return rates


def our_rates(num_images, **solver):
    cfg = schedule_in_iterations(config(**solver), num_images)
    sgd = optimizer()
    scheduler = build_lr_scheduler(cfg, sgd)
    return run(sgd, lambda i: [scheduler], cfg.SOLVER.MAX_ITER)


def chained_rates(by_epoch, warmup_iters, length, epochs, factor=1e-3):
    """torch's LinearLR at every iteration and another scheduler after every ``length`` of them."""
    sgd = optimizer()
    slow, warmup = by_epoch(sgd), LinearLR(sgd, factor, total_iters=warmup_iters)
    return run(
        sgd,
        lambda i: [warmup, slow] if (i + 1) % length == 0 else [warmup],
        epochs * length,
    )


@pytest.mark.parametrize("images, repeat, batch, expected", [
    (16, 1, 4, 4), (17, 1, 4, 5), (3, 1, 4, 1), (3, 2, 4, 2), (3, 5, 4, 4),
    (117266, 5, 64, 9162), (117266, 5, 192, 3054),
])  # fmt: skip
def test_a_unit_is_rounded_up_as_a_whole(images, repeat, batch, expected):
    assert epoch_length(images, repeat, batch) == expected


@pytest.mark.parametrize("arguments", [(0, 1, 4), (16, 0, 4), (16, 1, 0)])
def test_lengths_must_be_positive(arguments):
    with pytest.raises(ValueError, match="REPEAT_DATASET.*IMS_PER_BATCH.*positive"):
        epoch_length(*arguments)


def test_epochs_become_iterations(caplog):
    keys = {"MAX_EPOCHS": 120, "STEPS_EPOCHS": [80, 110], "REPEAT_DATASET": 5, "IMS_PER_BATCH": 64}
    cfg = config(**keys, MAX_ITER=7, STEPS=(3,))
    with caplog.at_level(logging.INFO):
        found = schedule_in_iterations(cfg, 117266)
    assert found.SOLVER.MAX_ITER == 24 * 9162 and found.SOLVER.STEPS == (16 * 9162, 22 * 9162)
    assert "120 epochs of 117266 images are 219888 iterations" in caplog.text
    assert found.is_frozen() and cfg.SOLVER.MAX_ITER == 7 and cfg.SOLVER.STEPS == (3,)


def test_without_epochs_the_config_stays(caplog):
    cfg = config(MAX_ITER=7)
    assert schedule_in_iterations(cfg, 16) is cfg and not caplog.text
    for keys in ({"STEPS_EPOCHS": [80]}, {"COSINE_STEP": "epoch"}):
        cfg = config(**keys)
        assert schedule_in_iterations(cfg, 16) is cfg
        assert "no effect while SOLVER.MAX_EPOCHS is 0" in caplog.text
        caplog.clear()
    cfg = schedule_in_iterations(config(MAX_ITER=20, STEPS=(10, 20, 30)), 16)
    assert cfg.SOLVER.STEPS == (10, 30)
    build_lr_scheduler(cfg, optimizer())  # a step in the last iteration would be an error


@pytest.mark.parametrize("keys, message", [
    ({"MAX_EPOCHS": 121, "REPEAT_DATASET": 5}, r"multiples of SOLVER.REPEAT_DATASET 5.* 121"),
    ({"MAX_EPOCHS": 120, "STEPS_EPOCHS": [81], "REPEAT_DATASET": 5}, r"got \[81\] and 120"),
    ({"MAX_EPOCHS": 120, "STEPS_EPOCHS": [110, 80]}, r"increasing.*got \[110, 80\]"),
    ({"MAX_EPOCHS": 120, "STEPS_EPOCHS": [120]}, r"increasing.*got \[120\] and 120"),
    ({"MAX_EPOCHS": 120, "STEPS_EPOCHS": [0]}, r"positive.*got \[0\]"),
    ({"MAX_EPOCHS": -1}, r"positive.* -1"),
    ({"MAX_ITER": 0}, "SOLVER.MAX_ITER must be at least 1, got 0"),
    ({"STEPS": (10, 5)}, r"SOLVER.STEPS must be .*got \(10, 5\)"),
    ({"STEPS": (0,)}, "SOLVER.STEPS must be positive"),
    ({"MAX_EPOCHS": 120, "REPEAT_DATASET": 0}, "SOLVER.REPEAT_DATASET 0"),
    ({"COSINE_STEP": "step"}, "SOLVER.COSINE_STEP must be one of .*'epoch'.* got 'step'"),
])  # fmt: skip
def test_an_impossible_schedule_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        schedule_in_iterations(config(**keys), 16)


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
def test_without_epochs_the_schedule_is_that_of_detectron2(name):
    keys = {"MAX_ITER": 40, "STEPS": (20, 30), "WARMUP_ITERS": 15, "LR_SCHEDULER_NAME": name}
    cfg, sgd = config(**keys), optimizer()
    scheduler = build_detectron2_lr_scheduler(cfg, sgd)
    assert our_rates(16, **keys) == run(sgd, lambda i: [scheduler], 40)


# torchvision's detection references: the warm-up ends within the first epoch. MMEngine multiplies
# in the same way, also where the warm-up is longer than an epoch.
@pytest.mark.parametrize("warmup_iters", [9, 30])
def test_steps_equal_chained_schedulers_of_torch(warmup_iters):
    found = our_rates(
        37, MAX_EPOCHS=8, STEPS_EPOCHS=[2, 7], LR_SCHEDULER_NAME="WarmupMultiStepLR",
        WARMUP_ITERS=warmup_iters,
    )  # fmt: skip
    expected = chained_rates(lambda sgd: MultiStepLR(sgd, [2, 7]), warmup_iters, 10, 8)
    assert found == pytest.approx(expected, rel=1e-12, abs=0) and len(set(found)) > 10
    assert found[19] > found[20] and found[69] > found[70]


@pytest.mark.parametrize("warmup_iters, end", [(9, 0.0), (30, 0.0), (9, 0.004)])
def test_cosine_by_epoch_equals_chained_schedulers_of_torch(warmup_iters, end):
    found = our_rates(
        37, MAX_EPOCHS=8, LR_SCHEDULER_NAME="WarmupCosineLR", COSINE_STEP="epoch",
        WARMUP_ITERS=warmup_iters, BASE_LR_END=end,
    )  # fmt: skip
    cosine = chained_rates(lambda sgd: CosineAnnealingLR(sgd, 8, eta_min=end), warmup_iters, 10, 8)
    assert found == pytest.approx(cosine, rel=1e-12, abs=0)
    assert len(set(found[30:])) == 5  # one for each epoch


def test_cosine_by_epoch_of_a_repeated_data_set():
    # MMDetection's SSDLite: 120 epochs of 5 passes, LinearLR(end=500), so that iteration 499 is
    # the first at the full rate; here 4 epochs of 5 passes over 37 images, end=21
    found = our_rates(
        37, MAX_EPOCHS=20, REPEAT_DATASET=5, LR_SCHEDULER_NAME="WarmupCosineLR",
        COSINE_STEP="epoch", WARMUP_ITERS=20,
    )  # fmt: skip
    assert len(found) == 4 * 47
    assert found[0] == pytest.approx(BASE_LR / 1000) and found[20:47] == [BASE_LR] * 27
    for epoch in range(1, 4):
        expected = BASE_LR * (1 + math.cos(math.pi * epoch / 4)) / 2
        assert found[47 * epoch : 47 * (epoch + 1)] == pytest.approx([expected] * 47, rel=1e-12)


def test_cosine_by_iteration():
    found = our_rates(
        40, MAX_EPOCHS=2, LR_SCHEDULER_NAME="WarmupCosineLR", WARMUP_ITERS=4, WARMUP_FACTOR=0.2,
        BASE_LR_END=0.01,
    )  # fmt: skip
    for i, warmup in ((0, 0.2), (1, 0.4), (3, 0.8), (4, 1), (10, 1), (19, 1)):
        cosine = 0.01 + (BASE_LR - 0.01) * (1 + math.cos(math.pi * i / 20)) / 2
        assert found[i] == pytest.approx(warmup * cosine, rel=1e-12), i


def test_constant_warmup():
    found = our_rates(16, MAX_EPOCHS=2, WARMUP_ITERS=3, WARMUP_METHOD="constant", WARMUP_FACTOR=0.5)
    assert found == pytest.approx([BASE_LR / 2] * 3 + [BASE_LR] * 5, rel=1e-12)


def rates_at(iterations, num_images, **solver):
    cfg = schedule_in_iterations(config(**solver), num_images)
    scheduler = build_lr_scheduler(cfg, optimizer(cfg.SOLVER.BASE_LR))
    rates = []
    for iteration in iterations:
        scheduler.last_epoch = iteration
        rates += scheduler.get_lr()
    return cfg.SOLVER.MAX_ITER, rates


# Rates that MMEngine 0.10.7 gives for configs of MMDetection 3.3, on COCO's 117266 images with
# objects: LinearLR with end=500, then steps after epochs 16 and 22 of 24, or a cosine.
STEPS = {
    0: 2e-06, 1: 6.004008016032064e-06, 250: 0.0010030020040080157, 498: 0.0019959959919839737,
    499: 0.0020000000000000057, 146591: 0.0020000000000000057, 146592: 0.00020000000000000058,
    201563: 0.00020000000000000058, 201564: 2.000000000000006e-05, 219887: 2.000000000000006e-05,
}  # fmt: skip
COSINE = {
    0: 1.5e-05, 1: 4.5030060120240486e-05, 498: 0.014969969939879738, 499: 0.014999999999999979,
    3053: 0.014999999999999979, 3054: 0.014997429937316658, 363425: 1.0278489340696231e-05,
    363426: 2.5700626833205457e-06, 366479: 2.5700626833205457e-06,
}  # fmt: skip
# SSDLite's with epochs of 10 iterations and end=25: a warm-up longer than an epoch
SHORT = {
    0: 1.5e-05, 9: 0.005634375, 10: 0.0062576776413453845, 19: 0.011876089831612648,
    20: 0.012493932879134532, 24: 0.014989721510659307, 29: 0.014989721510659307,
    30: 0.014976880002998466, 1199: 2.570062683320552e-06,
}  # fmt: skip
SSD300 = {
    "BASE_LR": 0.002, "IMS_PER_BATCH": 64, "MAX_EPOCHS": 120, "STEPS_EPOCHS": [80, 110],
    "REPEAT_DATASET": 5, "LR_SCHEDULER_NAME": "WarmupMultiStepLR", "WARMUP_ITERS": 499,
}  # fmt: skip
SSDLITE = {
    "BASE_LR": 0.015, "IMS_PER_BATCH": 192, "MAX_EPOCHS": 600, "COSINE_STEP": "epoch",
    "REPEAT_DATASET": 5, "LR_SCHEDULER_NAME": "WarmupCosineLR", "WARMUP_ITERS": 499,
}  # fmt: skip


@pytest.mark.parametrize("solver, num_images, expected", [
    (SSD300, 117266, STEPS), (SSDLITE, 117266, COSINE),
    ({**SSDLITE, "WARMUP_ITERS": 24}, 384, SHORT),
], ids=["ssd300", "ssdlite", "long warm-up"])  # fmt: skip
def test_rates_equal_those_of_mmengine(solver, num_images, expected):
    max_iter, rates = rates_at(expected, num_images, **solver)
    assert max_iter == max(expected) + 1
    assert rates == pytest.approx(list(expected.values()), rel=1e-12, abs=0)


def test_the_rate_falls_at_the_right_iteration_of_a_long_run():
    # fvcore's own tolerance for it, 1e-6 of the run, would be 4 iterations
    max_iter, rates = rates_at(
        (2999998, 2999999, 3000000), 400000, MAX_EPOCHS=40, STEPS_EPOCHS=[30],
        LR_SCHEDULER_NAME="WarmupMultiStepLR",
    )  # fmt: skip
    assert max_iter == 4000000
    assert rates == pytest.approx([BASE_LR, BASE_LR, BASE_LR / 10])


@pytest.mark.parametrize("keys, message", [
    ({"LR_SCHEDULER_NAME": "Cosine"}, "SOLVER.LR_SCHEDULER_NAME:.*'WarmupCosineLR'.*got 'Cosine'"),
    ({"WARMUP_METHOD": "cubic"}, "SOLVER.WARMUP_METHOD must be one of .*'linear'.*got 'cubic'"),
    ({"RESCALE_INTERVAL": True}, "SOLVER.RESCALE_INTERVAL"),
])  # fmt: skip
def test_what_an_epoch_schedule_lacks_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        our_rates(16, MAX_EPOCHS=2, **keys)
