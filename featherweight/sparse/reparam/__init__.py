"""Weights in another form: train the form, then `fold` it into a plain model."""

from featherweight.sparse.reparam.edge_popup import edge_popup, masks, score_parameters
from featherweight.sparse.reparam.fold import Reparametrization, attach, attachable_weights, fold

__all__ = [
    "edge_popup",  # frozen random weights, learned scores choose the edges
    "score_parameters",  # what edge-popup trains
    "masks",  # the edges it has chosen
    "fold",  # a plain model with the same weights
    "Reparametrization",  # base class of the room's forms
    "attach",  # put a form on a weight so that fold can undo it
    "attachable_weights",  # the weights that can carry a form
]
