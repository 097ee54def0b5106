"""Data sets by name, whole on the device, and the loader that batches them."""

from secateur.data.dataset import Dataset, Split, stratified
from secateur.data.loader import Loader
from secateur.data.registry import DATA, load

__all__ = ["DATA", "Dataset", "Loader", "Split", "load", "stratified"]
