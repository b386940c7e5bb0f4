"""Heads on frozen features that are solved, not trained: in closed form from class statistics, or to a stated gradient."""

from etflight.closed_form.directions import cosine_regression, dot_regression
from etflight.closed_form.heads import behind_frame, fitted_head, lda, nearest_class_mean, nearest_frame, ridge
from etflight.closed_form.lbfgs import minimise
from etflight.closed_form.logistic import LogisticRegression
from etflight.closed_form.transform import plain, shrunk, standardization, whitening

__all__ = [
    "LogisticRegression",
    "behind_frame",
    "cosine_regression",
    "dot_regression",
    "fitted_head",
    "lda",
    "minimise",
    "nearest_class_mean",
    "nearest_frame",
    "plain",
    "ridge",
    "shrunk",
    "standardization",
    "whitening",
]
