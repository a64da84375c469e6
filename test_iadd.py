"""Tests of iadd.py in the order of its sections: the method against plain references, then what
the README promises of the commands. Run: ./run_all.sh test

As a program, `python test_iadd.py [--quick]`, this file times the parts of the method."""

import argparse
import copy
import csv
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import matplotlib.axes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import iadd
from iadd import Normalisation, UserError, flat_parameters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = Path(iadd.__file__).parent
README = (HERE / "README.md").read_text()


@pytest.fixture(autouse=True)
def clean_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # these networks are tiny: several threads wait for each other
    iadd.DSA[:] = iadd.DSA_KINDS.values()
    torch.backends.cudnn.allow_tf32 = False  # comparisons need all 24 bits
    torch.backends.cuda.matmul.allow_tf32 = False


ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
if DEVICE == "cuda":
    ROUNDING = {"rtol": 1e-3, "atol": 1e-4}


def same(a, b):
    """The same bits on a CPU; on CUDA some kernels add in no fixed order."""
    return torch.equal(a, b) if DEVICE == "cpu" else torch.allclose(a, b, **ROUNDING)


def count(net):
    return sum(p.numel() for p in net.parameters())


# ---- 1. The student ------------------------------------------------------------------------------


def unrolled(net):
    """The student the obvious way, MTT's: autograd keeps the graph of all steps."""
    ell = iadd.cross_entropy(net)

    def student(theta, alpha, x, y):
        if not theta.requires_grad:
            theta = theta.clone().requires_grad_()
        for x_j, y_j in zip(x, y):
            loss = ell(theta, x_j, y_j)
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            theta = theta - alpha * gradient
        return theta

    return student


def test_step_back_by_itself():
    """Against autograd, in float32, with so large an alpha that the Hessian counts."""
    net, (theta, _, x, _), (y, *_) = tiny_problem(torch.float32)
    alpha = torch.tensor(3.0, device=DEVICE, requires_grad=True)
    student = student_of(net)
    v = torch.randn_like(theta)
    expected = torch.autograd.grad(unrolled(net)(theta, alpha, x[:1], y[:1]), (theta, alpha, x), v)
    found = student.step_back(v, theta, alpha, x[0], y[0])
    for a, b in zip(found, (*expected[:2], expected[2][0])):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max())
    assert (expected[0] - v).norm() > 0.1 * v.norm()  # alpha H v


def student_of(net, precision="float32"):
    return iadd.Student(iadd.cross_entropy(net, precision))


def tiny_problem(dtype=torch.float64, J=4, B=3, depth=2):
    """A small ConvNet, the leaves theta, alpha, x and W, and what stays as it is: labels, start and
    target."""
    net = iadd.plain_network((3, 8, 8), 3, [(4, 3), "avg"] * depth).to(DEVICE, dtype)
    theta = flat_parameters(net)
    alpha = torch.tensor(0.3).to(theta)
    x = torch.randn(J, B, 3, 8, 8).to(theta)
    W = 1 + 0.1 * torch.rand_like(theta)
    leaves = [leaf.requires_grad_() for leaf in (theta, alpha, x, W)]
    y = torch.randint(3, (J, B), device=DEVICE)
    start = theta.detach().clone()
    return net, leaves, (y, start, start + 0.05 * torch.randn_like(start))


def loss_after(student, leaves, rest):
    theta, alpha, x, W = leaves
    y, start, target = rest
    return iadd.iadd_loss(student(theta, alpha, x, y), start, target, W)


def test_gradients_equal_those_of_the_plain_unroll():
    net, leaves, rest = tiny_problem()
    losses = [loss_after(student, leaves, rest) for student in (student_of(net), unrolled(net))]
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in losses)):
        assert b.abs().max() > 1e-6  # the comparison is of something
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_gradients_equal_finite_differences():
    """In theta, alpha, W and the images, through all kinds of augmentation."""
    net, (theta, alpha, _, W), rest = tiny_problem(J=12)
    images = torch.randn(5, 3, 8, 8).to(theta).requires_grad_()
    leaves = [theta, alpha, images, W]

    def loss(theta, alpha, images, W):
        iadd.seed_all("the same mini-batches")
        x, y = iadd.student_batches(images, torch.arange(5, device=DEVICE) % 3, 3, 12)
        return loss_after(student_of(net), (theta, alpha, x, W), (y, *rest[1:]))

    for k, gradient in enumerate(torch.autograd.grad(loss(*leaves), leaves)):
        direction = torch.randn_like(gradient)
        losses = []
        for h in (1e-6, -1e-6):
            losses.append(loss(*leaves[:k], leaves[k] + h * direction, *leaves[k + 1 :]))
        slope = (losses[0] - losses[1]) / 2e-6
        assert torch.allclose(slope, (gradient * direction).sum(), rtol=1e-5), k


def test_a_student_keeps_no_activations():
    """What waits for the way back is theta, alpha, x and y of each step, and nothing else."""
    net, (theta, alpha, x, _), (y, *_) = tiny_problem(J=10)
    end = student_of(net)(theta, alpha, x, y)
    node = end.grad_fn
    for _ in range(10):
        kept = [tensor.shape for tensor in node.saved_tensors]
        assert kept == [theta.shape, alpha.shape, x[0].shape, y[0].shape]
        node, *_ = (parent for parent, _ in node.next_functions if parent)  # the step before
    assert node.name() == "torch::autograd::AccumulateGrad"  # theta, where it began


def test_batchnorm_is_refused():
    """Its running statistics are no parameters: students would train on those of `net`."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 2))
    x = torch.randn(5, 3, 2, 2)
    with pytest.raises(RuntimeError, match="running_mean"):
        iadd.cross_entropy(net)(flat_parameters(net), x, torch.zeros(5, dtype=torch.int64))


# ---- 2. The loss and Algorithm 1 -----------------------------------------------------------------


def test_loss_by_hand():
    """Eq. (9)."""
    theta, start, target = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [2.0, 2.0, 1.0]])
    W = torch.tensor([1.0, 5.0, 0.5], requires_grad=True)
    loss = iadd.iadd_loss(theta, start, target, W)
    assert loss.item() == pytest.approx((1 + 0 + 1) / (4 + 4 + 1))
    loss.backward()  # 2 w d^2 / ||...||^2: never negative, so plain SGD can only lower the weights
    assert W.grad.tolist() == pytest.approx([2 * 1 * 1 / 9, 0, 2 * 0.5 * 4 / 9])
    with pytest.raises(AssertionError):
        iadd.iadd_loss(theta, start, target, W[:1])  # would broadcast


def settings_of(**changed):
    """Those of Algorithm 1, for the problem below."""
    steps = {"J": 3, "K": 2, "max_start": 2, "batch": 4, "S": 1, "seed": 0}
    rates = {"alpha": 0.05, "lr_img": 1000, "lr_alpha": 0.1, "lr_w": 0.0}
    return iadd.Matching(**{**steps, **rates, "method": "iadd", "epsilon": 0.1, **changed})


def test_weights_of_the_three_methods():
    mismatch = torch.tensor([0.1, -5.0, 0.3, -0.2, 0.0, 4.0, 0.1, 0.1, 0.2, 0.3])
    W = torch.full((10,), 0.5, requires_grad=True)
    assert iadd.importance_weights(settings_of(), W, mismatch) is W
    assert iadd.importance_weights(settings_of(method="mtt"), W, mismatch).tolist() == [1] * 10
    mask = iadd.importance_weights(settings_of(method="ddpp", epsilon=0.2), W, mismatch)
    assert mask.tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 1, 1]  # drops the two hardest of ten
    assert not mask.requires_grad
    assert iadd.importance_weights(settings_of(method="ddpp", epsilon=0.0), W, mismatch).sum() == 10


def matching_problem():
    """A network, two teachers of three epochs, images and their labels."""
    torch.manual_seed(1)
    net = iadd.plain_network((3, 8, 8), 3, [(4, 3), "avg"] * 2).to(DEVICE)
    teachers = [0.1 * torch.randn(4, count(net)).cumsum(0) for _ in range(2)]
    images = torch.randn(6, 3, 8, 8).to(DEVICE)
    return net, teachers, images, torch.arange(3).repeat_interleave(2).to(DEVICE)


def args_of(compile, precision="float32"):
    return SimpleNamespace(command="distill", precision=precision, compile=compile)


def distilled(T=3, compile=False, segments=None, **settings):
    """That problem after T iterations, and their losses."""
    net, teachers, images, labels = matching_problem()
    m = settings_of(**settings)
    d = iadd.Distillation(images, labels, count(net), m)
    student = iadd.fast_student(net, d, m, args_of(compile))
    before = images.clone()
    losses = [iadd.iteration(d, student, teachers, m, segments or range(m.S)) for _ in range(T)]
    assert torch.equal(images, before)  # d has a copy
    return d, losses


def test_uniform_weights_are_mtt():
    """W = 1 gives the images and alpha of an independent MTT loop, to rounding."""
    net, teachers, x_syn, labels = matching_problem()
    lr = torch.tensor(0.05, device=DEVICE, requires_grad=True)
    optimizer_x = torch.optim.SGD([x_syn.requires_grad_()], 1000, 0.5)
    optimizer_lr = torch.optim.SGD([lr], 0.1, 0.5)
    for t in range(3):
        iadd.seed_all(0, "segment", t, 0)  # the same random numbers once more
        start, target = (x.to(DEVICE) for x in iadd.random_segment(teachers, 2, 2))
        index = iadd.minibatches(6, 4, 3).to(DEVICE)
        theta = unrolled(net)(start, lr, iadd.augment(x_syn[index]), labels[index])
        error, distance = (F.mse_loss(end, target, reduction="sum") for end in (theta, start))
        optimizer_x.zero_grad()
        optimizer_lr.zero_grad()
        (error / distance).backward()
        optimizer_x.step()
        optimizer_lr.step()
    assert (x_syn - matching_problem()[2]).abs().max() > 0.1 and abs(lr - 0.05) > 1e-3
    for method, lr_w in (("mtt", 10.0), ("ddpp", 10.0), ("iadd", 0.0)):
        d, _ = distilled(method=method, lr_w=lr_w, epsilon=0.0)
        assert (d.W == 1).all() and torch.allclose(lr, d.alpha, **ROUNDING)
        assert torch.allclose(x_syn, d.images, **ROUNDING)


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


def test_weights_learn_by_plain_sgd_and_only_shrink():
    """At the paper's rate, too: 1e-4 times 1e-6 is far below what float32 can subtract from 1."""
    once, _ = distilled(T=1, lr_w=1e-4)
    thrice, losses = distilled(lr_w=1e-4)
    assert (once.W < 1).double().mean() > 0.95 and once.W.min() > 0.999
    assert torch.allclose(1 - once.W, 1e-4 * once.W.grad, rtol=1e-6)
    assert (thrice.W <= once.W).all() and thrice.W.mean() < once.W.mean()
    assert thrice.alpha != once.alpha != 0.05 and thrice.t == len(losses) == 3
    momentum = [of["momentum"] for of in thrice.optimizer.param_groups]
    assert momentum == [0.5, 0, 0.5]  # of alpha, W, images


