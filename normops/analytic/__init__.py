"""Analytic normalization: means and variances propagated through a network from those of its training set, to normalize or to initialize it.

    moments = analytic.input_moments(loader)       # mean and variance of the inputs: one pass over the data
    print(analytic.report(model, loader))          # how well they propagate: analytic against sampled statistics, layer by layer
    analytic.initialize_(model, moments)           # every unit gets mean 0 and variance 1, without data
    analytic.normalize(model, moments)             # every layer before a non-linearity is normalized from now on, without a batch
    analytic.fold(model)                           # a plain torch model with the same outputs

Source: Shekhovtsov & Flach 2018, Normalization of Neural Networks using Analytic Variance Propagation (arXiv 1803.10560).
"""

from normops.analytic import layers, rules
from normops.analytic.inputs import input_moments
from normops.analytic.models import fold, initialize_, normalize
from normops.analytic.moments import Closure, Moments, propagate
from normops.analytic.report import Report, report

__all__ = ["Closure", "Moments", "Report", "fold", "initialize_", "input_moments", "layers", "normalize", "propagate", "report", "rules"]
