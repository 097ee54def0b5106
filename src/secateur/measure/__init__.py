"""Accuracy, loss, counts, latency and file size."""