def test_segments_cover_the_allowed_epochs():
    teachers = [torch.arange(6.0)[:, None] + 10 * n for n in range(3)]
    seen = {tuple(iadd.random_segment(teachers, 2, 4).flatten().tolist()) for _ in range(400)}
    assert seen == {(10 * n + i, 10 * n + i + 2) for n in range(3) for i in range(4)}


def test_minibatches_are_fresh_permutations():
    index = iadd.minibatches(10, 5, 7)
    assert index.shape == (7, 5) and (index[0] != index[2]).any()
    for a_pass in (index[:2], index[2:4]):
        assert sorted(a_pass.flatten().tolist()) == list(range(10))
    index = iadd.minibatches(10, 4, 6)  # 10 = 4 + 4 + 2, filled up by the first 2 of the pass
    for a_pass in index[:3].flatten().tolist(), index[3:].flatten().tolist():
        assert set(a_pass) == set(range(10)) and a_pass[10:] == a_pass[:2]


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA adds in no fixed order")
def test_gradients_of_the_images_are_the_same_bits():
    """Though threads share out the sum over the mini-batches that an image is in."""
    torch.set_num_threads(2)
    images = torch.randn(10, 3, 32, 32, requires_grad=True)
    v = torch.randn(50, 10, 3, 32, 32)

    def gradient():
        iadd.seed_all("again")
        x, _ = iadd.student_batches(images, torch.arange(10), 10, 50)
        return torch.autograd.grad(x, images, v)[0]

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(5))


# ---- 3. DSA --------------------------------------------------------------------------------------

N = 400


def coordinates(n=N, size=33):
    """Images whose two channels hold each pixel's x and y in [-1, 1]: a warp can be read off."""
    grid = torch.linspace(-1, 1, size)
    x_and_y = torch.stack([grid.expand(size, size), grid[:, None].expand(size, size)])
    return x_and_y.repeat(n, 1, 1, 1)


def fitted_matrices(warped, size=33):
    """The 2x3 matrix of each warp, (n, 2, 3), by least squares over the pixels near the middle."""
    middle = slice(size // 2 - 5, size // 2 + 6)
    source = coordinates(1, size)[0][:, middle, middle].flatten(1)
    design = torch.cat([source, torch.ones(1, source.shape[1])]).T
    return (torch.linalg.pinv(design) @ warped[:, :, middle, middle].flatten(2).mT).mT


def test_dsa_scale():
    matrices = fitted_matrices(iadd.dsa_scale(coordinates()))
    sx, sy = matrices[:, 0, 0], matrices[:, 1, 1]
    for s in (sx, sy):
        assert 1 / 1.2 - 1e-4 <= s.min() < 0.87 and 1.16 < s.max() <= 1.2 + 1e-4
    assert abs(np.corrcoef(sx, sy)[0, 1]) < 0.2  # independent
    assert matrices[:, [0, 1], [1, 0]].abs().max() < 1e-4
    assert matrices[:, :, 2].abs().max() < 1e-4


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
        windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32)
        equal = (windows == y[:, None, None]).all(4).all(3).all(0)  # exact pixels, zero fill
        shifts.add(tuple(equal.nonzero()[0].tolist()))
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


def test_augment_draws_one_kind_a_mini_batch(monkeypatch):
    """All mini-batches of a kind at once, and in the order of x again."""
    marks = [lambda x, k=k: x * (k + 2) for k in range(6)]
    monkeypatch.setattr(iadd, "DSA", marks)  # to tell them apart
    x = torch.rand(40, 2, 3, 8, 8)
    iadd.seed_all("kinds")
    together = iadd.augment(x)
    iadd.seed_all("kinds")
    kind = torch.randint(6, (40,))
    assert torch.equal(together, torch.stack([marks[k](x_j) for k, x_j in zip(kind, x)]))


# ---- 4. Networks ---------------------------------------------------------------------------------


def test_parameter_counts():
    assert count(iadd.convnet((3, 32, 32), 10)) == 320_010  # stated in the paper, Section 1
    assert count(iadd.convnet((3, 32, 32), 100)) == 504_420
    assert count(iadd.convnet((3, 64, 64), 200)) == 857_160
    assert count(iadd.alexnet((3, 32, 32), 10)) == 1_872_202
    assert count(iadd.vgg11((3, 32, 32), 10)) == 9_231_114
    assert count(iadd.resnet18((3, 32, 32), 10)) == 11_173_962


@pytest.mark.parametrize("arch", iadd.ARCHITECTURES)
@pytest.mark.parametrize("channels, side, depth", [(1, 32, 3), (3, 64, 4), (1, 112, 5)])
def test_networks_take_all_sizes_and_have_no_other_state(arch, channels, side, depth):
    net = iadd.ARCHITECTURES[arch]((channels, side, side), 2)
    assert net(torch.randn(2, channels, side, side)).shape == (2, 2)
    assert not list(net.buffers())
    assert arch != "convnet" or len(net) == 4 * depth + 2
    if arch == "resnet18":
        with pytest.raises(ValueError, match="too small"):
            iadd.resnet18((channels, 8, 8), 2)


# ---- 5. Training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    """A few images, and a network for them."""
    images, labels = iadd.make_shapes(train=20, test=5).train
    net = iadd.convnet((3, 32, 32), 10, width=4).to(DEVICE)
    return Normalisation.fit(images, False, DEVICE).image_set(images, labels), net


def test_a_teacher_is_plain_sgd_and_no_view_of_what_is_trained(shapes):
    images, net = shapes
    before = flat_parameters(net).cpu()
    torch.manual_seed(3)
    after = iadd.train_teacher(iadd.cross_entropy(net), before, images, 0.01, 60)
    assert torch.equal(before, flat_parameters(net).cpu()) and (after - before).norm() > 1e-3
    torch.manual_seed(3)
    assert torch.allclose(after, trained_by_a_module(net, images, [(0.01, 1)]).cpu(), atol=1e-4)


def trained_by_a_module(net, images, phases, **options):
    """What `train` does on a flat theta by a module and torch.optim, with the same batches."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), 1.0, **options)
    for lr, epochs in phases:
        optimizer.param_groups[0]["lr"] = lr
        x, y = images[iadd.minibatches(200, 60, 4 * epochs).to(DEVICE)]
        for x_j, y_j in zip(iadd.augment(x), y):
            optimizer.zero_grad()
            F.cross_entropy(net(x_j), y_j).backward()
            optimizer.step()
    return flat_parameters(net)


def test_training_for_the_evaluation(shapes):
    images, net = shapes
    torch.manual_seed(3)
    ell = iadd.cross_entropy(net)
    theta = iadd.train_network(ell, flat_parameters(net), images, 3, 0.02, 60)
    torch.manual_seed(3)
    options = {"momentum": 0.9, "weight_decay": 5e-4}
    expected = trained_by_a_module(net, images, [(0.02, 2), (0.002, 1)], **options)
    assert torch.allclose(theta, expected, atol=1e-4)


def test_confusion_matrix(shapes):
    images, net = shapes
    x, y = images[:]
    predicted = net(x).argmax(1)
    confusion = iadd.confusion_matrix(net, flat_parameters(net), images)
    for r, c in itertools.product(range(10), range(10)):
        assert confusion[r, c] == ((y == r) & (predicted == c)).sum()


# ---- 6. Normalisation and ZCA; real images -------------------------------------------------------


def correlated_images(n=500, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.rand(n, 1, 4, 4, generator=g)
    return ((base + 0.3 * torch.rand(n, 3, 4, 4, generator=g)) / 1.3 * 255).to(torch.uint8)


def test_zca_whitens():
    images = correlated_images()
    z = Normalisation.fit(images, zca=True)(images)
    assert z.mean(0).abs().max() < 1e-5
    S = torch.linalg.eigvalsh(torch.cov((images.flatten(1).double() / 255).T))
    whitened = torch.linalg.eigvalsh(torch.cov(z.flatten(1).double().T))
    assert torch.allclose(whitened, S / (S + 0.1), atol=1e-5)  # as M = U diag(1/sqrt(S + .1)) U^T
    almost_white = Normalisation.fit(images, zca=True, eps=1e-7)(images)
    assert torch.allclose(torch.cov(almost_white.flatten(1).T), torch.eye(48), atol=1e-2)


@pytest.mark.parametrize("zca", [True, False])
def test_normalisation_inverts_and_is_fitted_on_training_images_alone(zca):
    train = correlated_images()
    test = 255 - correlated_images(100, seed=1) // 2
    normalise = Normalisation.fit(train, zca)
    z = normalise(test)
    assert torch.allclose(normalise.inverse(z), test.float() / 255, atol=1e-4)
    assert z.mean() > 0.3  # brighter than the training images: no centring of its own


def test_channels_are_normalised_with_each_mini_batch():
    """Images stay uint8, and what is read is as if they did not."""
    images, y = correlated_images(40), torch.arange(40) % 3
    normalise = Normalisation.fit(images, zca=False)
    as_bytes = normalise.image_set(images, y)
    assert as_bytes.x.dtype == torch.uint8
    z, labels = as_bytes[:]
    assert torch.equal(z, normalise(images)) and torch.equal(labels, y)
    assert z.mean((0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(z.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)
    constant = 0 * images
    assert Normalisation.fit(constant, zca=False)(constant).isfinite().all()


def test_real_images_are_of_their_class_and_distinct():
    data = iadd.make_shapes(train=20, test=5)
    normalise = Normalisation.fit(data.train[0], zca=False)
    images, labels = iadd.real_images(data, normalise, 3)
    assert labels.tolist() == [c for c in range(10) for _ in range(3)]
    equal = (images[:, None] == normalise(data.train[0])).flatten(2).all(2)  # (30, 200)
    assert equal.sum(1).tolist() == [1] * 30 and equal.sum(0).max() == 1
    assert torch.equal(data.train[1][equal.int().argmax(1)], labels)


def test_herding_by_hand():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1, 1))
    images = torch.tensor([0, 10, 2, 3, 100], dtype=torch.uint8).view(5, 1, 1, 1)  # mean 23
    normalise = Normalisation(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))  # divides by 255
    # First 10. Then 3: a mean of 6.5; with 100 it would be 55. Then 100: 37.7; with 2 it would be
    # 5. Then 0: 28.25.
    assert iadd.herding(net, torch.zeros(2), normalise, images, 4).tolist() == [1, 3, 4, 0]


# ---- 7. Settings ---------------------------------------------------------------------------------


def completed(line, side=32):
    """The options of a command line, filled in as for images of this size."""
    args = iadd.make_parser().parse_args(line.split())
    iadd.set_up_device(args)
    classes = sorted(args.classes) or ["a", "b"]
    data = iadd.Dataset(
        "?", classes, *[(torch.zeros(0, 3, side, side), torch.arange(2).repeat(60))] * 2
    )
    with mock.patch("iadd.load_dataset", lambda *_: data):
        return args, iadd.dataset_and_settings(args)[2].name


def test_presets():
    row = iadd.preset("cifar10", 1, 32)
    assert (row["steps"], row["expert_epochs"], row["max_start_epoch"]) == (50, 2, 2)
    assert (row["lr_img"], row["lr_alpha"], row["alpha"], row["batch"]) == (100, 1e-7, 0.01, 0)
    assert row["zca"] is True and iadd.preset("cifar10", 50, 32)["zca"] is False
    assert iadd.preset("cifar100", 50, 32)["batch"] == 125
    at_10 = iadd.preset("cifar10", 10, 32)
    assert iadd.preset("cifar10", 20, 32) == at_10 != iadd.preset("cifar10", 9, 32)
    assert iadd.preset("covid", 1, 112) == iadd.preset("covid", 20, 112)  # none smaller
    assert {**iadd.preset("folder", 10, 32), **at_10} == at_10  # CIFAR-10's
    assert iadd.preset("folder", 10, 33)["zca"] is False  # its cost grows with the sixth power


@pytest.mark.parametrize("name", ["teachers", "distill", "eval"])
def test_help(name, capsys):
    """The options in groups, and the presets, whose columns are options."""
    with pytest.raises(SystemExit, match="0"):
        command(f"{name} --help")
    text = capsys.readouterr().out
    assert text.endswith(iadd.PRESETS) and "\neval (distill --eval-every: a ConvNet):" in text
    for column in iadd.PRESETS.split("\n")[1].split():
        assert f"--{column.replace('_', '-')}" in text


def test_defaults_are_the_papers():
    s, _ = completed("teachers --dataset cifar10")
    assert (s.teachers, s.epochs, s.lr_teacher, s.batch_real) == (200, 50, 0.01, 256)
    assert completed("teachers --ipc 1")[0].epochs == 3  # those that distill reads
    assert completed("teachers --ipc 1 --max-start-epoch 8")[0].epochs == 9
    s, _ = completed("distill --ipc 1")
    assert (s.dataset, s.iterations, s.steps, s.segments) == ("cifar10", 5000, 50, 1)
    assert (s.lr_w, s.zca, s.seed, s.width, s.compile) == (1e-4, True, 0, 128, True)
    s, _ = completed("distill --ipc 50 --steps 7")  # default < preset < command line
    assert (s.steps, s.lr_img, s.zca, s.teachers) == (7, 1000, False, None)
    assert completed("distill --lr-alpha 0")[0].lr_alpha == 0
    s, _ = completed("eval --arch vgg11 --seed 3")
    assert (s.arch, s.nets, s.on, s.name) == (["vgg11"], 5, ["distilled"], "ipc1_iadd_seed3")
    assert completed("distill --dataset shapes --width 8")[0].compile is False


@pytest.mark.parametrize("test", [lambda: True, lambda: False, None])
def test_bf16_where_there_is_arithmetic_for_it(test, monkeypatch):
    """Some versions of torch cannot tell."""
    monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported", raising=False)
    if test:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", test, raising=False)
    expected = "bf16" if test and test() else "float32"
    assert completed("distill --device cpu")[0].precision == expected
    assert completed("distill --device cpu --precision bf16")[0].precision == "bf16"


def test_folders_are_named_by_their_images():
    """Chosen classes and sizes are in the name, up to what a file system takes."""
    for line, name in [
        ("", "?_zca_w128"),
        ("--no-zca --width 8", "?_std_w8"),
        ("--size 32", "?-32px_zca_w128"),
        ("--classes b a", "?-a-b_zca_w128"),
        ("--grey --dsa crop", "?-grey_zca_w128"),
    ]:
        assert completed(f"teachers {line}")[1] == name
    assert completed("teachers", side=33)[1] == "?_std_w128"
    assert completed("teachers --zca", side=33)[1] == "?_zca_w128"
    many = " ".join(f"n{k:08d}" for k in range(200))
    assert 60 < len(completed(f"teachers --classes {many}")[1]) < 80


# ---- 8. Datasets ---------------------------------------------------------------------------------


def make_images(folder, n=3, level=100, size=16, name=""):
    """n grey images, <name><k>.png, of noise about a level."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(level)
    for k in range(n):
        pixels = rng.integers(level, level + 50, (size, size)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}{k}.png")


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names_of(listed):
    """Names of the files of each class, of the training and the test images."""
    classes, *parts = listed
    return [
        {c: sorted(Path(x).name for x, k in part if classes[k] == c) for c in classes}
        for part in parts
    ]


