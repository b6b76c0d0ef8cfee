"""The specification of `jaxattn.einsum` as plain loops in float64. No JAX, and nothing from the package."""

import itertools
import math
import re

import numpy as np

TERM = re.compile(r"([+-]?)(?:(\d+)\*)?([A-Za-z_]\w*)|([+-]?\d+)")


class Misfit(Exception):
    """The equation doesn't fit: the library must raise ValueError."""


def read(text):
    """A term as a list of tokens: ("...",), ("axes", names) or ("sum", [(coefficient, axis)], constant)."""
    tokens = []
    for word in re.findall(r"\([^)]*\)|\S+", text):
        if word == "...":
            tokens.append(("...",))
        elif word[0] == "(":
            tokens.append(("axes", word[1:-1].split()))
        elif word.isidentifier():
            tokens.append(("axes", [word]))
        else:
            parts = TERM.findall(word)
            pairs = [(int(sign + (number or "1")), axis) for sign, number, axis, _ in parts if axis]
            tokens.append(("sum", pairs, sum(int(constant) for *_, constant in parts if constant)))
    return tokens


def place(index, n, boundary):
    """The token that stands at `index` of an axis of n tokens, or None."""
    while not 0 <= index < n:
        if boundary == "zero":
            return None
        if boundary is None:
            raise Misfit("out of range")
        if boundary == "edge":
            index = 0 if index < 0 else n - 1
        elif boundary == "wrap":
            index += n if index < 0 else -n
        elif n == 1:
            index = 0
        else:
            index = -index if index < 0 else 2 * (n - 1) - index
    return index


