"""Wrong calls of analytic normalization: of the operators and functions of propagated statistics, and of whole models. One sentence each."""

import copy
import math

import pytest
import torch
from analytic_models import Recurrent, data, layers, make, moments
from torch import nn

import normops
from normops import analytic
from normops.analytic import Moments

OPS = torch.ops.normops

# ---- functions and operators ----

ONE, TWO, THREE = torch.ones(1), torch.ones(2), torch.ones(3)
WEIGHT, IMAGE = torch.ones(3, 2), torch.ones(2, 3, 4)
WRONG = {  # calls of functions and operators: arguments of which one is wrong, options
    "activation_moments": [
        ((TWO.long(), TWO, "relu"), {}, TypeError, "expected mean, a tensor of dtype float16, bfloat16, float32 or float64, got torch.int64"),
        ((TWO, TWO.to(torch.complex64), "relu"), {}, TypeError, "expected var, a tensor of dtype .*, got torch.complex64"),
        ((TWO, THREE, "relu"), {}, ValueError, r"expected mean and var to broadcast, got shapes \(2,\) and \(3,\)"),
        ((TWO, TWO.to("meta"), "relu"), {}, ValueError, "expected var on mean's device cpu, got meta"),
        ((TWO, TWO, "swish"), {}, ValueError, "expected activation out of none, relu, .*, got 'swish'"),
        ((TWO, TWO, "elu", (1.0, 1.0, 1.0)), {}, ValueError, "expected at most 2 parameters of elu, got 3"),
        ((TWO, TWO, "hardtanh", (1.0, -1.0)), {}, ValueError, "expected low <= high, got 1.0 and -1.0"),
    ],
    "analytic_norm_weight": [
        ((THREE, THREE, THREE), {}, ValueError, r"expected weight \(O, I/groups, \*kernel\) with groups that divide O, got shape \(3,\), 1 groups"),
        ((WEIGHT, torch.ones(4), torch.ones(4)), {"groups": 2}, ValueError, r"expected weight .*, got shape \(3, 2\), 2 groups"),
        ((WEIGHT, TWO, TWO), {"groups": 0}, ValueError, r"expected weight .*, got shape \(3, 2\), 0 groups"),
        ((WEIGHT.long(), TWO, TWO), {}, TypeError, "expected weight of dtype .*, got torch.int64"),
        ((WEIGHT[:0], TWO, TWO), {}, ValueError, r"expected a weight with elements, got shape \(0, 2\)"),
        ((WEIGHT, ONE, TWO), {}, ValueError, r"expected mean of shape \(2,\), got \(1,\)"),
        ((WEIGHT, TWO, THREE), {}, ValueError, r"expected var of shape \(2,\), got \(3,\)"),
        ((WEIGHT, TWO, TWO.to("meta")), {}, ValueError, "expected var on .* device cpu, got meta"),
        ((WEIGHT, TWO, TWO, TWO), {}, ValueError, r"expected scale of shape \(3,\), got \(2,\)"),
        ((WEIGHT, TWO, TWO, None, THREE.long()), {}, TypeError, "expected bias of dtype .*, got torch.int64"),
        ((WEIGHT, TWO, TWO), {"eps": -1.0}, ValueError, "expected eps >= 0, got -1.0"),
        ((IMAGE, TWO, TWO), {"stride": (2, 2)}, ValueError, r"expected stride of .* for each dimension of a kernel, got [\[(]2, 2[\])]"),
        ((IMAGE, TWO, TWO), {"stride": (0,)}, ValueError, r"expected stride of .* a number >= 1 .*, got [\[(]0,?[\])]"),
        ((IMAGE, THREE, THREE), {"dilation": (2,)}, ValueError, r"expected dilation of a transposed convolution, .*, got [\[(]2,?[\])]"),
        ((IMAGE, THREE, THREE), {"stride": (1,)}, ValueError, r"expected mean of shape \(2,\), got \(3,\)"),
        ((WEIGHT, TWO, TWO), {"eps": math.nan}, ValueError, "expected eps >= 0, got nan"),
    ],
    "analytic_norm": [
        ((TWO, THREE, THREE), {}, ValueError, r"expected x of shape \(N, C, \*spatial\), got \(2,\)"),
        ((IMAGE.long(), THREE, THREE), {}, TypeError, "expected x of dtype .*, got torch.int64"),
        ((IMAGE, TWO, THREE), {}, ValueError, r"expected mean of shape \(3,\), got \(2,\)"),
        ((IMAGE, THREE, THREE.long()), {}, TypeError, "expected var of dtype .*, got torch.int64"),
        ((IMAGE, THREE, THREE.to("meta")), {}, ValueError, "expected var on x's device cpu, got meta"),
        ((IMAGE, THREE, THREE, TWO), {}, ValueError, r"expected weight of shape \(3,\) or \(2, 3\), got \(2,\)"),
        ((IMAGE, THREE, THREE), {"eps": -1.0}, ValueError, "expected eps >= 0, got -1.0"),
        ((IMAGE, THREE, THREE), {"activation": "swish"}, ValueError, "expected activation out of none, relu, .*, got 'swish'"),
        ((IMAGE, THREE, THREE), {"residual": IMAGE[:1]}, ValueError, r"expected residual of x's shape \(2, 3, 4\), got \(1, 3, 4\)"),
    ],
}  # fmt: skip
CALLS = [(name, *case) for name, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize("entry", [normops, OPS], ids=["function", "operator"])
@pytest.mark.parametrize(("name", "given", "options", "kind", "message"), CALLS, ids=[f"{case[0]}-{i}" for i, case in enumerate(CALLS)])
def test_arguments(name, given, options, kind, message, entry):
    with pytest.raises(kind, match=f"^{name}: {message}$"):
        getattr(entry, name)(*given, **options)


MIXED = r"max_moments: expected the variables to broadcast, .* \(2,\) and \(3,\) .*"
VALUES = {  # of functions that have no operator, and negative variances
    "dtype": (lambda: normops.max_moments(TWO, TWO, TWO.long(), TWO), TypeError, "max_moments: expected mean, a tensor of .*, got torch.int64"),
    "shapes": (lambda: normops.max_moments(TWO, TWO, THREE, THREE), ValueError, MIXED),
    "correlation": (lambda: normops.max_moments(TWO, TWO, TWO, TWO, 2.0), ValueError, r"max_moments: expected .*\[-1, 1\], got 2.0"),
    "no count": (lambda: normops.max_pool_moments(TWO, TWO, 0), ValueError, "max_pool_moments: expected a whole count .*, got 0 and 0.0"),
    "half a count": (lambda: normops.max_pool_moments(TWO, TWO, 2.5), ValueError, "max_pool_moments: .*, got 2.5 and 0.0"),
    "of a pool": (lambda: normops.max_pool_moments(TWO, TWO, 4, -0.1), ValueError, r"max_pool_moments: .* in \[0, 1\], got 4 and -0.1"),
}  # fmt: skip
NEGATIVE = {
    "activation_moments": lambda var: normops.activation_moments(TWO, var, "relu"),
    "max_moments": lambda var: normops.max_moments(TWO, TWO, TWO, var),
    "max_pool_moments": lambda var: normops.max_pool_moments(TWO, var, 4),
    "argmax_probabilities": lambda var: normops.argmax_probabilities(TWO, var),
    "softmax_mean": lambda var: normops.softmax_mean(TWO, var),
    "analytic_norm_weight": lambda var: normops.analytic_norm_weight(WEIGHT, TWO, var),
    "analytic_norm": lambda var: normops.analytic_norm(IMAGE[:, :2], TWO, var),
    "activation_moments.default": lambda var: OPS.activation_moments(TWO, var, "relu"),
    "analytic_norm_weight.default": lambda var: OPS.analytic_norm_weight(WEIGHT, TWO, var),
    "analytic_norm.default": lambda var: OPS.analytic_norm(IMAGE[:, :2], TWO, var),
}
VALUES |= {f"{name} negative": (lambda call=call: call(torch.tensor([1.0, -1.0])), ValueError,
                                f"{name.removesuffix('.default')}: expected var >= 0, got -1") for name, call in NEGATIVE.items()}  # fmt: skip


@pytest.mark.parametrize("key", VALUES)
def test_values(key):
    call, kind, message = VALUES[key]
    with pytest.raises(kind, match=f"^{message}$"):
        call()


# ---- models ----


def normalized():
    return analytic.normalize(make("mlp"), moments("mlp"))


def alike(*shape, mean=0.0, var=1.0):
    return Moments(torch.full(shape[:1], mean), torch.full(shape[:1], var), shape)


OUTSIDE = "Linear: expected to be called inside the model that analytic.normalize was given"
ERRORS = {
    "already": (lambda: analytic.normalize(normalized(), alike(6)), ValueError,
                "analytic.normalize: expected a model that is not normalized yet, got one with analytic layers"),
    "names": (lambda: analytic.normalize(make("mlp"), alike(6), layers=["0", "7", "1"]), ValueError,
              "analytic.normalize: expected names of layers out of 0, 2, 4, got 1, 7"),
    "function": (lambda: analytic.normalize(nn.Sequential(nn.Linear(6, 2), nn.LogSigmoid()), alike(6)), NotImplementedError,
                 r"propagate: no rule for log_sigmoid; write one: @propagate.register\(function\) above a function of its arguments"),
    "nan": (lambda: analytic.normalize(make("mlp"), alike(6, mean=torch.nan)), ValueError, "Moments: expected a finite mean, got nan"),
    "infinite": (lambda: analytic.initialize_(make("mlp"), alike(6, var=torch.inf)), ValueError, "Moments: expected a finite var, got inf"),
    "negative": (lambda: analytic.initialize_(make("mlp"), alike(6, var=-1.0)), ValueError, "Moments: expected var >= 0, got -1"),
    "features": (lambda: analytic.normalize(make("mlp"), alike(5)), ValueError,
                 r"propagate: expected 6 features in linear, got a sample of shape \(5,\)"),
    "one feature": (lambda: analytic.initialize_(make("mlp"), alike(1)), ValueError,
                    r"propagate: expected 6 features in linear, got a sample of shape \(1,\)"),
    "channels": (lambda: analytic.normalize(make("cnn"), alike(5, 16, 16)), ValueError,
                 r"propagate: expected 3 channels in conv2d, got a sample of shape \(5, 16, 16\)"),
    "rank": (lambda: analytic.initialize_(make("cnn"), alike(3)), ValueError,
             r"propagate: expected a sample that conv2d takes, got one of shape \(3,\) .*"),
    "tensor": (lambda: analytic.normalize(make("mlp"), torch.zeros(6)), TypeError, "analytic.normalize: expected Moments, got Tensor"),
    "no moments": (lambda: analytic.initialize_(make("mlp"), None), TypeError, "analytic.initialize_: expected Moments, got NoneType"),
    "padding": (lambda: analytic.normalize(make("mlp"), alike(6), padding="same"), ValueError,
                "propagate: expected padding out of ignore, coverage, got 'same'"),
    "pooling": (lambda: analytic.initialize_(make("mlp"), alike(6), pooling=1.5), ValueError,
                r"propagate: expected pooling in \[0, 1\], got 1.5"),
    "no bias": (lambda: analytic.initialize_(make("mlp", bias=False), alike(6)), ValueError,
                "analytic.initialize_: expected a bias in every layer, got none in 0"),
    "plain": (lambda: analytic.fold(make("mlp")), ValueError, "analytic.fold: expected a model that analytic.normalize was given, got another"),
    "several places": (lambda: analytic.fold(analytic.normalize(Recurrent(), alike(6))), ValueError,
                       "analytic.fold: expected layers that are called at one place, got a Linear at 3"),
    "outside": (lambda: normalized()[0](data("mlp")), RuntimeError, OUTSIDE),
    "outside, of a copy": (lambda: copy.deepcopy(normalized())[2](torch.zeros(1, 8)), RuntimeError, OUTSIDE),
}  # fmt: skip


@pytest.mark.parametrize("key", ERRORS)
def test_models(key):
    """One sentence each."""
    call, kind, message = ERRORS[key]
    with pytest.raises(kind, match=f"^{message}$"):
        call()


def test_a_failure_changes_nothing():
    """Neither weights nor layers nor the rules of modules."""
    for function in (analytic.normalize, analytic.initialize_):
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.LogSigmoid())
        before, attributes = copy.deepcopy(model.state_dict()), [set(vars(module)) for module in model.modules()]
        with pytest.raises(NotImplementedError):
            function(model, moments("mlp"))
        assert not layers(model) and [set(vars(module)) for module in model.modules()] == attributes
        assert function is analytic.initialize_ or all(map(torch.equal, model.state_dict().values(), before.values()))
