from ssd.checkpoint.checkpointer import SSDCheckpointer

__all__ = ["SSDCheckpointer"]
