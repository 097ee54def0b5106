"""Accuracy, loss, counts, latency and file size."""

from secateur.measure.accuracy import accuracy, loss, loss_and_accuracy
from secateur.measure.counting import counted
from secateur.measure.latency import file_size, latency
from secateur.modes import evaluating

__all__ = ["accuracy", "counted", "evaluating", "file_size", "latency", "loss", "loss_and_accuracy"]
