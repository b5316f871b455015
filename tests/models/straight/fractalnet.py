"""FractalNet on CIFAR in evaluation (Larsson, Maire, Shakhnarovich 2017, section 2 and figure 1).

Column c of C begins a unit (3x3, normalization, ReLU) after every 2^(C - c) of the last column's.
Where several columns end, one join: the mean of all that end there, seen by each of them next (as
the authors' `generation/fractalnet.py` wires it). It pools the columns one by one, 2x2, before the
last join of a block; Caffe's pooling rounds up.
"""

import numpy as np

from tests.models.straight.cifar_resnet import bias_free, classify, norm
from tests.models.straight.numpy_layers import max_pool, relu


def unit(p, path, x):
    return relu(norm(p, f"{path}/norm", bias_free(p, f"{path}/conv", x, padding=1)))


def fractal_of_3(p, block, x):
    """f3, written out: column 1 has one unit, column 2 two, column 3 four."""
    one = unit(p, f"{block}/column1_unit1", x)
    two = unit(p, f"{block}/column2_unit1", x)
    three = unit(p, f"{block}/column3_unit1", x)
    three = unit(p, f"{block}/column3_unit2", three)
    half = np.mean([two, three], axis=0)
    two = unit(p, f"{block}/column2_unit2", half)
    three = unit(p, f"{block}/column3_unit3", half)
    three = unit(p, f"{block}/column3_unit4", three)
    return np.mean([max_pool(y, 2, 2, ceil=True) for y in (one, two, three)], axis=0)


def fractalnet(p, x, blocks):
    for i in range(1, blocks + 1):
        x = fractal_of_3(p, f"block{i}", x)
    return classify(p, x)
