"""Tests of iadd.py: the method against plain references, the parts against what the paper and the
literature state, and every command by its command line. Run: pytest -q

As a program, `python test_iadd.py [--quick]`, this file times the parts of the method against the
obvious way to write them (Section 4.2)."""

import argparse
import copy
import csv
import functools
import gc
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import operator
import os
import random
import re
import runpy
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import urllib.error
import weakref
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import iadd
from iadd import Dataset, Normalisation, UserError, flat_parameters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = Path(iadd.__file__).parent


@pytest.fixture(autouse=True)
def clean_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # these networks are tiny: several threads wait for each other
    torch.backends.cudnn.allow_tf32 = False  # comparisons need all 24 bits
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(autouse=True, scope="module")
def whitening_is_computed_once():
    """The eigenvectors behind ZCA take long, and most commands need those of the same images."""
    known, eigh = {}, torch.linalg.eigh

    def remembered(x):
        key = x.shape, x.device, hash(x.cpu().numpy().tobytes())
        if key not in known:
            known[key] = eigh(x)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", remembered)
        yield


def same(a, b):
    """The same bits on a CPU; on CUDA some kernels add in no fixed order."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return torch.equal(a, b) if DEVICE == "cpu" else torch.allclose(a, b, rtol=1e-3, atol=1e-4)


ROUNDING = {"rtol": 1e-5, "atol": 1e-6} if DEVICE == "cpu" else {"rtol": 1e-3, "atol": 1e-4}


def count(net):
    return sum(p.numel() for p in net.parameters())


# ---- the method: gradients -----------------------------------------------------------------------


def unrolled(net):
    """The student the obvious way, MTT's: autograd keeps the graph of all steps."""
    ell = iadd.cross_entropy(net)

    def student(theta, alpha, x, y):
        theta = theta if theta.requires_grad else theta.clone().requires_grad_()
        for x_j, y_j in zip(x, y):
            (gradient,) = torch.autograd.grad(ell(theta, x_j, y_j), theta, create_graph=True)
            theta = theta - alpha * gradient
        return theta

    return student


def student_of(net, precision="float32"):
    return iadd.Student(iadd.cross_entropy(net, precision))


def tiny_problem(dtype=torch.float64, J=4, B=3, depth=2):
    """A small ConvNet, the leaves theta, alpha, x and W, and what stays as it is: labels, start and
    target."""
    net = iadd.plain_network((3, 8, 8), 3, [(4, 3), "avg"] * depth).to(DEVICE, dtype)
    theta = flat_parameters(net)
    x = torch.randn(J, B, 3, 8, 8).to(theta)
    W = 1 + 0.1 * torch.rand_like(theta)
    leaves = [leaf.requires_grad_() for leaf in (theta, torch.tensor(0.3).to(theta), x, W)]
    y = torch.randint(3, (J, B), device=DEVICE)
    start = theta.detach().clone()
    return net, leaves, (y, start, start + 0.05 * torch.randn_like(start))


def loss_after(student, leaves, rest):
    (theta, alpha, x, W), (y, start, target) = leaves, rest
    return iadd.iadd_loss(student(theta, alpha, x, y), start, target, W)


def gradients(student, leaves, rest):
    return torch.autograd.grad(loss_after(student, leaves, rest), leaves)


def test_gradients_equal_those_of_the_plain_unroll():
    net, leaves, rest = tiny_problem()
    ours = gradients(student_of(net), leaves, rest)
    for a, b in zip(ours, gradients(unrolled(net), leaves, rest)):
        assert b.abs().max() > 1e-6  # the comparison is of something
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_gradients_equal_finite_differences():
    net, leaves, rest = tiny_problem(J=3)
    student = student_of(net)
    for k, gradient in enumerate(gradients(student, leaves, rest)):
        direction = torch.randn_like(gradient)
        moved = [leaves[:k] + [leaves[k] + h * direction] + leaves[k + 1 :] for h in (1e-6, -1e-6)]
        up, down = (loss_after(student, there, rest) for there in moved)
        assert torch.allclose((up - down) / 2e-6, (gradient * direction).sum(), rtol=1e-5), k


def test_one_step_is_plain_sgd():
    net, (theta, alpha, x, _), (y, *_) = tiny_problem(torch.float32)
    ours = student_of(net).step(theta, alpha, x[0], y[0])
    optimizer = torch.optim.SGD(net.parameters(), alpha.item())
    F.cross_entropy(net(x[0]), y[0]).backward()
    optimizer.step()
    assert torch.allclose(ours, flat_parameters(net), atol=1e-6)


def test_a_student_keeps_no_activations():
    """What waits for the way back is theta, alpha, x and y of each step, and nothing else."""
    net, (theta, alpha, x, _), (y, *_) = tiny_problem(J=10)
    end = student_of(net)(theta, alpha, x, y)
    node = end.grad_fn
    for _ in range(10):
        shapes = [tensor.shape for tensor in node.saved_tensors]
        assert shapes == [theta.shape, alpha.shape, x[0].shape, y[0].shape]
        previous, *others = (n for n, _ in node.next_functions if n is not None)
        kinds = [n.name() for n in others]  # of alpha, a leaf, and of x, one of J
        assert kinds == ["torch::autograd::AccumulateGrad", "UnbindBackward0"]
        node = previous
    assert node.name() == "torch::autograd::AccumulateGrad"  # theta, where it began


def test_batchnorm_is_refused():
    """Its running statistics are no parameters: students would train on those of `net`."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 2))
    x, y = torch.randn(5, 3, 2, 2), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="running_mean"):
        iadd.cross_entropy(net)(flat_parameters(net), x, y)


# ---- the method: the loss and Algorithm 1 --------------------------------------------------------


def test_loss_by_hand():  # Eq. (9)
    theta, start, target = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [2.0, 2.0, 1.0]])
    W = torch.tensor([1.0, 5.0, 0.5], requires_grad=True)
    loss = iadd.iadd_loss(theta, start, target, W)
    assert loss.item() == pytest.approx((1 + 0 + 1) / (4 + 4 + 1))
    loss.backward()  # 2 w d^2 / ||...||^2: never negative, so plain SGD can only lower the weights
    assert W.grad.tolist() == pytest.approx([2 * 1 * 1 / 9, 0, 2 * 0.5 * 4 / 9])


def settings_of(**changed):
    """Those of Algorithm 1, for the problem below."""
    steps = {"J": 3, "K": 2, "max_start": 2, "batch": 4, "S": 1, "seed": 0}
    rates = {"alpha": 0.05, "lr_img": 1000, "lr_alpha": 0.1, "lr_w": 0.0}
    return iadd.Matching(**{**steps, **rates, "method": "iadd", "epsilon": 0.1, **changed})


def test_weights_of_the_three_methods():
    mismatch = torch.tensor([0.1, -5.0, 0.3, -0.2, 0.0, 4.0, 0.1, 0.1, 0.2, 0.3])
    W = torch.full((10,), 0.5, requires_grad=True)
    iadd_, mtt, ddpp = (settings_of(method=x, epsilon=0.2) for x in ("iadd", "mtt", "ddpp"))
    assert iadd.weigh(iadd_, W, mismatch) is W
    assert iadd.weigh(mtt, W, mismatch).tolist() == [1] * 10
    mask = iadd.weigh(ddpp, W, mismatch)  # drops the two hardest of ten
    assert mask.tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 1, 1] and not mask.requires_grad
    none = settings_of(method="ddpp", epsilon=0.0)
    assert iadd.weigh(none, W, mismatch).tolist() == [1] * 10
    assert W.tolist() == [0.5] * 10


def matching_problem():
    """A network, two teachers of three epochs, images and their labels."""
    torch.manual_seed(1)
    net = iadd.plain_network((3, 8, 8), 3, [(4, 3), "avg"] * 2).to(DEVICE)
    teachers = [0.1 * torch.randn(4, count(net)).cumsum(0) for _ in range(2)]
    images, labels = torch.randn(6, 3, 8, 8).to(DEVICE), torch.arange(3).repeat_interleave(2)
    return net, teachers, images, labels.to(DEVICE)


def distilled(T=3, compiling=False, segments=None, **settings):
    """That problem after T iterations, and their losses. compiling: as --compile says."""
    net, teachers, images, labels = matching_problem()
    m = settings_of(**settings)
    d = iadd.Distillation(images, labels, count(net), m)
    args = SimpleNamespace(precision="float32", iterations=T, compile=compiling)
    student = iadd.fast_student(net, teachers[0][0], d, m, args)
    losses = [iadd.iteration(d, student, teachers, m, segments or range(m.S)) for _ in range(T)]
    return d, losses


def test_uniform_weights_are_mtt():
    """W = 1 gives the images and alpha of an independent MTT loop, to rounding."""
    d, _ = distilled(method="mtt", lr_w=10.0)
    assert (d.W == 1).all()
    fixed, _ = distilled(method="iadd", lr_w=0.0)
    assert same(d.images, fixed.images) and same(d.alpha, fixed.alpha)

    net, teachers, x_syn, labels = matching_problem()
    lr = torch.tensor(0.05, device=DEVICE, requires_grad=True)
    optimizer_x = torch.optim.SGD([x_syn.requires_grad_()], 1000, 0.5)
    optimizer_lr = torch.optim.SGD([lr], 0.1, 0.5)
    for t in range(3):
        iadd.seed_all(0, "segment", t, 0)  # the same random numbers once more
        start, target = (x.to(DEVICE) for x in iadd.random_segment(teachers, 2, 2))
        index = iadd.minibatches(6, 4, 3).to(DEVICE)
        x, y = iadd.augment(x_syn[index]), labels[index]
        theta = unrolled(net)(start, lr, x, y)
        error, distance = (F.mse_loss(end, target, reduction="sum") for end in (theta, start))
        optimizer_x.zero_grad()
        optimizer_lr.zero_grad()
        (error / distance).backward()
        optimizer_x.step()
        optimizer_lr.step()
    assert torch.allclose(x_syn, d.images, **ROUNDING) and torch.allclose(lr, d.alpha, **ROUNDING)
    assert (x_syn - matching_problem()[2]).abs().max() > 0.1 and abs(lr - 0.05) > 1e-3


def test_an_iteration_averages_over_its_segments():
    """From one start, the steps of S segments are the mean of those of each alone."""
    together, (loss,) = distilled(T=1, lr_w=1.0, S=3)
    apart = [distilled(T=1, lr_w=1.0, segments=[s]) for s in range(3)]
    for key in ("images", "alpha", "W"):
        steps = torch.stack([getattr(d, key).detach() for d, _ in apart])
        assert torch.allclose(getattr(together, key), steps.mean(0), **ROUNDING)
        assert not torch.equal(steps[0], steps[1])
    losses = torch.stack([loss for _, (loss,) in apart])
    assert torch.allclose(loss, losses.mean()) and losses.std() > 0


def test_weights_learn_and_only_shrink():
    d, losses = distilled(lr_w=10.0)
    assert d.W.max() <= 1 and d.W.min() < 0.99
    assert d.alpha != 0.05 and d.t == len(losses) == 3


def test_ddpp_matches_only_what_is_easy():
    mtt, none, some = (
        distilled(method=method, epsilon=epsilon, lr_w=9.0)
        for method, epsilon in (("mtt", 0.3), ("ddpp", 0.0), ("ddpp", 0.3))
    )
    assert same(mtt[0].images, none[0].images) and not same(mtt[0].images, some[0].images)
    assert some[1][0] < mtt[1][0] and (some[0].W == 1).all()


def test_segments_cover_the_allowed_epochs():
    teachers = [torch.arange(6.0)[:, None] + 10 * n for n in range(3)]
    seen = {tuple(iadd.random_segment(teachers, 2, 4).flatten().tolist()) for _ in range(400)}
    assert seen == {(10 * n + i, 10 * n + i + 2) for n in range(3) for i in range(4)}


def test_minibatches_are_fresh_permutations():
    index = iadd.minibatches(10, 5, 7)
    assert index.shape == (7, 5) and iadd.minibatches(10, 10, 3).shape == (3, 10)
    assert sorted(index[:2].flatten().tolist()) == list(range(10))
    assert sorted(index[2:4].flatten().tolist()) == list(range(10)) and (index[0] != index[2]).any()
    index = iadd.minibatches(10, 4, 6)  # 10 = 4 + 4 + 2, filled up by the first 2 of the pass
    for a_pass in index[:3].flatten().tolist(), index[3:].flatten().tolist():
        assert set(a_pass) == set(range(10)) and a_pass[10:] == a_pass[:2]


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA adds in no fixed order")
def test_gradients_of_the_images_are_the_same_bits():
    """Though threads share out the sum over the mini-batches that an image is in."""
    torch.set_num_threads(2)
    images, labels = torch.randn(10, 3, 32, 32, requires_grad=True), torch.arange(10)
    v = torch.randn(50, 10, 3, 32, 32)

    def gradient():
        iadd.seed_all("again")
        x, _ = iadd.student_batches(images, labels, 10, 50)
        return torch.autograd.grad(x, images, v)[0]

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(5))


def test_augment_is_each_kind_by_itself():
    """The regrouping changes nothing but the order of the random numbers."""
    x, alone = torch.rand(40, 2, 3, 8, 8), [lambda x, k=k: x * (k + 2) for k in range(6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iadd, "DSA", alone)
        iadd.seed_all("kinds")
        together = iadd.augment(x)
    iadd.seed_all("kinds")
    kind = torch.randint(6, (40,))
    assert torch.equal(together, torch.stack([alone[k](x_j) for k, x_j in zip(kind, x)]))


def test_herding_by_hand():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1, 1))
    x = torch.tensor([0.0, 10.0, 2.0, 3.0, 100.0]).view(5, 1, 1, 1)  # their mean is 23
    # First 10. Then 3: a mean of 6.5; with 100 it would be 55. Then 100: 37.7; with 2 it would be
    # 5. Then 0: 28.25.
    assert iadd.herding(net, torch.zeros(2), 4, x).tolist() == [1, 3, 4, 0]


# ---- speed and precision -------------------------------------------------------------------------


def errors(found, exact):
    """How far each tensor is from the exact one, as a share of that."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact)]


def test_precision_of_every_way(monkeypatch):
    """Of a student's end and the gradients, beside float64. The fast ways may be 3 times worse than
    the plain one of their precision."""
    torch.compiler.reset()
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):  # it can but trace
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    net, leaves, (y, start, target) = tiny_problem(J=3, B=4)

    def way(faster, precision, dtype=torch.float32):
        theta, alpha, x, W = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
        end = faster(student_of(net.to(dtype), precision))(theta, alpha, x, y)
        loss = iadd.iadd_loss(end, start.to(dtype), target.to(dtype), W)
        return [end.detach() - theta.detach(), *torch.autograd.grad(loss, (theta, alpha, x, W))]

    exact = way(copy.copy, "float32", torch.float64)
    for precision, least, most in (("float32", 1e-9, 1e-4), ("bf16", 1e-3, 0.2)):
        plain = max(errors(way(copy.copy, precision), exact))
        assert least < plain < most
        torch.compiler.reset()
        assert max(errors(way(iadd.compiled, precision), exact)) < 3 * plain


def test_bf16_is_for_the_network_alone():
    """It sees bfloat16; loss, steps and gradients stay as they were."""
    net, (theta, alpha, x, _), (y, *_) = tiny_problem(torch.float32)
    seen = []
    net[0].register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    loss = iadd.cross_entropy(net, "bf16")(theta, x[0], y[0])
    assert loss.dtype == torch.float32 and {t.dtype for t in seen} == {torch.bfloat16}
    end = student_of(net, "bf16")(theta, alpha, x, y)
    found = torch.autograd.grad(end.sum(), (theta, alpha, x))
    assert all(t.dtype == torch.float32 for t in (end, *found))
    assert (end != end.bfloat16()).any()  # the step itself is not rounded


