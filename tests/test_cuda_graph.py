"""Without a GPU; tests/test_gpu.py has the rest."""

import copy
import pickle
import threading

import torch
from detectron2.modeling import build_model

from ssd.cuda_graph import CudaGraph


def test_a_graph_that_is_copied_or_has_left_the_gpu(tiny_cfg):
    graph, x = CudaGraph(), torch.rand(3)
    graph._graphs["recorded"] = threading.RLock()  # which can't be copied either
    for other in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), graph):
        assert torch.equal(other(torch.sin, x), x.sin())
        assert other is graph or other._graphs == {}
    model = build_model(tiny_cfg())
    model.cuda_graph = graph
    assert model.to("cpu").cuda_graph is graph and graph._graphs == {}
