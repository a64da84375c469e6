"""Importance-Aware Adaptive Dataset Distillation (IADD) in one file, to be read beside the paper.

    python iadd.py teachers --dataset cifar10   # 200 trajectories of a ConvNet     (Section 3.1)
    python iadd.py distill --ipc 1              # the distilled images              (Algorithm 1)
    python iadd.py eval --arch vgg11            # fresh networks, trained on them   (Section 4.1)

Give all three the same options on data and network (cifar10 is the default). `--dataset shapes`:
they take three minutes on two CPU cores; `eval --on distilled random full` then says 57.4 ± 5.5 %
for networks trained on one distilled image per class, 29.5 ± 3.5 for one real image, 99.5 ± 0.2
for all 2,000. CIFAR-10, IPC 1: 44.2 ± 0.9, in six minutes on an H200; the paper: 46.5 ± 1.1.

The paper: Guang Li, Ren Togo, Takahiro Ogawa, Miki Haseyama, Neural Networks 172, 2024, arXiv
2401.15863; sections, equations, figures, tables and lines (of Algorithm 1) below are that paper's.
Train many teachers on the real data and keep their parameters before training and after every
epoch. Then take a few real images per class (IPC) and repeat T times: let a student start where a
random teacher was after a random early epoch i, take J steps of gradient descent on the augmented
distilled images, and see how far it ends from where the teacher stood K epochs later. That squared
distance, each parameter weighted by its importance W, relative to the teacher's own, is
back-propagated through all J steps into the images, the student's learning rate alpha and W. With
W = 1 this is MTT (Cazenavette et al., CVPR 2022), whose settings fill the paper's gaps.

Glossary
    theta       all parameters of a network as one vector, (P,)       theta, theta~, Eq. (3)-(5)
    theta_start, theta_target   of a teacher at epoch i and i + K     theta_i, theta_{i+K}
    ell         cross-entropy of a network on a mini-batch            l, Eq. (2)
    images      the distilled images, normalised, (N, C, H, W)        D_distill
    alpha       the student's learning rate, a trainable scalar       alpha, Eq. (2), (10)
    W           the importance of each parameter, (P,)                W, Eq. (6), (11)
    T, J        distillation iterations; steps of a student           --iterations, --steps
    K           epochs of a teacher (the paper: its updates)          --expert-epochs
    max_start   a student starts at an epoch i < max_start            I+, --max-start-epoch
    S           segments of teachers, averaged; the paper: 1          --segments
"""

import argparse
import copy
import ctypes
import datetime
import functools
import gc
import hashlib
import json
import math
import os
import sys
import time
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

# ---- 1. The student: J steps of gradient descent, and the way back through them (Section 3.1)


