"""Tensors in, tensors out: the only place that factorises. Knows nothing of files or reports."""

from geoscope.linalg.angles import principal_angles
from geoscope.linalg.operand import Operand
from geoscope.linalg.product import Product, factorise_product
from geoscope.linalg.quantile import quantile
from geoscope.linalg.storage import FORMATS, FloatFormat, effective_format
from geoscope.linalg.svd import Factors, concatenate, factorise
from geoscope.linalg.svd_leading import factorise_leading

__all__ = [
    "FORMATS",
    "Factors",
    "FloatFormat",
    "Operand",
    "Product",
    "concatenate",
    "effective_format",
    "factorise",
    "factorise_leading",
    "factorise_product",
    "principal_angles",
    "quantile",
]