def test_nothing_compiled_is_taken_for_the_other_precision(monkeypatch):
    """torch.compile does not see all that a function remembers (PyTorch issue 197811)."""
    quick = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", quick)
    net, (theta, *_), _ = tiny_problem(torch.float32, depth=1)
    x, y = torch.randn(3, 3, 8, 8, device=DEVICE), torch.arange(3, device=DEVICE)
    for precision in ("float32", "bf16", "float32"):
        ell = iadd.cross_entropy(net, precision)
        fast = iadd.accelerated(ell, (theta, x, y), 1, True)
        assert torch.allclose(fast(theta, x, y), ell(theta, x, y), rtol=1e-5)


def test_a_step_is_compiled_once(monkeypatch):
    """Though the first theta is a teacher's, and the others results of a step."""
    graphs = []
    count_them = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count_them))
    torch.compiler.reset()
    net, (theta, alpha, x, _), (y, *_) = tiny_problem(torch.float32, depth=1)
    end = iadd.compiled(student_of(net))(theta.detach(), alpha, x, y)
    torch.autograd.grad(end.square().sum(), (alpha, x))
    assert len(graphs) == 2  # of `step` and of `step_back`


def test_random_numbers_do_not_depend_on_the_device():
    """A recording that fails can leave those of a GPU unusable; all are drawn on the CPU."""
    x = torch.rand(12, 2, 3, 16, 16)
    found = []
    for device in ("cpu", DEVICE):
        iadd.seed_all("the same")
        found.append(iadd.augment(x.to(device)).cpu())
    assert torch.allclose(*found, atol=1e-4)


def graphed(function, examples):
    """A stand-in for CUDA graphs: like these, it overwrites its inputs and what it returned."""
    static = function(*examples).detach().clone()
    memory = [torch.zeros_like(example) for example in examples]  # of the gradients

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            for mine, given in zip(examples, inputs):
                mine.data.copy_(given)
            return static.copy_(function(*inputs)).detach()

        @staticmethod
        def backward(ctx, v):
            inputs = [i.detach().requires_grad_(i.requires_grad) for i in ctx.saved_tensors]
            needed = [i for i in inputs if i.requires_grad]
            with torch.enable_grad():
                found = iter(torch.autograd.grad(function(*inputs), needed, v))
            for mine, i in zip(memory, inputs):
                if i.requires_grad:
                    mine.copy_(next(found))
            pairs = zip(memory, inputs)
            return tuple(mine.detach() if i.requires_grad else None for mine, i in pairs)

    return Replay.apply


@pytest.fixture
def cuda(monkeypatch):
    """As if there were a GPU: a function that sets what records CUDA graphs."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    return functools.partial(monkeypatch.setattr, torch.cuda, "make_graphed_callables")


def test_recorded_equals_eager(cuda, monkeypatch, capsys):
    """On CUDA the real thing, elsewhere the stand-in."""
    recordings = []
    record = graphed if DEVICE == "cpu" else torch.cuda.make_graphed_callables
    cuda(lambda *inputs: recordings.append(1) or record(*inputs))
    (eager, losses), (fast, again) = (distilled(lr_w=1.0, S=2, compiling=c) for c in (False, None))
    for key in ("images", "alpha", "W"):
        a, b = (getattr(d, key) for d in (eager, fast))
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    assert torch.allclose(torch.stack(losses), torch.stack(again), rtol=1e-3)
    net, *_ = matching_problem()
    x, y = torch.randn(30, 3, 8, 8, device=DEVICE), torch.arange(30, device=DEVICE) % 3
    images, before = iadd.ImageSet(x, y), x.clone()
    args = SimpleNamespace(precision="float32", batch_real=8)
    trained = []
    for args.compile in (False, None):
        ell = iadd.fast_loss(net, images, 1, args)
        iadd.seed_all("twice the same")
        thetas = [flat_parameters(net) + k for k in range(2)]
        trained += [iadd.train_network(ell, theta, images, 4, 0.1, 8) for theta in thetas]
    assert torch.allclose(trained[0], trained[2], atol=1e-3)
    assert torch.allclose(trained[1], trained[3], atol=1e-3)
    assert len(recordings) == 2  # one for the students, one for both networks
    assert torch.equal(x, before)  # what is recorded writes into copies
    assert capsys.readouterr().err == ""


def test_no_old_graph_is_freed_while_another_is_recorded(cuda):
    class Graph:
        """Like those of torch 2.9 to 2.14, part of a cycle (torch pull request 195397)."""

    def record(function, examples):
        assert alive() is None
        return function

    cuda(record)
    gc.disable()  # not now
    try:
        graph = Graph()
        graph.itself, alive = graph, weakref.ref(graph)
        del graph
        assert alive() is not None
        examples = (torch.ones(3, requires_grad=True),)
        assert iadd.accelerated(torch.exp, examples, 0, None)(torch.zeros(1)) == 1
    finally:
        gc.enable()


def test_compiles_what_takes_minutes(cuda, monkeypatch, capsys):
    compiled, recorded, long = [], [], 10**9
    cuda(lambda function, _: recorded.append(1) or function)
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(options) or f)
    examples = (torch.ones(3, requires_grad=True),)
    wishes = ((1000, None, 0), (long, False, 0), (long, None, 1), (1000, True, 1), (0, True, 0))
    for gpu in (True, False):
        monkeypatch.setattr(torch.Tensor, "is_cuda", gpu, raising=False)
        for images, wanted, does in wishes:
            compiled.clear(), recorded.clear()
            function = iadd.accelerated(torch.exp, examples, images, wanted)
            assert function(torch.zeros(1)) == 1 and compiled == does * [{"dynamic": False}]
            assert len(recorded) == (gpu and wanted is not False)
            assert ("compiling first" in capsys.readouterr().err) == does


class Broken(torch.autograd.Function):
    """Returns its input, and fails on the way back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, v):
        raise ValueError("no way back")


def fails_at_once(f, *_, **options):
    raise RuntimeError("Compiler: cl is not found.\nMany more lines")


def fails_when_called(f, *_, **options):
    return fails_at_once


def fails_on_the_way_back(f, *_, **options):
    return lambda *inputs: Broken.apply(f(*inputs))


def gives_other_numbers(f, *_, **options):
    return lambda *inputs: 2.5 * f(*inputs)


def gives_no_numbers(f, *_, **options):
    return lambda *inputs: math.nan * f(*inputs)


def gives_other_gradients(f, *_, **options):
    def way(*inputs):
        result = f(*inputs)
        return result.detach() + 2 * (result - result.detach())

    return way


def use_instead(fault, tool, cuda, monkeypatch):
    """`fault` for torch.compile, or for what records CUDA graphs."""
    if tool == "torch.compile":
        monkeypatch.setattr(torch.Tensor, "is_cuda", False, raising=False)
        monkeypatch.setattr(torch, "compile", fault)
    else:
        cuda(fault)
    return tool == "torch.compile" or None  # what --compile has to be


@pytest.mark.parametrize("tool", ["torch.compile", "CUDA graphs"])
@pytest.mark.parametrize(
    "fault, says",
    [
        (fails_at_once, "RuntimeError: Compiler: cl is not found."),
        (fails_when_called, "RuntimeError: Compiler: cl is not found."),
        (fails_on_the_way_back, "ValueError: no way back"),
        (gives_other_numbers, "it gives other results"),
        (gives_no_numbers, "it gives other results"),
        (gives_other_gradients, "it gives other results"),
    ],
)
def test_what_makes_it_faster_may_fail(cuda, monkeypatch, capsys, fault, says, tool):
    """A line says so, and the plain function does it."""
    net, (theta, *_), _ = tiny_problem(torch.float32)
    x, y = torch.randn(2, 3, 8, 8, device=DEVICE), torch.arange(2, device=DEVICE)
    ell, examples = iadd.cross_entropy(net), (theta, x, y)
    wanted = use_instead(fault, tool, cuda, monkeypatch)
    assert iadd.accelerated(ell, examples, 1, wanted) is ell
    lines = [x for x in capsys.readouterr().err.splitlines() if "compiling first" not in x]
    assert lines == [f"without {tool}: {says}"]