def make_pets(root, classes=("cat", "dog", "emu"), train=12, test=3, size=16):
    """{train,test}/<class>/<k>.png; classes differ in brightness."""
    for c, name in enumerate(classes):
        make_images(root / "train" / name, train, 10 + 50 * (c % 3), size)
        make_images(root / "test" / name, test, 15 + 50 * (c % 3), size)
    return root


def test_shapes_are_seeded():
    a, b = (iadd.make_shapes(5, 2, seed).train for seed in (0, 0))
    assert torch.equal(a[0], b[0]) and a[0].shape == (50, 3, 32, 32)
    assert not torch.equal(a[0], iadd.make_shapes(5, 2, 1).train[0])


def test_a_folder(tmp_path, capsys):
    """In a class's folder everything that Pillow reads is read, and the rest is counted."""
    root = make_pets(tmp_path / ".hidden/pets")
    Image.new("RGB", (16, 16), (255, 0, 0)).save(root / "train/cat/x.GIF")
    touch(*(root / "train/cat" / name for name in (".DS_Store", ".tmp/1.png", "a.txt", "x.heic")))
    touch(root / "train/.cache/1.png")
    data = iadd.load_dataset(str(root), tmp_path)
    x, y = data.train
    assert data.name == "pets" and data.classes == ["cat", "dog", "emu"] and x.is_contiguous()
    assert y.tolist() == [0] * 13 + [1] * 12 + [2] * 12 and x[12, :, 0, 0].tolist() == [255, 0, 0]
    assert (x[13:].float().mean((1, 2, 3)) // 50).tolist() == [1] * 12 + [2] * 12
    assert data.test[1].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    said = f"2 of 39 files are masks or no images: {root}/train/cat/a.txt, ..."
    assert said in capsys.readouterr().out
    part = iadd.load_dataset(str(root), tmp_path, 8, True, ["emu", "cat", "emu"])
    assert part.shape == (1, 8, 8) and part.classes == ["cat", "emu"]
    assert (part.train[0][13:] > 100).all()
    (root / "test").rename(root / "validation")
    touch(root / "test/1.png")  # as ImageNet has it: test images without labels
    assert len(iadd.load_dataset(str(root), tmp_path).test[0]) == 9


def test_a_folder_without_a_split(tmp_path, capsys):
    """Of each class a fifth is for the test, whatever the names; what is no class is none."""
    names = [os.fsdecode(b"gar\xe7on"), "train station"]  # the first is not UTF-8
    make_images(tmp_path / "own" / names[1] / "lung Masks")  # as COVID-QU-Ex has them
    for k, name in enumerate(names):
        make_images(tmp_path / "own" / name, 10, 100 * k, name=os.fsdecode(b"\xe7"))
    touch(tmp_path / "own/__MACOSX" / names[0] / "._1.png", tmp_path / "own/README.txt")
    data = iadd.load_dataset(f"{tmp_path}/own", tmp_path)
    assert data.name == "own" and data.classes == ["gar?on", names[1]] and data.shape == (3, 16, 16)
    assert data.train[1].bincount().tolist() == [8, 8] and data.test[1].tolist() == [0, 0, 1, 1]
    for x, y in (data.train, data.test):
        assert torch.equal(x.float().mean((1, 2, 3)) // 100, y.float())
    said = capsys.readouterr().out
    assert "own has no folder train: a fifth of each" in said and "3 of 23 files are masks" in said


def test_unusual_images_are_read_rightly(tmp_path):
    """A palette, one bit, EXIF, CMYK; what is transparent is white."""
    red, blue, white = [255, 0, 0], [0, 0, 255], [255, 255, 255]
    image = Image.new("RGB", (2, 2), (255, 0, 0))
    image.paste((0, 0, 255), (1, 0, 2, 2))
    hidden = image.convert("RGBA")
    hidden.putpixel((0, 0), (0, 0, 0, 0))
    plain, turned = Image.Exif(), Image.Exif()
    turned[0x0112] = 6  # by a quarter: red on the left comes to lie on top
    for made, suffix, exif, expected in [
        (image.quantize(2), "png", plain, [[red, blue]] * 2),
        (image.convert("CMYK"), "tif", plain, [[red, blue]] * 2),
        (image, "png", turned, [[red, red], [blue, blue]]),
        (hidden, "png", plain, [[white, blue], [red, blue]]),
        (Image.new("LA", (1, 1), (0, 127)), "png", plain, [[[128] * 3]]),
        (Image.new("1", (1, 1), 1), "png", plain, [[white]]),
    ]:
        path = tmp_path / f"x.{suffix}"
        made.save(path, exif=exif)
        assert iadd.read_image(path, None, "RGB").permute(1, 2, 0).tolist() == expected
    assert iadd.read_image(path, None, "L").tolist() == [[[255]]]


def test_tiny_imagenet(tmp_path):
    """As it is published, and as its users have it: with validation images sorted into folders."""
    train, val = tmp_path / "train", tmp_path / "val"
    for wnid in ("n01", "n02"):
        touch(train / wnid / "images/0.JPEG", train / wnid / f"{wnid}_boxes.txt")
        touch(val / f"images/{wnid}.JPEG")
    listed = val / "val_annotations.txt"
    listed.write_text("n02.JPEG\tn02\t0\t0\t9\t9\nn01.JPEG\tn01\t0\t0\t9\t9\n\n")
    of_train = {"n01": ["0.JPEG"], "n02": ["0.JPEG"]}
    expected = [of_train, {"n01": ["n01.JPEG"], "n02": ["n02.JPEG"]}]
    assert names_of(iadd.list_folder(tmp_path, ())) == expected
    listed.unlink()
    for wnid in ("n01", "n02"):
        (val / wnid).mkdir()
        (val / f"images/{wnid}.JPEG").rename(val / f"{wnid}/{wnid}.JPEG")
    (val / "images").rmdir()
    assert names_of(iadd.list_folder(tmp_path, ())) == expected


@pytest.mark.parametrize("layout", ["images", "."])
def test_covid(tmp_path, layout, monkeypatch):
    """Masks are no X-rays. The split is 8:2 in each class, and the same wherever they lie."""
    counts = {"COVID": 3616, "Lung_Opacity": 6012, "Normal": 10192, "Viral Pneumonia": 1345}
    for name, n in counts.items():
        touch(tmp_path / "a" / name / "masks/0.png", tmp_path / "a" / f"{name}.metadata.xlsx")
        touch(*(tmp_path / "a" / name / layout / f"{k}.png" for k in range(n)))
    train, test = names_of(iadd.list_folder(tmp_path / "a", ()))
    totals = [sum(map(len, part.values())) for part in (train, test)]
    assert totals == [16_933, 4_232]  # Section 4.1
    for c, n in counts.items():
        assert len({*train[c], *test[c]}) == n
    numbers = [int(name.split(".")[0]) for name in test["Normal"]]
    assert abs(np.mean(numbers) - 10192 / 2) < 200  # from everywhere
    (tmp_path / "a").rename(tmp_path / "b")
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *x, **y: reversed(list(walk(*x, **y))))  # another disk
    assert names_of(iadd.list_folder(tmp_path / "b", ())) == [train, test]


class FakeCifar:
    """Stands in for torchvision's CIFAR10, which needs a download."""

    url, base_folder, classes = "", "cifar-10-batches-py", ["a", "b"]

    def __init__(self, root, train=True, download=False):
        n = 8 if train else 2
        self.data = np.arange(n * 8 * 8 * 3).reshape(n, 8, 8, 3).astype(np.uint8)
        self.targets = [0, 1] * (n // 2)


def test_cifar(monkeypatch, tmp_path):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar)
    data = iadd.load_dataset("cifar10", tmp_path / "share")
    assert data.shape == (3, 8, 8) and data.train[0][0, :, 0, 1].tolist() == [3, 4, 5]
    assert data.train[1].tolist() == [0, 1] * 4 and data.test[1].tolist() == [0, 1]
    assert data.classes == ["a", "b"]
    assert not list(tmp_path.iterdir())  # where it lies complete nothing is written


# ---- 9. Speed and precision ----------------------------------------------------------------------


def test_precision_of_every_way(capsys):
    """Of a student's end and its gradients, beside float64: what is compiled, and on a GPU
    captured, may be 3 times worse than the plain student."""
    net, leaves, (y, *_) = tiny_problem(J=3, depth=1)

    def way(student, dtype=torch.float32):
        theta, alpha, x = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves[:3])
        moved = student(theta, alpha, x, y) - theta.detach()
        return [moved, *torch.autograd.grad(moved.square().sum(), (theta, alpha, x))]

    exact = way(student_of(net), torch.float64)
    net.float()
    inputs = tuple(leaf.detach().float().requires_grad_() for leaf in leaves[:3])
    for precision, least, most in (("float32", 1e-9, 1e-4), ("bf16", 1e-3, 0.2)):
        plain = student_of(net, precision)
        fast = iadd.accelerated(plain, (*inputs, y), args_of(True))
        assert fast is not plain or not shutil.which("g++"), capsys.readouterr().err
        worst = []
        for found in (way(plain), way(fast)):
            assert all(t.dtype == torch.float32 for t in found)
            worst.append(max((a - b).norm() / b.norm() for a, b in zip(found, exact)))
        assert least < worst[0] < most and worst[1] < 3 * worst[0]
        loss = iadd.cross_entropy(net, precision)(inputs[0], inputs[2][0], y[0])
        assert loss.dtype == torch.float32


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_equals_plain(capsys):
    """Over whole iterations. One graph for all steps: another would cost another half a minute."""
    torch._dynamo.utils.counters.clear()
    (plain, losses), (fast, again) = (distilled(lr_w=1.0, S=2, compile=c) for c in (False, True))
    for key in ("images", "alpha", "W"):
        assert torch.allclose(getattr(plain, key), getattr(fast, key), **ROUNDING)
    assert torch.allclose(torch.stack(losses), torch.stack(again), **ROUNDING)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # step, step_back
    assert "without torch" not in capsys.readouterr().err


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
def test_random_numbers_are_the_same_for_every_device():
    found = []
    for device in ("cpu", DEVICE):
        iadd.seed_all("again")
        found.append(iadd.augment(torch.ones(12, 2, 3, 16, 16, device=device)).cpu())
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("tool", ["torch.compile", "torch.cuda.make_graphed_callables"])
def test_what_makes_it_faster_may_fail(tool, monkeypatch, capsys):
    """It is left out with a warning. (The tools are replaced: they do not fail when one wants.)"""

    def fails(*_, **__):
        raise RuntimeError("cl is not found.\nMore lines")

    graph = "cuda" in tool
    monkeypatch.setattr(torch.Tensor, "is_cuda", graph, raising=False)
    monkeypatch.setattr(tool, lambda *_, **__: fails)
    args = args_of(True)
    args.command = "distill" if graph else "eval"  # within distill a loss is not compiled
    net, (theta, _, x, _), (y, *_) = tiny_problem(torch.float32)
    ell = iadd.cross_entropy(net)
    assert iadd.accelerated(ell, (theta, x[0].detach(), y[0]), args) is ell
    warnings = [line for line in capsys.readouterr().err.splitlines() if "without " in line[:9]]
    name = "cuda_graph" if graph else "torch_compile"
    assert warnings == [f"without {name}: RuntimeError: cl is not found"]
    args.compile = False
    assert iadd.accelerated(ell, (theta,), args) is ell and not capsys.readouterr().err