class Einsum:
    """An equation with extents for every axis, and its sum written out: `paths()` yields (operand indices, output
    index) for each product, None where a zero stands or the result is dropped."""

    def __init__(self, equation, shapes, padding=None, boundary=None, **sizes):
        left, right = equation.split("->")
        texts = [*left.split(","), right]
        batch = None
        for text, shape in zip(texts, shapes, strict=False):
            if "..." in text:
                words = read(text)
                at = words.index(("...",))
                batch = shape[at : at + len(shape) - len(words) + 1]
        self.terms = []
        for text in texts:
            tokens = read(text)
            if ("...",) in tokens:
                at = tokens.index(("...",))
                tokens[at : at + 1] = [("axes", [f"_{k}"]) for k in range(len(batch))]
            self.terms.append(tokens)
        count = sum(token[0] == "sum" for term in self.terms for token in term)
        paddings = list(padding) if isinstance(padding, list) else [padding or "VALID"] * count
        boundaries = list(boundary) if isinstance(boundary, list) else [boundary] * count
        sums = iter(range(count))
        written = [(t, d) for t, term in enumerate(self.terms) for d, token in enumerate(term) if token[0] == "sum"]
        self.which = {place: next(sums) for place in written}
        self.sizes = dict(sizes)
        self.inferred = set()  # positions that nothing but padding gives
        self.low, self.length = {}, {}
        self.boundary = {}
        places = [(t, d) for t, term in enumerate(self.terms) for d in range(len(term))]
        while True:  # what an operand says outright goes before what padding implies
            before = len(self.sizes) + len(self.low)
            for infer in (False, True):
                for t, d in places:
                    self._extent(t, d, shapes, paddings, boundaries, infer)
                if len(self.sizes) + len(self.low) > before:
                    break
            else:
                break
        if len(self.low) < count:
            raise Misfit("unknown extent")
        for t, d in places:  # once more, with everything known: what was inferred twice must agree
            self.low.pop((t, d), None)
            self._extent(t, d, shapes, paddings, boundaries, None)
        self.shape = []
        for d, token in enumerate(self.terms[-1]):
            if token[0] == "sum":
                self.shape.append(self.length[len(shapes), d])
            else:
                self.shape.append(math.prod(self.sizes[a] for a in token[1]))
        if any(n < 1 for n in self.shape):
            raise Misfit("empty")

    def _learn(self, axis, size):
        if self.sizes.setdefault(axis, size) != size:
            raise Misfit(f"{axis}: {self.sizes[axis]} and {size}")

    def _extent(self, t, d, shapes, paddings, boundaries, infer):
        token, output = self.terms[t][d], t == len(shapes)
        if token[0] == "axes":
            if output:
                return
            known = [self.sizes[a] for a in token[1] if a in self.sizes]
            missing = [a for a in token[1] if a not in self.sizes]
            if len(missing) == 1:
                if shapes[t][d] % math.prod(known):
                    raise Misfit("composed")
                self._learn(missing[0], shapes[t][d] // math.prod(known))
            elif not missing and math.prod(known) != shapes[t][d]:
                raise Misfit("composed")
            return
        pairs, constant = token[1:]
        (stride, position), windows = pairs[0], pairs[1:]
        if (t, d) in self.low or any(a not in self.sizes for _, a in windows):
            return
        padding = paddings[self.which[t, d]]
        reach = [c * (self.sizes[a] - 1) for c, a in windows]
        span, below = sum(map(abs, reach)), -sum(min(r, 0) for r in reach)
        if padding != "VALID" and constant:
            raise Misfit("constant and padding")
        if output:
            if position not in self.sizes:
                return
            extent = self.sizes[position]
            full = stride * (extent - 1) + span + 1
            if padding == "VALID":
                low, n = below - constant, full - below + constant
            elif padding == "SAME":
                n = stride * extent
                low = max((extent - 1) * stride + span + 1 - n, 0) // 2
            else:
                low, n = padding[0], full - sum(padding)
        else:
            n = shapes[t][d]
            if padding == "VALID":
                low, extent = below - constant, 0
                while stride * extent + sum(max(r, 0) for r in reach) <= n - 1:
                    extent += 1
            elif padding == "SAME":
                extent = -(-n // stride)
                low = max((extent - 1) * stride + span + 1 - n, 0) // 2
            else:
                low, extent = padding[0], (n + sum(padding) - span - 1) // stride + 1
            if position not in self.sizes:
                if infer and not constant:
                    if extent < 1:
                        raise Misfit("kernel larger than input")
                    self.sizes[position] = extent
                    self.inferred.add(position)
                return
            elif position in self.inferred and not constant and self.sizes[position] != extent:
                raise Misfit("inferred twice")
            elif padding == "SAME" and self.sizes[position] != extent:
                raise Misfit("same")
        self.low[t, d], self.length[t, d] = below - low, n
        boundary = boundaries[self.which[t, d]]
        self.boundary[t, d] = boundary or (None if padding == "VALID" else "zero")

    def _index(self, t, at):
        """The index into term t where the axes have the values `at`, or None."""
        index = []
        for d, token in enumerate(self.terms[t]):
            if token[0] == "sum":
                raw = self.low[t, d] + sum(c * at[a] for c, a in token[1])
                one = place(raw, self.length[t, d], self.boundary[t, d])
                if one is None:
                    return None
            else:
                one = 0
                for axis in token[1]:
                    one = one * self.sizes[axis] + at[axis]
            index.append(one)
        return tuple(index)

    def paths(self):
        if not all(a in self.sizes for term in self.terms for token in term if token[0] == "axes" for a in token[1]):
            raise Misfit("unknown extent")
        if len(self.low) != len(self.which):
            raise Misfit("unknown window")
        axes = list(self.sizes)
        for values in itertools.product(*(range(self.sizes[a]) for a in axes)):
            at = dict(zip(axes, values, strict=True))
            indices = [self._index(t, at) for t in range(len(self.terms))]
            yield indices[:-1], indices[-1]

    def value(self, *operands):
        y = np.zeros(self.shape, np.result_type(*operands, np.float64))
        for indices, out in self.paths():
            if out is not None and all(index is not None for index in indices):
                y[out] += math.prod(x[index] for x, index in zip(operands, indices, strict=True))
        return y

    def gradients(self, operands, cotangent):
        """The gradient of <value, cotangent> with respect to each operand: the sum is linear in each."""
        grads = [np.zeros(x.shape) for x in operands]
        for indices, out in self.paths():
            if out is not None and all(index is not None for index in indices):
                factors = [x[index] for x, index in zip(operands, indices, strict=True)]
                for k, grad in enumerate(grads):
                    grad[indices[k]] += cotangent[out] * math.prod(factors[:k] + factors[k + 1 :])
        return grads