def test_without_a_compiler_a_gpu_still_records(cuda, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", fails_when_called)
    cuda(lambda function, _: lambda *inputs: 1 * function(*inputs))
    examples = (torch.ones(3, requires_grad=True),)
    fast = iadd.accelerated(torch.exp, examples, 1, True)
    assert fast is not torch.exp and fast(torch.zeros(1)) == 1
    assert "CUDA" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_too_little_memory_is_no_such_failure(cuda, error):
    def record(function, examples):
        raise error

    cuda(record)
    with pytest.raises(type(error)):
        iadd.accelerated(torch.exp, (torch.ones(3, requires_grad=True),), 0, None)


def everything(run, name, compiling):
    """What teachers, distill and eval come to."""
    tmp, options, _ = run
    options = [*options, "--runs", tmp / name, compiling]  # the last --runs counts
    folder = tmp / name / "pets_std_w4"
    assert command("teachers --teachers 1 --ipc 1", options) == 0
    assert command("distill --iterations 3 --steps 3", options) == 0
    assert command("eval --nets 1 --eval-epochs 2", options) == 0
    out = folder / "ipc1_iadd_seed0"
    end = result(out)
    return thetas(folder / "teachers/000.pt"), end["images"], end["W"], rows_of(out)[0]["confusion"]


@pytest.fixture(scope="module")
def plainly(run):
    return everything(run, "plain", "--no-compile")


@pytest.mark.parametrize("tool", ["torch.compile", "CUDA graphs"])
@pytest.mark.parametrize("fault", [fails_when_called, fails_on_the_way_back, gives_other_numbers])
def test_all_commands_go_on_from_the_same_state(
    run, plainly, cuda, monkeypatch, capsys, fault, tool
):
    wanted = use_instead(fault, tool, cuda, monkeypatch)
    found = everything(run, f"{fault.__name__}-{tool}", "--compile" if wanted else "")
    assert capsys.readouterr().err.count(f"without {tool}: ") == 3
    assert all(map(same, found, plainly))


# ---- networks, presets ---------------------------------------------------------------------------


def test_parameter_counts():
    assert count(iadd.convnet((3, 32, 32), 10)) == 320_010  # stated in the paper, Section 1
    assert count(iadd.convnet((3, 32, 32), 100)) == 504_420
    assert count(iadd.convnet((3, 64, 64), 200)) == 857_160
    assert count(iadd.alexnet((3, 32, 32), 10)) == 1_872_202
    assert count(iadd.vgg11((3, 32, 32), 10)) == 9_231_114
    assert count(iadd.resnet18((3, 32, 32), 10)) == 11_173_962


def of_size(channels, side):
    """A dataset of such images."""
    part = torch.zeros(2, channels, side, side, dtype=torch.uint8), torch.arange(2)
    return Dataset("x", ["a", "b"], part, part)


@pytest.mark.parametrize("arch", iadd.ARCHITECTURES)
@pytest.mark.parametrize("channels, side", [(1, 32), (3, 64), (1, 112)])
def test_networks_take_all_sizes_and_have_no_other_state(arch, channels, side):
    args = SimpleNamespace(width=8, device="cpu")
    net = iadd.new_network(arch, of_size(channels, side), args)
    assert net(torch.randn(2, channels, side, side)).shape == (2, 2)
    assert not list(net.buffers())


def completed(*words):
    args = iadd.make_parser().parse_args([str(word) for word in words])
    iadd.complete(args)
    return args


def test_depth_by_image_size():
    for side, depth in ((28, 3), (32, 3), (64, 4), (112, 5), (128, 5)):
        net = iadd.convnet((1, side, side), 2, width=1)
        assert sum(isinstance(layer, torch.nn.Conv2d) for layer in net) == depth


def test_presets():
    row = iadd.preset("cifar10", 1)
    assert (row["J"], row["K"], row["max_start"]) == (50, 2, 2)
    assert (row["lr_img"], row["lr_alpha"], row["alpha"]) == (100, 1e-7, 0.01)
    assert row["batch"] == 0 and row["zca"] is True
    assert iadd.preset("cifar10", 50)["zca"] is False
    assert iadd.preset("cifar100", 50)["batch"] == 125
    assert iadd.preset("cifar10", 20) == iadd.preset("cifar10", 10) != iadd.preset("cifar10", 9)
    assert iadd.preset("covid", 1) == iadd.preset("covid", 20)  # none smaller: the smallest
    assert iadd.preset("a folder", 10)["J"] == iadd.preset("cifar10", 10)["J"]


def test_defaults_are_the_papers():
    s = completed("teachers", "--dataset", "cifar10")
    assert (s.teachers, s.epochs, s.lr_teacher, s.batch_real) == (200, 50, 0.01, 256)
    assert completed("teachers", "--ipc", 1).epochs == 3  # those that distill reads
    s = completed("distill", "--ipc", 1)
    assert (s.dataset, s.iterations, s.J, s.S) == ("cifar10", 5000, 50, 1)
    assert (s.lr_w, s.zca, s.seed, s.width) == (1e-4, True, 0, 128)
    s = completed("distill", "--ipc", 50, "--steps", 7)  # default < preset < what is typed
    assert (s.J, s.lr_img, s.zca) == (7, 1000, False)
    s = completed("eval", "--arch", "vgg11")
    assert (s.dataset, s.arch, s.nets, s.on) == ("cifar10", ["vgg11"], 5, ["distilled"])


# ---- normalisation -------------------------------------------------------------------------------


def correlated_images(n=500, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.rand(n, 1, 4, 4, generator=g)
    return ((base + 0.3 * torch.rand(n, 3, 4, 4, generator=g)) / 1.3 * 255).to(torch.uint8)


def test_zca_whitens():
    images = correlated_images()
    normalise = Normalisation.fit(images, zca=True)
    z = normalise(images)
    assert z.mean(0).abs().max() < 1e-5
    S = torch.linalg.eigvalsh(torch.cov((images.flatten(1).double() / 255).T))
    whitened = torch.linalg.eigvalsh(torch.cov(z.flatten(1).double().T))
    assert torch.allclose(whitened, S / (S + 0.1), atol=1e-5)  # as M = U diag(1/sqrt(S + .1)) U^T
    assert torch.allclose(normalise.scale, normalise.scale.T, atol=1e-5)
    almost_white = Normalisation.fit(images, zca=True, eps=1e-7)(images)
    assert torch.allclose(torch.cov(almost_white.flatten(1).T), torch.eye(48), atol=1e-2)


@pytest.mark.parametrize("zca", [True, False])
def test_normalisation_inverts_and_is_fitted_on_training_images_alone(zca):
    train, test = correlated_images(), 255 - correlated_images(100, seed=1) // 2
    normalise = Normalisation.fit(train, zca)
    z = normalise(test)
    assert torch.allclose(normalise.inverse(z), test.float() / 255, atol=1e-4)
    assert z.mean() > 0.3  # brighter than the training images: no centring of its own


def test_channel_normalisation():
    images = correlated_images()
    z = Normalisation.fit(images, zca=False)(images)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(3), atol=1e-4)
    constant = torch.full((4, 1, 4, 4), 7, dtype=torch.uint8)
    assert Normalisation.fit(constant, zca=False)(constant).isfinite().all()


def test_channels_are_normalised_with_each_mini_batch():
    """Images stay uint8, and a network is trained to the same bits as if they did not."""
    images, y = correlated_images(40), torch.arange(40) % 3
    net = iadd.convnet((3, 4, 4), 3, width=4)
    normalise = Normalisation.fit(images, zca=False)
    as_bytes, as_floats = normalise.image_set(images, y), iadd.ImageSet(normalise(images), y)
    assert as_bytes.x.dtype == torch.uint8
    initial, thetas, matrices = flat_parameters(net), [], []
    for image_set in (as_bytes, as_floats):
        iadd.seed_all("twice the same")
        how = (initial, image_set, 2, 0.1, 8)
        thetas.append(iadd.train_network(iadd.cross_entropy(net), *how))
        matrices.append(iadd.confusion_matrix(net, thetas[0], image_set))
    assert torch.equal(*thetas) and torch.equal(*matrices)
    white = Normalisation.fit(images, zca=True).image_set(images, y)
    assert white.x.dtype == torch.float32  # once for all, as each time would take longer


def memory_of_training(n):
    """Peak memory of this process, in GB, beyond n images of 64 x 64 pixels as bytes."""
    images, y = torch.zeros(n, 3, 64, 64, dtype=torch.uint8), torch.arange(n) % 3
    images[::2] = 200
    before = peak_memory(torch.device("cpu"))
    normalise = Normalisation.fit(images, zca=False)
    image_set = normalise.image_set(images, y)
    net = iadd.convnet((3, 64, 64), 3, width=1)
    iadd.train_network(iadd.cross_entropy(net), flat_parameters(net), image_set, 1, 0.1, 64)
    iadd.confusion_matrix(net, flat_parameters(net), image_set)
    return peak_memory(torch.device("cpu")) - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_that_of_the_images_as_bytes():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(memory_of_training, 8000).result() < 0.6  # half without the images


# ---- DSA -----------------------------------------------------------------------------------------

N = 400


def coordinates(n=N, size=33):
    """Images whose two channels hold each pixel's x and y in [-1, 1]: a warp can be read off."""
    grid = torch.linspace(-1, 1, size)
    x_and_y = torch.stack([grid.expand(size, size), grid[:, None].expand(size, size)])
    return x_and_y.repeat(n, 1, 1, 1)


def fitted_matrices(warped, size=33):
    """The 2x3 matrix of each warp, by least squares over the pixels near the middle."""
    middle = slice(size // 2 - 5, size // 2 + 6)
    source = coordinates(1, size)[0][:, middle, middle].flatten(1)
    design = torch.cat([source, torch.ones(1, source.shape[1])]).T
    return (torch.linalg.pinv(design) @ warped[:, :, middle, middle].flatten(2).mT).mT  # (n, 2, 3)


def test_dsa_scale():
    matrices = fitted_matrices(iadd.dsa_scale(coordinates()))
    sx, sy = matrices[:, 0, 0], matrices[:, 1, 1]
    for s in (sx, sy):
        assert 1 / 1.2 - 1e-4 <= s.min() < 0.87 and 1.16 < s.max() <= 1.2 + 1e-4
    assert abs(np.corrcoef(sx, sy)[0, 1]) < 0.2  # independent
    assert matrices[:, [0, 1], [1, 0]].abs().max() < 1e-4 and matrices[:, :, 2].abs().max() < 1e-4


def test_dsa_rotate():
    matrices = fitted_matrices(iadd.dsa_rotate(coordinates()))
    angle = torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert -15.01 <= angle.min() < -13 and 13 < angle.max() <= 15.01
    assert torch.allclose(torch.linalg.det(matrices[:, :, :2]), torch.ones(N), atol=1e-3)
    assert len(angle.unique()) > N * 0.9


def test_dsa_crop():
    x = torch.rand(N, 3, 32, 32)
    shifts = set()
    for padded, y in zip(F.pad(x, (4, 4, 4, 4)), iadd.dsa_crop(x)):
        shifts.add(  # exact pixels, zero fill
            next(
                (dx, dy)
                for dx, dy in itertools.product(range(9), range(9))
                if torch.equal(padded[:, dy : dy + 32, dx : dx + 32], y)
            )
        )
    assert {dx for dx, _ in shifts} == {dy for _, dy in shifts} == set(range(9))
    assert len(shifts) > 60
    large = iadd.dsa_crop(torch.ones(2000, 1, 64, 64))
    assert large.sum((1, 2, 3)).min() == 56 * 56  # up to 8 pixels of 64


def test_dsa_cutout():
    y = iadd.dsa_cutout(torch.ones(N, 3, 32, 32))
    assert (y == y[:, :1]).all()  # the same hole in each channel
    rows, columns = ((1 - y[:, 0]).amax(axis) for axis in (2, 1))
    heights, widths = rows.sum(1), columns.sum(1)
    assert torch.equal((1 - y[:, 0]).sum((1, 2)), heights * widths)  # a rectangle
    assert heights.max() == widths.max() == 16
    assert heights.min() == widths.min() == 8  # its centre on the border
    assert len(set(zip(heights.tolist(), widths.tolist()))) > 20


def test_dsa_flip():
    x = torch.rand(N, 3, 8, 8)
    y = iadd.dsa_flip(x)
    flipped = torch.tensor([torch.equal(b, a.flip(2)) for a, b in zip(x, y)])
    kept = torch.tensor([torch.equal(b, a) for a, b in zip(x, y)])
    assert (flipped ^ kept).all() and 0.4 < flipped.float().mean() < 0.6


def test_dsa_color():
    x = torch.rand(1, 3, 16, 16).repeat(N, 1, 1, 1)
    y = iadd.dsa_color(x)
    brightness = y.mean((1, 2, 3)) - x.mean((1, 2, 3))  # saturation and contrast keep the mean
    assert -0.5 - 1e-5 <= brightness.min() < -0.4 and 0.4 < brightness.max() <= 0.5 + 1e-5
    grey_x, grey_y = x.mean(1), y.mean(1)
    contrast = grey_y.flatten(1).std(1) / grey_x.flatten(1).std(1)  # saturation keeps the grey
    assert 0.5 - 1e-4 <= contrast.min() < 0.6 and 1.4 < contrast.max() <= 1.5 + 1e-4
    saturation = (y - grey_y[:, None]).std((1, 2, 3)) / (x - grey_x[:, None]).std((1, 2, 3))
    saturation /= contrast
    assert 0 <= saturation.min() < 0.1 and 1.9 < saturation.max() <= 2 + 1e-4


@pytest.mark.parametrize("dsa", iadd.DSA, ids=lambda f: f.__name__)
def test_dsa_gradient(dsa):
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def f(x):
        torch.manual_seed(3)
        return dsa(x)

    assert f(x).shape == x.shape and f(x).dtype == x.dtype
    assert torch.autograd.gradcheck(f, x, nondet_tol=0 if DEVICE == "cpu" else 1e-9)  # see `same`


def test_augment_draws_one_group_a_batch_and_keeps_the_order(monkeypatch):
    marks = [lambda x, k=k: x * 0 + x.mean((1, 2, 3), keepdim=True) + 100 * k for k in range(6)]
    monkeypatch.setattr(iadd, "DSA", marks)
    x = torch.arange(60.0).view(60, 1, 1, 1, 1).expand(60, 4, 3, 2, 2)
    group = (iadd.augment(x) - x) / 100
    assert (group == group[:, :1, :1, :1, :1]).all()
    assert group.unique().tolist() == [0, 1, 2, 3, 4, 5]


def test_augment_is_differentiable_random_and_seeded():
    x = torch.rand(12, 5, 3, 16, 16, device=DEVICE, requires_grad=True)
    torch.manual_seed(0)
    first = iadd.augment(x)
    torch.manual_seed(0)
    assert torch.equal(first, iadd.augment(x)) and not torch.equal(first, iadd.augment(x))
    first.sum().backward()
    assert (x.grad.abs().sum((1, 2, 3, 4)) > 0).all()


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    """A few shapes, normalised: images, labels."""
    data = iadd.make_shapes(train=20, test=5)
    normalise = Normalisation.fit(data.train[0], zca=False, device=DEVICE)
    return iadd.ImageSet(normalise(data.train[0]), data.train[1].to(DEVICE))


def small_network():
    net = iadd.convnet((3, 32, 32), 10, width=4).to(DEVICE)
    return net, flat_parameters(net)


def test_a_teacher_is_no_view_of_what_is_trained(shapes):
    net, initial = small_network()
    thetas = [initial.cpu()]
    for _ in range(3):
        thetas.append(iadd.train_teacher(iadd.cross_entropy(net), thetas[-1], shapes, 0.01, 50))
    assert thetas[1].dtype == torch.float32
    assert all(theta.device.type == "cpu" for theta in thetas)
    assert torch.equal(thetas[0], initial.cpu())
    for before, after in itertools.pairwise(thetas):
        assert (after - before).norm() > 1e-3


def test_training_is_plain_sgd(shapes):
    """`train` on a flat theta does what a module and torch.optim do, with the same batches."""
    x, y = shapes.x, shapes.y
    net, theta = small_network()
    torch.manual_seed(3)
    theta = iadd.train_network(iadd.cross_entropy(net), theta, shapes, 3, 0.02, 60)
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
    for lr, epochs in ((0.02, 2), (0.002, 1)):
        optimizer.param_groups[0]["lr"] = lr
        index = iadd.minibatches(200, 60, 4 * epochs).to(DEVICE)
        for x_j, y_j in zip(iadd.augment(x[index]), y[index]):
            optimizer.zero_grad()
            F.cross_entropy(net(x_j), y_j).backward()
            optimizer.step()
    assert torch.allclose(theta, flat_parameters(net), atol=1e-4)


def test_confusion_matrix(shapes):
    x, y = shapes.x, shapes.y
    net, theta = small_network()
    predicted = net(x).argmax(1)
    confusion = iadd.confusion_matrix(net, theta, shapes)
    for r, c in ((2, 5), (2, 2), (7, 1)):
        assert confusion[r, c] == ((y == r) & (predicted == c)).sum()
    assert confusion.sum() == 200 and confusion.trace() == (predicted == y).sum()


def test_random_streams_differ():
    starts = set()
    for key in ((0, "teacher", 0), (0, "teacher", 1), (1, "teacher", 0), (0, "segment", 0, 1)):
        iadd.seed_all(*key)
        starts.add(torch.rand(()).item())
    assert len(starts) == 4


def test_real_images_are_of_their_class_and_distinct():
    data = iadd.make_shapes(train=20, test=5)
    normalise = Normalisation.fit(data.train[0], zca=False, device=DEVICE)
    images, labels = iadd.real_images(data, normalise, 3)
    assert labels.tolist() == [c for c in range(10) for _ in range(3)]
    every, found = normalise(data.train[0]), []
    for image, label in zip(images, labels):
        (match,) = torch.nonzero((every == image).flatten(1).all(1))[:, 0].tolist()
        assert data.train[1][match] == label
        found.append(match)
    assert len(set(found)) == 30


# ---- datasets ------------------------------------------------------------------------------------


def test_shapes_are_seeded():
    a, b, c = iadd.make_shapes(5, 2), iadd.make_shapes(5, 2), iadd.make_shapes(5, 2, seed=1)
    assert torch.equal(a.train[0], b.train[0]) and not torch.equal(a.train[0], c.train[0])
    assert a.shape == (3, 32, 32) and len(a.classes) == 10
    assert a.train[1].bincount().tolist() == [5] * 10 and len(a.test[0]) == 20


def make_folder(root, classes=("cat", "dog", "emu"), train=6, test=3, size=32):
    """{train,test}/<class>/<k>.png; classes differ in brightness."""
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("test", test)):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for k in range(n):
                pixels = rng.integers(50 * (c % 3), 50 * (c % 3) + 100, (size, size, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{k}.png")
    return root


def test_folder(tmp_path):
    root = make_folder(tmp_path / "pets")
    Image.new("L", (32, 32), 99).save(root / "train" / "cat" / "9.png")  # a grey one among colour
    data = iadd.load_dataset(str(root), tmp_path)
    assert data.name == "pets" and data.classes == ["cat", "dog", "emu"]
    assert data.shape == (3, 32, 32) and len(data.test[0]) == 9
    assert data.train[1].tolist() == [0] * 7 + [1] * 6 + [2] * 6
    with Image.open(root / "train" / "dog" / "0.png") as image:
        assert torch.equal(data.train[0][7], torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert (data.train[0][6] == 99).all()
    part = iadd.load_dataset(str(root), tmp_path, 8, ["emu", "cat", "emu"])
    assert part.shape == (3, 8, 8) and part.name == "pets"
    assert part.classes == ["cat", "emu"] and part.test[1].tolist() == [0] * 3 + [1] * 3


def test_what_is_not_read_is_named(tmp_path, capsys):
    """In a class's folder everything that Pillow reads is read, and the rest is named."""
    cat = make_folder(tmp_path / "pets") / "train/cat"
    red = Image.new("RGB", (32, 32), (255, 0, 0))
    for suffix in ("gif", "bmp", "jp2", "ico", "TIF"):
        red.save(cat / f"x.{suffix}")
    (cat / ".DS_Store").write_bytes(b"x")  # hidden
    for k in range(7):
        (cat / f"{k}.txt").write_bytes(b"x")
    (cat / "x.heic").write_bytes(b"x")
    (cat / "more").mkdir()
    red.save(cat / "more" / "x.png")
    data = iadd.load_dataset(str(tmp_path / "pets"), tmp_path)
    assert data.train[1].bincount().tolist() == [11, 6, 6]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"not read in {tmp_path}/pets/train: 9, ")
    assert all(name in line for name in (".txt", "cat/x.heic", "cat/more")) and len(line) < 250
    inner = cat.parent / "dog" / "images"  # if there is such a folder, it is what is read
    inner.mkdir()
    red.save(inner / "x.png")
    assert len(iadd.image_files(cat.parent)["dog"]) == 1
    assert ": 15, " in capsys.readouterr().out and iadd.few("abcde") == "a, b, c, d, e"
    assert iadd.few(range(7)) == "0, 1, 2, 3, 4 and 2 more"


def test_val_where_test_has_no_classes(tmp_path):
    """As ImageNet has it: its test images are in one folder, without labels."""
    root = make_folder(tmp_path / "net")
    (root / "test").rename(root / "val")
    assert len(iadd.load_dataset(str(root), tmp_path).test[0]) == 9
    (root / "test").mkdir()
    Image.new("RGB", (32, 32)).save(root / "test" / "1.png")
    assert len(iadd.load_dataset(str(root), tmp_path).test[0]) == 9
    make_folder(tmp_path / "both", test=5)
    (root / "val").rename(tmp_path / "both" / "val")
    assert len(iadd.load_dataset(str(tmp_path / "both"), tmp_path).test[0]) == 15


def test_unusual_images_are_read_rightly_or_refused_by_name(tmp_path):
    """Palette, alpha, CMYK, rotated by EXIF, one bit; too deep, truncated, absurdly large."""

    def read(name, image, mode="RGB", **options):
        image.save(tmp_path / name, **options)
        return np.moveaxis(iadd.read_image(tmp_path / name, None, mode), 0, 2).tolist()

    red, blue, white = [255, 0, 0], [0, 0, 255], [255, 255, 255]
    red_blue = Image.new("RGB", (2, 2), (255, 0, 0))
    red_blue.paste((0, 0, 255), (1, 0, 2, 2))
    pixels = [[red, blue], [red, blue]]
    palette = red_blue.convert("P", palette=Image.Palette.ADAPTIVE)
    assert read("palette.png", palette) == read("palette.gif", palette) == pixels
    assert read("alpha.png", red_blue.convert("RGBA")) == pixels
    assert read("cmyk.tif", red_blue.convert("CMYK")) == pixels
    assert read("bits.png", Image.new("1", (1, 1), 1), "L") == [[[255]]]
    assert read("grey.png", Image.new("LA", (1, 1), (77, 255)), "L") == [[[77]]]
    assert read("grey.png", Image.new("L", (1, 1), 77)) == [[[77, 77, 77]]]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter: red on the left comes to lie on top
    assert read("turned.png", red_blue, exif=exif) == [[red, red], [blue, blue]]

    # what is transparent is white, whatever lies under it
    hidden = red_blue.convert("RGBA")
    hidden.putpixel((0, 0), (0, 0, 0, 0))
    assert read("part.png", hidden) == read("part.webp", hidden, lossless=True)
    assert read("part.png", hidden) == [[white, blue], [red, blue]]
    assert read("mask.png", Image.new("LA", (1, 1), (0, 0)), "L") == [[[255]]]
    assert read("half.png", Image.new("RGBA", (1, 1), (0, 0, 0, 127))) == [[[128] * 3]]
    assert (
        read("palette.gif", palette, transparency=palette.getpixel((0, 0))) == [[white, blue]] * 2
    )
    assert read("tRNS.png", red_blue, transparency=(0, 0, 255)) == [[red, white]] * 2

    for name, pixels in (("deep.png", np.full((8, 8), 999, np.uint16)), ("f.tif", np.ones((8, 8)))):
        kind = np.uint16 if name == "deep.png" else np.float32
        with pytest.raises(ValueError, match="8-bit images are needed"):
            read(name, Image.fromarray(pixels.astype(kind)))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.jpg", "cut.png"):
        Image.fromarray(noise).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(OSError):
            iadd.read_image(tmp_path / name, None, "RGB")
    bomb = bytearray((tmp_path / "alpha.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 10**5, 10**5)  # more pixels than one should believe
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(Image.DecompressionBombError):
        iadd.read_image(tmp_path / "bomb.png", None, "RGB")


def test_a_photo_that_is_not_square_is_said_at_once(tmp_path):
    Image.new("RGB", (32, 24)).save(tmp_path / "photo.png")
    bad = [tmp_path / "photo.png", tmp_path / "nowhere.png"]
    with pytest.raises(UserError, match="photo.png has 32 x 24 pixels; --size N makes"):
        iadd.read_dataset(
            "x", {"train": {"a": bad, "b": bad}, "test": {"a": bad, "b": bad}}, (), None, "RGB"
        )


def test_tiny_imagenet(tmp_path):
    """As it is published, with everything in it that must be ignored."""
    rng, wnids = np.random.default_rng(0), ["n01", "n02", "n03"]
    (tmp_path / "val" / "images").mkdir(parents=True)
    (tmp_path / "words.txt").write_bytes(b"n01\tgoldfish, Carassius auratus\nn07\tf\xe9vier\n")
    for c, wnid in enumerate(wnids):
        folder = tmp_path / "train" / wnid / "images"
        folder.mkdir(parents=True)
        (folder.parent / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
        (folder / "._n01_0.JPEG").write_bytes(b"x")
        for k in range(4):
            pixels = rng.integers(0, 9, (64, 64, 3), dtype=np.uint8) + np.uint8(40 * c)
            image = Image.fromarray(pixels).convert("L" if k == 2 else "RGB")
            image.save(folder / f"{wnid}_{k}.JPEG")
    lines = []
    for k, wnid in enumerate(["n02", "n03", "n01", "n01"]):
        Image.new("RGB", (64, 64), (10 * k, 0, 0)).save(tmp_path / "val/images" / f"val_{k}.JPEG")
        lines.append(f"val_{k}.JPEG\t{wnid}\t0\t0\t9\t9\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))

    data = iadd.load_dataset("tinyimagenet", tmp_path)
    assert data.classes == wnids and data.shape == (3, 64, 64)
    assert data.train[1].bincount().tolist() == [4, 4, 4]
    for c, level in enumerate((4, 44, 84)):
        assert (data.train[0][data.train[1] == c].float().mean() - level).abs() < 2
    red = data.test[0][:, 0].float().mean((1, 2)).round().tolist()
    assert dict(zip(red, data.test[1].tolist())) == {0: 1, 10: 2, 20: 0, 30: 0}
    part = iadd.load_dataset("tinyimagenet", tmp_path, None, ["n02", "n01"])
    assert part.classes == ["n01", "n02"] and len(part.test[0]) == 3

    annotations = tmp_path / "val/val_annotations.txt"
    annotations.write_text("".join(lines) + "val_9.JPEG\tn01\n")  # which there is not
    with pytest.raises(UserError, match="1 of the images cannot be read: .*val_9.JPEG"):
        iadd.load_dataset("tinyimagenet", tmp_path)
    annotations.write_text("".join(lines) + "\n")  # a blank line at the end
    assert torch.equal(iadd.load_dataset("tinyimagenet", tmp_path).test[1], data.test[1])
    for bad in (b"val_0.JPEG\tn\xff\xfe\n", b"val_0.JPEG n01\n", b"\n"):
        annotations.write_bytes(bad)
        with pytest.raises(UserError, match="val"):
            iadd.load_dataset("tinyimagenet", tmp_path)

    # as its users have it, sorted into folders; the annotations are bad or missing
    images, wnids_of_val = tmp_path / "val/images", ["n02", "n03", "n01", "n01"]
    for layout in ("val/images/{}", "val/{}", "val/{}/images"):
        for k, wnid in enumerate(wnids_of_val):
            folder = tmp_path / layout.format(wnid)
            folder.mkdir(parents=True, exist_ok=True)
            (images / f"val_{k}.JPEG").rename(folder / f"val_{k}.JPEG")
        sorted_ones = iadd.load_dataset("tinyimagenet", tmp_path)
        assert sorted_ones.test[1].tolist() == [0, 0, 1, 2] and sorted_ones.classes == wnids
        red = sorted_ones.test[0][:, 0].float().mean((1, 2)).round().tolist()
        assert sorted(red[:2]) == [20, 30] and red[2:] == [0, 10]
        annotations.unlink(missing_ok=True)
        for k, wnid in enumerate(wnids_of_val):
            (tmp_path / layout.format(wnid) / f"val_{k}.JPEG").rename(images / f"val_{k}.JPEG")
        for wnid in wnids:
            shutil.rmtree(tmp_path / layout.split("{}")[0] / wnid)
    with pytest.raises(OSError, match="val_annotations.txt"):
        iadd.load_dataset("tinyimagenet", tmp_path)


def make_covid(root, counts, layout="images", size=32):
    """As Kaggle unpacks it. The k-th image of a class is of the grey level k, its mask white."""
    for name, n in counts.items():
        for part, level in (("images", None), ("masks", 255)):
            flat = layout == "flat" and part == "images"
            folder = root / name if flat else root / name / part
            folder.mkdir(parents=True, exist_ok=True)
            for k in range(n):
                image = Image.new("L", (size, size), k if level is None else level)
                image.convert("RGB" if k == 1 else "L").save(folder / f"{name}-{k + 1}.png")
            (folder / f"._{name}-1.png").write_bytes(b"x")
        (root / f"{name}.metadata.xlsx").write_bytes(b"x")
    return root


@pytest.mark.parametrize("layout", ["images", "flat"])
def test_covid(tmp_path, layout, monkeypatch):
    counts = {"COVID": 20, "Lung_Opacity": 13, "Normal": 30, "Viral Pneumonia": 7}
    make_covid(tmp_path, counts, layout)
    data = iadd.load_dataset("covid", tmp_path)
    assert data.shape == (1, 112, 112) and data.name == "covid"
    assert data.classes == list(counts)

    def levels(part, c):
        images, labels = part
        return images[labels == c][:, 0, 0, 0].tolist()

    for c, (n, test) in enumerate(zip(counts.values(), (4, 3, 6, 1))):
        trained, tested = levels(data.train, c), levels(data.test, c)
        assert sorted(trained + tested) == list(range(n)) and len(tested) == test  # each once
        assert sorted(tested) != list(range(n - test, n))  # no run of neighbours

    glob = Path.glob  # a file system that lists the other way round
    monkeypatch.setattr(Path, "glob", lambda *words: reversed(list(glob(*words))))
    again = iadd.load_dataset("covid", tmp_path)
    assert torch.equal(again.train[0], data.train[0]) and torch.equal(again.test[0], data.test[0])
    part = iadd.load_dataset("covid", tmp_path, 32, ["Normal", "COVID"])
    assert part.classes == ["COVID", "Normal"]
    assert part.shape == (1, 32, 32) and levels(part.test, 0) == levels(data.test, 0)


def test_covid_counts_of_the_paper(monkeypatch):
    counts = {"COVID": 3616, "Lung_Opacity": 6012, "Normal": 10192, "Viral Pneumonia": 1345}
    names = {c: [Path(c, f"{c}-{k}.png") for k in range(n)] for c, n in counts.items()}
    monkeypatch.setattr(iadd, "image_files", lambda root: names)
    train, test = iadd.list_covid(Path("x")).values()
    totals = [sum(map(len, part.values())) for part in (train, test)]
    assert totals == [16_933, 4_232]  # Section 4.1
    numbers = [int(file.stem.split("-")[1]) for file in train["COVID"]]
    assert len(set(numbers)) == 2893 and abs(np.mean(numbers) - 1808) < 60  # from everywhere


def test_manual_downloads_are_explained(tmp_path, capsys):
    for name in ("tinyimagenet", "covid"):
        error = refused(capsys, f"distill --dataset {name} --data-dir", tmp_path / "nowhere")
        assert f"there is no folder {tmp_path}/nowhere" in error and "README" in error
    make_covid(tmp_path, {"COVID": 5, "Normal": 5})
    error = refused(capsys, "teachers --dataset covid --data-dir", tmp_path / "COVID")
    assert "COVID is a class: --data-dir takes the folder above it" in error
    (tmp_path / "Lung_Opacity" / "masks").mkdir(parents=True)  # only a part has been unpacked
    error = refused(capsys, "teachers --dataset covid --data-dir", tmp_path)
    assert "holds no image of Lung_Opacity, only of: COVID, Normal" in error
    shutil.rmtree(tmp_path / "Lung_Opacity")
    data = iadd.load_dataset("covid", tmp_path)
    assert data.classes == ["COVID", "Normal"]  # those that are there, as the program says


class FakeCifar:
    """Stands in for torchvision's CIFAR10, which needs a download."""

    url, classes, there = "", ["a", "b"], True

    def __init__(self, root, train, download=False):
        if not self.there and not download:
            raise RuntimeError("Dataset not found or corrupted")
        n = 8 if train else 2
        self.data = np.arange(n * 8 * 8 * 3).reshape(n, 8, 8, 3).astype(np.uint8)
        self.targets = [0, 1] * (n // 2)


def test_cifar(monkeypatch, tmp_path):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar)
    data = iadd.load_dataset("cifar10", tmp_path / "share")
    assert data.shape == (3, 8, 8) and len(data.train[0]) == 8 and len(data.test[0]) == 2
    assert data.train[0][0, :, 0, 0].tolist() == [0, 1, 2]
    assert data.train[1].tolist() == [0, 1] * 4 and data.classes == ["a", "b"]
    assert not list(tmp_path.iterdir())  # where it lies complete nothing is written
    monkeypatch.setattr(FakeCifar, "there", False)
    again = iadd.load_dataset("cifar10", tmp_path / "data")
    assert torch.equal(again.train[0], data.train[0])


# ---- the command line ----------------------------------------------------------------------------


def words(*parts):
    """The words of a command line: of strings, which are split, paths, numbers, lists of these."""
    for part in parts:
        if isinstance(part, list):
            yield from words(*part)
        else:
            yield from part.split() if isinstance(part, str) else [str(part)]


def command(*parts):
    """The exit code of a command line."""
    return iadd.main(list(words(*parts)))


def refused(capsys, *parts):
    """Runs a command that must fail: its message, which is one line and no traceback."""
    capsys.readouterr()
    try:
        code = command(*parts)
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    lines = [line for line in error.replace("\r", "\n").splitlines() if "error:" in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


def result(folder):
    return iadd.load(folder / "distilled.pt", {}, "")


def thetas(path):
    return torch.load(path, weights_only=True)["thetas"]


def log_of(folder):
    return list(csv.DictReader((folder / "log.csv").read_text().splitlines()))


def rows_of(folder):
    return [json.loads(row) for row in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished small run on images of 32 x 32 pixels: a folder for all, options, the results."""
    tmp = tmp_path_factory.mktemp("run")
    more = f"--no-zca --width 4 --device {DEVICE} --precision float32"
    pets = make_folder(tmp / "pets", train=12)
    options = ["--dataset", pets, "--runs", tmp / "runs", more]
    assert command("teachers --teachers 2 --ipc 1", options) == 0
    assert command("distill --iterations 12 --steps 3", options) == 0
    return tmp, options, tmp / "runs" / "pets_std_w4"


def test_files_of_a_run(run):
    tmp, _, folder = run
    out = folder / "ipc1_iadd_seed0"
    assert sorted(x.name for x in (folder / "teachers").glob("[!.]*")) == ["000.pt", "001.pt"]
    assert len(thetas(folder / "teachers" / "000.pt")) == 4  # 3 epochs are read at IPC 1
    pictures = [f"images_{t:05d}.png" for t in (0, 10, 12)]
    files = sorted(path.name for path in out.glob("[!.]*"))
    assert files == ["distilled.pt", *pictures, "log.csv"]
    content = result(out)
    assert content["images"].shape == (3, 3, 32, 32) and content["labels"].tolist() == [0, 1, 2]
    settings = content["settings"]
    assert settings["classes"] == ["cat", "dog", "emu"] and settings["J"] == 3
    assert content["iteration"] == 12
    rows = log_of(out)
    assert [float(row["iteration"]) for row in rows] == [10, 12]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    with Image.open(out / "images_00012.png") as grid:
        assert grid.size == (3 * 100 + 4, 100 + 4)
    assert not list(tmp.rglob("*.tmp"))


def test_weights_move_at_the_papers_learning_rate(run):
    """Steps of 1e-4 times 1e-6 are far below what float32 can subtract from 1."""
    W = result(run[2] / "ipc1_iadd_seed0")["W"]
    assert W.dtype == torch.float64 and (W < 1).float().mean() > 0.95 and W.mean() > 0.999


@pytest.mark.parametrize("method", ["mtt", "ddpp"])
def test_other_methods_keep_the_weights_at_one(run, method):
    _, options, folder = run
    assert command(f"distill --iterations 2 --method {method} --steps 2", options) == 0
    assert (result(folder / f"ipc1_{method}_seed0")["W"] == 1).all()


def test_teachers_are_kept_and_continued(run, capsys):
    _, options, folder = run
    path = folder / "teachers" / "000.pt"
    before, stamp = thetas(path).clone(), path.stat().st_mtime_ns
    assert command("teachers --teachers 2 --ipc 1", options) == 0
    assert "2 of 2 are complete" in capsys.readouterr().out and path.stat().st_mtime_ns == stamp
    assert command("teachers --teachers 3 --epochs 4", options) == 0
    after = thetas(path)
    assert len(after) == 5 and torch.equal(after[:4], before)
    (folder / "teachers" / "002.pt").unlink()


def test_same_seed_same_bits(run):
    _, options, folder = run
    results = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        more = f"--iterations 3 --steps 2 --name same_{name} --seed {seed}"
        assert command("distill", more, options) == 0
        results.append(result(folder / f"same_{name}"))
    a, b, c = results
    assert same(a["images"], b["images"]) and same(a["alpha"], b["alpha"])
    assert not same(a["images"], c["images"])


def test_a_finished_result_is_not_overwritten(run, capsys):
    _, options, folder = run
    path, distil = folder / "ipc1_iadd_seed0" / "distilled.pt", ["distill --steps 3", options]
    stamp = path.stat().st_mtime_ns
    for T in (12, 11):
        assert command(distil, "--iterations", T) == 0
        assert "is at iteration 12" in capsys.readouterr().out
    error = refused(capsys, distil, "--iterations 12 --lr-img 7")
    assert "distilled.pt has lr_img 100, not 7.0; --teachers N" in error
    assert path.stat().st_mtime_ns == stamp
    assert command(distil, "--lr-img 7 --iterations 1 --name other") == 0
    assert result(folder / "other")["settings"]["lr_img"] == 7


def test_the_first_teachers_can_be_chosen(run, capsys):
    """And a result is of as many teachers as it began with."""
    _, options, folder = run
    shutil.copy(folder / "teachers" / "001.pt", folder / "teachers" / "002.pt")
    distil = ["distill --steps 3 --iterations 12", options]
    assert "has teachers 2, not 3" in refused(capsys, distil)
    assert command(distil, "--teachers 2") == 0
    error = refused(capsys, distil, "--teachers 4")
    assert "3 teachers" in error and "--teachers 4" in error
    (folder / "teachers" / "002.pt").unlink()


TESTING = "--eval-every 5 --nets 1 --eval-epochs 1"
DIVERGE = [f"--lr-alpha 1e6 {TESTING}", "--lr-w 1e9", "--alpha 1e9", "--lr-img 1e6 --lr-w 1e9"]


@pytest.mark.parametrize("rates", DIVERGE)
def test_divergence_stops_and_keeps_the_last_good_state(run, capsys, rates):
    _, options, folder = run
    name = f"diverge{DIVERGE.index(rates)}"
    more = f"--steps 3 --name {name} {rates} --iterations 60"
    error = refused(capsys, "distill", options, more)
    noticed = int(re.search(r"diverged by iteration (\d+)", error)[1])
    kept = result(folder / name)
    assert kept["iteration"] < noticed <= 60 and "lower the learning rates" in error
    assert kept["images"].isfinite().all() and kept["W"].isfinite().all() and kept["alpha"] > 0


def test_eval_all_architectures(run, capsys):
    _, options, folder = run
    archs, sets = list(iadd.ARCHITECTURES), ["distilled", "full"]
    out = folder / "ipc1_iadd_seed0"
    assert command("eval --nets 2 --eval-epochs 1 --arch", archs, "--on", sets, options) == 0
    lines, rows = capsys.readouterr().out.splitlines(), rows_of(out)[-8:]
    assert [(row["on"], row["arch"]) for row in rows] == list(itertools.product(sets, archs))
    for row in rows:
        matrix = np.array(row["confusion"])  # of both networks
        assert matrix.sum(1).tolist() == [6, 6, 6] and len(row["accuracies"]) == 2
        assert row["mean"] == pytest.approx(100 * matrix.trace() / 18)
        assert row["mean"] == pytest.approx(sum(row["accuracies"]) / 2)
        line = next(x for x in lines if x.split()[:2] == [row["on"], row["arch"]])
        assert f"{row['mean']:.1f} ± {row['std']:.1f}" in line
    assert rows[0]["lr"] == result(out)["alpha"] and rows[0]["iteration"] == 12
    assert rows[-1]["lr"] == 0.01 and rows[-1]["iteration"] is None


def test_herding_is_a_fixed_choice_of_real_images(run, capsys, monkeypatch, tmp_path):
    tmp, options, folder = run
    used = []
    stand_in = lambda ell, theta, images, *_: used.append((images.x, images.y)) or theta  # noqa: E731
    monkeypatch.setattr(iadd, "train_network", stand_in)
    assert command("eval --on herding random --nets 2", options) == 0
    (a, labels), (b, _), (c, _), (d, _) = used
    assert torch.equal(a, b) and not torch.equal(c, d) and labels.tolist() == [0, 1, 2]
    data = iadd.load_dataset(str(tmp / "pets"), tmp)
    real = Normalisation.fit(data.train[0], zca=False, device=DEVICE)(data.train[0])
    net = iadd.convnet(data.shape, 3, 4).to(DEVICE)
    theta = thetas(folder / "teachers" / "000.pt")[-1].to(DEVICE)
    torch.nn.utils.vector_to_parameters(theta, net.parameters())
    for c in range(3):  # for one image a class: the nearest to the mean of the features
        x = real[data.train[1] == c]
        features = net[:-1](x)
        nearest = (features - features.mean(0)).norm(dim=1).argmin()
        assert torch.allclose(x[nearest], a[c], atol=1e-5)
    bare = [options[:3], tmp_path, options[4:]]
    assert "teachers/000.pt" in refused(capsys, "eval --on herding", bare)


def test_the_seed_of_eval_is_that_of_its_networks(run):
    _, options, folder = run
    out = folder / "ipc1_iadd_seed0"
    for seed in (0, 5):
        assert command(f"eval --nets 2 --eval-epochs 3 --seed {seed}", options) == 0
    a, b = rows_of(out)[-2:]
    assert (a["seed"], b["seed"]) == (0, 5) and a["iteration"] == b["iteration"] == 12


def test_eval_takes_the_ipc_of_the_file(run, capsys):
    _, options, folder = run
    more = "--ipc 4 --max-start-epoch 1 --iterations 1 --steps 2 --name four"
    assert command("distill", more, options) == 0
    assert command("eval --name four --on distilled random --nets 1 --eval-epochs 1", options) == 0
    assert [row["ipc"] for row in rows_of(folder / "four")] == [4, 4]
    assert "IPC 4" in capsys.readouterr().out


def test_eval_of_a_file_from_elsewhere(run, tmp_path):
    """The file brings its normalisation along."""
    tmp, options, folder = run
    gift = tmp_path / "gift.pt"
    shutil.copy(folder / "ipc1_iadd_seed0" / "distilled.pt", gift)
    how = "--nets 1 --eval-epochs 2 --device " + DEVICE
    assert command("eval", how, options, "--distilled", gift) == 0
    assert command("eval", how, options) == 0
    mine, theirs = (rows_of(folder / x)[-1] for x in ("gift", "ipc1_iadd_seed0"))
    assert list(tmp_path.iterdir()) == [gift]  # which may be where one cannot write
    assert mine["accuracies"] == theirs["accuracies"] or DEVICE == "cuda"
    assert mine["lr"] == theirs["lr"] and mine["ipc"] == 1


def test_eval_knows_the_dataset_of_a_file(run, monkeypatch):
    tmp, options, folder = run
    monkeypatch.chdir(tmp)  # where it is a folder of the name
    gift = folder / "ipc1_iadd_seed0" / "distilled.pt"
    how = ["--nets 1 --eval-epochs 1", options[2:], "--name known --distilled", gift]
    assert command("eval", how) == 0
    assert len(rows_of(folder / "known")) == 1


def test_a_row_is_kept_although_nobody_reads_it(run, monkeypatch):
    """Its line is printed after it is written: the output may end in a pager that is closed."""

    def closed(_):
        raise BrokenPipeError

    _, options, folder = run
    monkeypatch.setattr("tqdm.tqdm.write", closed)
    assert command("eval --on full --name closed_pipe --nets 1 --eval-epochs 1", options) == 2
    assert len(rows_of(folder / "closed_pipe")) == 1


@pytest.mark.parametrize(
    "labels, dtype", [([0, 0, 1, 1], torch.int32), ([[0.9, 0.1]] * 3 + [[0, 1]], torch.float64)]
)
def test_someone_elses_images(tmp_path, monkeypatch, labels, dtype):
    """The lines of the README turn them into a file that eval takes."""
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar)
    monkeypatch.chdir(tmp_path)
    torch.save(torch.randn(4, 3, 8, 8, requires_grad=True), "images.pt")
    torch.save(torch.tensor(labels, dtype=dtype), "labels.pt")
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    (lines,) = (block for block in blocks if "images.pt" in block)
    exec(lines)
    how = "--nets 2 --eval-epochs 2 --width 4 --no-compile --device"
    assert command("eval --distilled other.pt", how, DEVICE, "--on distilled random") == 0
    (path,) = tmp_path.rglob("results.jsonl")
    assert [(row["ipc"], row["lr"]) for row in rows_of(path.parent)] == [
        (2, pytest.approx(0.01)),
        (2, 0.01),
    ]


def test_eval_every_changes_nothing(run):
    _, options, folder = run
    distil = ["distill --iterations 4 --steps 2", options]
    assert command(distil, "--name plain") == 0
    assert command(distil, "--name watched --eval-every 2 --nets 2 --eval-epochs 1") == 0
    plain, watched = (result(folder / name) for name in ("plain", "watched"))
    assert same(plain["images"], watched["images"]) and same(plain["alpha"], watched["alpha"])
    rows = rows_of(folder / "watched")
    assert [row["iteration"] for row in rows] == [2, 4]
    assert rows[0]["lr"] != rows[1]["lr"] == watched["alpha"]
    assert command("eval --name watched --nets 2 --eval-epochs 1", options) == 0  # is the same
    again = rows_of(folder / "watched")[-1]
    assert again["accuracies"] == rows[1]["accuracies"] or DEVICE == "cuda"


def test_plot_draws_what_it_says(run, monkeypatch, capsys):
    """Two files, and the numbers that reach matplotlib: the log, and of each parameter W and the
    student's distance to the teacher."""
    from matplotlib.axes import Axes

    _, options, folder = run
    out, drawn, bars, plot, errorbar = folder / "ipc1_iadd_seed0", [], [], Axes.plot, Axes.errorbar
    monkeypatch.setattr(Axes, "plot", lambda ax, *a, **b: drawn.append(a) or plot(ax, *a, **b))
    watched = lambda ax, *a, **b: bars.append(a) or errorbar(ax, *a, **b)  # noqa: E731
    monkeypatch.setattr(Axes, "errorbar", watched)
    assert command("eval --nets 2 --eval-epochs 1 --seed 3", options) == 0
    row = rows_of(out)[-1]
    assert command("plot", out) == 0
    assert (12, row["mean"], row["std"]) in bars
    said, log = capsys.readouterr().out, log_of(out)
    keys = ("loss", "alpha", "W_min", "W_1pct", "W_median", "W_mean")
    for key, (x, y) in zip(keys, drawn):
        logged = [float(row[key]) for row in log]
        shown = 1 - np.array(logged) if key.startswith("W") else logged
        assert list(x) == [10, 12] and list(y) == pytest.approx(list(shown))
    miss, W = (np.asarray(values) for (values,) in drawn[6:8])
    assert np.array_equal(W, 1 - result(out)["W"]) and miss.shape == W.shape
    assert miss.min() >= 0 and 0 < miss.mean() < 1
    assert str(out / "plot.png") in said
    with Image.open(out / "plot.png") as figure:
        assert min(figure.size) > 150 and len(set(figure.convert("L").tobytes())) > 50


def test_plot_shows_the_images_from_the_real_ones_on(run):
    _, _, folder = run
    out = folder / "ipc1_iadd_seed0"
    assert command("plot", out) == 0
    first = Image.open(out / "images_00000.png")
    with Image.open(out / "evolution.gif") as film:
        assert film.n_frames == len(list(out.glob("images_*.png"))) == 3
        frame = film.convert("RGB").resize(first.size)
    difference = np.asarray(frame).astype(float) - np.asarray(first.convert("RGB"))
    assert abs(difference).mean() < 10  # 256 colours, resized
    alone = folder / "alone"  # a file that somebody has sent
    alone.mkdir()
    shutil.copy(out / "distilled.pt", alone)
    assert command("plot", alone) == 0
    assert {path.name for path in alone.iterdir()} == {"distilled.pt", "plot.png"}


def test_covid_from_end_to_end(tmp_path, capsys):
    make_covid(tmp_path / "xrays", {"COVID": 10, "Normal": 15}, size=40)
    which = "--dataset covid --classes COVID Normal --size 32 --width 4 --ipc 2"
    options = [which, "--data-dir", tmp_path / "xrays", "--runs", tmp_path / "runs"]
    assert command("teachers --teachers 1 --epochs 2", options) == 0
    assert command("distill --max-start-epoch 1 --iterations 2 --steps 2", options) == 0
    assert command("eval --on distilled full --nets 2 --eval-epochs 2", options) == 0
    said = capsys.readouterr().out
    assert "20 training and 5 test images" in said and "'shape': [1, 32, 32]" in said
    (path,) = tmp_path.rglob("results.jsonl")
    for row in rows_of(path.parent):
        assert np.array(row["confusion"]).sum(1).tolist() == [4, 6]
    assert command("plot", path.parent) == 0


def test_help_explains_every_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    for name in ("", "teachers", "distill", "eval", "plot"):
        with pytest.raises(SystemExit, match="0"):
            command(name, "--help")
        text = capsys.readouterr().out
        if not name:  # begins with the three commands
            found = [text.index(f"python iadd.py {x}") for x in ("teachers", "distill", "eval")]
            assert found == sorted(found) and found[-1] < 500
            continue
        options = re.split(r"\n  (?=--)", text.split("\n\ndataset ")[0])[1:]
        assert len(options) == 0 if name == "plot" else len(options) > 14
        for option in options:
            assert re.search(r"\(.+\)", option), option
        assert re.search(r"cifar100 +50 +200 +80 ", text)


# ---- nothing is lost: interruptions, kills, other runs -------------------------------------------

FORK = multiprocessing.get_context("forkserver")  # children need not import torch anew
FORK.set_forkserver_preload(["torch", "torchvision", "pytest", "filelock", "PIL.Image"])


def child_main(line, said, environment, change):
    """What such a child does: a command line. `said` begins the names of its outputs."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.environ.update(environment)
    torch.set_num_threads(1)
    change()
    sys.exit(iadd.main(line))


def start(said, *parts, environment=(), change=int):
    """A child with a command line; `change` first alters iadd.py in it."""
    arguments = (list(words(*parts)), said, dict(environment), change)
    child = FORK.Process(target=child_main, args=arguments, daemon=True)
    child.start()
    return child


def wait_for_rows(folder, child):
    """Until it is beyond iteration 20."""
    path, end = folder / "log.csv", time.time() + 60
    while not path.exists() or path.read_text().count("\n") < 3:
        assert time.time() < end and child.is_alive()
        time.sleep(0.02)


def exit_code(child):
    child.join(120)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode


def lines_of(text):
    """Without progress bars."""
    return [line for line in re.split("[\r\n]+", text) if line and not re.search("it/s|s/it", line)]


TEACH = "--batch-real 6 --lr-teacher 0.05"
DISTIL = "--steps 3 --alpha 0.05 --lr-w 1 --lr-img 1 --lr-alpha 1e-5"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three teachers of images of 16 x 16 pixels, on the CPU: a folder, options, their folder."""
    tmp = tmp_path_factory.mktemp("small")
    root, more = make_folder(tmp / "pets", train=12, size=16), "--width 4 --device cpu --no-compile"
    options = ["--dataset", root, "--runs", tmp / "runs", more, "--precision float32"]
    assert command("teachers --teachers 3 --ipc 1", TEACH, options) == 0
    return tmp, options, tmp / "runs" / "pets_zca_w4"


def state_of(folder):
    """All of a result but the machine, and the times in its log."""
    state = result(folder)
    log = [[t, *numbers] for t, _, *numbers in state["log"]]
    return {**state, "log": log, "machine": None}


def identical(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def close(a, b):
    """The same to rounding."""
    keys = ("images", "W")
    return a["iteration"] == b["iteration"] and all(
        torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-4) for key in keys
    )


def without_times(folder):
    return [{**row, "time": None} for row in log_of(folder)]


@pytest.fixture(scope="module")
def straight(small):
    """A result of 60 iterations without any interruption."""
    _, options, folder = small
    assert command("distill --iterations 60 --name whole", DISTIL, options) == 0
    return folder / "whole"


def test_a_distillation_goes_on_bit_for_bit(small, straight, capsys):
    _, options, folder = small
    distil, out = ["distill --name parts", DISTIL, options], folder / "parts"
    for T in (10, 30, 60):  # a larger T is no other setting: what came before is the same
        assert command(distil, "--iterations", T) == 0
        assert f"is at iteration {T}" in capsys.readouterr().out
    assert identical(state_of(out), state_of(straight))
    assert without_times(out) == without_times(straight) and len(log_of(out)) == 6
    momentum = [of.get("momentum_buffer") for of in result(out)["optimizer"]["state"].values()]
    assert sum(x is not None and x.abs().max().item() > 0 for x in momentum) == 2  # it matters
    error = refused(capsys, distil, "--iterations 60 --lr-w 7 --batch 2")
    assert "batch 3, not 2" in error and "lr_w 1.0, not 7.0" in error
    assert identical(state_of(out), state_of(straight))


def test_a_grid_shows_the_real_images_at_the_start(small, straight):
    """ZCA is inverted: iteration 0 is real images, enlarged six times."""
    tmp, *_ = small
    with Image.open(straight / "images_00000.png") as grid:
        tile = np.array(grid)[4:100:6, 4:100:6].astype(int)
    paths = list((tmp / "pets" / "train" / "cat").iterdir())
    assert min(np.abs(tile - np.array(Image.open(path))).max() for path in paths) <= 1


def test_the_log_has_mean_losses(small, monkeypatch):
    """Each row of the iterations since the row before, also if interrupted between the two."""
    _, options, folder = small
    distil = ["distill --iterations 24", DISTIL, options]
    assert command(distil, "--name means") == 0
    iteration, losses = iadd.iteration, {}

    def watched(d, *rest):
        loss = iteration(d, *rest)
        if d.t == 16 and 16 not in losses:
            losses[d.t] = loss.item()
            signal.raise_signal(signal.SIGINT)
        losses[d.t] = loss.item()
        return loss

    monkeypatch.setattr(iadd, "iteration", watched)
    monkeypatch.setattr(iadd, "CHECKPOINT_SECONDS", -1)
    assert command(distil, "--name stops") == 130
    assert result(folder / "stops")["iteration"] == 10
    assert command(distil, "--name stops") == 0
    assert identical(state_of(folder / "means"), state_of(folder / "stops"))
    means = [statistics.mean(losses[t + 1] for t in part) for part in (range(10), range(10, 20))]
    means.append(statistics.mean(losses[t] for t in (21, 22, 23, 24)))
    for name in ("means", "stops"):
        logged = [float(row["loss"]) for row in log_of(folder / name)]
        assert logged == pytest.approx(means, rel=1e-12) and len(set(losses.values())) == 24


def killed_in_a_checkpoint(n, where):
    """Checkpoints come often. The n-th kills its process: half written, or not yet renamed."""
    iadd.CHECKPOINT_SECONDS = 0.05
    save, replace, checkpoints = torch.save, os.replace, itertools.count(1)

    def dying_save(content, path):
        save(content, path)
        if next(checkpoints) == n and where == "half":
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_replace(*paths):
        if where == "unnamed" and next(checkpoints) > 2 * n - 2:  # each save counts, too
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    torch.save, os.replace = dying_save, dying_replace


def test_twenty_kills(small, tmp_path):
    """At random moments, or in a write: the file is always whole and never older than before, and
    in the end the result is that of an uninterrupted run."""
    _, options, folder = small
    distil, out = ["distill", DISTIL, options], folder / "killed"
    moments, reached = random.Random(0), 0
    for kill in range(20):
        where = ("at a random moment", "half", "unnamed")[kill % 3]
        change = functools.partial(killed_in_a_checkpoint, 1 + kill // 6, where)
        said = tmp_path / str(kill)
        child = start(said, distil, "--name killed --iterations 1000000", change=change)
        if kill % 3 == 0:
            time.sleep(moments.uniform(0.2, 1.2))
            child.kill()
        assert exit_code(child) == -signal.SIGKILL, (tmp_path / f"{kill}.err").read_text()
        if (out / "distilled.pt").exists():
            now = result(out)["iteration"]
            assert now >= reached
            reached = now
    assert reached > 20
    for name in ("killed", "unharmed"):
        assert command(distil, f"--name {name} --iterations {reached + 3}") == 0
    killed, unharmed = (state_of(folder / name) for name in ("killed", "unharmed"))
    assert identical(killed, unharmed)
    assert without_times(out) == without_times(folder / "unharmed")
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()


def killed_in_epoch(n):
    iadd.CHECKPOINT_SECONDS = -1
    train, epochs = iadd.train, itertools.count(1)

    def dying(*args):
        if next(epochs) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        train(*args)

    iadd.train = dying


def test_a_killed_teacher_goes_on(small, tmp_path):
    _, options, folder = small
    paths = {}
    for name in ("killed", "whole"):
        options = [*options[:3], tmp_path / name, options[4]]
        train = ["teachers --teachers 1 --epochs 10", TEACH, options]
        paths[name] = tmp_path / name / folder.name / "teachers" / "000.pt"
        for epochs in (4, 7) if name == "killed" else ():
            n = 5 if epochs == 4 else 4
            child = start(tmp_path / "said", train, change=functools.partial(killed_in_epoch, n))
            assert exit_code(child) == -signal.SIGKILL
            assert len(thetas(paths[name])) - 1 == epochs
        assert command(train) == 0
    killed, whole = (thetas(path) for path in paths.values())
    assert len(whole) == 11 and torch.equal(killed, whole)


def saving_often():
    iadd.CHECKPOINT_SECONDS = 0.05


def test_ctrl_c_goes_on_and_is_one_line(small, tmp_path):
    _, options, folder = small
    distil = ["distill", DISTIL, options]
    more = "--iterations 1000000 --name stopped"
    child = start(tmp_path / "said", distil, more, change=saving_often)
    wait_for_rows(folder / "stopped", child)
    os.kill(child.pid, signal.SIGINT)
    assert exit_code(child) == 130
    error = (tmp_path / "said.err").read_text()
    assert "iadd.py: interrupted; teachers and distill go on" in error and "Traceback" not in error
    saved = result(folder / "stopped")["iteration"]
    assert saved >= 10 and saved % 10 == 0
    for which in ("stopped", "unstopped"):
        assert command(distil, f"--name {which} --iterations {saved + 2}") == 0
    assert identical(state_of(folder / "stopped"), state_of(folder / "unstopped"))


def test_interrupted_teachers_keep_their_epochs(small, tmp_path, monkeypatch, capsys):
    _, options, folder = small
    options = [*options[:3], tmp_path, options[4]]
    command_line = ["teachers --teachers 2 --epochs 4", options]
    train, calls = iadd.train, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 7:  # the third epoch of the second teacher
            signal.raise_signal(signal.SIGINT)
        train(*args)

    monkeypatch.setattr(iadd, "train", interrupted)
    assert command(command_line, TEACH) == 130
    paths = [tmp_path / folder.name / "teachers" / f"00{k}.pt" for k in (0, 1)]
    assert len(thetas(paths[0])) - 1 == 4 and not paths[1].exists()  # a minute is lost at most
    before = paths[0].stat().st_mtime_ns
    assert command(command_line, TEACH) == 0 and len(calls) == 11
    assert [len(thetas(path)) - 1 for path in paths] == [4, 4]
    assert paths[0].stat().st_mtime_ns == before
    other = "--batch-real 6 --lr-teacher 0.02"
    assert "lr_teacher 0.05, not 0.02" in refused(capsys, command_line, other)


def test_an_interrupted_evaluation_is_made_up_for(small, monkeypatch):
    _, options, folder = small
    more = "--name watched --iterations 6 --eval-every 3 --nets 1 --eval-epochs 2"
    with monkeypatch.context() as patch:
        patch.setattr(iadd, "train_network", lambda *_: signal.raise_signal(signal.SIGINT))
        assert command("distill", more, DISTIL, options) == 130
    assert result(folder / "watched")["iteration"] < 3
    assert command("distill", more, DISTIL, options) == 0
    assert [row["iteration"] for row in rows_of(folder / "watched")] == [3, 6]


def test_an_interrupted_picture_is_made_up_for(small, monkeypatch):
    _, options, folder = small
    distil = ["distill --name painter --iterations 20", DISTIL, options]
    save_image = "torchvision.utils.save_image"
    with monkeypatch.context() as patch:

        def draw(x, path, **_):
            Path(path).write_bytes(b"half")
            if "00010" in str(path):
                signal.raise_signal(signal.SIGINT)

        patch.setattr(save_image, draw)
        assert command(distil) == 130
    assert command(distil) == 0
    with Image.open(folder / "painter" / "images_00010.png") as picture:
        picture.load()


def test_what_is_interrupted_early_can_be_plotted(small, monkeypatch):
    """Before the log has a row."""
    _, options, folder = small
    with monkeypatch.context() as patch:
        patch.setattr(iadd, "iteration", lambda *_: signal.raise_signal(signal.SIGINT))
        more = "--name early --iterations 20"
        assert command("distill", more, DISTIL, options) == 130
    assert command("plot", folder / "early") == 0


def test_a_learning_rate_below_0_is_no_good_state(small, monkeypatch, capsys):
    """Though nothing is infinite yet."""
    _, options, folder = small
    iteration = iadd.iteration

    def going_wrong(d, *rest):
        loss = iteration(d, *rest)
        if d.t == 20:
            d.alpha.data.neg_()
        return loss

    monkeypatch.setattr(iadd, "iteration", going_wrong)
    monkeypatch.setattr(iadd, "CHECKPOINT_SECONDS", -1)
    error = refused(capsys, "distill --name negative --iterations 60", DISTIL, options)
    assert "diverged by iteration 20" in error and "alpha -0.04" in error
    kept = result(folder / "negative")
    assert kept["iteration"] == 10 and kept["alpha"] > 0


@pytest.mark.parametrize("has_it", [True, False])
def test_precision_is_a_setting(small, tmp_path, monkeypatch, capsys, has_it):
    """By default bf16 where there is arithmetic for it; files of the other are refused."""
    _, options, _ = small
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    options = [*options[:-1], "--runs", tmp_path]  # no --precision
    best, other = ("bf16", "float32") if has_it else ("float32", "bf16")
    folder = tmp_path / "pets_zca_w4"
    teach, distil = ["teachers --ipc 1", TEACH, options], ["distill", DISTIL, options]

    def images_of(name, *typed):
        assert command(distil, "--iterations 4 --name", name, *typed) == 0
        return result(folder / name)["images"]

    assert command(teach, "--teachers 1") == 0
    settings = torch.load(folder / "teachers/000.pt", weights_only=True)["settings"]
    assert settings["precision"] == best
    error = refused(capsys, teach, "--teachers 2 --precision", other)
    assert f"precision {best}, not {other}" in error
    default = images_of("default")
    assert torch.equal(default, images_of("typed", "--precision", best))
    assert not torch.equal(default, images_of("other", "--precision", other))
    error = refused(capsys, distil, "--iterations 12 --name other --precision", best)
    assert f"precision {other}, not {best}" in error
    for typed in ([], ["--precision", other]):
        assert command("eval --name default --nets 1 --eval-epochs 1", options, typed) == 0
    assert [row["precision"] for row in rows_of(folder / "default")] == [best, other]


def test_other_teachers_are_noticed(small, tmp_path, capsys):
    """Even with the same settings; but not if they have only been trained for longer."""
    _, options, folder = small
    options = [*options[:3], tmp_path, options[4]]
    distil = ["distill", DISTIL, options]
    assert command("teachers --teachers 2 --ipc 1", TEACH, options) == 0
    assert command(distil, "--iterations 2") == 0
    assert command("teachers --teachers 2 --epochs 5", TEACH, options) == 0
    assert command(distil, "--iterations 4") == 0
    path = tmp_path / folder.name / "teachers" / "001.pt"
    teacher = torch.load(path, weights_only=True)
    iadd.save({**teacher, "thetas": teacher["thetas"] * 1.001}, path)
    assert "teachers_fingerprint" in refused(capsys, distil, "--iterations 6")


def test_a_folder_has_one_writer(small, tmp_path, capsys):
    _, options, folder = small
    distil = ["distill --name shared", DISTIL, options]
    child = start(tmp_path / "said", distil, "--iterations 1000000")
    wait_for_rows(folder / "shared", child)
    assert "shared" in refused(capsys, distil, "--iterations 9")
    with iadd.one_writer(folder / "teachers", SimpleNamespace(rank=0)):
        assert "teachers" in refused(capsys, "teachers --teachers 9", TEACH, options)
        more = "--name another --iterations 2"
        assert command("distill", more, DISTIL, options) == 0  # to read is not to write
    os.kill(child.pid, signal.SIGINT)
    assert exit_code(child) == 130
    saved = result(folder / "shared")["iteration"]
    assert command(distil, "--iterations", saved + 1) == 0
    assert len(list((folder / "teachers").glob("*.pt"))) == 3


def test_save_is_all_or_nothing(small, capsys, monkeypatch):
    """On a full disk, say: one line, and what was there before stays."""
    _, options, folder = small
    distil = ["distill --name full", DISTIL, options]
    assert command(distil, "--iterations 4") == 0
    before, save = state_of(folder / "full"), torch.save

    def full(content, path):
        save(content, path)
        os.truncate(path, 1000)
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 896 vs 790")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert ".tmp: [enforce" in refused(capsys, distil, "--iterations 8")
        assert ".tmp: [enforce" in refused(capsys, "teachers --teachers 4", TEACH, options)
    assert identical(state_of(folder / "full"), before)
    assert not (folder / "teachers" / "003.pt").exists()
    assert command(distil, "--iterations 8") == 0 and result(folder / "full")["iteration"] == 8


# ---- several processes ---------------------------------------------------------------------------


def several(folder, n, *parts, change=int):
    """What torchrun does: n processes that know of each other. When one fails, the others end.
    Their exit codes, and the lines that each wrote to standard output and to standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    job |= {"WORLD_SIZE": str(n), "GLOO_SOCKET_IFNAME": "lo"}
    said = [folder / f"said_{port}_{k}" for k in range(n)]
    mine = [{**job, "RANK": str(k), "LOCAL_RANK": str(k)} for k in range(n)]
    children = [start(said[k], *parts, environment=mine[k], change=change) for k in range(n)]
    end = time.time() + 120
    while any(child.is_alive() for child in children):
        late = time.time() > end
        if late or any(child.exitcode for child in children):
            time.sleep(0.3)  # more than one may have something to say
            for child in children:
                child.kill() if late else child.terminate()
        children[0].join(0.05)
        children[-1].join(0.05)
    texts = [[lines_of(Path(f"{x}.{name}").read_text()) for x in said] for name in ("out", "err")]
    return [child.exitcode for child in children], *texts


@pytest.mark.parametrize("S, processes", [(2, 2), (3, 3), (4, 3)])
def test_segments_are_shared_out(small, tmp_path, S, processes):
    """To rounding, several processes are one."""
    _, options, folder = small
    distil = ["distill", DISTIL, options, f"--segments {S} --iterations 20"]
    alone, shared = f"alone{S}", f"shared{S}_{processes}"
    assert command(distil, "--name", alone) == 0
    codes, out, _ = several(tmp_path, processes, distil, "--name", shared)
    assert codes == [0] * processes
    assert "is at iteration 20" in out[0][-1] and not any(out[1:])  # rank 0 speaks
    a, b = (state_of(folder / name) for name in (alone, shared))
    assert close(a, b)
    for mine, theirs in zip(a["log"], b["log"]):
        assert mine == pytest.approx(theirs, rel=1e-3)


def test_any_number_of_processes_goes_on(small, tmp_path):
    _, options, folder = small
    distil = ["distill", DISTIL, options, "--segments 3 --iterations"]
    assert command(distil, "30 --name mono") == 0
    for n, T in ((2, 10), (1, 20), (3, 30)):
        assert several(tmp_path, n, distil, T, "--name mixed")[0] == [0] * n
    assert close(state_of(folder / "mixed"), state_of(folder / "mono"))
    assert [int(float(row["iteration"])) for row in log_of(folder / "mixed")] == [10, 20, 30]


def test_too_few_segments_to_share_out(small, tmp_path):
    _, options, folder = small
    codes, out, err = several(tmp_path, 2, "distill --name few", DISTIL, options)
    assert codes[0] == 2 and 0 not in codes and not (folder / "few").exists()
    (error,) = [line for lines in err for line in lines if "error" in line]  # said once
    assert "--segments 2" in error
    assert not any("Traceback" in line for lines in err for line in lines)


def fails_on_rank_1_alone():
    def fails(*_, **__):
        raise UserError("only here")

    if os.environ["RANK"] == "1":
        iadd.one_writer = fails


def test_a_mistake_on_one_rank_is_said(small, tmp_path):
    _, options, _ = small
    line = ["distill --name alone --segments 2 --iterations 5", DISTIL, options]
    codes, _, err = several(tmp_path, 2, line, change=fails_on_rank_1_alone)
    assert codes[1] == 2 and "iadd.py: error: only here" in err[1]


def fails_on_rank_1():
    if os.environ["RANK"] == "1":
        iadd.Normalisation.fit = lambda *_: [][7]


def test_a_bug_shows_its_traceback_on_any_rank(small, tmp_path):
    _, options, _ = small
    distil = ["distill --name buggy --segments 2 --iterations 5", DISTIL, options]
    codes, _, err = several(tmp_path, 2, distil, change=fails_on_rank_1)
    assert codes[1] == 1 and "IndexError: list index out of range" in err[1]


def test_teachers_and_evaluated_networks_are_shared_out(small, straight, tmp_path):
    _, options, folder = small
    train = ["teachers --teachers 3 --epochs 3", TEACH, options[:3], tmp_path, options[4:]]
    assert several(tmp_path, 2, train)[0] == [0, 0]
    paths = sorted((tmp_path / folder.name / "teachers").glob("*.pt"))
    assert [path.name for path in paths] == ["000.pt", "001.pt", "002.pt"]
    for path in paths:
        assert torch.allclose(thetas(path), thetas(folder / "teachers" / path.name), atol=1e-5)
    test = ["eval --name whole --on distilled random --nets 3 --eval-epochs 5", options]
    assert command(test) == 0 and several(tmp_path, 2, test)[0] == [0, 0]
    rows = rows_of(straight)
    assert [row["on"] for row in rows] == ["distilled", "random"] * 2
    assert [row["accuracies"] for row in rows[:2]] == [row["accuracies"] for row in rows[2:]]
    assert [row["confusion"] for row in rows[:2]] == [row["confusion"] for row in rows[2:]]


def test_to_import_it_joins_no_job():
    """Under torchrun, too: only a command does."""
    job = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "nowhere"}
    code = "import iadd, torch; assert not torch.distributed.is_initialized(); print('fine')"
    how = {"capture_output": True, "text": True, "cwd": HERE, "timeout": 60}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **job}, **how)
    assert (done.stdout, done.stderr, done.returncode) == ("fine\n", "", 0)


def test_a_rank_that_dies_ends_the_job(small):
    """With torchrun itself: one of two processes is killed, and one process goes on."""
    _, options, folder = small
    distil = ["distill --segments 2", DISTIL, options]
    line = words(distil, "--name orphan --iterations 1000000")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen([*torchrun, iadd.__file__, *line], **pipes)
    try:
        wait_for_rows(folder / "orphan", SimpleNamespace(is_alive=lambda: job.poll() is None))
        workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in workers}
        (last,) = (pid for pid, found in environments.items() if b"\0RANK=1\0" in found)
        os.kill(int(last), signal.SIGKILL)
        _, error = job.communicate(timeout=60)
    finally:
        job.terminate()  # if it is still there
    assert job.returncode and "Signal 9 (SIGKILL)" in error
    saved = result(folder / "orphan")["iteration"]
    for name in ("orphan", "parent"):
        assert command(distil, f"--name {name} --iterations {saved + 1}") == 0
    assert close(state_of(folder / "orphan"), state_of(folder / "parent"))


# ---- bad input: one clear line, exit code 2 ------------------------------------------------------


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def test_bad_datasets(tmp_path, capsys, monkeypatch):
    def says(*parts):
        return refused(capsys, "teachers --data-dir", tmp_path / "data", "--runs", runs, *parts)

    def says_of(name, change=lambda root: None, **options):
        root = make_folder(tmp_path / name, **options)
        change(root)
        return says("--dataset", root)

    runs = tmp_path / "runs"
    assert "unknown dataset 'nonsense'" in says("--dataset nonsense")
    (tmp_path / "empty").mkdir()
    assert f"no folder {tmp_path}/empty/train" in says("--dataset", tmp_path / "empty")
    assert "two classes" in says_of("one", classes=["cat"])
    message = says_of("odd", lambda root: (root / "test" / "emu").rename(root / "test" / "fox"))
    assert "odd/train holds no image of fox" in message
    message = says("--dataset", tmp_path / "odd", "--classes cat dog Norml")
    assert "odd/train holds no image of Norml" in message
    message = says_of("half", lambda root: shutil.rmtree(root / "test"))
    assert f"there is no folder {tmp_path}/half/test" in message
    message = says_of("hollow", lambda root: [empty(root / x / "dog") for x in ("train", "test")])
    assert "hollow/train holds no image of dog, only of: cat, emu" in message
    many = [f"class{k:03d}" for k in range(30)]
    message = says_of("void", lambda root: empty(root / "test"), classes=many, train=1, test=1)
    assert "void/test holds no image of class000, " in message and "class004 and 25 more" in message
    assert len(message) < 250
    photo = Image.new("RGB", (800, 600))
    message = says_of("photos", lambda root: photo.save(root / "train" / "cat" / "2.png"))
    assert "photos/train/cat/2.png has 800 x 600 pixels; --size N" in message

    def cut(root):
        for path in root.glob("*/dog/*"):
            os.truncate(path, 200)
        image = Image.fromarray(np.ones((32, 32), np.uint16))
        image.save(root / "train" / "dog" / "0.png")

    message = says_of("cut", cut)
    assert "9 of the images cannot be read: " in message and message.endswith(" and 4 more")
    assert all(f"cut/train/dog/{k}.png: " in message for k in range(5))
    assert "8-bit images are needed" in message
    large = Image.new("RGB", (40, 40))
    message = says_of("large", lambda root: large.save(root / "test" / "dog" / "2.png"))
    assert "test/dog/2.png" in message and "--size" in message
    message = says_of("first", lambda root: large.save(root / "train" / "cat" / "0.png"))
    assert "train/cat/0.png" in message
    assert "--size" in says("--dataset shapes --size 8")
    assert "--classes" in says("--dataset shapes --classes disk ring")
    more = "--dataset shapes --lr-teacher 1e9 --epochs 1 --width 4 --no-compile"
    assert "diverged: lower --lr-teacher" in says(more)

    def no_network(self, root, train, download=False):
        raise urllib.error.URLError("no route") if download else RuntimeError("not found")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.__init__", no_network)
    message = says("--dataset cifar10")  # which file is wanted, where to get it, where to put it
    assert "https://" in message and "/cifar-10-python.tar.gz to" in message
    assert str(tmp_path / "data") in message
    assert not list(runs.rglob("*.pt")) and not list(runs.rglob("*.tmp"))


def test_what_can_be_known_is_said_at_once(run, tmp_path, capsys, monkeypatch):
    """Before anything is computed, and with nothing written."""
    tmp, options, folder = run

    def computes(*_):
        raise AssertionError("it computes")

    for name in ("train", "real_images"):
        monkeypatch.setattr(iadd, name, computes)
    monkeypatch.setattr(Normalisation, "fit", computes)
    pets = make_folder(tmp_path / "pets")
    shutil.rmtree(pets / "train" / "dog")
    shutil.copytree(pets / "test" / "dog", pets / "train" / "dog")  # three, six of the others
    new = ["--width 2 --runs", tmp_path / "runs", "--dataset", pets]
    for name in ("teachers --epochs 1", "distill"):
        error = refused(capsys, name, "--ipc 4", new)
        assert "IPC 4 is too large: dog has 3 training images" in error
    error = refused(capsys, "eval --on full herding", new)
    assert "there is no " in error and "teachers/000.pt; train it first" in error
    small = make_folder(tmp_path / "small", size=4)
    assert "vgg11: images of (3, 4, 4) are too small" in refused(
        capsys, "eval --arch convnet vgg11 --on full", new, "--dataset", small
    )
    assert not (tmp_path / "runs").exists()

    monkeypatch.setattr(iadd, "fingerprint", lambda _: 0)
    gift = tmp_path / "gift.pt"
    content = result(folder / "ipc1_iadd_seed0")
    iadd.save({**content, "settings": {**content["settings"], "ipc": 4}}, gift)
    how = ["eval --on distilled random", options, "--dataset", pets, "--distilled", gift]
    assert "IPC 4 is too large" in refused(capsys, how)
    (folder / "closed" / "results.jsonl").mkdir(parents=True)  # nothing can be written to it
    good = folder / "ipc1_iadd_seed0" / "distilled.pt"
    assert "results.jsonl" in refused(capsys, "eval --name closed", options, "--distilled", good)


def test_zca_of_own_images(tmp_path, capsys, monkeypatch):
    """Those larger than 32 x 32 have it only where it is asked for, and what it takes is said; if
    that is more than about a minute, they do not have it."""

    class Fitted(Exception):
        pass

    def fit(images, zca, *_):
        raise Fitted(zca)

    monkeypatch.setattr(Normalisation, "fit", fit)
    options = ["teachers --width 2 --runs", tmp_path / "runs"]

    def fitted(size, *more):
        root = tmp_path / f"of{size}"
        if not root.exists():
            make_folder(root, size=size)
        capsys.readouterr()
        with pytest.raises(Fitted) as found:
            command(options, "--dataset", root, *more)
        return found.value.args[0], "ZCA of" in capsys.readouterr().out

    assert fitted(32) == (True, False) and fitted(32, "--no-zca") == (False, False)
    assert fitted(40) == (False, False) and fitted(40, "--zca") == (True, True)
    make_folder(tmp_path / "of50", size=50)
    error = refused(capsys, options, "--zca --dataset", tmp_path / "of50")
    assert "ZCA of 7500 numbers: about 74 s, 2.2 GB: use --no-zca, or a smaller --size" in error


def test_names_of_folders(tmp_path):
    """Short choices of classes are in them, long ones as their number and a hash."""
    classes = [f"n{k:08d}" for k in range(40)]
    pets = make_folder(tmp_path / "pets", classes, train=1, test=1, size=8)

    def folder_of(*more):
        args = completed(*words("teachers --width 2 --runs runs --no-zca --dataset", pets, *more))
        data, shared, folder = iadd.prepare(args)
        assert data.name == shared["dataset"] == "pets"
        (tmp_path / folder).mkdir(parents=True)  # a file system takes it
        return folder.name

    assert folder_of() == "pets_std_w2"
    assert folder_of("--size 16", "--classes", *classes[1::-1]) == (
        "pets-n00000000-n00000001-16px_std_w2"
    )
    longer = {folder_of("--classes", *classes[k : k + 35]) for k in range(3)}
    assert len(longer) == 3 and all("-35-" in name and len(name) < 60 for name in longer)


@pytest.mark.parametrize(
    "error", [NotImplementedError("no flock"), OSError(37, "No locks available")]
)
def test_a_file_system_without_locks(run, capsys, monkeypatch, error):
    _, options, folder = run

    def fails(*_, **__):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", fails)
    said = refused(capsys, "teachers --ipc 1", options)
    assert f"cannot lock {folder}/teachers" in said and str(error) in said


def test_within_jupyter(monkeypatch):
    """%run there has an output that cannot be told how to encode."""
    monkeypatch.setattr(sys, "argv", ["iadd.py", "plot", "nowhere"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(iadd.__file__, run_name="__main__")
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "line, says",
    [
        ("teachers --teachers 0", "0 is not from 1 to 1000000"),
        ("distill --ipc x", "'x'"),
        ("distill --alpha 0", "0 is not"),
        ("distill --lr-img nan", "nan is not from 0"),
        ("distill --lr-img inf", "inf is not from 0"),
        ("distill --method magic", "invalid choice: 'magic'"),
        ("eval --arch vgg99", "invalid choice: 'vgg99'"),
        ("eval --precision half", "invalid choice: 'half'"),
        ("eval --device toaster", "toaster"),
        ("eval --device meta", "meta"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("teachers --size 5000", "5000 is not from 1 to 512"),
        ("teachers --teachers 9999999999", "is not from 1 to 1000000"),
        ("distill --epsilon 2", "2 is not from 0 to 1"),
    ],
)
def test_bad_options(line, says, capsys):
    assert says in refused(capsys, line)


def test_a_device_without_float64(monkeypatch, capsys):
    """Such as a Mac's GPU; here a stand-in."""
    zeros = torch.zeros

    def without_float64(*shape, dtype=None, **how):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return zeros(*shape, dtype=dtype, **how)

    monkeypatch.setattr(torch, "zeros", without_float64)
    assert "--device cpu: Cannot convert" in refused(capsys, "teachers --device cpu")


def test_more_memory_than_there_is(monkeypatch, capsys):
    """Other errors are bugs, and show their traceback."""

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(iadd, "load_dataset", fails)
    assert "Tried to allocate" in refused(capsys, "teachers --dataset shapes")
    monkeypatch.setattr(iadd, "load_dataset", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        command("teachers --dataset shapes")


def test_variables_of_another_launcher_mean_nothing(run, monkeypatch):
    """Only torchrun's are believed."""
    _, options, _ = run
    for name, value in {"RANK": "x", "WORLD_SIZE": "", "LOCAL_RANK": "7"}.items():
        monkeypatch.setenv(name, value)
    assert command("teachers --teachers 2 --ipc 1", options) == 0


def test_missing_or_mismatching_teachers(run, tmp_path, capsys):
    tmp, options, folder = run
    error = refused(capsys, "distill", options, "--zca")
    assert "run first: python iadd.py teachers --ipc 1 --epochs 3" in error
    error = refused(capsys, "distill", options, "--max-start-epoch 30 --name few")
    assert "--epochs 31" in error
    assert "seed 0, not 5" in refused(capsys, "teachers --teachers 1 --seed 5", options)

    elsewhere = [options[:3], tmp_path, "--no-zca --device", DEVICE]
    teachers = tmp_path / "pets_std_w8" / "teachers"  # where they do not belong
    teachers.mkdir(parents=True)
    shutil.copy(folder / "teachers" / "000.pt", teachers)
    assert "width 4, not 8" in refused(capsys, "distill --width 8", elsewhere)
    teachers.parent.rename(tmp_path / "pets_std_w4")
    changed = make_folder(tmp_path / "pets", train=13)
    for name in ("teachers --ipc 1", "distill"):
        error = refused(capsys, name, "--width 4", elsewhere, "--dataset", changed)
        assert "000.pt is of other images: delete its folder, or --runs DIR" in error
    assert not list(tmp_path.rglob("distilled.pt"))


def test_the_advice_to_train_teachers_helps(tmp_path, capsys):
    """Also where the IPC decides on ZCA, and so on the teachers' folder."""
    pets = make_folder(tmp_path / "pets", train=50, size=16)
    options = ["--dataset", pets, "--runs", tmp_path / "runs", f"--width 2 --device {DEVICE}"]
    more = "--iterations 1 --steps 1 --max-start-epoch 1"
    for ipc in (10, 50):
        distil = [f"distill --ipc {ipc} --teachers 1", more, options]
        error = refused(capsys, distil)
        advice = re.search(r"run first: python iadd.py (teachers[^,]*),", error)[1]
        assert command(advice, options) == 0 and command(distil) == 0
    assert len(list((tmp_path / "runs").rglob("000.pt"))) == 2


def test_eval_without_a_fitting_result(run, tmp_path, capsys):
    _, options, folder = run
    error = refused(capsys, "eval --ipc 3", options)
    assert "there is no " in error and "ipc3_iadd" in error and "distill makes it" in error
    assert "nowhere.pt" in refused(capsys, "eval", options, "--distilled", tmp_path / "nowhere.pt")
    other = make_folder(tmp_path / "pets")  # the same names, other images
    assert "is of other images" in refused(capsys, "eval", options, "--dataset", other)
    gift = folder / "ipc1_iadd_seed0" / "distilled.pt"
    error = refused(capsys, "eval --dataset shapes --width 4 --distilled", gift)
    assert "classes ['cat', 'dog', 'emu'], not ['disk'" in error and len(error) < 300
    assert "unknown dataset 'pets'" in refused(capsys, "eval --distilled", gift)  # not CIFAR-10
    assert "nowhere" in refused(capsys, "plot", tmp_path / "nowhere")


def flipped(content, bit):
    """Those bytes with one bit changed."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_damaged_files_are_named(run, tmp_path, capsys):
    tmp, options, folder = run
    out, bad = folder / "ipc1_iadd_seed0", tmp_path / "bad.pt"
    good, images = (out / "distilled.pt").read_bytes(), result(out)["images"]
    where = 8 * good.index(images.numpy().tobytes())
    cut = (b"", b"hello", good[:-500], good[: len(good) // 2])
    for content in (*cut, flipped(good, where + 5), flipped(good, where + 3000)):
        bad.write_bytes(content)
        assert "bad.pt" in refused(capsys, "eval", options, "--distilled", bad)

    teachers = tmp_path / "runs" / folder.name / "teachers"
    teachers.mkdir(parents=True)
    good = (folder / "teachers" / "000.pt").read_bytes()
    (teachers / "000.pt").write_bytes(flipped(good, 4 * len(good)))
    for name in ("teachers", "distill"):
        error = refused(capsys, name, options[:3], tmp_path / "runs", options[4])
        assert "teachers/000.pt" in error


def test_no_flipped_bit_goes_unnoticed(run, tmp_path):
    """A file is refused, or it still holds the same."""
    path, refusals = run[2] / "ipc1_iadd_seed0" / "distilled.pt", 0
    good, content, bad = path.read_bytes(), result(path.parent), tmp_path / "bad.pt"
    for bit in random.Random(0).sample(range(8 * len(good)), 300):
        bad.write_bytes(flipped(good, bit))
        try:
            assert identical(iadd.load(bad, {}, ""), content)
        except UserError:
            refusals += 1
    assert refusals > 200


def test_other_torch_files_are_refused(run, tmp_path, capsys):
    _, options, folder = run
    bad = tmp_path / "bad.pt"
    teacher = torch.load(folder / "teachers" / "000.pt", weights_only=True)
    for content in ({"images": torch.zeros(1)}, [1, 2], "text", teacher, {"settings": {}}):
        torch.save(content, bad)
        assert "bad.pt" in refused(capsys, "eval", options, "--distilled", bad)


def test_a_damaged_checkpoint_is_named_and_deleted_begins_anew(small, capsys):
    _, options, folder = small
    distil, path = ["distill --name hurt", DISTIL, options], folder / "hurt" / "distilled.pt"
    assert command(distil, "--iterations 4") == 0
    W = result(folder / "hurt")["W"].numpy().tobytes()
    damaged = flipped(path.read_bytes(), 8 * path.read_bytes().index(W) + 17)
    path.write_bytes(damaged)
    assert "hurt/distilled.pt" in refused(capsys, distil, "--iterations 8")
    assert path.read_bytes() == damaged
    shutil.rmtree(path.parent)  # as the message says
    assert command(distil, "--iterations 4") == 0
    assert result(folder / "hurt")["iteration"] == 4


def test_a_file_of_another_version_is_named(small, tmp_path, capsys):
    _, options, folder = small
    assert command("distill --name earlier --iterations 2", DISTIL, options) == 0
    path = folder / "earlier" / "distilled.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "format": 1}, path)
    assert "of another version" in refused(capsys, "distill --name earlier", DISTIL, options)


NAN = functools.partial(torch.mul, math.nan)
CRAFTED = {  # changes to an entry of a good file that would give a wrong number without a word
    "images": [NAN, operator.itemgetter(np.s_[:, :1]), operator.itemgetter(np.s_[1:])],
    "labels": [lambda y: y + 9, lambda y: y - 1, lambda y: y[:0]],
    "alpha": [lambda a: -a, lambda a: 0 * a, NAN],
    "mean": [NAN],
    "scale": [NAN],
    "W": [operator.itemgetter(np.s_[1:]), NAN],
    "settings": [lambda s: {**s, "zca": True}, lambda s: {**s, "classes": ["x", "y", "z"]}],
}


@pytest.mark.parametrize("key", CRAFTED)
def test_crafted_results_are_refused(run, tmp_path, capsys, key):
    """Wherever they are opened, with one line that names them."""
    _, options, folder = run
    good = result(folder / "ipc1_iadd_seed0")
    path = tmp_path / "runs" / folder.name / "ipc1_iadd_seed0" / "distilled.pt"
    shutil.copytree(folder / "teachers", path.parent.parent / "teachers")
    distil = ["distill --iterations 14 --steps 3", options[:3], tmp_path / "runs", options[4]]
    path.parent.mkdir()
    says = {"settings": ("zca ", "classes "), "labels": (": labels", "min()")}.get(
        key, (f": {key}",)
    )
    for change in CRAFTED[key]:
        iadd.save({**good, key: change(good[key])}, path)
        for line in (distil, ["eval --distilled", path, options]):
            error = refused(capsys, line)
            assert "distilled.pt" in error and any(x in error for x in says)


def test_crafted_teachers_are_refused(run, tmp_path, capsys):
    _, options, folder = run
    path = tmp_path / folder.name / "teachers" / "000.pt"
    good = torch.load(folder / "teachers" / "000.pt", weights_only=True)
    x = good["thetas"]
    path.parent.mkdir(parents=True)
    for thetas in (x[0], x[:, 1:], NAN(x), "x", None):
        iadd.save({**good, "thetas": thetas}, path)
        for name in ("teachers --ipc 1", "distill", "eval --on herding"):
            error = refused(capsys, name, options[:3], tmp_path, options[4])
            assert "000.pt" in error


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil_ran",)


def test_files_run_no_code(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({key: Evil() for key in ("images", "settings")}, "evil.pt")
    error = refused(capsys, "eval --dataset shapes --distilled evil.pt")
    assert "evil.pt" in error and not Path("evil_ran").exists()


def test_run_all(tmp_path):
    """`paper` lists every cell and runs the chosen ones, with options; GPUS=2: two processes."""
    here = Path(iadd.__file__).parent
    python = tmp_path / ".venv" / "bin" / "python"  # a stand-in that writes down what it is told
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >> "$LOG"\n')
    python.chmod(0o755)
    for name, place in (("run_all.sh",) * 2, ("requirements.txt", ".venv/installed")):
        shutil.copy(here / name, tmp_path / place)
    shutil.copy(here / "requirements.txt", tmp_path)

    def run_all(*words, gpus="1"):
        environment = {**os.environ, "LOG": str(tmp_path / "log"), "GPUS": gpus}
        (tmp_path / "log").write_text("")
        run = subprocess.run(
            [tmp_path / "run_all.sh", *words], capture_output=True, text=True, env=environment
        )
        lines = (tmp_path / "log").read_text().replace(str(tmp_path), "").splitlines()
        return run.returncode, run.stdout, lines

    code, listing, ran = run_all("paper")
    cells = [line.split(" ", 1) for line in listing.splitlines()]
    assert code == 0 and not ran
    assert len({name for name, _ in cells}) == 8 * 5 + 3 + 3 + 4  # Table 1 with full, Tables 3, 4
    for _, command in cells:  # every command is one that iadd.py understands
        iadd.make_parser().parse_args(command.split("iadd.py ")[1].split())
    code, _, ran = run_all("paper", "table4/iadd", "table1/cifar10/ipc1/random", "--width", "8")
    assert code == 0 and ran == [  # in the order of the tables
        "/iadd.py eval --dataset cifar10 --ipc 1 --on random --width 8",
        "/iadd.py teachers --dataset covid --ipc 20 --width 8",
        "/iadd.py distill --dataset covid --ipc 20 --method iadd --width 8",
        "/iadd.py eval --dataset covid --ipc 20 --method iadd --width 8",
    ]
    assert run_all("paper", "table1/cifar10/ipc1")[2][-1].startswith("/iadd.py eval --dataset cif")
    assert "ipc10" not in "".join(run_all("paper", "table1/cifar10/ipc1")[2])
    assert run_all("paper", "table9")[0] == 2
    ran = run_all("cifar100", "10", gpus="2")[2]
    torchrun = "-m torch.distributed.run --nproc-per-node 2 --local-addr 127.0.0.1 "
    assert all(line.startswith(torchrun) for line in ran)
    assert "distill --segments 2 --dataset cifar100 --ipc 10" in ran[1] and len(ran) == 3


# ---- does it work? -------------------------------------------------------------------------------


def test_distilled_shapes_beat_random_ones(tmp_path):
    """One distilled image a class teaches a fresh network far more than one real image. A chance
    difference between two such rows is about 3 points."""
    options = ["--dataset shapes --runs", tmp_path]
    assert command("teachers --ipc 1 --teachers 2", options) == 0
    assert command("distill --iterations 100", options) == 0
    assert command("eval --on distilled random --nets 3 --eval-epochs 150", options) == 0
    (path,) = tmp_path.rglob("results.jsonl")
    distilled, real = (row["mean"] for row in rows_of(path.parent))
    assert distilled > real + 15, (distilled, real)


# ---- the code itself -----------------------------------------------------------------------------


def test_ruff_has_no_complaint():
    beside = shutil.which("ruff", path=Path(sys.executable).parent)
    if not beside and not importlib.util.find_spec("ruff"):
        pytest.skip("ruff is not installed")
    ruff = [beside] if beside else [sys.executable, "-m", "ruff"]
    for check in (["format", "--check"], ["check"]):
        line = [*ruff, *check, "--no-cache", "iadd.py", "test_iadd.py"]
        done = subprocess.run(line, cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- python test_iadd.py: how fast is it? --------------------------------------------------------


def peak_memory(device):
    """Of this process, in GB: of the GPU, or on Linux of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e9 if found else math.nan


def median_seconds(runs, device):
    """Median time of the items of an iterator but the first, which may compile."""
    times = [time.perf_counter()]
    for _ in runs:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
    spans = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(spans[1:] or spans)


def job(way, task, batch, steps, width, device, compiling):
    """A function that does one task in a way: the "obvious" one, or ours in "float32" or
    "bf16". task: "distil", an iteration of Algorithm 1 with `steps` steps of `batch` images, or
    "train", as many steps. With it, the floating-point operations of a step."""
    torch.manual_seed(0)
    n = batch if task == "distil" else batch * steps
    net, x = iadd.convnet((3, 32, 32), 10, width).to(device), torch.randn(n, 3, 32, 32).to(device)
    theta, y = flat_parameters(net), torch.arange(n, device=device) % 10
    ours, precision = way in ("float32", "bf16"), "bf16" if way == "bf16" else "float32"
    args = SimpleNamespace(device=device, precision=precision, batch_real=batch)
    args.iterations, args.compile = 1, ours and compiling
    if task == "distil":
        teachers = [torch.stack([theta, theta + 0.01 * torch.randn_like(theta)]).cpu()]
        rates = {"alpha": 0.01, "lr_alpha": 1e-7, "lr_w": 1e-4, "lr_img": 1}
        m = settings_of(J=steps, K=1, max_start=1, batch=batch, **rates)
        d = iadd.Distillation(x, y, len(theta), m)
        student = unrolled(net)
        if ours:
            student = iadd.fast_student(net, theta, d, m, args)
        work = functools.partial(iadd.iteration, d, student, teachers, m, [0])
    else:
        images = iadd.ImageSet(x, y)
        ell = iadd.fast_loss(net, images, 1, args)
        optimizer = torch.optim.SGD([theta.requires_grad_()], 0.01, momentum=0.9)
        work = functools.partial(iadd.train, ell, theta, optimizer, images, 1, batch)
    with FlopCounterMode(display=False) as counter:
        net(x[:batch])
    passes = 12 if task == "distil" else 3  # ways forward that a step costs, with its way back
    return work, passes * counter.get_total_flops()


def measure(ways, task, batch, steps, width, device, threads, compiling, repeats):
    """Median seconds a step of each way, in turn, with the same threads and the same malloc; the
    operations of a step; and the peak memory of all in GB."""
    torch.set_num_threads(threads)
    iadd.tune(device)
    jobs = [job(way, task, batch, steps, width, device, compiling) for way in ways]
    seconds = [[median_seconds((work() for _ in range(2)), device) for work, _ in jobs]]
    for _ in range(repeats):
        seconds.append([median_seconds((work() for _ in range(1)), device) for work, _ in jobs])
    medians = [statistics.median(times) / steps for times in zip(*seconds[1:] or seconds)]
    return medians, jobs[0][1], peak_memory(device)


def convolution_rate(precision, batch, device, threads, repeats):
    """FLOP/s of a 3x3 convolution of 128 channels on 16x16 pixels, with its way back."""
    torch.set_num_threads(threads)
    iadd.tune(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(batch, 128, 16, 16, dtype=dtype, device=device, requires_grad=True)
    w = torch.randn(128, 128, 3, 3, dtype=dtype, device=device, requires_grad=True)
    v = torch.randn_like(x)
    work = (torch.autograd.grad(F.conv2d(x, w, padding=1), (x, w), v) for _ in range(repeats))
    return 3 * 2 * batch * 16**2 * 128**2 * 9 / median_seconds(work, device)


def alone(function, *case):
    """In a process of its own, as peak memory and malloc are a process's; NaN if it ends early."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *case).result()
        except (BrokenExecutor, torch.OutOfMemoryError):
            return 3 * [math.nan], math.nan, math.nan


def bench(quick, width=None, compiling=True):
    """Time each part of the method against the obvious way to write it, on random data."""
    device, gpu = torch.device(f"{DEVICE}:0"), DEVICE == "cuda"
    threads, repeats = torch.get_num_threads(), 2 if quick else 7
    settings = (width or (32 if quick else 128), device, threads, compiling)
    name = torch.cuda.get_device_name() if gpu else f"{threads} CPU threads"
    print(f"{name}, torch {torch.__version__}, ConvNetD3 of width {settings[0]}, all ways in turn")
    print("obvious: MTT's unrolled graph, or an eager loop; of conv: share of the rate at which a")
    print("convolution of 128 channels runs, forward and back, in that precision\n")
    columns = f"{'obvious':>10}{'here':>10}{'faster':>8}{'of conv':>9}"
    print(f"{'milliseconds a step':<28}{columns}  peak memory, GB")
    J = 5 if quick else 50 if gpu else 8
    for name, task, batch, steps, count, what in [
        ("distil", "distil", 10, J, 500, "10 iterations of 50 steps"),
        ("distil", "distil", 100, J, 500, "10 iterations of 50 steps"),
        ("teachers", "train", 256, J, 196, "an epoch of CIFAR-10"),
        ("evaluation", "train", 10, 20 * J, 5000, "five networks, 1000 epochs"),
    ]:
        ways, case = ("obvious", "float32", "bf16"), (task, batch, steps, *settings)
        (slow, *times), flops, _ = alone(measure, ways, *case, repeats)
        before, *peaks = (alone(measure, (way,), *case, 0)[2] for way in ways)
        for precision, fast, peak in zip(ways[1:], times, peaks):
            rate = alone(convolution_rate, precision, batch, device, threads, 3 if quick else 20)
            line = f"{f'{name}, batch {batch}, {precision}':<28}{1000 * slow:>10.2f}"
            line += f"{1000 * fast:>10.2f}{slow / fast:>7.2f}x{flops / fast / rate:>9.0%}"
            line += f"{before:>7.2f} -> {peak:.2f}  {what}: {count * fast:.2f} s;"
            print(f"{line} conv: {rate / 1e12:.2f} TFLOP/s", flush=True)
    for batch, way in itertools.product((10,) if quick else (10, 100), ("float32", "bf16")):
        few, many = (alone(measure, (way,), "distil", batch, J, *settings, 0)[2] for J in (5, 50))
        print(f"peak memory at batch {batch}, {way}: J = 5 {few:.2f} GB, J = 50", end=" ")
        print(f"{many:.2f} GB ({many / few - 1:+.0%})", flush=True)


def test_bench(capsys, monkeypatch):
    case = (("obvious", "bf16"), "train", 4, 2, 4, torch.device("cpu"), 1, False, 1)
    seconds, flops, peak = alone(measure, *case)
    macs = 32**2 * 4 * 3 * 9 + (16**2 + 8**2) * 4 * 4 * 9 + 64 * 10
    assert min(seconds) > 0 and flops == 3 * 4 * 2 * macs and 0.1 < peak < 2
    monkeypatch.setitem(globals(), "alone", lambda function, *case: function(*case))  # quicker
    bench(quick=True, width=4, compiling=False)
    *lines, before, last = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if re.match("(distil|teachers|evaluation), batch", line)]
    assert len(rows) == 8 and all("peak memory at batch 10" in line for line in (before, last))
    for row in rows:
        times = re.search(r"(?:32|bf16) +([\d.]+) +([\d.]+) +([\d.]+)x", row).groups()
        slow, fast, ratio = map(float, times)
        assert slow > 0 and fast > 0 and ratio == pytest.approx(slow / fast, rel=0.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=bench.__doc__)
    parser.add_argument("--quick", action="store_true", help="a narrow network, fewer steps")
    bench(parser.parse_args().quick)