# ---- 10. Commands: one run, and what it comes to -------------------------------------------------


def command(line):
    """The exit code of a command line."""
    return iadd.main(line.split())


def refused(capsys, line):
    """Runs a command that must fail: its message, which is one line and no traceback."""
    capsys.readouterr()
    try:
        code = command(line)
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    lines = [text for text in re.split("[\r\n]", error) if "error:" in text]
    assert code == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


def result(folder):
    return iadd.load(folder / "distilled.pt", {}, "")


def thetas(path):
    return torch.load(path, weights_only=True)["thetas"]


def log_of(folder):
    """The rows of the log, without times."""
    rows = [dict(zip(iadd.LOG, row)) for row in result(folder)["log"]]
    return [{key: x for key, x in row.items() if key != "time"} for row in rows]


def rows_of(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with images, the lines of the three commands on them, and what these made."""
    tmp = tmp_path_factory.mktemp("run")
    options = f"--dataset {make_pets(tmp / 'pets')} --runs {tmp}/runs --device {DEVICE}"
    options += " --width 4 --precision float32 --no-compile"
    run = SimpleNamespace(tmp=tmp, options=options, folder=tmp / "runs/pets_zca_w4")
    run.out = run.folder / "ipc1_iadd_seed0"
    run.gift = run.out / "distilled.pt"
    run.teach = f"teachers {options} --teachers 2 --batch-real 6 --lr-teacher 0.05"
    run.distil = f"distill {options} --steps 3 --alpha 0.05 --lr-w 1 --lr-img 1 --lr-alpha 1e-5"
    run.eval = f"eval {options} --nets 2 --eval-epochs 2"
    assert command(f"{run.teach} --ipc 1") == 0
    assert command(f"{run.distil} --iterations 60") == 0
    return run


def test_files_of_a_run(run):
    teachers = sorted((run.folder / "teachers").glob("[!.]*"))
    assert [path.name for path in teachers] == ["000.pt", "001.pt"]
    a, b = map(thetas, teachers)
    assert len(a) == 4 and not torch.equal(a, b)  # 3 epochs are read at IPC 1
    assert not {"seed", "teachers"} & {*torch.load(teachers[0], weights_only=True)["settings"]}
    content, rows = result(run.out), log_of(run.out)
    assert content["images"].shape == (3, 3, 16, 16) and content["labels"].tolist() == [0, 1, 2]
    assert content["settings"]["classes"] == ["cat", "dog", "emu"] and content["iteration"] == 60
    assert [row["iteration"] for row in rows] == [10, 20, 30, 40, 50, 60]
    W = content["W"]
    spread = [x.item() for x in (content["alpha"], W.min(), W.mean())]
    logged = [rows[-1][key] for key in ("alpha", "W_min", "W_mean")]
    assert logged == pytest.approx(spread, rel=1e-9) and W.min() < 0.999
    pictures = sorted(run.out.glob("images_*.png"))
    assert [path.name for path in pictures] == [f"images_{t:05d}.png" for t in range(0, 61, 10)]
    tile = np.array(Image.open(pictures[0]))[4:100:6, 4:100:6, 0].astype(int)
    cats = (run.tmp / "pets/train/cat").iterdir()  # ZCA is inverted: at first real images
    assert min(np.abs(tile - np.array(Image.open(path))).max() for path in cats) <= 1


def test_eval(run, capsys):
    """Of all sets and networks: the table, and a row of each with its confusion matrix."""
    sets, archs = ["distilled", "random", "herding", "full"], ["convnet", "alexnet", "resnet18"]
    line = f"{run.eval} --on {' '.join(sets)} --arch {' '.join(archs)} --seed 5"
    assert command(f"{line} --name {run.out.name}") == 0
    printed = capsys.readouterr().out.splitlines()[-12:]
    rows = rows_of(run.out)[-12:]
    assert [(row["on"], row["arch"]) for row in rows] == list(itertools.product(sets, archs))
    for row, line in zip(rows, printed):
        matrix = np.array(row["confusion"])  # of both networks
        assert matrix.sum(1).tolist() == [6, 6, 6]
        assert row["mean"] == pytest.approx(100 * matrix.trace() / 18)
        assert row["std"] == pytest.approx(statistics.stdev(row["accuracies"]))
        assert line.split()[:2] == [row["on"], row["arch"]] and not row["lr_given"]
        assert f"{row['mean']:.1f} ± {row['std']:.1f}" in line
        assert (row["seed"], row["epochs"]) == (5, 2) and row["ipc"] == (
            12 if row["on"] == "full" else 1
        )
        made = (60, result(run.out)["alpha"])
        assert (row["iteration"], row["lr"]) == (made if row["on"] == sets[0] else (None, 0.01))


def test_baselines(run, monkeypatch):
    """Herding chooses by the first teacher's features, random others for each network and seed."""
    used = []
    watch = lambda ell, theta, images, *_: used.append(images.x) or theta  # noqa: E731
    monkeypatch.setattr(iadd, "train_network", watch)  # to see what it would be trained on
    assert command(f"{run.eval} --on herding random full") == 0
    assert command(f"{run.eval} --on random --seed 5 --name {run.out.name}") == 0
    herded, again, first, second, full, _, third, _ = used
    assert torch.equal(herded, again) and len(full) == 36
    assert not torch.equal(first, second) and not torch.equal(first, third)
    net = iadd.convnet((3, 16, 16), 3, 4).to(DEVICE)
    theta = thetas(run.folder / "teachers/000.pt")[-1]
    images = iadd.load_dataset(f"{run.tmp}/pets", None).train[0]
    normalise = Normalisation.fit(images, True, DEVICE)
    chosen = iadd.herding(net, theta, normalise, images[:12], 1)
    assert torch.allclose(full[chosen], herded[:1], atol=1e-5)


def test_eval_of_a_file_from_elsewhere(run, tmp_path):
    """It brings its normalisation, or it is only images."""
    two = f"{run.distil} --ipc 2 --max-start-epoch 1 --iterations 1 --name two"
    assert command(two) == 0
    content = torch.load(run.folder / "two/distilled.pt", weights_only=True)
    torch.save(content, tmp_path / "gift.pt")
    bare = {name: content[name] for name in ("images", "labels")}  # ZCA and alpha are added
    torch.save({**bare, "labels": F.one_hot(bare["labels"], 3)}, tmp_path / "bare.pt")
    line = f"{run.eval} --ipc 2 --distilled {tmp_path}"
    assert command(f"{line}/gift.pt --on distilled random") == 0
    assert command(f"{run.eval} --ipc 2 --name two") == 0
    alpha = content["alpha"].item()
    assert command(f"{line}/bare.pt --lr {alpha}") == 0
    (theirs, random_ones), (mine,) = rows_of(run.folder / "gift"), rows_of(run.folder / "two")
    (other,) = rows_of(run.folder / "bare")
    for row in (theirs, other):
        assert row["accuracies"] == mine["accuracies"] or DEVICE == "cuda"
        assert row["lr"] == mine["lr"] == alpha
    assert theirs["ipc"] == random_ones["ipc"] == 2
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"bare.pt", "gift.pt"}  # which may be where one cannot write


