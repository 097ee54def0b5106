"""Accuracy, loss, latency and file size."""

from secateur.measure.accuracy import accuracy, evaluating, loss, loss_and_accuracy
from secateur.measure.latency import file_size, latency

__all__ = ["accuracy", "evaluating", "file_size", "latency", "loss", "loss_and_accuracy"]