def flat_parameters(net: nn.Module) -> Tensor:
    """A copy of all parameters of a network as one vector theta, (P,): Eq. (3)-(5)."""
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def cross_entropy(net: nn.Module, precision: str = "float32"):
    """The loss of a network, in bfloat16 ("bf16") or in the dtype of theta, as ell(theta, x, y):
    (P,), (B, C, H, W), (B,) -> (). RuntimeError if it has buffers, which would not be matched."""
    named = dict(net.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def ell(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        dtype = torch.bfloat16 if precision == "bf16" else theta.dtype
        parts = zip(named.items(), theta.split(sizes))
        parameters = {name: part.view_as(p).to(dtype) for (name, p), part in parts}
        logits = torch.func.functional_call(net, parameters, (x.to(dtype),), strict=True)
        return F.cross_entropy(logits.to(theta.dtype), y)

    return ell


class Student:
    """student(theta, alpha, x, y): theta (P,) after J steps of gradient descent at the rate alpha,
    (), one on each mini-batch of x (J, B, C, H, W), augmented, and y (J, B)."""

    def __init__(self, ell):
        self.gradient = torch.func.grad(ell)  # of ell in theta, (P,)

    def step(self, theta: Tensor, alpha: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return theta - alpha * self.gradient(theta, x, y)  # Eq. (2)

    def step_back(self, v: Tensor, theta: Tensor, alpha: Tensor, x: Tensor, y: Tensor):
        """v (P,), the gradient in the result of `step`, becomes those in theta, alpha and x:
        (I - alpha H) v, -<v, g>, -alpha (dg/dx)^T v; g and H: of ell in theta."""
        g, pull_back = torch.func.vjp(lambda theta, x: self.gradient(theta, x, y), theta, x)
        Hv, dg_dx_v = pull_back(v)  # one vector-Jacobian product; H is symmetric
        return v - alpha * Hv, -(v @ g), -alpha * dg_dx_v

    def __call__(self, theta: Tensor, alpha: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if not theta.requires_grad:  # as the others do; else torch.compile compiles a step twice
            theta = theta.detach().requires_grad_()
        for x_j, y_j in zip(x, y):  # Algorithm 1, lines 6 and 10
            theta = StudentStep.apply(self, theta, alpha, x_j, y_j)  # lines 8, 9
        return theta


class StudentStep(torch.autograd.Function):
    """A step as autograd sees it. create_graph=True would keep the activations of all J steps; this
    keeps the inputs of each and computes its activations anew: memory that hardly grows with J."""

    @staticmethod
    def forward(ctx, student, theta, alpha, x, y):
        ctx.student = student
        ctx.save_for_backward(theta, alpha, x, y)
        return student.step(theta, alpha, x, y)

    @staticmethod
    def backward(ctx, v):
        of_theta, of_alpha, of_x = ctx.student.step_back(v, *ctx.saved_tensors)
        return None, of_theta, of_alpha, of_x, None  # a student and labels have no gradient


# ---- 2. The loss and Algorithm 1 (Sections 3.2, 3.3) -------------------------------------


@dataclass
class Matching:
    """How students are matched with teachers: the settings of Algorithm 1."""

    J: int
    K: int
    max_start: int
    batch: int  # distilled images in a step
    alpha: float  # alpha_0
    lr_alpha: float  # mu, Eq. (10)
    lr_w: float  # eta, Eq. (11)
    lr_img: float  # zeta, Eq. (12)
    S: int
    method: str  # "iadd", "mtt" or "ddpp"
    epsilon: float  # DDPP's: Algorithm 1 lists it, and has no line that uses it
    seed: int


class Distillation:
    """What Algorithm 1 learns, and the optimizer that learns it. images: real ones at first,
    normalised, (N, C, H, W); labels: (N,); P: length of theta."""

    def __init__(self, images: Tensor, labels: Tensor, P: int, m: Matching):
        self.t = 0  # iterations done
        self.labels = labels
        self.images = images.detach().clone().requires_grad_()  # Algorithm 1, line 1
        self.alpha = images.new_tensor(m.alpha).requires_grad_()  # line 2
        # All ones, the "unit vector" W_0; float32 would round away what a rate of 1e-4 subtracts
        self.W = images.new_ones(P, dtype=torch.float64).requires_grad_()
        learned = [  # the paper is silent on momentum: MTT's, and none for W
            {"params": [self.alpha], "lr": m.lr_alpha, "momentum": 0.5},  # Eq. (10)
            {"params": [self.W], "lr": m.lr_w},  # Eq. (11)
            {"params": [self.images], "lr": m.lr_img, "momentum": 0.5},  # Eq. (12)
        ]
        self.optimizer = torch.optim.SGD(learned)
        self.mismatch = images.new_zeros(P)  # theta - theta_target of the last student, to plot


def iadd_loss(theta: Tensor, theta_start: Tensor, theta_target: Tensor, W: Tensor) -> Tensor:
    """Eq. (9) with (7) and (8): ||W theta - W theta_target||^2 / ||theta_start - theta_target||^2.
    All (P,). dL/dw = 2 w (theta - theta_target)^2 / ||...||^2 is not below 0 while w > 0: SGD only
    lowers weights, and fastest where the student misses by most (Fig. 6, 7)."""
    weighted = W * (theta - theta_target)  # Algorithm 1, lines 11-13
    return weighted.square().sum() / (theta_start - theta_target).square().sum()


def weigh(m: Matching, W: Tensor, mismatch: Tensor) -> Tensor:
    """The weights (P,) of a mismatch (P,). IADD learns them; MTT's [51] are 1; DDPP [54] drops what
    is hardest to match: here the share epsilon, anew for each start (the paper gives no rule)."""
    if m.method == "iadd":
        return W
    if m.method == "mtt":
        return torch.ones_like(W)
    size = mismatch.abs()
    kept = max(1, round((1 - m.epsilon) * len(size)))
    return (size <= size.kthvalue(kept).values).to(W.dtype)


def random_segment(teachers: list[Tensor], K: int, max_start: int) -> Tensor:
    """theta_i, theta_{i+K}, (2, P), of a random teacher (epochs + 1, P) and start i < max_start."""
    trajectory = teachers[torch.randint(len(teachers), ())]
    i = torch.randint(max_start, ()).item()
    return trajectory[[i, i + K]]


def minibatches(n: int, batch: int, J: int) -> Tensor:
    """Indices of J mini-batches, (J, batch), batch <= n, on the CPU. Each pass over the n images is
    a fresh permutation, cut into batches, the last filled up with the first images of the pass."""
    in_a_pass = math.ceil(n / batch)
    permutations = torch.rand(math.ceil(J / in_a_pass), n).argsort(1)  # a row for each pass
    filled = permutations[:, torch.arange(in_a_pass * batch) % n]  # (passes, in_a_pass * batch)
    return filled.view(-1, batch)[:J]


def student_batches(images: Tensor, labels: Tensor, batch: int, J: int) -> tuple[Tensor, Tensor]:
    """J augmented mini-batches, x (J, batch, C, H, W), y (J, batch): Algorithm 1, line 7."""
    index = minibatches(len(images), batch, J).to(images.device)  # an iteration's, all at once
    x = images.index_select(0, index.flatten())  # on a CPU its gradient adds in a fixed order
    return augment(x.view(J, batch, *images.shape[1:])), labels[index]


def matching_loss(d: Distillation, student: Student, teachers: list[Tensor], m: Matching) -> Tensor:
    """Algorithm 1, lines 4-13: the loss, (), of one student."""
    segment = random_segment(teachers, m.K, m.max_start)  # line 4
    theta_start, theta_target = segment.to(d.images.device)
    x, y = student_batches(d.images, d.labels, m.batch, m.J)  # line 7
    theta = student(theta_start, d.alpha, x, y)  # lines 5, 6, 8-10
    d.mismatch = theta.detach() - theta_target  # as in Fig. 1
    return iadd_loss(theta, theta_start, theta_target, weigh(m, d.W, d.mismatch))  # lines 11-13


def iteration(d: Distillation, student, teachers: list[Tensor], m: Matching, segments) -> Tensor:
    """Algorithm 1, lines 4-14: updates d, returns the loss, (). segments: range(S), or a process's
    share. (Eq. (10)-(12) have an index j, but the gradient exists only after all J steps.)"""
    d.optimizer.zero_grad()
    loss = d.W.new_zeros(())
    for s in segments:
        seed_all(m.seed, "segment", d.t, s)  # so that it can be resumed, or done elsewhere
        part = matching_loss(d, student, teachers, m) / m.S  # lines 4-13
        part.backward()
        loss += part.detach()
    sum_over_ranks(loss, d.alpha.grad, d.W.grad, d.images.grad)  # of several processes, if any
    d.optimizer.step()  # line 14, Eq. (10)-(13)
    d.t += 1
    return loss


# ---- 3. DSA: differentiable Siamese augmentation [47], the curly A in Eq. (2) ------------
# x is (N, C, H, W), and each image draws its own parameters


def uniform(x: Tensor, low: float, high: float) -> Tensor:
    """A number from U(low, high) for each image of x, (N, 1, 1, 1), the same on every device."""
    return torch.rand(len(x), 1, 1, 1, dtype=x.dtype).to(x.device) * (high - low) + low


def dsa_color(x: Tensor) -> Tensor:
    """Brightness + U(-.5, .5), then saturation * U(0, 2), then contrast * U(.5, 1.5)."""
    x = x + uniform(x, -0.5, 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * uniform(x, 0, 2)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * uniform(x, 0.5, 1.5)


def dsa_crop(x: Tensor) -> Tensor:
    """Shift by whole pixels, up to an eighth of the side in x and in y."""
    side = x.shape[-1]
    reach = round(side / 8)
    shift = torch.randint(-reach, reach + 1, (2, len(x))).to(x.device)
    dx, dy = 2 * shift / (side - 1)  # `warp` has the side in [-1, 1]
    return warp(x, tx=dx, ty=dy, mode="nearest")


def dsa_cutout(x: Tensor) -> Tensor:
    """Set a square of half the side to 0; its centre lies anywhere."""
    side = x.shape[-1]
    hole = round(side / 2)
    pixel = torch.arange(side, device=x.device)
    start = torch.randint(0, side + 1 - hole % 2, (2, len(x), 1)).to(x.device) - hole // 2
    rows, columns = (pixel >= start) & (pixel < start + hole)  # (N, side) each
    return x.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)


def dsa_flip(x: Tensor) -> Tensor:
    """Left-right, with probability .5."""
    return torch.where(uniform(x, 0, 1) < 0.5, x.flip(3), x)


def dsa_scale(x: Tensor) -> Tensor:
    """Scale the sampling grid by U(1/1.2, 1.2), in x and in y independently."""
    return warp(x, a=uniform(x, 1 / 1.2, 1.2), d=uniform(x, 1 / 1.2, 1.2))


def dsa_rotate(x: Tensor) -> Tensor:
    """Rotate by U(-15, 15) degrees."""
    angle = uniform(x, -math.pi / 12, math.pi / 12)
    return warp(x, a=angle.cos(), b=-angle.sin(), c=angle.sin(), d=angle.cos())


def warp(x: Tensor, a=1.0, b=0.0, tx=0.0, c=0.0, d=1.0, ty=0.0, mode: str = "bilinear") -> Tensor:
    """The output at (u, v) is x at (a u + b v + tx, c u + d v + ty); both axes run over [-1, 1],
    0 outside. a, ..., ty: a number each, or one for each image."""
    matrix = x.new_empty(len(x), 6)
    for column, entry in enumerate((a, b, tx, c, d, ty)):
        matrix[:, column] = entry.flatten() if isinstance(entry, Tensor) else entry
    grid = F.affine_grid(matrix.view(-1, 2, 3), list(x.shape), align_corners=True)  # (N, H, W, 2)
    return F.grid_sample(x, grid, mode, padding_mode="zeros", align_corners=True)


DSA = [dsa_color, dsa_crop, dsa_cutout, dsa_flip, dsa_scale, dsa_rotate]


def augment(x: Tensor) -> Tensor:
    """Augments J mini-batches (J, B, C, H, W): each draws one of the six kinds for all its images,
    as torch.stack([DSA[k](x_j) for k, x_j in zip(kind, x)]), but a kind draws and works at once."""
    kind = torch.randint(len(DSA), (len(x),))
    order = kind.argsort().to(x.device)  # mini-batches of a kind are neighbours
    parts = x[order].split(kind.bincount(minlength=len(DSA)).tolist())
    done = [dsa(part.flatten(0, 1)).view_as(part) for dsa, part in zip(DSA, parts) if len(part)]
    return torch.cat(done)[order.argsort()]  # in the order of x again


# ---- 4. Networks. GroupNorm with a channel a group is instance normalisation, without buffers


def plain_network(shape, classes: int, layers: list, norm: bool = True) -> nn.Module:
    """Convolutions (width, kernel), each with instance normalisation and ReLU, halvings "avg" or
    "max", a linear layer. shape: (C, H, W) of the images. Raises ValueError if too small."""
    channels, side, _ = shape
    modules = []
    for layer in layers:
        if layer in ("avg", "max"):
            modules.append(nn.AvgPool2d(2) if layer == "avg" else nn.MaxPool2d(2))
            side //= 2
        else:
            width, kernel = layer
            convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2)
            normalisation = nn.GroupNorm(width, width) if norm else nn.Identity()
            modules += [convolution, normalisation, nn.ReLU()]
            channels = width
    if side == 0:
        raise ValueError(f"images of {shape} are too small for this network")
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(channels * side * side, classes))


def convnet(shape, classes: int, width: int = 128) -> nn.Module:
    """The ConvNet of teachers and students (Section 4.1); 320,010 parameters for CIFAR-10."""
    depth = max(1, round(math.log2(shape[1])) - 2)  # 3 for 32 pixels a side, 4: 64, 5: 112
    return plain_network(shape, classes, [(width, 3), "avg"] * depth)


def alexnet(shape, classes: int) -> nn.Module:
    """AlexNet [6] as this field uses it for small images: no stride, no norm, one linear layer."""
    layers = [(128, 5), "max", (192, 5), "max", (256, 3), (192, 3), (192, 3), "max"]
    return plain_network(shape, classes, layers, norm=False)


def vgg11(shape, classes: int) -> nn.Module:
    """VGG11 [89] with a single linear layer."""
    widths = [64, "max", 128, "max", 256, 256, "max", 512, 512, "max", 512, 512, "max"]
    return plain_network(shape, classes, [w if w == "max" else (w, 3) for w in widths])


def resnet18(shape, classes: int) -> nn.Module:
    """ResNet18 [7] for small images: a 3x3 stem without stride or pooling."""
    if shape[1] <= 8:  # its last stage would normalise single pixels, that is, make all alike
        raise ValueError(f"images of {shape} are too small for this network")
    net = torchvision.models.resnet18(norm_layer=lambda w: nn.GroupNorm(w, w), num_classes=classes)
    net.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    for module in net.modules():  # initialised as the others are, not as by torchvision
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return net


ARCHITECTURES = {"convnet": convnet, "alexnet": alexnet, "vgg11": vgg11, "resnet18": resnet18}

# ---- 5. Training on images: teachers (Section 3.1), evaluation (Section 4.1) -------------


def seed_all(*key) -> None:
    """Starts the random stream named `key`, such as (seed, "teacher", 3)."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def train(ell, theta: Tensor, optimizer, images: "ImageSet", epochs: int, batch: int) -> None:
    """Passes over the images in mini-batches with DSA. Updates theta (P,) in place."""
    batch = min(batch, len(images))
    index = minibatches(len(images), batch, epochs * math.ceil(len(images) / batch))
    at_once = max(1, 3 * 2**22 // (batch * images.x[0].numel()))  # mini-batches in 50 MB
    for several in index.to(images.x.device).split(at_once):
        x, y = images[several]
        for x_j, y_j in zip(augment(x), y):
            optimizer.zero_grad()
            ell(theta, x_j, y_j).backward()
            optimizer.step()


def train_teacher(ell, theta: Tensor, images: "ImageSet", lr: float, batch: int) -> Tensor:
    """A teacher, (P,) on the CPU, an epoch after theta (P,). Plain SGD: theta is all its state."""
    theta = theta.to(images.x.device, copy=True).requires_grad_()
    train(ell, theta, torch.optim.SGD([theta], lr), images, 1, batch)
    return theta.detach().cpu()


def train_network(ell, theta: Tensor, images, epochs: int, lr: float, batch: int) -> Tensor:
    """A network of the evaluation, from theta (P,) on. The paper is silent; nearly as MTT: SGD with
    momentum .9, weight decay 5e-4, DSA, a tenth of the rate in the second half."""
    theta = theta.to(images.x.device, copy=True).requires_grad_()
    optimizer = torch.optim.SGD([theta], lr, momentum=0.9, weight_decay=5e-4)
    train(ell, theta, optimizer, images, epochs - epochs // 2, batch)
    if epochs > 1:  # `train` does not take 0
        optimizer.param_groups[0]["lr"] = lr / 10
        train(ell, theta, optimizer, images, epochs // 2, batch)
    return theta.detach()


@torch.no_grad()
def confusion_matrix(net: nn.Module, theta: Tensor, images: "ImageSet") -> Tensor:
    """Entry (r, c): how many of the images of class r the network with theta takes for class c."""
    nn.utils.vector_to_parameters(theta, net.parameters())
    starts = range(0, len(images), 250)
    scores = torch.cat([net(images[k : k + 250][0]) for k in starts])  # (N, classes)
    n = scores.shape[1]
    return torch.bincount(n * images.y + scores.argmax(1), minlength=n * n).view(n, n)


# ---- 6. Normalisation and ZCA (Section 4.2); the real images to begin with ---------------


class Normalisation:
    """Maps uint8 images to network input and back, fitted on training images alone.
    With ZCA whitening z = (x - mean) M, where M = U diag(1 / sqrt(v + eps)) U^T for the covariance
    U diag(v) U^T of the pixels x in [0, 1]; otherwise z = (x - mean) * 1/std for each channel."""

    def __init__(self, mean: Tensor, scale: Tensor):
        self.mean = mean  # (C, H, W); without ZCA (C, 1, 1)
        self.scale = scale  # M (D, D), D = C H W; without ZCA 1/std (C, 1, 1)
        self.zca = scale.dim() == 2

    @classmethod
    def fit(cls, images: Tensor, zca: bool, device="cpu", eps: float = 0.1) -> "Normalisation":
        """images: uint8 (N, C, H, W). eps: as MTT."""
        parts = images.to(device).split(1000)  # floats of all at once would fill the memory
        mean = sum(part.sum(0) for part in parts).double() / len(images) / 255  # (C, H, W)
        if not zca:
            mean = mean.mean((1, 2), keepdim=True)
            squares = sum((part / 255 - mean).square().sum((0, 2, 3)) for part in parts)
            std = (squares / images[:, 0].numel()).sqrt().clamp_min(1e-4)
            return cls(mean.float(), 1 / std[:, None, None].float())
        centred = ((part / 255 - mean).flatten(1).float() for part in parts)
        covariance = sum((x.T @ x).double() for x in centred) / (len(images) - 1)
        v, U = torch.linalg.eigh(covariance)
        M = (U / (v.clamp_min(0) + eps).sqrt()) @ U.T
        return cls(mean.float(), M.float())

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (..., C, H, W) -> network input, float32, on the device."""
        z = torch.empty(images.shape, device=self.mean.device)
        for part, out in zip(images.split(1000), z.split(1000)):
            x = part.to(z.device) / 255 - self.mean
            out.copy_((x.flatten(-3) @ self.scale).view_as(x) if self.zca else x * self.scale)
        return z

    def image_set(self, images: Tensor, labels: Tensor) -> "ImageSet":
        """uint8 (N, C, H, W), (N,), on the device: with ZCA whitened, without it left as bytes."""
        device = self.mean.device
        if self.zca:
            return ImageSet(self(images), labels.to(device))
        return ImageSet(images.to(device), labels.to(device), self)

    def inverse(self, z: Tensor) -> Tensor:
        """Network input (N, C, H, W) -> pixels on the scale 0 to 1, not clamped."""
        if self.zca:  # M is symmetric: z = (x - mean) M  <=>  M (x - mean)^T = z^T
            return torch.linalg.solve(self.scale, z.flatten(1).T).T.view_as(z) + self.mean
        return z / self.scale + self.mean


def real_images(data: "Dataset", normalise: Normalisation, ipc: int, choose=None):
    """`ipc` training images of each class, normalised, class after class, and their labels: random
    ones (Algorithm 1, line 1), or those whose indices `choose` returns for a class's images."""
    check_ipc(ipc, data)
    images, labels = data.train
    chosen = []
    for c in range(len(data.classes)):
        members = torch.nonzero(labels == c)[:, 0]
        if choose is None:
            some = torch.randperm(len(members))[:ipc]
        else:
            some = choose(normalise(images[members]))
        chosen.append(members[some])
    index = torch.cat(chosen)
    return normalise(images[index]), labels[index].to(normalise.mean.device)


# ==== The method ends here. What follows serves it: data, files, speed, processes, commands. ======


class UserError(Exception):
    """Something the user can mend: the command line prints one line and exits with code 2."""


# ---- 7. Settings: default < preset < what the user typed ---------------------------------
# The paper's (Sections 4.1, 4.2, 4.5); lr_teacher, batch_real: MTT's; covid's T: a guess
DEFAULTS = {"epochs": 50, "lr_teacher": 0.01, "batch_real": 256, "iterations": 5000, "width": 128}
SMALL = {"epochs": 10, "lr_teacher": 0.02, "batch_real": 64, "iterations": 200, "width": 32}
# MTT's, and ZCA where MTT has it; covid: MTT's for images of 128 x 128; shapes: ours. batch 0: all
PRESETS = """
dataset       ipc teachers  J K max_start lr_img lr_alpha alpha batch   zca
cifar10         1      200 50 2         2    100     1e-7   .01     0  True
cifar10        10      200 30 2        20    100     1e-5  .001     0  True
cifar10        50      200 30 2        40   1000     1e-5  .001     0 False
cifar100        1      200 20 3        20   1000     1e-5   .01     0  True
cifar100       10      200 20 2        20   1000     1e-5   .01     0 False
cifar100       50      200 80 2        40   1000     1e-5   .01   125  True
tinyimagenet    1      100 10 2        10  10000     1e-4   .01     0 False
tinyimagenet   10      100 20 2        40  10000     1e-4   .01   200 False
covid          20      100 20 2        10   1000     1e-6   .01     0 False
shapes          1        6 10 2         4    300     1e-5   .03     0 False
"""


def preset(name: str, ipc: int) -> dict:
    """Settings of a dataset (a folder: CIFAR-10's) at the largest IPC <= ipc, or the least."""
    table = np.genfromtxt(PRESETS.splitlines(), dtype=None, names=True, encoding="utf-8")
    rows = [row for row in table if row["dataset"] == name] or table[:3]  # CIFAR-10's
    up_to_ipc = [row for row in rows if row["ipc"] <= ipc] or rows[:1]
    settings = dict(zip(table.dtype.names, up_to_ipc[-1].item()))
    return {**(SMALL if name == "shapes" else DEFAULTS), **settings}


# ---- 8. Datasets -------------------------------------------------------------------------


@dataclass
class Dataset:
    """train, test: uint8 images (N, C, H, W), H = W, int64 labels (N,), index of classes."""

    name: str
    classes: list[str]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.train[0].shape[1:])


class ImageSet:
    """Images and labels on a device, read by index: x, y = images[index], where x is
    network input. x: that already, (N, C, H, W), or with `normalise` uint8, a quarter as
    large, normalised anew each time; y: (N,)."""

    def __init__(self, x: Tensor, y: Tensor, normalise: "Normalisation | None" = None):
        self.x = x
        self.y = y
        self.normalise = normalise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        return self.normalise(x) if self.normalise else x, self.y[index]


def load_dataset(name: str, data_dir: Path, size: int | None = None, only=()) -> Dataset:
    """One of PRESETS or a folder {train,test}/<class>/*, of `size` pixels, of classes `only`."""
    if name in ("cifar10", "cifar100", "shapes"):
        if size or only:
            raise UserError(f"--size and --classes are for datasets of image files, not for {name}")
        return make_shapes() if name == "shapes" else load_cifar(name, data_dir)
    if name == "tinyimagenet":
        return read_dataset(name, list_tiny_imagenet(data_dir), only, size, "RGB")
    if name == "covid":
        return read_dataset(name, list_covid(data_dir), only, size or 112, "L")
    root = Path(name)
    if not root.is_dir():
        raise UserError(f"unknown dataset {name!r}: neither one of those in --help, nor a folder")
    return read_dataset(root.resolve().name, list_folders(root, "test", "val"), only, size, "RGB")


def load_cifar(name: str, data_dir: Path) -> Dataset:
    """CIFAR-10 or CIFAR-100 [53], downloaded to data_dir on first use (170 MB)."""
    cifar = getattr(torchvision.datasets, name.upper())
    try:
        parts = [cifar(data_dir, train) for train in (True, False)]
    except RuntimeError:  # they are not there yet
        try:
            with filelock.FileLock(f"{data_dir}.lock"):  # one process downloads for all
                parts = [cifar(data_dir, train, download=True) for train in (True, False)]
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot download {cifar.url} to {data_dir}/: {error}") from None
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return Dataset(name, parts[0].classes, train, test)


def few(things) -> str:
    """The first five, and how many others there are: to name them in a line."""
    names = [str(thing) for thing in things]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def image_files(root: Path) -> dict[str, list[Path]]:
    """{class: files}, of each folder in root the images in it, or in its folder "images", if any.
    Nothing hidden; whatever else is there is named. Raises UserError."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; see README")
    known = Image.registered_extensions()
    found = {}
    unread = []
    for folder in sorted(filter(Path.is_dir, root.glob("[!.]*"))):
        inner = folder / "images" if (folder / "images").is_dir() else folder
        files = {path for path in inner.glob("[!.]*") if path.suffix.lower() in known}
        unread += {*folder.glob("[!.]*"), *inner.glob("[!.]*")} - files - {inner}
        found[folder.name] = sorted(files)
    if unread:
        of_each_kind = {path.suffix: path.relative_to(root) for path in sorted(unread)}
        print(f"not read in {root}: {len(unread)}, such as {few(of_each_kind.values())}")
    return found


def list_folders(root: Path, *tests: str) -> dict[Path, dict]:
    """{folder: {class: files}} to train on, root/train, and to test on, the first of `tests` that
    has a class's folder. Raises UserError."""
    train = image_files(root / "train")
    fitting = (test for test in tests if any((root / test / c).is_dir() for c in train))
    test = root / next(fitting, tests[0])
    return {root / "train": train, test: image_files(test)}


def list_tiny_imagenet(root: Path) -> dict[Path, dict]:
    """As `list_folders`, of Tiny ImageNet [80], tested on its validation images, which are either
    sorted into folders of classes or, as published, listed in a file."""
    files = list_folders(root, "val/images", "val")
    _, test = files.values()
    if not any(test.values()):
        annotations = root / "val/val_annotations.txt"
        try:
            for line in filter(str.strip, annotations.read_text().splitlines()):
                file, c, *_ = line.split("\t")
                test.setdefault(c, []).append(root / "val/images" / file)
        except ValueError as error:
            raise UserError(f"cannot read {annotations}: {error}") from None
    return files


def list_covid(root: Path) -> dict[str, dict]:
    """As `list_folders`, of COVID-19 Radiography [81], split 8:2 (Section 4.1). A hash of the
    file's name decides, so that the split is the same everywhere."""
    if (root / "images").is_dir():
        raise UserError(f"{root} is a class: --data-dir takes the folder above it")
    train = {}
    test = {}
    for name, files in image_files(root).items():
        hashes = {file: hashlib.sha256(f"{name}/{file.name}".encode()).digest() for file in files}
        files = sorted(files, key=hashes.get)
        cut = round(0.8 * len(files))
        train[name] = files[:cut]
        test[name] = files[cut:]
    return {f"{root} (training part)": train, f"{root} (test part)": test}


def read_image(path: Path, size: int | None, mode: str) -> np.ndarray:
    """An image file as uint8 (C, H, W), H = W, C = 1 for mode "L", 3 for "RGB". Raises UserError if
    it needs --size, and whatever Pillow raises if it cannot be read."""
    with Image.open(path) as image:
        if image.mode[0] in "IF":  # 16 or 32 bits, which Pillow would clip at 255
            raise ValueError(f"its pixels are of mode {image.mode}; 8-bit images are needed")
        width, height = image.size
        if not size and (width != height or width > 512):  # the most that --size takes
            raise UserError(f"{path} has {width} x {height} pixels; --size N makes all N x N")
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:  # on white, as a page shows it
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(mode)
        if size:
            image = image.resize((size, size), Image.Resampling.BILINEAR)  # antialiased
        return np.ascontiguousarray(np.moveaxis(np.atleast_3d(image), 2, 0))


def read_dataset(name: str, files: dict, only, size: int | None, mode: str) -> Dataset:
    """files: {folder: {class: files}} to train on, to test on; only: the classes to use, or all;
    size, mode: as in `read_image`. Raises UserError."""
    train, test = files.values()
    classes = sorted(set(only or [*train, *filter(test.get, test)]))
    for folder, part in files.items():
        lacking = [c for c in classes if not part.get(c)]
        if lacking:
            others = few(filter(part.get, part))
            raise UserError(f"{folder} holds no image of {few(lacking)}, only of: {others}")
    if len(classes) < 2:
        raise UserError(f"{name} needs folders of two classes, see README; found: {few(classes)}")
    paths = []
    labels = []
    for part in files.values():
        for k, c in enumerate(classes):
            paths += part[c]
            labels += [k] * len(part[c])
    arrays = []
    unreadable = []
    for path in progress(paths, f"reading {name}"):  # threads are slower at small files
        try:
            arrays.append(read_image(path, size, mode))
        except UserError:
            raise
        except Exception as error:  # OSError, SyntaxError, DecompressionBombError, ...
            unreadable.append(f"{path}: {error}")
    if unreadable:
        raise UserError(f"{len(unreadable)} of the images cannot be read: {few(unreadable)}")
    for path, array in zip(paths, arrays):
        if array.shape != arrays[0].shape:
            raise UserError(f"{path} and {paths[0]} differ in size; --size N makes all N x N")
    n = sum(len(train[c]) for c in classes)
    x = torch.from_numpy(np.stack(arrays))
    y = torch.tensor(labels)
    return Dataset(name, classes, (x[:n], y[:n]), (x[n:], y[n:]))


SHAPES = {  # positive inside the figure; (u, v) are its own coordinates, its radius is 1
    "disk": lambda u, v: 1 - np.hypot(u, v),
    "ring": lambda u, v: 0.22 - abs(np.hypot(u, v) - 0.78),
    "square": lambda u, v: 0.85 - np.maximum(abs(u), abs(v)),
    "triangle": lambda u, v: 0.5 - np.maximum(-v, 0.866 * abs(u) + 0.5 * v),
    "cross": lambda u, v: np.fmin(0.28 - np.fmin(abs(u), abs(v)), 1 - np.fmax(abs(u), abs(v))),
    "flower": lambda u, v: 0.65 + 0.35 * np.cos(5 * np.arctan2(v, u)) - np.hypot(u, v),
    "stripes": lambda u, v: np.sin(6 * u) / 6,
    "checker": lambda u, v: np.sin(5 * u) * np.sin(5 * v) / 4,
    "dots": lambda u, v: (np.cos(6 * u) + np.cos(6 * v) - 0.8) / 8,
    "waves": lambda u, v: np.sin(8 * np.hypot(u, v)) / 8,
}


def make_shapes(train: int = 200, test: int = 50, seed: int = 0) -> Dataset:
    """Ten classes of drawn figures: no single pixel and no colour gives the class away."""
    rng = np.random.default_rng(seed)
    grid = np.linspace(-1, 1, 32)

    def draw(low, high, channels=1):
        return rng.uniform(low, high, (train + test, channels, 1, 1))

    images = []  # (train + test, 3, 32, 32) of each class
    for figure in SHAPES.values():
        x = grid - draw(-0.3, 0.3)  # (train + test, 1, 1, 32)
        y = grid[:, None] - draw(-0.3, 0.3)  # (train + test, 1, 32, 1)
        tilt = draw(-0.3, 0.3)
        scale = draw(0.4, 0.8)
        u = (np.cos(tilt) * x - np.sin(tilt) * y) / scale
        v = (np.sin(tilt) * x + np.cos(tilt) * y) / scale
        inside = (figure(u, v) * scale * 32 / 2 + 0.5).clip(0, 1)  # with soft edges
        image = draw(0, 0.5, 3) + inside * draw(0.2, 0.5, 3)
        image *= 1 + draw(-0.3, 0.3) * x + draw(-0.3, 0.3) * y
        image += rng.normal(0, 0.15, image.shape)
        images.append(torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)))
    x, test_x = torch.stack(images).split([train, test], 1)  # (10, train, 3, 32, 32), ...
    y = torch.arange(len(SHAPES))
    train_part = x.flatten(0, 1), y.repeat_interleave(train)
    test_part = test_x.flatten(0, 1), y.repeat_interleave(test)
    return Dataset("shapes", list(SHAPES), train_part, test_part)