def test_the_log_has_mean_losses(run, monkeypatch):
    losses = []
    plain = iadd.iteration
    watch = lambda *rest: losses.append(plain(*rest)) or losses[-1]  # noqa: E731
    monkeypatch.setattr(iadd, "iteration", watch)  # the log does not say them one by one
    assert command(f"{run.distil} --iterations 24 --name means") == 0
    parts = (losses[:10], losses[10:20], losses[20:])
    means = [statistics.mean(map(float, part)) for part in parts]
    assert [row["loss"] for row in log_of(run.folder / "means")] == pytest.approx(means)


def test_plot(run, monkeypatch):
    """Its curves are of the log, the evaluations, the last mismatch and W; the animation shows the
    images from the real ones on. (A picture cannot be read back: what matplotlib gets is.)"""
    drawn, bars = [], []
    plain = matplotlib.axes.Axes.plot
    watch = lambda ax, *x, **y: drawn.append(x[-1]) or plain(ax, *x, **y)  # noqa: E731
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", watch)
    error_bar = lambda ax, *x, **y: bars.append((*x, y["color"]))  # noqa: E731
    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", error_bar)
    assert command(f"{run.eval} --name {run.out.name} --lr 0.02") == 0
    with open(run.out / "results.jsonl", "a") as file:
        file.write('{"on": "distilled", "arch": "con')  # a full disk
    assert command(f"{run.eval} --name {run.out.name}") == 0
    assert command(f"plot {run.out}") == 0
    content, rows = result(run.out), log_of(run.out)
    loss, alpha, spread, mismatch, W = drawn
    assert loss.tolist() == [row["loss"] for row in rows]
    assert alpha.tolist() == [row["alpha"] for row in rows]
    names = ("W_min", "W_median", "W_mean")
    assert spread.tolist() == [[1 - row[name] for name in names] for row in rows]
    assert torch.equal(W, 1 - content["W"]) and torch.equal(mismatch, content["mismatch"].abs())
    lines = (run.out / "results.jsonl").read_text().splitlines()
    given, at_alpha = json.loads(lines[-3]), json.loads(lines[-1])
    for row, color in ((given, "C1"), (at_alpha, "C0")):
        assert (60, row["mean"], row["std"], color) in bars
    table = list(csv.DictReader((run.out / "log.csv").read_text().splitlines()))
    assert [float(row["W_mean"]) for row in table] == [row["W_mean"] for row in rows]
    for name in ("plot.png", "pairs.png"):
        with Image.open(run.out / name) as figure:
            assert len(set(figure.convert("L").tobytes())) > 50
    with Image.open(run.out / "evolution.gif") as film:
        assert film.n_frames == 7
        frame = np.asarray(film.convert("RGB")).astype(float)
    first = np.asarray(Image.open(run.out / "images_00000.png").convert("RGB"))
    assert abs(frame[14:] - first).mean() < 10  # of 256 colours, below the iteration


