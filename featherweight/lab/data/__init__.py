"""Data of the lab: whole image sets in memory, split apart, and served as batches.

``load`` reads a set by its registered name, ``Batches`` serves it, ``DATA`` lists what there is.
"""

from featherweight.lab.data import digits, idx, cifar, image_folder, hub  # noqa: F401, I001  (register)
from featherweight.lab.data.base import DATA, Data, DataError, Split
from featherweight.lab.data.batches import Batches
from featherweight.lab.data.load import load

__all__ = ["DATA", "Batches", "Data", "DataError", "Split", "load"]
