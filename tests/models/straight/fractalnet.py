"""FractalNet on CIFAR in evaluation (Larsson, Maire, Shakhnarovich 2017, section 2 and figure 1).

Column c of C begins a unit (3x3, normalization, ReLU) after every 2^(C - c) units of the last
column. Columns that end at the same place share one join: the mean of them all, which each of them
takes next (as the authors' `generation/fractalnet.py` connects them). Before the last join of a
block, each column is pooled separately, 2x2; Caffe's pooling rounds up.
"""

import numpy as np

from tests.models.straight.cifar_resnet import bias_free, classify, norm
from tests.models.straight.numpy_layers import max_pool, relu


def unit(p, path, x):
    return relu(norm(p, f"{path}/norm", bias_free(p, f"{path}/conv", x, padding=1)))


def fractal_of_3(p, block, x):
    """f_3, written out: column 1 has one unit, column 2 two, column 3 four."""
    column1 = unit(p, f"{block}/column1_unit1", x)
    column2 = unit(p, f"{block}/column2_unit1", x)
    column3 = unit(p, f"{block}/column3_unit1", x)
    column3 = unit(p, f"{block}/column3_unit2", column3)
    half = np.mean([column2, column3], axis=0)
    column2 = unit(p, f"{block}/column2_unit2", half)
    column3 = unit(p, f"{block}/column3_unit3", half)
    column3 = unit(p, f"{block}/column3_unit4", column3)
    return np.mean([max_pool(y, 2, 2, ceil=True) for y in (column1, column2, column3)], axis=0)


def fractalnet(p, x, blocks):
    for i in range(1, blocks + 1):
        x = fractal_of_3(p, f"block{i}", x)
    return classify(p, x)