# ---- 9. Files, speed, processes ----------------------------------------------------------

FORMAT = 2  # of the files that are written
CHECKPOINT_SECONDS = 60  # at least, from one to the next
progress = functools.partial(tqdm, mininterval=0.2 if sys.stderr and sys.stderr.isatty() else 30)


def fingerprint(tensors) -> int:
    """A number that tells other tensors apart."""
    return functools.reduce(lambda crc, x: zlib.crc32(x.contiguous().numpy(), crc), tensors, 0)


def save(content: dict, path: Path) -> None:
    """torch.save under another name, then renamed: `path` is always a whole file."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save({"format": FORMAT, **content}, temporary)
    except RuntimeError as error:  # the disk is full, for example
        raise OSError(f"cannot write {temporary}: {error}") from None
    os.replace(temporary, path)


def load(path: Path, settings: dict, hint: str, device="cpu", teacher: bool = False) -> dict:
    """What `save` wrote under these settings; no stranger's code is run. Raises UserError."""
    if not path.exists():
        raise UserError(f"there is no {path}; {hint}")
    try:
        with zipfile.ZipFile(path) as records:  # torch.load does not look at their CRCs
            if records.testzip():
                raise ValueError("wrong CRC")
        content = torch.load(path, device, mmap=teacher, weights_only=True)
        if content.get("format") != FORMAT:
            raise ValueError("of another version")
        check(content, teacher)
        found = content["settings"]
    except (PermissionError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises half a dozen types for a damaged file
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is damaged or not iadd.py's ({why}); {hint}") from None
    wrong = {
        name: f"{name} {found.get(name)!s:.50}, not {x!s:.50}"
        for name, x in settings.items()
        if found.get(name) != x
    }
    if "fingerprint" in wrong:
        raise UserError(f"{path} is of other images: delete its folder, or --runs DIR keeps both")
    if wrong:
        raise UserError(f"{path} has {few(wrong.values())}; {hint}")
    return content


def check(content: dict, teacher: bool) -> None:
    """Raises ValueError for what would otherwise give a wrong number without a word."""
    settings = content["settings"]
    if teacher:
        fits = {"thetas": content["thetas"].shape[1:] == (settings["P"],)}
    else:
        labels = content["labels"]
        fits = {
            "images": content["images"].shape == (len(labels), *settings["shape"]),
            "labels": labels.min() >= 0 and labels.max() < len(settings["classes"]),
            "alpha": content["alpha"] > 0,
            "W": content["W"].shape == (settings["P"],),
        }
    for name, x in content.items():
        if torch.is_tensor(x) and not x.isfinite().all():
            fits[name] = False
    wrong = [name for name, good in fits.items() if not good]
    if wrong:
        raise ValueError(f"wrong shapes or values: {', '.join(wrong)}")


def one_writer(folder: Path, args):
    """The lock of a folder, for `with`. Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(folder / f".lock{args.rank}").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another run writes to {folder}") from None
    except (OSError, NotImplementedError) as error:  # a file system without locks
        raise UserError(f"cannot lock {folder}, --runs DIR chooses another: {error}") from None


def copies(inputs) -> list[Tensor]:
    """Leaves of the same values."""
    return [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]


def outcome(function, inputs) -> list[Tensor]:
    """function(*inputs) less the first of them, as it counts how far a student comes from
    where it starts (for a loss, () - (P,): odd, and enough), and the gradients of the
    square of that."""
    inputs = copies(inputs)
    moved = function(*inputs) - inputs[0].detach()
    learned = [x for x in inputs if x.requires_grad]
    return [moved.detach(), *torch.autograd.grad(moved.square().sum(), learned)]


def attempt(what: str, make, plain, inputs):
    """make(plain), which is faster; or if it fails, or with these inputs is off by half, a
    line that says so, and `plain`."""
    try:
        fast = make(plain)
        pairs = zip(outcome(fast, inputs), outcome(plain, inputs))
        # bf16 rounds by 0.15 on the way; what is wrong is off by more
        if all((a - b).norm() <= 0.5 * b.norm() for a, b in pairs):
            return fast
        why = "it gives other results"
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # no C++ compiler, no Triton, an unsupported Python, ...
        why = f"{type(error).__name__}: {error}".splitlines()[0][:99]
    print(f"without {what}: {why}", file=sys.stderr)
    return plain


def compiled(function):
    """A loss or a `Student`, to be compiled when it is first called."""
    if not isinstance(function, Student):
        return torch.compile(function, dynamic=False)
    student = copy.copy(function)
    student.step = torch.compile(function.step, dynamic=False)
    student.step_back = torch.compile(function.step_back, dynamic=False)
    return student


def recorded(function, inputs):
    """A function as a CUDA graph: of fixed shapes, each call overwrites the last result."""
    gc.collect()  # an old graph that Python frees only while this is recorded spoils it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.11 sees a stream of its own and wonders
        graph = torch.cuda.make_graphed_callables(function, tuple(copies(inputs)))

    def replay(*inputs):
        # alpha, a leaf, would keep memory as its .grad that the next replay overwrites
        return graph(*(1 * x if x.dim() == 0 else x for x in inputs))

    return replay


def accelerated(plain, inputs, images: int, wanted: bool | None):
    """plain, compiled, and on a GPU as a CUDA graph. inputs: examples. wanted: --compile,
    --no-compile (nor a graph), or None to compile if `images` in all steps that are left
    repay the minute that it takes (which rounds otherwise). Without any images it is never
    compiled."""
    if wanted is False:
        return plain
    gpu = inputs[0].is_cuda
    fast = plain
    if images > 0 and (wanted or images >= (3_000_000 if gpu else 120_000)):
        print("compiling first, up to a minute (--no-compile does without)", file=sys.stderr)
        torch.compiler.reset()  # a process may compile one function for eight networks only
        fast = attempt("torch.compile", compiled, plain, inputs)
    if gpu:
        fast = attempt("CUDA graphs", functools.partial(recorded, inputs=inputs), fast, inputs)
    return fast


def fast_loss(net: nn.Module, images: ImageSet, epochs: int, args):
    """The loss of a network, made faster for mini-batches of images and `epochs` in all."""
    ell = cross_entropy(net, args.precision)
    inputs = (flat_parameters(net).requires_grad_(), *images[: args.batch_real])
    return accelerated(ell, inputs, epochs * len(images), args.compile)


def fast_student(net: nn.Module, theta: Tensor, d: Distillation, m: Matching, args):
    """The `Student` of a network, made faster; a step counts as 4 of training. theta: any."""
    J = m.J if d.images.is_cuda else 2  # a CUDA graph is of all steps
    inputs = (theta.to(d.images.device), d.alpha, *student_batches(d.images, d.labels, m.batch, J))
    images = 4 * (args.iterations - d.t) * m.S * m.J * m.batch
    return accelerated(Student(cross_entropy(net, args.precision)), inputs, images, args.compile)


def tune(device: torch.device) -> None:
    """cuDNN times its convolutions and chooses. glibc's malloc keeps large blocks that are
    freed: the system would clear every page before it gave it out again, up to half of a
    step's time."""
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs are recorded on the current one
    elif sys.platform == "linux":
        malloc = ctypes.CDLL(None)
        malloc.mallopt(-4, 0)  # M_MMAP_MAX
        malloc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
        malloc.mallopt(-8, 1)  # M_ARENA_MAX: what one thread frees is for all


def sum_over_ranks(*tensors: Tensor | None) -> None:
    """In place, over the processes of torchrun; everybody waits for it."""
    if torch.distributed.is_initialized():
        for x in tensors:
            if x is not None:  # only IADD has a gradient in W
                torch.distributed.all_reduce(x)


# ---- 10. Commands ------------------------------------------------------------------------


def new_network(arch: str, data: Dataset, args) -> nn.Module:
    """On the device. Raises UserError if the images are too small for it."""
    sizes = {"width": args.width} if arch == "convnet" else {}
    try:
        return ARCHITECTURES[arch](data.shape, len(data.classes), **sizes).to(args.device)
    except ValueError as error:
        raise UserError(f"{arch}: {error}") from None


def check_ipc(ipc: int, data: Dataset) -> None:
    """Raises UserError if a class has fewer training images."""
    n, c = data.train[1].bincount().min(0)
    if ipc > n:
        raise UserError(f"IPC {ipc} is too large: {data.classes[c]} has {n} training images")


def prepare(args) -> tuple[Dataset, dict, Path]:
    """The data; what settings teachers and results share; their folder. Raises UserError for
    whatever can be known by then."""
    data = load_dataset(args.dataset, args.data_dir, args.size, args.classes)
    sets = f"{len(data.train[1])} training and {len(data.test[1])} test images"
    print(f"{data.name}: {sets} of {few(data.classes)}")
    check_ipc(args.ipc, data)
    zca = args.whiten
    if zca is None:  # not typed
        zca = args.zca and data.shape[1] <= 32
    D = math.prod(data.shape)
    if zca and D > 3072:
        cost = f"ZCA of {D} numbers: about {60 * (D / 7000) ** 3:.0f} s, {40e-9 * D * D:.1f} GB"
        if D > 7000:
            raise UserError(f"{cost}: use --no-zca, or a smaller --size")
        print(cost)
    P = len(flat_parameters(new_network("convnet", data, args)))
    shared = {
        "dataset": data.name,
        "fingerprint": fingerprint(data.train),
        "classes": data.classes,
        "shape": list(data.shape),
        "zca": zca,
        "width": args.width,
        "P": P,
    }
    name = "-".join([data.name, *data.classes]) if args.classes else data.name
    if len(name) > 60:  # too long for a folder
        name = f"{name[:30]}-{len(data.classes)}-{zlib.crc32(name.encode()):08x}"
    if args.size:
        name += f"-{args.size}px"
    return data, shared, args.runs / f"{name}_{'zca' if zca else 'std'}_w{args.width}"


def command_teachers(args) -> None:
    """Train teachers on the real data and keep their parameters at each epoch (Section 3.1)."""
    data, settings, folder = prepare(args)
    settings |= {
        "lr_teacher": args.lr_teacher,
        "batch_real": args.batch_real,
        "seed": args.seed,
        "precision": args.precision,
    }
    shown = {**settings, "classes": len(data.classes)}
    print(f"settings: {shown}, {args.epochs} epochs; {args.machine}")
    mine = range(args.rank, args.teachers, args.ranks)  # teachers of this process
    paths = [folder / f"teachers/{k:03d}.pt" for k in mine]
    hint = "delete it, or --runs DIR chooses another folder"
    with one_writer(folder / "teachers", args):
        found = {path: [] for path in paths}
        for path in filter(Path.exists, paths):
            found[path] += load(path, settings, hint, teacher=True)["thetas"]
        todo = [path for path in paths if len(found[path]) <= args.epochs]
        print(f"{folder}/teachers: {len(paths) - len(todo)} of {len(paths)} are complete")
        if not todo:
            return
        normalise = Normalisation.fit(data.train[0], settings["zca"], args.device)
        images = normalise.image_set(*data.train)
        test = normalise.image_set(*data.test)
        net = new_network("convnet", data, args)
        ell = fast_loss(net, images, len(todo) * args.epochs, args)
        for path in todo:
            seed = (args.seed, "teacher", int(path.stem))
            seed_all(*seed)
            thetas = found[path] or [flat_parameters(new_network("convnet", data, args)).cpu()]
            saved = time.time()
            epochs = range(len(thetas) - 1, args.epochs)
            for epoch in progress(epochs, f"teacher {path.stem}", unit="epoch", leave=False):
                seed_all(*seed, "epoch", epoch)
                theta = train_teacher(ell, thetas[-1], images, args.lr_teacher, args.batch_real)
                if not theta.isfinite().all():
                    raise UserError(f"teacher {path.stem} diverged: lower --lr-teacher")
                thetas.append(theta)
                if epoch + 1 == args.epochs or time.time() > saved + CHECKPOINT_SECONDS:
                    save({"thetas": torch.stack(thetas), "settings": settings}, path)
                    saved = time.time()
            hits = confusion_matrix(net, theta.to(args.device), test).trace()
            tqdm.write(f"teacher {path.stem}: {100 * hits / len(test):.1f} % test accuracy")


def load_teachers(args, folder: Path, shared: dict) -> list[Tensor]:
    """The part of each trajectory that will be read, (epochs + 1, P). Raises UserError."""
    epochs = args.max_start - 1 + args.K
    paths = sorted(folder.glob("[0-9]*.pt"))[: args.first]
    n = args.first or len(paths) or args.teachers
    hint = f"run first: python iadd.py teachers --ipc {args.ipc} --epochs {epochs} --teachers {n}, "
    hint += "with the same options on data and network"
    teachers = [load(path, shared, hint, teacher=True)["thetas"][: epochs + 1] for path in paths]
    if len(teachers) < (args.first or 1) or min(map(len, teachers)) <= epochs:
        raise UserError(f"{len(paths)} teachers in {folder}, too few or short; {hint}")
    return teachers


def command_distill(args) -> None:
    """Distil a dataset into a few images per class (Algorithm 1)."""
    data, settings, folder = prepare(args)
    out = folder / args.name
    teachers = load_teachers(args, folder / "teachers", settings)
    m = Matching(**{name: getattr(args, name) for name in Matching.__annotations__})
    N = args.ipc * len(data.classes)
    m.batch = min(args.batch or N, N)
    settings |= {**vars(m), "ipc": args.ipc, "precision": args.precision}
    settings |= {"teachers": len(teachers), "teachers_fingerprint": fingerprint(teachers)}
    shown = {**settings, "classes": len(data.classes)}
    print(f"settings: {shown}, {args.iterations} iterations; {args.machine}")
    with one_writer(out, args):
        d, result = begin(args, data, m, settings, out / "distilled.pt")
        normalise = Normalisation(result["mean"], result["scale"])
        student = fast_student(new_network("convnet", data, args), teachers[0][0], d, m, args)
        mine = range(args.rank, m.S, args.ranks)  # segments of this process
        log = result["log"]
        losses = []
        saved = time.time()
        with progress(total=args.iterations, initial=d.t) as bar:
            while d.t < args.iterations:  # Algorithm 1, lines 3 and 15
                losses.append(iteration(d, student, teachers, m, mine))  # lines 4-14
                bar.update()
                last = d.t == args.iterations
                tests = args.eval_every and d.t % args.eval_every == 0
                if d.t % 10 > 0 and not last and not tests:
                    continue  # to look at a number is to wait for a GPU
                result |= state_of(d)
                row = log_row(d, losses)
                log.append(row)
                losses = []
                bar.set_postfix_str(f"loss {row[2]:.4g} alpha {row[3]:.4g}", refresh=False)
                if tests:
                    images = ImageSet(result["images"], d.labels)
                    about = {"on": "distilled", "ipc": args.ipc, "iteration": d.t, "lr": row[3]}
                    evaluate(args, data, normalise, images, {**about, "arch": "convnet"}, out)
                if args.rank > 0:
                    continue
                np.savetxt(out / "log.csv", log, "%.17g", ",", header=",".join(LOG), comments="")
                if last or d.t % (10 * math.ceil(args.iterations / 200)) == 0:  # 20 times
                    draw(result["images"], normalise, args.ipc, out / f"images_{d.t:05d}.png")
                if last or time.time() > saved + CHECKPOINT_SECONDS:
                    save(result, out / "distilled.pt")
                    saved = time.time()
    print(f"{out}/distilled.pt is at iteration {d.t}, alpha {d.alpha:.5f}")


def begin(args, data: Dataset, m: Matching, settings: dict, path: Path):
    """A distillation, new or as in the file at `path`, and what that holds. (Of many processes
    some may find iteration 0 saved already: it is the same.)"""
    if path.exists():
        hint = "--teachers N takes the first N, --name NAME keeps both, or delete its folder"
        result = load(path, settings, hint, args.device)
        d = Distillation(result["images"], result["labels"], settings["P"], m)
        d.alpha.data = result["alpha"]
        d.W.data = result["W"]
        d.optimizer.load_state_dict(result["optimizer"])
        d.t = result["iteration"]
        return d, result
    seed_all(args.seed, "distill")
    normalise = Normalisation.fit(data.train[0], settings["zca"], args.device)
    images, labels = real_images(data, normalise, args.ipc)  # Algorithm 1, line 1
    d = Distillation(images, labels, settings["P"], m)
    result = {
        "settings": settings,
        "machine": args.machine,
        "log": [],
        "mean": normalise.mean,
        "scale": normalise.scale,
        **state_of(d),
    }
    if args.rank == 0:
        draw(images, normalise, args.ipc, path.parent / "images_00000.png")
        save(result, path)
    return d, result


def state_of(d: Distillation) -> dict:
    """All that changes from one iteration to the next."""
    state = {
        name: getattr(d, name).detach() for name in ("images", "labels", "alpha", "W", "mismatch")
    }
    return {**state, "iteration": d.t, "optimizer": d.optimizer.state_dict()}


LOG = ("iteration", "time", "loss", "alpha", "W_min", "W_1pct", "W_median", "W_mean")


def log_row(d: Distillation, losses: list[Tensor]) -> list[float]:
    """A row of log.csv; its loss is the mean since the row before. Raises UserError."""
    loss = float(sum(losses) / len(losses))
    finite = all(x.isfinite().all() for x in (losses[-1], d.alpha, d.images, d.W))
    if not finite or d.alpha <= 0:
        raise UserError(
            f"diverged by iteration {d.t} (loss {loss:.4g}, alpha {d.alpha:.4g}): "
            "lower the learning rates; the state last saved is kept"
        )
    W = d.W.detach().sort().values  # quantile() of torch 2.6 does not take those of width 1024
    spread = W[[0, len(W) // 100, len(W) // 2]].tolist()
    return [d.t, time.time(), loss, d.alpha.item(), *spread, W.mean().item()]


def draw(images: Tensor, normalise: Normalisation, ipc: int, path: Path) -> None:
    """The images as a person sees them, `ipc` in a row (Fig. 4, 5, 8)."""
    pixels = normalise.inverse(images).clamp(0, 1)
    pixels = F.interpolate(pixels, scale_factor=math.ceil(96 / pixels.shape[-1]))
    torchvision.utils.save_image(pixels, path, nrow=ipc if ipc > 1 else 10, padding=4, pad_value=1)


@torch.no_grad()
def herding(net: nn.Sequential, theta: Tensor, ipc: int, x: Tensor) -> Tensor:
    """Herding [83]: indices (ipc,) into x (N, C, H, W), by the inputs of the last layer."""
    nn.utils.vector_to_parameters(theta.to(x.device), net.parameters())
    features = torch.cat([net[:-1](part) for part in x.split(500)])  # (N, features)
    chosen = []
    for n in range(1, ipc + 1):
        means = (features[chosen].sum(0) + features) / n  # of those chosen and one more
        distance = (features.mean(0) - means).norm(dim=1)
        distance[chosen] = math.inf
        chosen.append(distance.argmin().item())
    return torch.tensor(chosen)


def command_eval(args) -> None:
    """Train fresh networks on the distilled images, test them on real ones (Section 4.1)."""
    data, shared, folder = prepare(args)
    for arch in args.arch:
        new_network(arch, data, args)  # tells if the images are too small for it
    if "herding" in args.on:
        teacher = load(folder / "teachers/000.pt", shared, "train it first", teacher=True)
        net = new_network("convnet", data, args)
    ipc = args.ipc
    if "distilled" in args.on:
        path = args.distilled or folder / args.name / "distilled.pt"
        wanted = shared
        if args.distilled:  # from elsewhere, perhaps of another program
            wanted = {name: shared[name] for name in ("classes", "shape", "zca")}
        result = load(path, wanted, "distill makes it, with the same options", args.device)
        normalise = Normalisation(result["mean"], result["scale"])
        ipc = result["settings"]["ipc"]  # --name does not tell it
        check_ipc(ipc, data)
        print(f"{path}, iteration {result['iteration']}")
    else:
        normalise = Normalisation.fit(data.train[0], shared["zca"], args.device)
    print(f"IPC {ipc}: test accuracy after the last epoch, mean ± std")
    print("trained on  network         accuracy  networks  epochs        lr  seconds")
    for on in args.on:
        row = {"on": on, "ipc": ipc, "iteration": None, "lr": args.lr_teacher}
        if on == "distilled":
            images = ImageSet(result["images"], result["labels"])
            row |= {"iteration": result["iteration"], "lr": result["alpha"].item()}
        elif on == "full":
            images = normalise.image_set(*data.train)
        else:
            choose = None
            if on == "herding":
                choose = functools.partial(herding, net, teacher["thetas"][-1], ipc)
            images = ImageSet(*real_images(data, normalise, ipc, choose))
        for arch in args.arch:
            evaluate(args, data, normalise, images, {**row, "arch": arch}, folder / args.name)


def evaluate(args, data: Dataset, normalise: Normalisation, images: ImageSet, row: dict, out: Path):
    """Trains new networks on the images (on "random": others for each) and tests them. row: on,
    arch, ipc, iteration, lr; with what they come to it is printed and added to results.jsonl."""
    start = time.time()
    out.mkdir(parents=True, exist_ok=True)
    open(out / "results.jsonl", "a").close()  # it can be written to
    on = row["on"]
    arch = row["arch"]
    lr = args.lr or row["lr"]
    test = normalise.image_set(*data.test)
    epochs = args.eval_epochs or (args.epochs if on == "full" else 1000)
    net = new_network(arch, data, args)
    alone = args.command == "eval"  # to compile within distill would undo what is compiled there
    ell = fast_loss(net, images, args.nets * epochs if alone else 0, args)
    n = len(data.classes)
    matrices = torch.zeros(args.nets, n, n, dtype=torch.int64)
    mine = range(args.rank, args.nets, args.ranks)
    for k in progress(mine, f"{arch} on {on}", unit="network", leave=False):
        seed_all(args.seed, "eval", on, arch, k)
        theta = flat_parameters(new_network(arch, data, args))
        if on == "random":
            images = ImageSet(*real_images(data, normalise, row["ipc"]))
        theta = train_network(ell, theta, images, epochs, lr, args.batch_real)
        if alone and not theta.isfinite().all():
            raise UserError(f"{arch} diverged at the learning rate {lr:.4g}: lower --lr")
        matrices[k] = confusion_matrix(net, theta, test)
    sum_over_ranks(matrices)
    scores = [100 * matrix.trace().item() / len(test) for matrix in matrices]
    mean = np.mean(scores)
    std = np.std(scores, ddof=1) if len(scores) > 1 else 0.0
    seconds = time.time() - start
    row = {
        **row,
        "lr": lr,
        "epochs": epochs,
        "seed": args.seed,
        "precision": args.precision,
        "mean": mean,
        "std": std,
        "accuracies": scores,
        "seconds": seconds,
        "confusion": matrices.sum(0).tolist(),
    }
    if args.rank == 0:
        with open(out / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    tqdm.write(
        f"{on:<12}{arch:<10}{f'{mean:.1f} ± {std:.1f} %':>14}"
        f"{args.nets:>10}{epochs:>8}{lr:>10.5f}{seconds:>9.0f}"
    )


def command_plot(args) -> None:
    """Draw a distillation's course, its weights W beside what they weigh, and its images."""
    from matplotlib.figure import Figure

    result = load(args.folder / "distilled.pt", {}, "give the folder of a result")
    log = dict(zip(LOG, np.array(result["log"]).reshape(-1, len(LOG)).T))
    figure = Figure((18, 8), layout="constrained")
    (loss, alpha, weights), (accuracy, mismatch, final) = figure.subplots(2, 3)
    t = log["iteration"]
    loss.plot(t, log["loss"])
    loss.set_title("loss by iteration")
    alpha.plot(t, log["alpha"])
    alpha.set_title("alpha by iteration")
    for name in LOG[4:]:  # of W
        weights.plot(t, 1 - log[name], label=name)
    weights.set_title("1 - W by iteration")
    weights.legend()
    tests = args.folder / "results.jsonl"
    for row in map(json.loads, tests.open() if tests.exists() else []):
        if row["on"] == "distilled" and row["arch"] == "convnet":
            accuracy.errorbar(row["iteration"], row["mean"], row["std"], fmt="C0o", capsize=3)
    accuracy.set_title("test accuracy of new ConvNets by iteration, %")
    mismatch.plot(result["mismatch"].abs(), linewidth=0.3)  # Fig. 1
    mismatch.set_title("|student - teacher| by parameter, from the first layer on")
    final.plot(1 - result["W"], linewidth=0.3)  # Fig. 6, 7
    final.set_title("1 - W by parameter")
    figure.savefig(args.folder / "plot.png", dpi=130)
    pictures = map(Image.open, sorted(args.folder.glob("images_*.png")))
    small = [x.reduce(math.ceil(max(x.size) / 1100)).quantize(128) for x in pictures]
    path = args.folder / "evolution.gif"
    if small:
        small[0].save(path, save_all=True, append_images=small[1:], duration=250, loop=0)
    print(f"{args.folder}/plot.png, {path}")


# ---- 11. Command line --------------------------------------------------------------------


def between(low: float, high: float, kind: type = float):
    """An argparse type: a number from `low` to `high`."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)

    return number


def make_parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    switch = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function in (command_teachers, command_distill, command_eval, command_plot):
        name = function.__name__.removeprefix("command_")
        command = subparsers.add_parser(
            name,
            help=function.__doc__,
            description=f"{function.__doc__} (In brackets: defaults)",
            epilog=PRESETS,
            formatter_class=form,
        )
        command.set_defaults(function=function, rank=0, ranks=1)

    def add(names, flag, text, **options):
        for name in names.split():
            subparsers.choices[name].add_argument(flag, help=text, **options)

    data = "teachers distill eval"
    add(data, "--dataset", "below; or a folder {train,test}/*/* (cifar10)")
    add(data, "--data-dir", "folder of data and downloads (data)", type=Path, default="data")
    add(data, "--runs", "folder of all that is written (runs)", type=Path, default="runs")
    add(data, "--classes", "those to use, of image files (all)", nargs="+", default=[])
    text = "whiten by ZCA, or normalise each channel (preset; folders: ZCA up to 32 pixels a side)"
    add(data, "--zca", text, dest="whiten", action=switch)
    add(data, "--seed", "of everything random (0)", type=int, default=0)
    add(data, "--compile", "torch.compile (if the run is long)", action=switch)
    add(data, "--precision", "(bf16 if the device has it)", choices=["float32", "bf16"])
    add(data, "--device", "cpu, cuda, cuda:1, ... (cuda where there is one)")
    whole = between(1, 10**6, int)
    rate = between(0, 1e30)
    above_zero = between(1e-12, 1e30)
    for names, flag, kind, text in [
        (data, "--ipc", whole, "distilled images per class (1); for teachers: --epochs"),
        (data, "--size", between(1, 512, int), "pixels a side of image files (covid 112)"),
        (data, "--width", whole, "channels of the ConvNet (preset, 128 in the paper)"),
        ("teachers", "--teachers", whole, "how many (preset, 200 in the paper)"),
        ("teachers", "--epochs", whole, "of each (preset; with --ipc those distill reads)"),
        ("teachers", "--lr-teacher", above_zero, "learning rate, plain SGD (preset, .01)"),
        ("teachers", "--batch-real", whole, "images a step (preset, 256)"),
        ("distill", "--iterations", whole, "T (preset, 5000 in the paper)"),
        ("distill", "--batch", whole, "distilled images a step (preset, 0: all)"),
        ("distill", "--lr-img", rate, "learning rate of the images (preset)"),
        ("distill", "--lr-alpha", rate, "learning rate of alpha (preset)"),
        ("distill", "--alpha", above_zero, "alpha_0, its first value (preset)"),
        ("distill", "--eval-every", whole, "iterations between evaluations (none)"),
        ("distill eval", "--eval-epochs", whole, "of each network (1000; on full the preset's 50)"),
        ("distill eval", "--lr", above_zero, "of networks (alpha; on real images the teachers')"),
    ]:
        add(names, flag, text, type=kind)
    for flag, letter, text in [
        ("--steps", "J", "J, student steps an iteration (preset)"),
        ("--expert-epochs", "K", "K, teacher epochs to the target (preset)"),
        ("--max-start-epoch", "max_start", "I+, starts are below it (preset)"),
        ("--teachers", "first", "use the first so many (all)"),
    ]:
        add("distill", flag, text, dest=letter, type=whole)
    add("distill", "--segments", "S, starts averaged (1)", dest="S", type=whole, default=1)
    add("distill", "--lr-w", "learning rate of W (1e-4, Section 4.1)", type=rate, default=1e-4)
    add("distill", "--epsilon", "ddpp: share dropped (0.1)", type=between(0, 1), default=0.1)
    add("distill eval", "--nets", "networks to train (5)", type=whole, default=5)
    add("distill eval", "--method", "(iadd)", choices=["iadd", "mtt", "ddpp"], default="iadd")
    text = "of a result's folder (ipc<IPC>_<method>_seed<seed>; eval: seed0)"
    add("distill eval", "--name", text)
    sets = ["distilled", "random", "herding", "full"]
    add("eval", "--on", "(distilled)", nargs="+", choices=sets, default=["distilled"])
    add("eval", "--arch", "(convnet)", nargs="+", choices=ARCHITECTURES, default=["convnet"])
    add("eval", "--distilled", "from elsewhere (in --runs)", type=Path, metavar="FILE")
    add("plot", "folder", "of a result, with distilled.pt", type=Path)
    return parser


def complete(args) -> None:
    """Adds to args the device, the processes of torchrun and what was not typed. Nothing else
    assigns to args. Raises UserError."""
    launched = torch.distributed.is_torchelastic_launched()
    if launched:
        args.rank = int(os.environ["RANK"])
        args.ranks = int(os.environ["WORLD_SIZE"])
    if args.command == "distill" and args.ranks > args.S:
        raise UserError(f"{args.ranks} processes need --segments {args.ranks} or more to share out")
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched else 0)
        torch.zeros(1, device=device, dtype=torch.float64).item()  # W is float64
    except Exception as error:  # whatever a missing backend raises
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0][:99]}") from None
    tune(device)
    args.device = device
    if launched:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=1))
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(False)
        processor = torch.cuda.get_device_name(device)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        processor = f"{torch.get_num_threads()} CPU threads"
    args.machine = f"torch {torch.__version__}, {args.ranks} x {processor}"
    if args.precision is None:
        args.precision = "bf16" if native else "float32"
    if args.command == "eval" and args.distilled:
        args.name = args.name or args.distilled.stem
        if args.dataset is None:
            args.dataset = load(args.distilled, {}, "a result is needed")["settings"]["dataset"]
    if args.dataset is None:
        args.dataset = "cifar10"
    few_epochs = args.command == "teachers" and args.ipc and not args.epochs
    args.ipc = args.ipc or 1
    for key, value in preset(args.dataset, args.ipc).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if few_epochs:  # those that distill reads with the preset of this IPC
        args.epochs = args.max_start - 1 + args.K
    if args.command != "teachers":
        seed = args.seed if args.command == "distill" else 0  # eval's is of its networks
        args.name = args.name or f"ipc{args.ipc}_{args.method}_seed{seed}"


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, 2 for what the user can mend, 130 for Ctrl-C."""
    args = make_parser().parse_args(argv)
    stderr = sys.stderr
    try:
        if args.command != "plot":
            complete(args)
            if args.rank > 0:
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (till the end)
        args.function(args)
        return 0
    except KeyboardInterrupt:
        print("iadd.py: interrupted; teachers and distill go on from the last minute", file=stderr)
        return 130
    except (UserError, OSError, ImportError, MemoryError, torch.OutOfMemoryError) as error:
        if args.rank > 0:
            time.sleep(5)  # if rank 0 says the same, torchrun ends this process meanwhile
        print(f"iadd.py: error: {str(error) or 'out of memory'}", file=stderr)
        return 2
    finally:
        sys.stderr = stderr  # for a traceback


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in Jupyter
        sys.stdout.reconfigure(errors="replace")  # a terminal without ±
    sys.exit(main())
