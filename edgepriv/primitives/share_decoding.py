"""Shamir shares of which some are wrong: which ones, in time that does not grow with how they were chosen.

The shares that `edgepriv.primitives.sharing` makes are values of a polynomial of degree below the threshold t over
GF(2^128) (modulus x^128 + x^7 + x^2 + x + 1), with the secret at 0: a Reed-Solomon code. `decode` finds the polynomial
through n shares as long as at most (n - t) / 2 of them are wrong (Gao 2003, by the extended Euclidean algorithm), in
O(n^2) field operations. `weights_at_zero` gives the Lagrange coefficients of the secret, so that many secrets that
were shared among the same indices cost t multiplications each.

Field elements are integers below 2^128, polynomials lists of them, lowest coefficient first. Not in constant time:
what is decoded here has been revealed to the party that decodes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepriv.primitives.sharing import SECRET_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Polynomial = list[int]

_MASK = (1 << 128) - 1


def multiply(a: int, b: int) -> int:
    """Product in the field."""
    table = [0, a, a << 1, (a << 1) ^ a]
    table += [entry ^ (a << 2) for entry in table]
    table += [entry ^ (a << 3) for entry in table]
    product = 0
    for shift in range(124, -1, -4):
        product = (product << 4) ^ table[(b >> shift) & 15]
    for _ in range(2):  # x^128 = x^7 + x^2 + x + 1
        high = product >> 128
        product = (product & _MASK) ^ high ^ (high << 1) ^ (high << 2) ^ (high << 7)
    return product


def inverse(a: int) -> int:
    """Multiplicative inverse of an element that is not 0: a^(2^128 - 2)."""
    result, square = 1, a
    for _ in range(127):
        square = multiply(square, square)
        result = multiply(result, square)
    return result


def weights_at_zero(indices: Sequence[int]) -> list[int]:
    """Lagrange coefficients: the secret is the sum of coefficient times share."""
    weights = []
    for i in indices:
        above = below = 1
        for j in indices:
            if j != i:
                above, below = multiply(above, j), multiply(below, i ^ j)
        weights.append(multiply(above, inverse(below)))
    return weights


def without(indices: Sequence[int], weights: Sequence[int], left_out: int) -> tuple[list[int], list[int]]:
    """The indices without one of them, and their Lagrange coefficients."""
    shrink = inverse(left_out)
    kept = [(i, w) for i, w in zip(indices, weights, strict=True) if i != left_out]
    return [i for i, _ in kept], [multiply(multiply(w, i ^ left_out), shrink) for i, w in kept]


def secret_of(weights: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The secret, from as many shares as there are weights, in the order of their indices."""
    total = 0
    for weight, share in zip(weights, shares, strict=True):
        total ^= multiply(weight, int.from_bytes(share, "big"))
    return total.to_bytes(SECRET_BYTES, "big")


def decode(shares: Mapping[int, bytes], threshold: int) -> tuple[bytes, frozenset[int]] | None:
    """The secret and the indices of the wrong shares; None where too many are wrong to tell.

    Args:
        shares: 16 bytes each, by index (1 and up).
        threshold: how many shares make the secret.
    """
    points = {index: int.from_bytes(share, "big") for index, share in shares.items()}
    if len(points) < threshold:
        return None
    found = _polynomial(points, threshold)
    if found is None:
        return None
    wrong = frozenset(index for index, value in points.items() if _evaluate(found, index) != value)
    if 2 * len(wrong) > len(points) - threshold:
        return None
    return (found[0] if found else 0).to_bytes(SECRET_BYTES, "big"), wrong


def _polynomial(points: Mapping[int, int], threshold: int) -> Polynomial | None:
    """Gao's decoder: divide the interpolation by what the Euclidean algorithm says is wrong with it."""
    product: Polynomial = [1]
    for index in points:
        product = _add([0, *product], _scale(product, index))
    older, newer = product, _interpolate(points)
    old_factor: Polynomial = []
    factor: Polynomial = [1]
    while 2 * (len(newer) - 1) >= len(points) + threshold:
        quotient, rest = _divide(older, newer)
        older, newer = newer, rest
        old_factor, factor = factor, _add(old_factor, _times(quotient, factor))
    found, rest = _divide(newer, factor)
    return None if rest or len(found) > threshold else found


def _interpolate(points: Mapping[int, int]) -> Polynomial:
    """Newton's divided differences, then the powers."""
    indices, table = list(points), list(points.values())
    for width in range(1, len(indices)):
        for k in range(len(indices) - 1, width - 1, -1):
            table[k] = multiply(table[k] ^ table[k - 1], _inverse_of_difference(indices[k], indices[k - width]))
    result: Polynomial = []
    for index, coefficient in zip(reversed(indices), reversed(table), strict=True):
        result = _add([0, *result] if result else [], _add(_scale(result, index), [coefficient]))
    return result


_inverses: dict[int, int] = {}


def _inverse_of_difference(i: int, j: int) -> int:
    """Indices are at most 256, so their differences are few."""
    if (i ^ j) not in _inverses:
        _inverses[i ^ j] = inverse(i ^ j)
    return _inverses[i ^ j]


def _add(a: Polynomial, b: Polynomial) -> Polynomial:
    if len(a) < len(b):
        a, b = b, a
    total = [x ^ y for x, y in zip(a, b, strict=False)] + a[len(b) :]
    while total and not total[-1]:
        total.pop()
    return total


def _scale(a: Polynomial, factor: int) -> Polynomial:
    return [multiply(factor, x) for x in a]


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    total: Polynomial = []
    for power, coefficient in enumerate(a):
        if coefficient:
            total = _add(total, [0] * power + _scale(b, coefficient))
    return total


def _divide(a: Polynomial, b: Polynomial) -> tuple[Polynomial, Polynomial]:
    rest, top, quotient = list(a), inverse(b[-1]), [0] * max(len(a) - len(b) + 1, 0)
    for power in range(len(quotient) - 1, -1, -1):
        factor = multiply(rest[power + len(b) - 1], top)
        quotient[power] = factor
        if factor:
            for k, value in enumerate(b):
                rest[power + k] ^= multiply(factor, value)
    del rest[len(b) - 1 :]
    return _add(quotient, []), _add(rest, [])


def _evaluate(a: Polynomial, at: int) -> int:
    total = 0
    for coefficient in reversed(a):
        total = multiply(total, at) ^ coefficient
    return total
