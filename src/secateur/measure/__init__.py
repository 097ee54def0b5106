"""Accuracy, loss, counts, latency and file size."""

from secateur.measure.accuracy import accuracy, evaluating, loss, loss_and_accuracy
from secateur.measure.counting import counted
from secateur.measure.latency import file_size, latency

__all__ = ["accuracy", "counted", "evaluating", "file_size", "latency", "loss", "loss_and_accuracy"]
