"""Data sets by name, whole on the device, and the loader that batches them."""

from secateur.lab.data.dataset import Dataset, Split, stratified
from secateur.lab.data.loader import Loader
from secateur.lab.data.registry import DATA, load

__all__ = ["DATA", "Dataset", "Loader", "Split", "load", "stratified"]
