"""Reverse-mode differentiation of NumPy arrays: the part of a framework that a NumPy port lacks.

An Array remembers the arrays that it was computed from, and a function from its gradient to theirs.
gradients(loss, leaves) walks back from the loss. Nothing here depends on CLIP.
"""

import numpy as np


class Array:
    __array_ufunc__ = None  # numpy leaves the operators with an Array on the right to this class

    def __init__(self, data, parents=(), back=None):
        self.data, self.parents, self.back = np.asarray(data), parents, back

    shape = property(lambda self: self.data.shape)
    T = property(lambda self: self.transpose(1, 0))

    def __len__(self):
        return len(self.data)

    def __add__(self, other):
        return binary(np.add, lambda g, a, b: (g, g), self, other)

    def __sub__(self, other):
        return binary(np.subtract, lambda g, a, b: (g, -g), self, other)

    def __rsub__(self, other):
        return binary(np.subtract, lambda g, a, b: (g, -g), other, self)

    def __mul__(self, other):
        return binary(np.multiply, lambda g, a, b: (g * b, g * a), self, other)

    def __truediv__(self, other):
        return binary(np.divide, lambda g, a, b: (g / b, -g * a / b**2), self, other)

    def __matmul__(self, other):
        def back(g, a, b):
            return g @ np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2) @ g

        return binary(np.matmul, back, self, other)

    def __neg__(self):
        return self * -1

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, index):
        def back(g):
            whole = np.zeros_like(self.data)
            np.add.at(whole, index, g)
            return (whole,)

        return Array(self.data[index], (self,), back)

    def reshape(self, *shape):
        return Array(self.data.reshape(shape), (self,), lambda g: (g.reshape(self.shape),))

    def transpose(self, *axes):
        return Array(self.data.transpose(axes), (self,), lambda g: (g.transpose(np.argsort(axes)),))

    def sum(self, axis=None, keepdims=False):
        def back(g):
            g = g if keepdims or axis is None else np.expand_dims(g, axis)
            return (np.broadcast_to(g, self.shape),)

        return Array(self.data.sum(axis, keepdims=keepdims), (self,), back)

    def mean(self, axis=None, keepdims=False):
        total = self.sum(axis, keepdims)
        return total / (self.data.size // total.data.size)


def binary(function, back, *operands):
    """An operation of two operands; numbers and NumPy arrays are constants."""
    values = [x.data if isinstance(x, Array) else x for x in operands]
    used = [i for i, x in enumerate(operands) if isinstance(x, Array)]

    def backward(g):
        both = back(g, *values)
        return tuple(summed(both[i], np.shape(values[i])) for i in used)

    return Array(function(*values), tuple(operands[i] for i in used), backward)


def summed(g, shape):
    """The gradient of an operand that was broadcast: the sum over the axes of broadcasting."""
    g = g.sum(tuple(range(g.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axes, keepdims=True)


def unary(x, value, slope):
    return Array(value, (x,), lambda g: (g * slope,))


def exp(x):
    value = np.exp(x.data)
    return unary(x, value, value)


def log(x):
    return unary(x, np.log(x.data), 1 / x.data)


def sqrt(x):
    value = np.sqrt(x.data)
    return unary(x, value, 0.5 / value)


def sigmoid(x):
    value = logistic(x.data)
    return unary(x, value, value * (1 - value))


def logistic(x):
    small = np.exp(-np.abs(x))  # at most 1: no overflow
    return np.where(x >= 0, 1, small) / (1 + small)


def softplus(x):
    """log(1 + exp x) without overflow."""
    value = np.maximum(x.data, 0) + np.log1p(np.exp(-np.abs(x.data)))
    return unary(x, value, logistic(x.data))


def maximum(x, least):
    return unary(x, np.maximum(x.data, least), x.data >= least)


def constant(x):
    """The value, through which no gradient flows."""
    return Array(x.data)


def concatenate(arrays, axis):
    cuts = np.cumsum([x.shape[axis] for x in arrays])[:-1]
    joined = np.concatenate([x.data for x in arrays], axis)
    return Array(joined, tuple(arrays), lambda g: tuple(np.split(g, cuts, axis)))


def gradients(loss, leaves):
    """The gradients of a scalar for the leaves, as NumPy arrays; zeros where it does not depend on one."""
    order, seen, stack = [], set(), [(loss, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((parent, False) for parent in node.parents)
    found = {id(loss): np.ones_like(loss.data)}
    for node in reversed(order):
        g = found.get(id(node))
        if g is not None and node.back:
            for parent, part in zip(node.parents, node.back(g)):
                found[id(parent)] = found[id(parent)] + part if id(parent) in found else part
    return [np.asarray(found.get(id(leaf), np.zeros_like(leaf.data))) for leaf in leaves]
