"""Reading the files and nothing else."""

import cv2

from benchmarks.contenders.base import Contender
from benchmarks.inputs import read_records
from benchmarks.machine import Work


class Decoding(Contender):
    """cv2.imread, the limit of ``data``.

    A program that only calls cv2.imread spends a third of the time or more on new memory; without
    that it is the limit.
    """

    def data(self) -> Work:
        if "reused" in self.spec.contender:
            from ssd.memory import keep_freed_memory

            keep_freed_memory()
        records = read_records(self.folder)
        names = [record["file_name"] for record in records]

        class Pictures:
            def __getitem__(self, number):
                return cv2.imread(names[number % len(names)])

        return self.samples(Pictures(), lambda number, image: names[number % len(names)])
