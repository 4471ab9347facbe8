import os
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from commands import run
from detectron2.structures import Boxes, Instances

from ssd.data.batch import Batch


def no_file(name):
    raise PermissionError("not here")


@pytest.mark.parametrize("system", ["Linux", "another", "refuses"])
def test_a_batch_travels_between_processes(system, monkeypatch):
    if system == "another":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    elif system == "refuses":
        monkeypatch.setattr(os, "memfd_create", no_file, raising=False)
    elif not hasattr(os, "memfd_create"):
        pytest.skip("there are no files in memory here")
    generator = torch.Generator().manual_seed(0)
    batch = Batch()
    for count in (3, 0, 1):
        instances = Instances((4, 5), gt_boxes=Boxes(torch.rand(count, 4, generator=generator)))
        instances.gt_classes = torch.arange(count)
        image = torch.randint(0, 256, (3, 4, 5), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "scale": torch.tensor(0.5)})
    table = torch.arange(12).view(3, 4)
    odd = [table.t(), table[:, 1], table[:1, ::2], table[:1, 1], torch.tensor(1).expand(4)]
    rest = {"sparse": table.to_sparse(), "leaf": torch.ones(2, requires_grad=True)}
    batch.append({"file_name": "a.jpg", "odd": odd, **rest})
    received = pickle.loads(ForkingPickler.dumps(batch))
    assert type(received) is list and received[3]["file_name"] == "a.jpg"
    assert all(map(torch.equal, odd, received[3]["odd"]))
    assert torch.equal(received[3]["sparse"].to_dense(), table)
    assert received[3]["leaf"].requires_grad and received[3]["leaf"].tolist() == [1, 1]
    for sent, got in zip(batch[:3], received[:3]):
        assert torch.equal(sent["image"], got["image"]) and torch.equal(sent["scale"], got["scale"])
        assert torch.equal(sent["instances"].gt_boxes.tensor, got["instances"].gt_boxes.tensor)
        assert torch.equal(sent["instances"].gt_classes, got["instances"].gt_classes)
        assert got["instances"].image_size == (4, 5)
    storages = {x["image"].untyped_storage().data_ptr() for x in received[:3]}
    assert len(storages) == 1
    assert pickle.loads(ForkingPickler.dumps(Batch())) == []
    conjugate = torch.tensor([1 + 2j]).conj()  # not plain memory
    assert pickle.loads(ForkingPickler.dumps(Batch([conjugate])))[0].shape == (1,)


def test_a_loader_where_no_socket_can_be_made(tmp_path):
    """Their paths are short; in a TMPDIR like this the worker's batches got lost."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    code = """
import os
import torch
from ssd.data.batch import Batch
loader = torch.utils.data.DataLoader(range(24), 2, num_workers=1, collate_fn=lambda numbers: Batch(
    {"image": torch.full((3, 2), number), "open": len(os.listdir("/dev/fd"))} for number in numbers
))
batches = list(loader)
assert batches[-1][0]["open"] < batches[0][0]["open"] + 4, "each leaves a file open"
print([x["image"].tolist() for batch in batches for x in batch])
"""
    assert run("-c", code, TMPDIR=folder).strip() == str([[[i] * 2] * 3 for i in range(24)])


def test_a_batch_in_a_file_can_be_read_twice():
    message = pickle.dumps(Batch([torch.arange(3)]))
    for received in (pickle.loads(message), pickle.loads(message)):
        assert type(received) is Batch and torch.equal(received[0], torch.arange(3))