def test_pairs_are_before_and_after(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", lambda ax, x, **_: drawn.append(x))
    content = result(run.out)
    iadd.draw_pairs(content, run.tmp / "pairs.png")
    grid = drawn[0].permute(2, 0, 1)  # tiles of 16 x 16 with a margin of one
    normalise = Normalisation(content["mean"], content["scale"])
    for row, name in enumerate(("real", "images")):
        expected = normalise.inverse(content[name]).clamp(0, 1)
        for k in range(3):
            tile = grid[:, 17 * row + 1 : 17 * row + 17, 17 * k + 1 : 17 * k + 17]
            assert torch.allclose(tile, expected[k], atol=1e-5)
    folder = run.tmp / "pets/train/cat"
    cats = [iadd.read_image(path, None, "RGB") / 255 for path in folder.iterdir()]
    assert min((grid[:, 1:17, 1:17] - cat).abs().max() for cat in cats) < 1e-3


def test_covid_from_end_to_end(tmp_path, capsys):
    for k, name in enumerate(("COVID", "Flu", "Normal")):
        make_images(tmp_path / name, 10, 60 * k, 40)
    assert iadd.load_dataset("covid", tmp_path).shape == (1, 112, 112)
    options = f"--dataset covid --data-dir {tmp_path} --runs {tmp_path}/runs --ipc 2 --width 4"
    options += " --classes COVID Normal --size 32"
    assert command(f"teachers {options} --teachers 1 --epochs 2") == 0
    assert command(f"distill {options} --max-start-epoch 1 --iterations 2 --steps 2") == 0
    assert command(f"eval {options} --on distilled full --nets 2 --eval-epochs 2") == 0
    said = capsys.readouterr().out
    assert "covid: 16 training and 4 test images" in said
    for row in rows_of(tmp_path / "runs/covid-COVID-Normal-32px_std_w4/ipc2_iadd_seed0"):
        assert np.array(row["confusion"]).sum(1).tolist() == [4, 4]


def test_distilled_shapes_beat_random_ones(tmp_path, monkeypatch):
    """One distilled image a class teaches a fresh network far more than one real image, in `eval`
    and by the loop in README. A chance difference between two such rows is about 3 points."""
    torch.set_num_threads(2)
    options = f"--dataset shapes --runs {tmp_path}"
    assert command(f"teachers {options} --ipc 1 --teachers 2") == 0
    assert command(f"distill {options} --iterations 60") == 0
    assert command(f"eval {options} --on distilled random --nets 3 --eval-epochs 100") == 0
    (path,) = tmp_path.rglob("results.jsonl")
    ours, real = (row["mean"] for row in rows_of(path.parent))
    assert ours > real + 10, (ours, real)

    monkeypatch.chdir(path.parent)
    (loop,) = (code for code in blocks("python") if "augment(" in code)
    loop = re.sub('"[^"]*[.]pt"', '"distilled.pt"', loop)
    names = {}
    exec(loop.replace('"cifar10", pathlib.Path("data")', '"shapes", None'), names)
    right = names["guesses"] == names["data"].test[1]
    assert 100 * right.float().mean() > real + 10
    pictures = sorted(path.parent.glob("0*.png"))
    assert len(pictures) == 10 and pictures[3].name == "00003_triangle.png"
    pixels = names["normalise"].inverse(names["x"])[3].clamp(0, 1)
    assert (iadd.read_image(pictures[3], None, "RGB") / 255 - pixels).abs().max() < 1 / 255


def test_other_augmentations_and_grey_images(run, tmp_path, capsys):
    """Both are of the teachers as of all that is made with them."""
    options = f"{run.options} --dsa scale color --grey --runs {tmp_path}"
    assert command(run.teach.replace(run.options, options) + " --ipc 1") == 0
    assert "dsa': 'color scale'" in capsys.readouterr().out
    assert [iadd.dsa_color, iadd.dsa_scale] == iadd.DSA
    assert command(run.distil.replace(run.options, options) + " --iterations 2") == 0
    assert command(run.eval.replace(run.options, options)) == 0
    out = tmp_path / "pets-grey_zca_w4/ipc1_iadd_seed0"
    assert command(f"plot {out}") == 0
    content = result(out)
    assert content["images"].shape == (3, 1, 16, 16)
    assert content["settings"]["shape"] == (1, 16, 16)
    assert command(run.distil.replace(run.options, options.replace(" color", ""))) == 2
    assert "was made with dsa color scale, not scale; give" in capsys.readouterr().err


@pytest.mark.parametrize("ipc, n, size", [(400, 10, (10_004, 1004)), (1, 300, (1004, 3004))])
def test_a_picture_shows_some_1000_images(ipc, n, size, tmp_path):
    """As many of each class as there is room for."""
    images = torch.arange(n).repeat_interleave(ipc).view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / n
    iadd.draw(images, Normalisation(torch.zeros(1), torch.ones(1)), ipc, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == size
        shade = picture.getpixel((54, 154))[0]  # of the second row
    assert shade == pytest.approx(255 / 10 if ipc > 1 else 255 * 10 / n, abs=1)


def test_home(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pets").symlink_to(run.tmp / "pets")
    (tmp_path / "runs").symlink_to(run.tmp / "runs")
    line = run.eval.replace(f"{run.tmp}/pets", "~/pets").replace(f" {run.tmp}", "=~")
    assert "--dataset ~/pets --runs=~/runs" in line
    assert command(f"{line} --distilled=~/runs/pets_zca_w4/{run.out.name}/distilled.pt") == 0
    assert command(f"plot ~/runs/pets_zca_w4/{run.out.name}") == 0
    assert rows_of(run.folder / "distilled")[-1]["file"] == str(
        tmp_path / run.gift.relative_to(run.tmp)
    )


# ---- 10. Commands: nothing is lost ---------------------------------------------------------------


def state_of(folder):
    """All tensors of a result, momentum too."""
    content = result(folder)
    momentum = [x.get("momentum_buffer") for x in content["optimizer"]["state"].values()]
    return [x for x in (*content.values(), *momentum) if torch.is_tensor(x)]


def identical(a, b):
    return len(a) == len(b) and all(map(same, a, b))


def test_10_and_20_and_30_iterations_are_60(run, tmp_path, monkeypatch):
    """In bits, over teachers and evaluations as well, which are of test images; another seed gives
    others."""
    tested = []
    plain = iadd.confusion_matrix
    watch = lambda net, theta, images: tested.append(len(images)) or plain(net, theta, images)  # noqa: E731
    monkeypatch.setattr(iadd, "confusion_matrix", watch)  # the numbers do not tell
    folder = tmp_path / run.folder.name
    for epochs in (1, 2, 3):
        assert command(f"{run.teach} --epochs {epochs} --runs {tmp_path}") == 0
    for name in ("teachers/000.pt", "teachers/001.pt"):
        whole, parts = thetas(run.folder / name), thetas(folder / name)
        assert same(whole, parts) and not same(whole[2], whole[3])
    line = f"{run.distil} --eval-every 20 --nets 1 --eval-epochs 1 --runs {tmp_path}"
    for T in (10, 30, 60):
        assert command(f"{line} --iterations {T}") == 0
    whole, parts = run.out, folder / run.out.name
    assert not (parts / "log.csv").exists()  # a spreadsheet may hold it; `plot` writes it
    assert identical(state_of(whole), state_of(parts)) and log_of(whole) == log_of(parts)
    rows = rows_of(parts)
    assert [row["iteration"] for row in rows] == [20, 40, 60] and set(tested) == {9}
    assert rows[0]["lr"] != rows[2]["lr"] == result(parts)["alpha"]
    assert command(f"{line} --iterations 10 --seed 1") == 0
    assert not same(result(folder / "ipc1_iadd_seed1")["images"], result(parts)["images"])


def start(line):
    """A process with a command that saves often and, also in a background job, minds Ctrl-C."""
    code = "import signal, sys, torch, iadd; signal.signal(2, signal.default_int_handler); "
    code += "torch.set_num_threads(1); iadd.CHECKPOINT_SECONDS = 0.05; "
    code += f"sys.exit(iadd.main({line.split()!r}))"
    words = [sys.executable, "-c", code]
    return subprocess.Popen(words, cwd=HERE, stderr=subprocess.PIPE, text=True)


def test_six_kills_and_two_interruptions(run, tmp_path):
    """At random moments, of teachers and of distill, which save more often than once a minute here:
    what was saved stays, and in the end all is as without them, with no evaluation missing."""
    assert iadd.CHECKPOINT_SECONDS == 60
    moments = random.Random(0)
    folder, whole = (tmp_path / name / run.folder.name for name in ("killed", "whole"))
    distil = f"{run.distil} --eval-every 10 --nets 1 --eval-epochs 1"
    for line, amount, name, size in [
        (run.teach, "--epochs", "teachers/000.pt", lambda x: len(x["thetas"]) - 1),
        (distil, "--iterations", f"{run.out.name}/distilled.pt", lambda x: x["iteration"]),
    ]:
        path = folder / name
        reached = 0
        for kill in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGKILL):
            before = path.exists() and path.stat().st_mtime_ns
            child = start(f"{line} --runs {tmp_path}/killed {amount} 99999")
            while not path.exists() or path.stat().st_mtime_ns == before:
                assert child.poll() is None, child.stderr.read()
                time.sleep(0.02)
            time.sleep(moments.uniform(0.2, 1))
            child.send_signal(kill)
            *_, last = child.communicate(timeout=60)[1].split("\n")[:-1]
            if kill == signal.SIGINT:
                assert child.returncode == 130 and "interrupted; the same command resumes" in last
            else:
                assert child.returncode == -kill
            before, reached = reached, size(torch.load(path, weights_only=True))
            assert reached >= before
        assert reached > 20
        for runs in ("killed", "whole"):
            assert command(f"{line} --runs {tmp_path}/{runs} {amount} {reached + 3}") == 0
    for name in ("teachers/000.pt", "teachers/001.pt"):
        assert same(thetas(folder / name), thetas(whole / name))
    a, b = folder / run.out.name, whole / run.out.name
    assert identical(state_of(a), state_of(b)) and log_of(a) == log_of(b)
    tests_a, tests_b = ({(x["iteration"], *x["accuracies"]) for x in rows_of(y)} for y in (a, b))
    # a kill between an evaluation and the next save leaves a row from beyond the saved iteration
    assert {x for x in tests_a if x[0] <= reached} == tests_b and len(tests_b) == reached // 10
    for path in a.glob("*.png"):
        Image.open(path).load()


def test_a_save_that_fails_leaves_the_old_file(run, capsys):
    """Here because no file may be larger than 100 KB, as on a full disk."""
    line = f"{run.distil} --name full"
    assert command(f"{line} --iterations 4") == 0
    before = state_of(run.folder / "full")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        said = refused(capsys, f"{line} --iterations 8")
        assert "cannot write" in said and "full/distilled.pt" in said and "File too large" in said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert identical(state_of(run.folder / "full"), before)
    assert not list(run.folder.rglob("*.tmp"))
    assert command(f"{line} --iterations 8") == 0
    assert result(run.folder / "full")["iteration"] == 8


def test_what_is_complete_is_kept(run, capsys):
    teacher = run.folder / "teachers/000.pt"
    stamps = teacher.stat().st_mtime_ns, run.gift.stat().st_mtime_ns
    assert command(f"{run.teach} --ipc 1 --seed 3") == 0  # the seed is not the teachers'
    assert "0 of 2 are to be trained" in capsys.readouterr().out
    for T in (60, 50):
        assert command(f"{run.distil} --iterations {T} --teachers 2") == 0
        assert "is complete: iteration 60" in capsys.readouterr().out
    assert stamps == (teacher.stat().st_mtime_ns, run.gift.stat().st_mtime_ns)


def test_divergence_keeps_the_last_good_state(run, capsys, monkeypatch):
    monkeypatch.setattr(iadd, "CHECKPOINT_SECONDS", -1)  # every ten iterations
    for rates in ("--lr-alpha 1e3", "--lr-img 1e6 --lr-w 1e9"):
        error = refused(capsys, f"{run.distil} --iterations 60 --name wild{rates[5]} {rates}")
        noticed = int(re.search(r"diverged by iteration (\d+)", error)[1])
        kept = result(run.folder / f"wild{rates[5]}")
        assert kept["iteration"] == noticed - 10 and kept["alpha"] > 0
    error = refused(capsys, f"{run.teach} --epochs 1 --lr-teacher 1e9 --runs {run.tmp}/wild")
    assert "teacher 000 diverged: lower --lr-teacher, with another --runs" in error
    assert not list((run.tmp / "wild").rglob("*.pt"))


def test_a_network_that_diverges_does_not_stop_the_others(run, capsys, monkeypatch):
    plain = iadd.train_network

    def spoil(ell, theta, *rest):
        trained = plain(ell, theta, *rest)
        return math.nan * trained if len(trained) > 10**6 else trained  # AlexNet's, not ConvNet's

    monkeypatch.setattr(iadd, "train_network", spoil)
    line = f"{run.eval} --seed 7 --name {run.out.name} --arch alexnet convnet"
    assert "networks diverged, see above: lower --lr" in refused(capsys, line)
    assert [row["arch"] for row in rows_of(run.out) if row["seed"] == 7] == ["convnet"]


def test_what_is_not_finite_is_no_good_state():
    for key, spoil in itertools.product(("images", "alpha", "W"), (math.nan, math.inf, -1.0)):
        d, losses = distilled(T=1)
        iadd.log_row(d, losses)
        getattr(d, key).data.flatten()[-1:].mul_(spoil)
        if key == "alpha" or not math.isfinite(spoil):
            with pytest.raises(UserError, match="diverged by iteration 1 "):
                iadd.log_row(d, losses)


def test_a_folder_has_one_writer(run, capsys):
    with iadd.lock(run.out, SimpleNamespace(rank=0)):
        assert f"cannot lock {run.out} (does another run" in refused(capsys, f"{run.distil}")
        assert command(f"{run.distil} --name another --iterations 2") == 0
        assert command(f"{run.eval}") == 0  # to read is not to write
    assert command(f"{run.distil} --iterations 60") == 0


def test_teachers_are_mapped_where_they_are_only_read(run, tmp_path, monkeypatch):
    """A file of which some epochs are needed; not one that is continued: on Windows a mapped file
    cannot be replaced."""
    mapped = []
    plain = torch.load
    watch = lambda path, *x, mmap, **y: mapped.append(mmap) or plain(path, *x, mmap=mmap, **y)  # noqa: E731
    monkeypatch.setattr(torch, "load", watch)
    assert command(f"{run.distil} --iterations 1 --name mapped") == 0
    assert mapped == [True, True]
    shutil.copytree(run.folder / "teachers", tmp_path / run.folder.name / "teachers")
    assert command(f"{run.teach} --epochs 4 --runs {tmp_path}") == 0
    assert mapped[2:] == [True, True, False, False]


def test_the_hint_can_be_pasted(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["iadd.py"])
    line = f"{run.distil} --no-zca --max-start-epoch 1 --iterations 1 --teachers 1"
    words = refused(capsys, line).split("run first: python iadd.py ")[1]
    assert command(words) == 0 and command(line) == 0
    line = line.replace("distill", "eval") + " --nets 1 --eval-epochs 1"
    assert command(line) == 0
    words = refused(capsys, f"{line} --ipc 2").split("run first: python iadd.py ")[1]
    assert command(words) == 0 and command(f"{line} --ipc 2") == 0


# ---- 10. Commands: several processes -------------------------------------------------------------


def torchrun(line, program=iadd.__file__):
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    words = [sys.executable, *words, program, *line.split(), "--device", "cpu"]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_two_processes_are_one(run, tmp_path):
    """Teachers, segments and networks are shared out; to rounding the results are the same. Any
    number of processes goes on from what another made, and rank 0 alone speaks."""
    assert torchrun(f"{run.teach} --ipc 1 --runs {tmp_path}").returncode == 0
    for name in ("teachers/000.pt", "teachers/001.pt"):
        mine = thetas(tmp_path / run.folder.name / name)
        assert torch.allclose(mine, thetas(run.folder / name), **ROUNDING)
    line = f"{run.distil} --segments 3 --name"
    assert command(f"{line} alone --iterations 20") == 0
    assert command(f"{line} together --iterations 10") == 0
    done = torchrun(f"{line} together --iterations 20")
    assert done.returncode == 0 and done.stdout.count("is at iteration 20") == 1, done.stderr
    alone, together = run.folder / "alone", run.folder / "together"
    for key in ("images", "alpha", "W"):
        assert torch.allclose(result(alone)[key], result(together)[key], rtol=1e-3, atol=1e-4)
    for a, b in zip(log_of(alone), log_of(together)):
        assert a == pytest.approx(b, rel=1e-3)
    line = f"{run.eval} --name alone --on distilled random --nets 3 --device cpu"
    assert command(line) == 0 and torchrun(line).returncode == 0
    rows = rows_of(alone)
    assert [row["on"] for row in rows] == ["distilled", "random"] * 2
    for a, b in zip(rows, rows[2:]):
        assert a["accuracies"] == b["accuracies"] and a["confusion"] == b["confusion"]


def test_all_processes_start_from_rank_0s_images(run, tmp_path):
    """Where threads or devices differ, so do the last bits of what each process computes; here more
    than that."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, sys, torch
sys.path.insert(0, {str(HERE)!r})
import iadd
rank = int(os.environ["RANK"])
plain, iteration = iadd.Normalisation.fit, iadd.iteration
def fit(*x):
    normalise = plain(*x)
    normalise.scale *= 1 + rank / 10
    return normalise
def watch(d, *x):
    loss = iteration(d, *x)
    torch.save([d.images.detach(), d.alpha.detach(), d.W.detach()], f"{tmp_path}/{{rank}}.pt")
    return loss
iadd.Normalisation.fit, iadd.iteration = fit, watch
sys.exit(iadd.main())
""")
    done = torchrun(f"{run.distil} --segments 2 --name ranks --iterations 3", program)
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(map(torch.equal, a, b))


def test_a_mistake_ends_all_processes(run):
    done = torchrun(f"{run.distil} --name few")
    assert done.returncode and "error: 2 processes need --segments 2" in done.stderr
    assert not (run.folder / "few").exists()


# ---- 11. Command line: bad input -----------------------------------------------------------------

BAD_INPUT = """
frobnicate                                       | invalid choice: 'frobnicate'
teachers --teachers 0                            | 0 is not from 1 to
teachers --teachers 9999999999                   | is not from 1 to
teachers --size 5000                             | 5000 is not from 1 to 512
distill --ipc x                                  | 'x'
distill --alpha 0                                | 0 is not from
distill --lr-img nan                             | nan is not from 0
distill --lr-img inf                             | inf is not from 0
distill --epsilon 2                              | 2 is not from 0 to 1
distill --method magic                           | invalid choice: 'magic'
eval --arch vgg99                                | invalid choice: 'vgg99'
eval --precision half                            | invalid choice: 'half'
eval --device toaster                            | --device toaster
eval --device meta                               | --device meta

teachers --dataset nonsense                      | there is no folder nonsense; see --dataset
teachers --dataset ~no_user/x                    | there is no folder ~no_user/x; see --dataset
teachers --dataset shapes --size 8               | --size
teachers --dataset shapes --classes disk ring    | --classes
teachers --dataset covid --data-dir nowhere      | there is no folder nowhere
teachers --dataset covid --data-dir zoo/train    | covid has no training images & of ['hollow']
teachers --dataset covid --data-dir xrays/COVID  | xrays/COVID has no & two classes & ['images']
distill --dataset tinyimagenet --data-dir none   | there is no folder none
teachers --dataset tinyimagenet --data-dir tiny  | tinyimagenet has no test images & ['n01', 'n02']
teachers --dataset xrays                         | xrays has no folder & two classes & ['COVID']
teachers --dataset zoo                           | zoo/test has no & for ['elk'], only ['cat',
teachers --dataset zoo --classes cat             | zoo/train has no & for two classes or more, o
teachers --dataset zoo --classes cat Dog         | zoo/train has no folder & for ['Dog'], only [
teachers --dataset zoo --classes cat hollow      | zoo has no training images & of ['hollow']
teachers --dataset zoo --classes cat cat/        | zoo/train has no folder & for ['cat/'], only
teachers --dataset zoo --classes cat elk         | zoo/test has no folder & for ['elk'], only [
teachers --dataset no_test                       | no_test has ['train'], but no test/cat
teachers --dataset unlabelled                    | ['test', 'train'], but no & unlabelled/train
teachers --dataset loose                         | loose/train has no & only ['0.png', '1.png'
teachers --dataset halves                        | halves must have train/<class> & Training/dog
teachers --dataset scans                         | no training images (.png, .jpg & ['ct', 'mr']
teachers --dataset many                          | many has no test images & ['c00', 'c01', 'c02
teachers --dataset dataset                       | dataset/train has no & only ['.cat', '.dog']
teachers --dataset photos                        | cat/x.png has 32 x 24 pixels & --size N makes
teachers --dataset sizes                         | sizes/test/dog/0.png & 20 x 20 & --size N makes
teachers --dataset broken                        | 12 of the images & 8-bit images
{eval} --arch convnet vgg11 --on full            | vgg11: images of (3, 16, 16) are too small

{distil} --ipc 13                                | IPC 13: cat has only 12 training images
{distil} --no-zca                                | run first: python & teachers --dataset & --epo
{distil} --max-start-epoch 30 --name x           | has 0 of 2 & of 31 epochs; run & --teachers 2
{distil} --teachers 4                            | has 2 of 4 teachers & --epochs 3 --teachers 4
{distil} --dsa color crop                        | dsa color crop cutout flip scale rotate, not co
{distil} --grey                                  | has 0 of 1 teachers of 3 epochs; run first
{teach} --lr-teacher 0.02                        | lr_teacher 0.05, not 0.02; give the same
{teach} --precision bf16                         | precision float32, not bf16
{teach} --dataset other/pets                     | made with images_checksum
{distil} --dataset other/pets                    | made with images_checksum
{eval} --dataset other/pets                      | made with images_checksum
{distil} --lr-img 7                              | lr_img 1.0, not 7.0; give the same & another
{distil} --precision bf16                        | precision float32, not bf16
{distil} --batch 2                               | batch 3, not 2
{distil} --runs other                            | teacher_checksum
{distil} --name hurt                             | hurt/distilled.pt has a W not of length
{distil} --name old                              | made with version None, not
{distil} --runs cut                              | cannot read & teachers/000.pt
{eval} --on full herding --runs none             | teachers/000.pt; run first: python & --teach
{eval} --ipc 3                                   | there is no & ipc3_iadd & run first: python
{eval} --ipc 2 --name {out.name}                 | made with ipc 1, not 2
{eval} --distilled none.pt                       | there is no none.pt; see --distilled
{eval} --distilled {gift} --dsa scale rotate     | not scale rotate; give the same
{eval} --distilled {gift} --ipc 2                | made with ipc 1, not 2
{eval} --distilled {gift} --no-zca               | made with zca True, not False
eval --dataset shapes --distilled {gift}         | classes ['cat', 'dog', 'emu'], not ['disk'
{eval} --distilled images0.pt                    | images0.pt: & (2, 3, 16, 16) & (3, 3, 16, 16)
{eval} --distilled labels0.pt                    | labels0.pt: & labels torch. & labels (3,), i
{eval} --distilled labels1.pt                    | labels1.pt: & labels torch. & labels (3,), i
{eval} --distilled labels2.pt                    | labels2.pt: & labels torch. & labels (3,), i
{eval} --distilled alpha0.pt                     | alpha0.pt: & alpha & alpha above 0, or --lr
{eval} --distilled alpha1.pt                     | alpha1.pt: & alpha & alpha above 0, or --lr
{eval} --distilled alpha2.pt                     | alpha2.pt: & alpha & alpha above 0, or --lr
{eval} --distilled images1.pt                    | images1.pt: & images are torch.uint8 (3,
{eval} --distilled labels3.pt                    | labels3.pt: & labels torch. & labels (3,), i
{eval} --distilled half.pt                       | cannot read half.pt, which must be a whole file
{eval} --distilled list.pt                       | cannot read list.pt & dictionary & see README
{eval} --distilled evil.pt                       | cannot read evil.pt
{eval} --distilled teacher.pt                    | teacher.pt: KeyError: 'images'; needed
{eval} --distilled tensor.pt                     | cannot read tensor.pt & see README
{eval} --distilled mean0.pt                      | mean0.pt: & must match & mean and scale
{eval} --distilled alone.pt                      | alone.pt: KeyError: 'mean'; needed
plot none                                        | there is no none/distilled.pt
plot bare                                        | made with version None, not
"""

SPOILT = {  # entries of a good file
    "images": [lambda x: x[1:], lambda x: x.byte()],
    "labels": [lambda y: y + 1, lambda y: y - 1, lambda y: y[:, None], lambda y: y / 2],
    "mean": [lambda m: m.mean((1, 2))],
    "alpha": [lambda a: -a, lambda a: 0 * a, lambda a: math.nan * a],
}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil_ran",)


ROWS = [row.split(" | ") for row in BAD_INPUT.splitlines() if row]


@pytest.fixture(scope="module")
def spoilt(run):
    """The folder in which BAD_INPUT is typed."""
    bad = run.tmp / "bad"
    make_images(bad / "xrays/COVID/images")
    for folder in ("train/n01/images", "train/n02/images", "val/images"):
        make_images(bad / "tiny" / folder)
    (bad / "tiny/val/val_annotations.txt").write_text("val_0.JPEG n01\n")
    for split in ("train", "test"):
        (make_pets(bad / "zoo") / split / "hollow").mkdir()
    make_images(bad / "zoo/train/elk")
    make_images(bad / "zoo/test/fox")
    shutil.rmtree(make_pets(bad / "no_test") / "test")
    shutil.rmtree(make_pets(bad / "unlabelled") / "test")
    make_images(bad / "unlabelled/test")
    make_images(bad / "loose/train")
    touch(bad / "loose/train/labels.csv")
    (make_pets(bad / "halves") / "train").rename(bad / "halves/Training")
    touch(bad / "scans/ct/0.dcm", bad / "scans/mr/0.npy")
    make_pets(bad / "many", [f"c{k:02d}" for k in range(30)], test=0, size=4)
    Image.new("RGB", (32, 24)).save(make_pets(bad / "photos") / "train/cat/x.png")
    make_images(make_pets(bad / "sizes") / "test/dog", 1, size=20)
    for path in make_pets(bad / "broken", train=3).glob("*/*/[12].png"):
        os.truncate(path, 60)
    Image.new("I;16", (16, 16)).save(bad / "broken/train/cat/1.png")
    make_pets(bad / "other/pets", train=13)
    make_pets(bad / "dataset", [".cat", ".dog"])

    content, good = result(run.out), run.gift.read_bytes()
    teacher = torch.load(run.folder / "teachers/000.pt", weights_only=True)
    (bad / "bare").mkdir()
    for name, saved in {
        "evil": {"images": Evil()},
        "list": [1, 2],
        "tensor": content["images"],
        "teacher": teacher,
        "alone": {name: content[name] for name in ("images", "labels", "alpha", "scale")},
        "bare/distilled": {name: content[name] for name in ("images", "labels", "alpha")},
    }.items():
        torch.save(saved, bad / f"{name}.pt")
    for key, changes in SPOILT.items():
        for k, change in enumerate(changes):
            torch.save({**content, key: change(content[key])}, bad / f"{key}{k}.pt")
    (bad / "half.pt").write_bytes(good[: len(good) // 2])
    for runs in ("other", "cut"):
        shutil.copytree(run.folder, bad / runs / run.folder.name)
    path = bad / "other" / run.folder.name / "teachers/000.pt"
    torch.save({**teacher, "thetas": 1.001 * teacher["thetas"]}, path)
    os.truncate(bad / "cut" / run.folder.name / "teachers/000.pt", 5000)
    former = {name: x for name, x in content["settings"].items() if name != "version"}
    for name, changed in {
        "hurt": {"W": content["W"][1:]},
        "old": {"settings": former, "format": 2},
    }.items():
        (run.folder / name).mkdir()
        torch.save({**content, **changed}, run.folder / name / "distilled.pt")
    return bad


def stamps(folder):
    files = (path for path in folder.rglob("[!.]*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize("line, says", ROWS, ids=[row[0].strip() for row in ROWS])
def test_bad_input(run, spoilt, line, says, monkeypatch, capsys):
    """One line with these words, exit code 2, nothing written; and said before anything is
    computed, so that what computes is replaced by what fails."""

    def computes(*_):
        raise AssertionError("it computes")

    monkeypatch.chdir(spoilt)
    monkeypatch.setattr(iadd, "train", computes)
    monkeypatch.setattr(iadd, "iteration", computes)
    monkeypatch.setattr(Normalisation, "fit", computes)
    before = stamps(run.tmp)
    error = refused(capsys, line.format(**vars(run)))
    for words in says.split(" & "):
        assert words.strip() in error
    assert len(error) < 600 and stamps(run.tmp) == before
    assert not Path("evil_ran").exists()


@pytest.mark.parametrize(
    "name, error, line, says",
    [  # what other machines do
        ("torchvision.datasets.CIFAR10.__init__", RuntimeError("no route"), "", "py/, and"),
        ("filelock.FileLock.acquire", OSError(37, "No locks"), "--dataset shapes", "No locks"),
        ("filelock.FileLock.acquire", NotImplementedError(), "--dataset shapes", "cannot lock"),
        (
            "torch.zeros",
            TypeError("MPS has no float64"),
            "--device cpu",
            "--device cpu (try cpu, or fewer GPUS): MPS has",
        ),
        ("iadd.load_dataset", torch.OutOfMemoryError("2 GB"), "", "out of memory; --no-zca"),
        ("iadd.load_dataset", MemoryError(), "", "out of memory; --no-zca"),
        ("iadd.load_dataset", RuntimeError("DefaultCPUAllocator: not enough"), "", "out of memory"),
    ],
)
def test_trouble_with_the_machine(name, error, line, says, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(name, fails)
    assert says in refused(capsys, f"teachers {line}")
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), MemoryError("no map")])
def test_trouble_with_reading_is_no_reason_to_delete(run, error, monkeypatch, capsys):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fails)
    said = refused(capsys, f"{run.distil} --name other")
    assert f"cannot read {run.folder}/teachers/000.pt" in said and str(error) in said
    assert "delete" not in said and "damaged" not in said


def test_other_builds_of_torch_and_libc(monkeypatch):
    """Without torch.distributed, and a C library without mallopt."""
    monkeypatch.setattr(iadd.dist, "is_available", lambda: False)
    monkeypatch.delattr(iadd.dist, "is_initialized")
    x = torch.ones(3)
    iadd.sum_over_ranks(x, None)
    iadd.broadcast(x)
    assert x.tolist() == [1, 1, 1]
    monkeypatch.setattr(iadd.ctypes, "CDLL", lambda _: object())
    iadd.tune(torch.device("cpu"))


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr(iadd, "load_dataset", lambda *_: 1 / torch.zeros(2).view(3))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        command("teachers")


# ---- README.md, results.md, run_all.sh -----------------------------------------------------------


def blocks(language):
    """The blocks of code in the documents."""
    texts = [README, (HERE / "assets/results.md").read_text()]
    return re.findall(rf"```{language}\n(.*?)```", "\n".join(texts), re.DOTALL)


def test_links_in_the_documents():
    """To files, to headings, to functions; and each picture is shown somewhere."""
    pictures = {path.name for path in (HERE / "assets").glob("*.[pg][ni][gf]")}
    headings = {}
    for path in (HERE / "README.md", HERE / "assets/results.md"):
        titles = re.findall("^#+ (.*)", path.read_text(), re.MULTILINE)
        headings[path] = [re.sub("[^a-z0-9 -]", "", x.lower()).replace(" ", "-") for x in titles]
    for path in headings:
        for link in re.findall(r"\]\((?!http)(.*?)\)", path.read_text()):
            name, _, heading = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), link
            assert not heading or heading in headings[target.resolve()], link
            pictures.discard(target.name)
    assert not pictures
    for row in re.findall(r"^\| .*?(?:Section|line|Eq).*? \| (.*) \|$", README, re.MULTILINE):
        for name in re.findall("`([a-zA-Z_]+)`", row):
            assert hasattr(iadd, name), name


def test_the_commands_in_the_documents_are_understood():
    """A shell expands them; what it would start is only written down."""
    shell = ['python() { echo "$@"; }', 'torchrun() { echo "$@"; }', *blocks("bash")]
    script = "\n".join(shell).replace("./run_all.sh", ":")
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 15
    for line in lines:
        iadd.make_parser().parse_args(line.split("iadd.py ")[1].split())


@pytest.mark.parametrize("ipc", [1])
def test_the_distilled_images_in_assets(ipc, tmp_path, monkeypatch):
    """What they hold, and that eval reads them; drawn images stand in for CIFAR-10's."""
    path = HERE / f"assets/cifar10_ipc{ipc}.pt"
    content = torch.load(path, weights_only=True)
    assert set(content) == {"images", "labels", "alpha", "iteration", "settings"}
    assert path.stat().st_size < 1.25e6
    shapes = iadd.make_shapes()
    data = iadd.Dataset("cifar10", content["settings"]["classes"], shapes.train, shapes.test)
    monkeypatch.setattr(iadd, "load_dataset", lambda *_: data)
    plain = Normalisation(torch.zeros(3, 32, 32, device=DEVICE), torch.eye(3072, device=DEVICE))
    monkeypatch.setattr(iadd, "fit_normalisation", lambda *_: plain)
    options = f"--ipc {ipc} --nets 1 --eval-epochs 1 --width 8 --no-compile --runs {tmp_path}"
    assert command(f"eval --distilled {path} {options}") == 0
    (row,) = rows_of(tmp_path / f"cifar10_zca_w8/{path.stem}")
    assert row["iteration"] == content["iteration"] and row["lr"] == content["alpha"].item()


def test_images_and_teachers_of_others(run, tmp_path, monkeypatch):
    """The lines in README turn images, here with soft labels, into a file that eval takes, and
    expert buffers into teachers that distill takes."""
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar)
    monkeypatch.chdir(tmp_path)
    soft = torch.tensor([[0.9, 0.1]] * 3 + [[0, 1]]).double()
    images = {"x": torch.randn(4, 3, 8, 8, requires_grad=True), "y": soft}
    (line,) = re.findall(r"`(torch.save\([^`]*\))`", README)
    exec(line, {"torch": torch, **images})
    options = f"--ipc 2 --width 4 --device {DEVICE}"
    assert command(f"eval --distilled other.pt {options} --nets 2 --eval-epochs 2") == 0
    (row,) = rows_of(tmp_path / "runs/cifar10_zca_w4/other")
    assert row["ipc"] == 2 and row["lr"] == pytest.approx(0.01)

    net = iadd.convnet((3, 8, 8), 2, 4)
    Path("buffers/CIFAR10/ConvNet").mkdir(parents=True)
    for k in range(2):
        trajectories = [[[p.detach() * s for p in net.parameters()] for s in (1, 2, 3)]] * (k + 1)
        torch.save(trajectories, f"buffers/CIFAR10/ConvNet/replay_buffer_{k}.pt")
    (lines,) = (block for block in blocks("python") if "replay_buffer" in block)
    exec(lines.replace("w128", "w4"))
    teacher = thetas("runs/cifar10_zca_w4/teachers/002.pt")
    assert torch.equal(teacher, flat_parameters(net) * torch.tensor([[1], [2], [3]]))
    line = f"distill {options} --max-start-epoch 1 --steps 2 --iterations 2"
    assert command(f"{line} --teachers 3") == 0 and command(f"{line} --teachers 4") == 2


