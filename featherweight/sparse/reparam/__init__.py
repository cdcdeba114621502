"""Weights in another form: train the form, then `fold` it into a plain model."""

from featherweight.sparse.reparam.continuous import (
    anneal,
    continuous_sparsification,
    end_round,
    mask_penalty,
)
from featherweight.sparse.reparam.edge_popup import edge_popup, masks, score_parameters
from featherweight.sparse.reparam.edge_popup_anneal import (
    clamp_scores_,
    edge_popup_anneal,
    edge_popup_densities,
    set_density_,
)
from featherweight.sparse.reparam.edge_popup_rescale import (
    fit_by_descent,
    fit_cross_entropy,
    fit_squares,
    scale_last_layer_,
    scale_output_,
    scale_to_fit_,
)
from featherweight.sparse.reparam.fold import (
    Reparametrization,
    attach,
    attachable_weights,
    density,
    fold,
    nonzero,
    parameter_groups,
)
from featherweight.sparse.reparam.registry import FORMS
from featherweight.sparse.reparam.rescaling import rescale, rescale_every
from featherweight.sparse.reparam.sign_in import (
    beta_schedule,
    decay_product,
    merge,
    metric,
    sign_in,
    split,
)
from featherweight.sparse.reparam.sign_in_sgd import SignInSGD, sign_in_groups
from featherweight.sparse.reparam.soft_threshold import soft_threshold, thresholds

__all__ = [
    "FORMS",  # the table of forms
    "sign_in",  # weights as products of two factors, which can change their sign
    "SignInSGD",  # the same as an optimizer, with one copy of the weights
    "sign_in_groups",  # its parameter groups
    "rescale_every",  # keep beta up, for both
    "rescale",  # once, for the products
    "beta_schedule",  # smaller betas towards the input
    "decay_product",  # plain weight decay for the products
    "split",  # a weight into its factors
    "merge",  # and back
    "metric",  # how fast a weight moves
    "soft_threshold",  # STR: each layer learns its threshold
    "thresholds",  # what they are now
    "continuous_sparsification",  # soft masks that harden
    "anneal",  # their temperature
    "mask_penalty",  # what the loss pays for them
    "end_round",  # into the next round
    "edge_popup",  # frozen random weights, learned scores choose the edges
    "score_parameters",  # what edge-popup trains
    "masks",  # the edges it has chosen
    "edge_popup_anneal",  # its density, lowered level by level
    "edge_popup_densities",  # to these
    "set_density_",  # once
    "clamp_scores_",  # scores stay positive
    "scale_to_fit_",  # frozen parameters scaled so that outputs fit best
    "fit_squares",  # by this factor for a squared error
    "fit_cross_entropy",  # this for cross-entropy
    "fit_by_descent",  # this for any loss
    "scale_output_",  # a factor on the output, spread over the layers
    "scale_last_layer_",  # or put on the last
    "parameter_groups",  # what an optimizer trains and decays under a form
    "nonzero",  # the weights that are not zero now
    "density",  # their fraction
    "fold",  # a plain model with the same weights
    "Reparametrization",  # base class of the room's forms
    "attach",  # put a form on a weight so that fold can undo it
    "attachable_weights",  # the weights that can carry a form
]
