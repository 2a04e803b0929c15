"""Argument checks: what they accept, and that an error names the argument, the rule and the value."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from attention_zoo import _checks as checks

TOKENS, X = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, 4)
ACCEPTED = {
    "positive sizes": lambda: checks.check_positive(dim=1, heads=8, kv_heads=None),
    "a size of numpy": lambda: checks.check_positive(heads=torch.tensor(4).numpy()[()]),
    "a size of 0": lambda: checks.check_at_least(0, text_len=0),
    "fractions": lambda: checks.check_fraction(dropout=0.0, other=0.99),
    "a known name": lambda: checks.check_choice("norm", "rms", ["layer", "rms"]),
    "a boolean mask": lambda: checks.check_boolean(mask=TOKENS.bool()),
    "features": lambda: checks.check_features(X.half(), 4),
    "no padding": lambda: checks.check_padding(None, X),
    "padding": lambda: checks.check_padding(TOKENS.bool(), X),
    "numbers of an interval": lambda: checks.check_in("(0, 1]", p=1, q=np.float32(0.5), r=np.int64(1)),
    "an int that is given": lambda: checks.check_int(0, n=0),
    "token ids": lambda: checks.check_tokens(TOKENS.int() + 2, 3),
    "flags": lambda: checks.check_flag(causal=True, norm=False),
    "numbers": lambda: checks.check_number(a=1, b=-2.5, d=torch.tensor(2.0).numpy()[()]),
    "positive numbers": lambda: checks.check_positive_number(scale=0.1, theta=10000, other=None),
    "an instance": lambda: checks.check_instance(int, type(None), a=1, b=None),
    "no attention mask": lambda: checks.check_attn_mask(None, X, 3, 7),
    "an attention mask": lambda: checks.check_attn_mask(torch.zeros(1, 3, 5, 7), X, 3, 7),
    "token ids of 8 bits": lambda: checks.check_tokens(TOKENS.to(torch.uint8), 3),
    "data": lambda: checks.check_has_data(nn.Linear(3, 3), X),
    "no data": lambda: checks.check_has_data(nn.Linear(3, 3, device="meta"), X.to("meta")),
    "no token ids": lambda: checks.check_token_range(TOKENS[:, :0], 3),
}
REJECTED = {
    "a float size": (lambda: checks.check_positive(dim=2.0), TypeError, r"dim must be an int, got dim=2\.0"),
    "a bool size": (lambda: checks.check_positive(dim=True), TypeError, "dim must be an int, got dim=True"),
    "a size of 0": (lambda: checks.check_positive(dim=0), ValueError, "dim must be at least 1, got dim=0"),
    "a small size": (lambda: checks.check_at_least(3, n=2), ValueError, "n must be at least 3, got n=2"),
    "a fraction of 1": (lambda: checks.check_fraction(p=1.0), ValueError, r"p must lie in \[0, 1\), got p=1\.0"),
    "a negative fraction": (lambda: checks.check_fraction(p=-0.5), ValueError, r"p must lie in .*, got p=-0\.5"),
    "a misspelt name": (
        lambda: checks.check_choice("norm", "layr", ["layer", "rms"]),
        ValueError,
        r"norm must be one of \['layer', 'rms'\], got norm='layr'; did you mean 'layer'\?",
    ),
    "an unknown name": (lambda: checks.check_choice("norm", 7, ["layer"]), ValueError, r"got norm=7$"),
    "a mask of floats": (lambda: checks.check_boolean(mask=X), TypeError, "mask must be a boolean tensor, .*float32"),
    "a list": (lambda: checks.check_boolean(mask=[True]), TypeError, "mask must be a boolean tensor, got list"),
    "a flag of 0": (lambda: checks.check_flag(causal=0), TypeError, "causal must be a bool, got causal=0"),
    "no flag": (lambda: checks.check_flag(causal=None), TypeError, "causal must be a bool, got causal=None"),
    "an empty flag": (lambda: checks.check_flag(causal=""), TypeError, "causal must be a bool, got causal=''"),
    "a string": (lambda: checks.check_number(scale="1"), TypeError, "scale must be a number, got scale='1'"),
    "a bool number": (lambda: checks.check_number(scale=True), TypeError, "scale must be a number, got scale=True"),
    "an infinity": (lambda: checks.check_number(scale=-torch.inf), ValueError, "scale must be finite, got scale=-inf"),
    "no number": (lambda: checks.check_positive_number(e=torch.nan), ValueError, "e must be finite, got e=nan"),
    "a zero": (lambda: checks.check_positive_number(eps=0.0), ValueError, r"eps must be positive, got eps=0\.0"),
    "an instance": (
        lambda: checks.check_instance(int, type(None), n=2.0),
        TypeError,
        "n must be of type int or None, got float",
    ),
    "integer features": (lambda: checks.check_features(TOKENS, 4), TypeError, "x must be a floating .*int64"),
    "wrong features": (lambda: checks.check_features(X, 3), ValueError, r"x must be .* dim=3, got shape \(2, 5, 4\)"),
    "no tokens": (lambda: checks.check_features(X[:, :0], 4), ValueError, r"at least one token, got shape \(2, 0, 4\)"),
    "float padding": (lambda: checks.check_padding(X[..., 0], X), TypeError, "mask must be a boolean .*float32"),
    "long padding": (
        lambda: checks.check_padding(torch.ones(2, 6).bool(), X, name="target_mask"),
        ValueError,
        r"target_mask must be \(b, n\) = \(2, 5\), got shape \(2, 6\)",
    ),
    "float ids": (
        lambda: checks.check_tokens(X, 3),
        TypeError,
        "tokens must be an integer tensor, got dtype .*float32",
    ),
    "an open end": (lambda: checks.check_in("(0, 1]", p=0), ValueError, r"p must lie in \(0, 1\], got p=0"),
    "an open end above": (lambda: checks.check_in("[0, 1)", p=1.0), ValueError, r"p must lie in \[0, 1\), got p=1.0"),
    "an infinite number": (lambda: checks.check_in("[0, inf)", p=math.inf), ValueError, "got p=inf"),
    "nan": (lambda: checks.check_in("(-inf, inf)", p=math.nan), ValueError, r"p must lie in \(-inf, inf\), got p=nan"),
    "a number as a string": (lambda: checks.check_in("[0, 1]", p="1"), TypeError, "p must be a number, got p='1'"),
    "a number as a bool": (lambda: checks.check_in("[0, 1]", p=True), TypeError, "p must be a number, got p=True"),
    "a number that is None": (lambda: checks.check_in("[0, 1]", p=None), TypeError, "p must be a number, got p=None"),
    "no int": (lambda: checks.check_int(1, n=None), TypeError, "n must be an int, got n=None"),
    "a small int": (lambda: checks.check_int(1, n=0), ValueError, "n must be at least 1, got n=0"),
    "sparse features": (
        lambda: checks.check_features(X.to_sparse(), 4),
        TypeError,
        "x must be a floating .*got layout",
    ),
    "boolean ids": (lambda: checks.check_tokens(TOKENS.bool(), 3), TypeError, "tokens must be an integer .*torch.bool"),
    "a weight on the meta device": (
        lambda: checks.check_has_data(nn.Sequential(nn.Linear(3, 3, device="meta")), X),
        RuntimeError,
        "Sequential must have its parameters loaded, got some on the meta device",
    ),
    "flat ids": (lambda: checks.check_tokens(TOKENS[0], 3), ValueError, r"tokens must be \(b, n\) .*got shape \(5,\)"),
    "a large id": (lambda: checks.check_tokens(TOKENS + 3, 3), ValueError, "lie in 0 .* = 2, got ids from 3 to 3"),
    "a negative id": (lambda: checks.check_tokens(TOKENS - 1, 3), ValueError, "got ids from -1 to -1"),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_check_accepts_valid_arguments(case: str) -> None:
    ACCEPTED[case]()


@pytest.mark.parametrize(("check", "error", "message"), REJECTED.values(), ids=REJECTED)
def test_a_check_names_the_argument_the_rule_and_the_value(
    check: Callable[[], None], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check()