@pytest.mark.parametrize("interpreter", ["bin/python", "Scripts/python.exe"])
def test_run_all(tmp_path, interpreter):
    """`paper` lists every cell and runs the chosen ones, with options; GPUS=2: two processes."""
    python = tmp_path / ".venv" / interpreter  # a stand-in that says what it is told
    touch(python)
    python.write_text('#!/bin/sh\necho "ran$MPLBACKEND $@"\n')
    python.chmod(0o755)
    shutil.copy(HERE / "run_all.sh", tmp_path)
    for name in ("requirements.txt", ".venv/installed"):
        shutil.copy(HERE / "requirements.txt", tmp_path / name)

    def run_all(words, gpus="1"):
        line = [tmp_path / "run_all.sh", *words.split()]
        done = subprocess.run(
            line,
            capture_output=True,
            text=True,
            env={**os.environ, "GPUS": gpus, "MPLBACKEND": "module://a_notebook_s"},
        )
        return done.stdout.replace(f"{tmp_path}/iadd.py ", "").splitlines(), done.returncode

    cells, code = run_all("paper")
    assert len({line.split()[0] for line in cells}) == 8 * 5 + 3 + 3 + 4  # Tables 1, full, 3, 4
    for line in cells:
        iadd.make_parser().parse_args(line.split("iadd.py ")[1].split())
    lines, _ = run_all("paper table4/iadd table1/cifar10/ipc1/random --width 8")
    assert [line for line in lines if line.startswith("ran")] == [
        "ran eval --dataset cifar10 --ipc 1 --on random --width 8",  # in the order of the tables
        "ran teachers --dataset covid --ipc 20 --width 8",
        "ran distill --dataset covid --ipc 20 --method iadd --width 8",
        "ran eval --dataset covid --ipc 20 --method iadd --width 8",
    ]
    assert code == 0 and run_all("paper table9")[1] == run_all("paper --ipc 1 table4")[1] == 2
    torchrun = "ran -m torch.distributed.run --nproc-per-node 2 --local-addr 127.0.0.1 "
    distill = f"{torchrun}distill --segments 2 --dataset cifar100 --ipc 10"
    assert distill in run_all("cifar100 10", gpus="2")[0]
    assert run_all("cifar100 10", gpus="0")[1] == run_all("teachers --ipc 1")[1] == 2


# ---- python test_iadd.py: how fast is it? --------------------------------------------------------

WAYS = ("obvious", "float32", "bf16")  # MTT's graph of all steps or an eager loop; ours


def work_of(task, batch, way, J, width, device):
    """What to time: J steps of a student or of training, the obvious way or in a precision."""
    net = iadd.convnet((3, 32, 32), 10, width).to(device)
    theta = flat_parameters(net)
    images = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.arange(batch, device=device) % 10
    args = SimpleNamespace(precision=way, batch_real=batch, compile=True, command="eval")
    if task == "student":
        m = settings_of(J=J, K=1, max_start=1, batch=batch, alpha=0.01, lr_img=1, lr_alpha=1e-7)
        d = iadd.Distillation(images, labels, len(theta), m)
        teachers = [torch.stack([theta, theta + 0.01]).cpu()]
        student = unrolled(net) if way == WAYS[0] else iadd.fast_student(net, d, m, args)
        return functools.partial(iadd.iteration, d, student, teachers, m, [0])
    images = iadd.ImageSet(images, labels)
    ell = iadd.cross_entropy(net) if way == WAYS[0] else iadd.fast_loss(net, images, args)
    optimizer = torch.optim.SGD([theta.requires_grad_()], 0.01)
    return functools.partial(iadd.train, ell, theta, optimizer, images, J, batch)


def seconds(work, device):
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(way, J, width, device):
    """Of a student and of the process that calls it, in GB."""
    iadd.tune(device)
    work_of("student", 10, way, J, width, device)()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()  # of Linux
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9


def bench(quick):
    """Times the parts of the method, each beside the obvious way to write it."""
    device = torch.device("cuda:0" if DEVICE == "cuda" else "cpu")
    J, width = (5, 32) if quick else (8 if DEVICE == "cpu" else 50, 128)
    iadd.tune(device)
    print(f"torch {torch.__version__}, {DEVICE}, width {width}: milliseconds a step, all in turn;")
    print("the share of the rate of 3x3 convolutions of 128 channels, forward and back")
    for task, batch, passes in (("student", 10, 12), ("student", 100, 12), ("training", 256, 3)):
        works = [work_of(task, batch, way, J, width, device) for way in WAYS]
        rounds = [[seconds(work, device) / J for work in works] for _ in range(6)]
        with FlopCounterMode(display=False) as counter:
            iadd.convnet((3, 32, 32), 10, width)(torch.zeros(batch, 3, 32, 32))
        for way, times in zip(WAYS, zip(*rounds[1:])):  # the first round compiles
            step = statistics.median(times)
            how = {"device": device, "dtype": torch.bfloat16 if way == "bf16" else torch.float32}
            layer = torch.nn.Conv2d(128, 128, 3, padding=1, **how)
            x = torch.randn(batch, 128, 16, 16, requires_grad=True, **how)
            convolve = lambda layer=layer, x=x: layer(x).sum().backward()  # noqa: E731
            best = min(seconds(convolve, device) for _ in range(9))
            rate = 3 * 2 * batch * 16**2 * 128**2 * 9 / best
            share = passes * counter.get_total_flops() / step / rate
            print(f"{task}, batch {batch}, {way:<9}{1000 * step:9.2f} {share:5.0%}", flush=True)
    for way, J in itertools.product(WAYS, (5, 50)):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peak = pool.submit(peak_memory, way, J, width, device).result()
        print(f"peak memory of a student, batch 10, {way}, J = {J}: {peak:.2f} GB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=bench.__doc__)
    parser.add_argument("--quick", action="store_true", help="a narrow network, fewer steps")
    bench(parser.parse_args().quick)
