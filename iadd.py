"""Importance-Aware Adaptive Dataset Distillation (IADD) in one file, to be read beside the paper.

    python iadd.py teachers --dataset cifar10   # 200 trajectories of a ConvNet     (Section 3.1)
    python iadd.py distill --ipc 1              # the distilled images              (Algorithm 1)
    python iadd.py eval --arch vgg11            # fresh networks, trained on them   (Section 4.1)

Give all three the same options on data and network (here cifar10 is the default). With `--dataset
shapes` they take three minutes on two CPU cores, without a GPU or a download.

The paper: Guang Li, Ren Togo, Takahiro Ogawa, Miki Haseyama, Neural Networks 172, 2024, arXiv
2401.15863. Sections, equations, figures, tables and lines (of Algorithm 1) below are that paper's.
Train many teachers on the real data and keep their parameters before training and after every
epoch. Then take a few real images per class (IPC) and repeat T times: let a student start where a
random teacher was after a random early epoch i, take J steps of gradient descent on the augmented
distilled images, and compare where it arrives with where the teacher stood K epochs later. Their
squared distance, each parameter weighted by its importance W, relative to the teacher's own,
is back-propagated through all J steps into the images, the student's learning rate alpha and W.
With W = 1 this is MTT (Cazenavette et al., CVPR 2022), whose settings fill the paper's gaps.

Glossary
    theta       all parameters of a network as one vector, (P,)       theta, theta~, Eq. (3)-(5)
    theta_start, theta_target   of a teacher at epoch i and i + K     theta_i, theta_{i+K}
    ell         cross-entropy of a network on a mini-batch            l, Eq. (2)
    images      the distilled images, normalised, (N, C, H, W)        D_distill
    alpha       the student's learning rate, a trainable scalar       alpha, Eq. (2), (10)
    W           the importance of each parameter, (P,)                W, Eq. (6), (11)
    T           distillation iterations                               --iterations
    J           steps of a student                                    --steps
    K           epochs of a teacher (the paper: its updates)          --expert-epochs
    max_start   a student starts at an epoch i < max_start            I+, --max-start-epoch
    S           segments of teachers, averaged; the paper: 1          --segments
    DSA         differentiable Siamese augmentation                   the curly A, Eq. (2), [47]
"""

import argparse
import ast
import contextlib
import ctypes
import datetime
import functools
import gc
import hashlib
import json
import math
import os
import re
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
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

# ---- 1. The student's step, the loss and Algorithm 1 (Section 3) ---------------------------------


def flat_parameters(net: nn.Module) -> Tensor:
    """A copy of all parameters of a network as one vector theta, (P,): Eq. (3)-(5)."""
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def cross_entropy(net: nn.Module, precision: str = "float32"):
    """The loss of a network, in bfloat16 ("bf16") or in the dtype of theta, as ell(theta, x, y):
    (P,), (B, C, H, W), (B,) -> (). RuntimeError if it has buffers, which would not be matched."""
    named = dict(net.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def ell(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        inside = torch.bfloat16 if precision == "bf16" else theta.dtype
        parts = zip(named.items(), theta.split(sizes))
        parameters = {name: part.view_as(p).to(inside) for (name, p), part in parts}
        logits = torch.func.functional_call(net, parameters, (x.to(inside),), strict=True)
        return F.cross_entropy(logits.to(theta.dtype), y)

    return ell


def student_step(net: nn.Module, precision: str = "float32"):
    """The step of Eq. (2), for theta (P,), alpha (), x (B, C, H, W), y (B,), and its backward pass:
    v, the gradient w.r.t. its result, becomes those w.r.t. theta, alpha and x: (I - alpha H) v,
    -<v, g> and -alpha (dg/dx)^T v. Here g is the gradient of ell in theta and H its Hessian."""
    gradient = torch.func.grad(cross_entropy(net, precision))

    def step(theta, alpha, x, y):
        return theta - alpha * gradient(theta, x, y)  # Eq. (2)

    def step_back(v, theta, alpha, x, y):
        g, pull_back = torch.func.vjp(lambda theta, x: gradient(theta, x, y), theta, x)
        Hv, dg_dx_v = pull_back(v)  # one vector-Jacobian product; H is symmetric
        return v - alpha * Hv, -(v @ g), -alpha * dg_dx_v

    return step, step_back


def differentiable(step, step_back):
    """`step` with `step_back` as its backward pass. create_graph=True would keep the activations of
    all J steps for it; this keeps only the inputs of each step and recomputes its activations:
    the same gradients, in memory that hardly grows with J."""

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, theta, alpha, x, y):
            ctx.save_for_backward(theta, alpha, x, y)
            return step(theta, alpha, x, y)

        @staticmethod
        def backward(ctx, v):
            return *step_back(v, *ctx.saved_tensors), None  # labels have no gradient

    return Step.apply


def unroll(step, theta: Tensor, alpha: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The student's parameters (P,) after a step on each of J mini-batches, from theta (P,) on.
    x: (J, B, C, H, W), augmented; y: (J, B)."""
    if not theta.requires_grad:  # as after a step; else torch.compile compiles a step twice
        theta = theta.detach().requires_grad_()
    for x_j, y_j in zip(x, y):  # lines 6, 10
        theta = step(theta, alpha, x_j, y_j)  # lines 8, 9
    return theta


def make_student(net: nn.Module, precision: str = "float32", faster=lambda step: step):
    """`unroll` with the step of a network. faster: applied to `step` and `step_back`."""
    return functools.partial(unroll, differentiable(*map(faster, student_step(net, precision))))


def iadd_loss(theta: Tensor, theta_start: Tensor, theta_target: Tensor, W: Tensor) -> Tensor:
    """Eq. (9) with (7) and (8): ||W theta - W theta_target||^2 / ||theta_start - theta_target||^2.
    All (P,). dL/dw = 2 w (theta - theta_target)^2 / ||...||^2 is not below 0 while w > 0: SGD only
    lowers weights, and fastest where the student misses by most (Fig. 6, 7)."""
    weighted = W * (theta - theta_target)  # lines 11-13
    return weighted.square().sum() / (theta_start - theta_target).square().sum()


def weigh(method: str, W: Tensor, mismatch: Tensor, epsilon: float) -> Tensor:
    """The weights (P,) of a mismatch (P,): all that distinguishes the three methods.
    IADD learns them; MTT's [51] are 1; DDPP [54] drops what is hardest to match: here the share
    `epsilon` of the parameters, anew for each start (a guess: the paper gives no rule)."""
    if method == "iadd":
        return W
    if method == "mtt":
        return torch.ones_like(W)
    kept = max(1, round((1 - epsilon) * len(mismatch)))
    return (mismatch.abs() <= mismatch.abs().kthvalue(kept).values).to(W.dtype)


@dataclass
class Matching:
    """How students are matched with teachers: the settings of Algorithm 1."""

    J: int
    K: int
    max_start: int
    batch: int  # distilled images in a step
    S: int = 1
    method: str = "iadd"
    epsilon: float = 0.1  # DDPP's: Algorithm 1 lists it, and has no line that uses it
    seed: int = 0


class Distillation:
    """What Algorithm 1 learns, and the optimizer that learns it. images: real ones at first,
    normalised, (N, C, H, W); labels: (N,); P: length of theta; t: iterations done."""

    def __init__(self, images, labels, alpha: float, P: int, lr_img, lr_alpha, lr_w):
        self.t = 0
        self.labels = labels
        self.images = images.detach().clone().requires_grad_()  # line 1
        self.alpha = images.new_tensor(alpha).requires_grad_()  # line 2
        # All ones, the "unit vector" W_0; float32 would round away what a rate of 1e-4 subtracts
        self.W = images.new_ones(P, dtype=torch.float64).requires_grad_()
        learned = [
            {"params": [self.alpha], "lr": lr_alpha, "momentum": 0.5},  # Eq. (10), mu; as MTT
            {"params": [self.W], "lr": lr_w},  # Eq. (11), eta; no momentum: our choice
            {"params": [self.images], "lr": lr_img, "momentum": 0.5},  # Eq. (12), zeta; as MTT
        ]
        self.optimizer = torch.optim.SGD(learned)
        self.m_alpha, self.m_images = torch.zeros_like(self.alpha), torch.zeros_like(self.images)
        for p, momentum in ((self.alpha, self.m_alpha), (self.images, self.m_images)):
            self.optimizer.state[p]["momentum_buffer"] = momentum  # by name, for the checkpoints
        self.mismatch = images.new_zeros(P)  # theta - theta_target of the last student, to plot


def random_segment(teachers: list[Tensor], K: int, max_start: int) -> tuple[Tensor, Tensor]:
    """theta_i, theta_{i+K} of a random teacher (epochs + 1, P), i uniform below max_start."""
    trajectory = teachers[torch.randint(len(teachers), ())]
    i = torch.randint(max_start, ())
    return trajectory[i], trajectory[i + K]


def student_batches(images: Tensor, labels: Tensor, batch: int, J: int) -> tuple[Tensor, Tensor]:
    """J augmented mini-batches, x (J, batch, C, H, W) and y (J, batch): line 7, Eq. (1). All at
    once, as the images do not change within an iteration."""
    index = minibatches(len(images), batch, J).to(images.device)
    x = images.index_select(0, index.flatten())  # on a CPU its gradient adds in a fixed order
    return augment(x.view(J, batch, *images.shape[1:])), labels[index]


def iteration(d: Distillation, student, teachers: list[Tensor], m: Matching, segments) -> Tensor:
    """Lines 4-14 of Algorithm 1: updates d, returns the loss, (). segments: range(S), or the share
    of this process. student: of `make_student`."""
    d.optimizer.zero_grad()
    loss = d.W.new_zeros(())
    for s in segments:
        seed_all(m.seed, "segment", d.t, s)  # so that it can be resumed, or done elsewhere
        segment = random_segment(teachers, m.K, m.max_start)  # line 4
        theta_start, theta_target = (theta.to(d.images.device) for theta in segment)
        x, y = student_batches(d.images, d.labels, m.batch, m.J)  # line 7
        alpha = 1 * d.alpha  # else .grad is memory that the next replay of a CUDA graph rewrites
        theta = student(theta_start, alpha, x, y)  # lines 5, 6, 8-10
        d.mismatch = theta.detach() - theta_target  # as in Fig. 1
        weights = weigh(m.method, d.W, d.mismatch, m.epsilon)  # Eq. (6)
        part = iadd_loss(theta, theta_start, theta_target, weights) / m.S  # lines 11-13
        part.backward()
        loss += part.detach()
    d.optimizer.step()  # line 14, Eq. (10)-(13)
    d.t += 1
    return loss


def distil(d: Distillation, student, teachers, m: Matching, T: int, segments, after_iteration):
    """Algorithm 1 from line 3 on; its lines 1 and 2 are in `Distillation`. (Eq. (10)-(12) carry the
    index j of a student's step, but the gradient exists only when all J steps are done.)"""
    while d.t < T:  # lines 3, 15
        loss = iteration(d, student, teachers, m, segments)  # lines 4-14
        after_iteration(loss)


# ---- 2. DSA, the curly A in Eq. (2) [47]; x is (N, C, H, W), each image draws its own parameters


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
    entries = [torch.as_tensor(entry).to(x).flatten() for entry in (a, b, tx, c, d, ty)]
    matrix = torch.stack([entry.expand(len(x)) for entry in entries], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=True)  # (N, H, W, 2)
    return F.grid_sample(x, grid, mode, padding_mode="zeros", align_corners=True)


DSA = [dsa_color, dsa_crop, dsa_cutout, dsa_flip, dsa_scale, dsa_rotate]


def augment(x: Tensor) -> Tensor:
    """Augments J mini-batches (J, B, C, H, W): each draws one of the six kinds for all its images.
    Differentiable in x. One call for all mini-batches of a kind."""
    kind = torch.randint(len(DSA), (len(x),))
    order = kind.argsort().to(x.device)
    parts = x[order].split(kind.bincount(minlength=len(DSA)).tolist())
    done = [dsa(part.flatten(0, 1)).view_as(part) for dsa, part in zip(DSA, parts) if len(part)]
    return torch.cat(done)[order.argsort()]  # in the order of x again


# ---- 3. Networks. GroupNorm with a channel a group is instance normalisation, without buffers ----


def plain_network(shape, classes: int, layers: list, norm: bool = True) -> nn.Module:
    """Convolutions (width, kernel), each with instance normalisation and ReLU, and halvings "avg"
    or "max"; then a linear layer. shape: (C, H, W) of the images."""
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
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(channels * side * side, classes))


def convnet(shape, classes: int, width: int = 128, depth: int = 3) -> nn.Module:
    """ConvNetD<depth>, of teachers and students (Section 4.1); 320,010 parameters for CIFAR-10."""
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
    net = torchvision.models.resnet18(norm_layer=lambda w: nn.GroupNorm(w, w), num_classes=classes)
    net.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    for module in net.modules():  # initialised as the others are, not as by torchvision
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return net


ARCHITECTURES = {"convnet": convnet, "alexnet": alexnet, "vgg11": vgg11, "resnet18": resnet18}

# ---- 4. Training on images: teachers (Section 3.1), evaluation (Section 4.1) ---------------------


def seed_all(*key) -> None:
    """Starts the random stream named `key`, such as (seed, "teacher", 3): one for each purpose."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def minibatches(n: int, batch: int, J: int) -> Tensor:
    """Indices of J mini-batches, (J, batch), batch <= n, on the CPU. Each pass over the n images is
    a fresh permutation, cut into batches, the last filled up with the first images of the pass."""
    in_a_pass = math.ceil(n / batch)
    permutations = torch.rand(math.ceil(J / in_a_pass), n).argsort(1)  # a row for each pass
    filled = permutations[:, torch.arange(in_a_pass * batch) % n]  # (passes, in_a_pass * batch)
    return filled.view(-1, batch)[:J]


def train(ell, theta: Tensor, optimizer, x, y, epochs: int, batch: int, normalise) -> None:
    """Passes over x (N, C, H, W), y (N,) in mini-batches with DSA. Updates theta (P,) in place. x:
    uint8, to be normalised, or network input already, which normalise(x) does not change."""
    batch = min(batch, len(x))
    index = minibatches(len(x), batch, epochs * math.ceil(len(x) / batch)).to(x.device)
    for several in index.split(max(1, 3 * 2**22 // (batch * x[0].numel()))):  # 50 MB
        for x_j, y_j in zip(augment(normalise(x[several])), y[several]):
            optimizer.zero_grad()
            ell(theta, x_j, y_j).backward()
            optimizer.step()


def train_teacher(ell, theta: Tensor, x, y, epochs, seed: tuple, lr: float, batch: int, normalise):
    """Yields a teacher's parameters, (P,) on the CPU, after each of the epochs, from theta (P,) on.
    Plain SGD, as MTT's: theta is all its state, and each epoch has a random stream of its own."""
    theta = theta.to(x.device, copy=True).requires_grad_()
    optimizer = torch.optim.SGD([theta], lr)
    for epoch in epochs:
        seed_all(*seed, "epoch", epoch)
        train(ell, theta, optimizer, x, y, 1, batch, normalise)
        yield theta.detach().to("cpu", copy=True)  # not a view of the live weights


def train_network(ell, theta: Tensor, x, y, epochs, lr: float, batch: int, normalise) -> Tensor:
    """A network of the evaluation, trained from theta (P,) on. The paper is silent; nearly as MTT:
    SGD with momentum .9, weight decay 5e-4, DSA, a tenth of the rate in the second half."""
    theta = theta.to(x.device, copy=True).requires_grad_()
    optimizer = torch.optim.SGD([theta], lr, momentum=0.9, weight_decay=5e-4)
    train(ell, theta, optimizer, x, y, epochs - epochs // 2, batch, normalise)
    if epochs > 1:  # `train` does not take 0
        optimizer.param_groups[0]["lr"] = lr / 10
        train(ell, theta, optimizer, x, y, epochs // 2, batch, normalise)
    return theta.detach()


@torch.no_grad()
def confusion_matrix(net: nn.Module, theta: Tensor, x: Tensor, y: Tensor, normalise) -> Tensor:
    """Entry (r, c): how many of the images x of class r the network takes for class c."""
    nn.utils.vector_to_parameters(theta, net.parameters())
    scores = torch.cat([net(normalise(part)) for part in x.split(250)])  # (N, classes)
    n = scores.shape[1]
    return torch.bincount(n * y + scores.argmax(1), minlength=n * n).view(n, n)


# ---- 5. Normalisation and ZCA (Section 4.2); the real images to begin with -----------------------


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
        """images: uint8 (N, C, H, W). eps: as MTT. Raises UserError if M would be too large."""
        if zca and images[0].numel() > 20000:
            raise UserError("the images are too large for ZCA: use --no-zca, or a smaller --size")
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
        """uint8 (..., C, H, W) -> network input, float32; floats are that already and stay."""
        if images.is_floating_point():
            return images
        z = torch.empty(images.shape, device=self.mean.device)
        for part, out in zip(images.split(1000), z.split(1000)):
            x = part.to(z.device) / 255 - self.mean
            out.copy_((x.flatten(-3) @ self.scale).view_as(x) if self.zca else x * self.scale)
        return z

    def on_device(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Images and labels on the device, whitened; without ZCA as uint8, a quarter as large."""
        x, y = (tensor.to(self.mean.device) for tensor in pair)
        return (self(x) if self.zca else x), y

    def inverse(self, z: Tensor) -> Tensor:
        """Network input (N, C, H, W) -> pixels on the scale 0 to 1, not clamped."""
        if self.zca:  # M is symmetric: z = (x - mean) M  <=>  M (x - mean)^T = z^T
            return torch.linalg.solve(self.scale, z.flatten(1).T).T.view_as(z) + self.mean
        return z / self.scale + self.mean


def real_images(data: "Dataset", normalise: Normalisation, ipc: int, choose=None):
    """`ipc` training images of each class, normalised, class after class, and their labels. choose:
    maps a class's images to indices (default: random ones, line 1). Raises UserError if too few."""
    images, labels = data.train
    chosen = []
    for c, name in enumerate(data.classes):
        members = torch.nonzero(labels == c)[:, 0]
        if len(members) < ipc:
            raise UserError(f"IPC {ipc} is too large: class {name} has {len(members)} images")
        some = choose(normalise(images[members])) if choose else torch.randperm(len(members))[:ipc]
        chosen.append(members[some])
    index = torch.cat(chosen)
    return normalise(images[index]), labels[index].to(normalise.mean.device)


# ==== The method ends here. What follows serves it: data, files, speed, processes, commands. ======


class UserError(Exception):
    """Something the user can mend. The command line prints it as one line and exits with code 2."""


# ---- 6. Settings (default < preset < what the user typed) and datasets ---------------------------
# The paper's (Sections 4.1, 4.2, 4.5); lr_teacher, batch_real: MTT's; epsilon, covid's T: guesses
DEFAULTS = {"epochs": 50, "lr_teacher": 0.01, "batch_real": 256, "iterations": 5000, "width": 128}
DEFAULTS |= {"method": "iadd", "lr_w": 1e-4, "epsilon": 0.1, "nets": 5}
SMALL = {"epochs": 10, "lr_teacher": 0.02, "batch_real": 64, "iterations": 200, "width": 32}
# MTT's, and ZCA where MTT has it; covid: MTT's for images of 128 x 128; shapes: ours
PRESETS = """
dataset       ipc teachers steps expert_epochs max_start_epoch lr_img lr_alpha alpha batch   zca
cifar10         1      200    50             2               2    100     1e-7   .01  None  True
cifar10        10      200    30             2              20    100     1e-5  .001  None  True
cifar10        50      200    30             2              40   1000     1e-5  .001  None False
cifar100        1      200    20             3              20   1000     1e-5   .01  None  True
cifar100       10      200    20             2              20   1000     1e-5   .01  None False
cifar100       50      200    80             2              40   1000     1e-5   .01   125  True
tinyimagenet    1      100    10             2              10  10000     1e-4   .01  None False
tinyimagenet   10      100    20             2              40  10000     1e-4   .01   200 False
covid          20      100    20             2              10   1000     1e-6   .01  None False
shapes          1        6    10             2               4    300     1e-5   .03  None False
"""


def preset(name: str, ipc: int) -> dict:
    """Settings of a dataset (a folder: of cifar10) at the largest IPC <= ipc, else at the least."""
    header, *lines = [line.split() for line in PRESETS.strip().splitlines()]
    table = [dict(zip(header, [line[0], *map(ast.literal_eval, line[1:])])) for line in lines]
    rows = [row for row in table if row["dataset"] == name] or table[:3]  # CIFAR-10's
    up_to_ipc = [row for row in rows if row["ipc"] <= ipc] or rows[:1]
    return {**DEFAULTS, **(SMALL if name == "shapes" else {}), **up_to_ipc[-1]}


@dataclass
class Dataset:
    """train and test: uint8 images (N, C, H, W), H = W, and int64 labels (N,), index of classes."""

    name: str
    classes: list[str]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    shape = property(lambda self: tuple(self.train[0].shape[1:]))  # (C, H, W)


def load_dataset(name: str, data_dir: Path, size=None, only=()) -> Dataset:
    """One of PRESETS, or a folder {train,test}/<class>/*; with `size` pixels, of classes `only`."""
    if name == "tinyimagenet":
        return read_dataset(name, *list_tiny_imagenet(data_dir), size, only)
    if name == "covid":
        return read_dataset(name, *list_covid(data_dir, only), size or 112, only, "L")
    if name in ("cifar10", "cifar100", "shapes"):
        if size or only:
            raise UserError(f"--size and --classes are for datasets of image files, not for {name}")
        return make_shapes() if name == "shapes" else load_cifar(name, data_dir)
    if not Path(name).is_dir():
        raise UserError(f"unknown dataset {name!r}: neither one of those in --help, nor a folder")
    train, test = (image_files(Path(name) / part) for part in ("train", "test"))
    return read_dataset(Path(name).resolve().name, train, test, size, only)


def load_cifar(name: str, data_dir: Path) -> Dataset:
    """CIFAR-10 or CIFAR-100 [53], downloaded to data_dir on first use (170 MB)."""
    cifar = getattr(torchvision.datasets, name.upper())
    try:
        with filelock.FileLock(f"{data_dir}.lock"):  # one process downloads, the others find it
            parts = [cifar(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot download {cifar.url} to {data_dir}/: {error}") from None
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    return Dataset(name, parts[0].classes, *zip(images, [torch.tensor(p.targets) for p in parts]))


def image_files(root: Path) -> dict[str, list[Path]]:
    """{class: files}: those in each folder of root, or in its folder "images"; nothing hidden."""
    kinds, found = torchvision.datasets.folder.IMG_EXTENSIONS, {}
    for folder in sorted(path for path in root.glob("[!.]*") if path.is_dir()):
        inner = folder / "images" if (folder / "images").is_dir() else folder
        found[folder.name] = sorted(f for f in inner.glob("[!.]*") if f.suffix.lower() in kinds)
    return found


def list_tiny_imagenet(root: Path):
    """{class: files} to train on, of Tiny ImageNet [80], and to test on: its validation images."""
    if not (root / "val/val_annotations.txt").exists():
        raise UserError(f"--data-dir {root} is not the folder tiny-imagenet-200, see README")
    test = {}
    for line in (root / "val/val_annotations.txt").read_text().splitlines():
        file, name, *_ = line.split("\t")
        test.setdefault(name, []).append(root / "val/images" / file)
    return image_files(root / "train"), test


def list_covid(root: Path, only=()):
    """{class: files} to train and to test on, of COVID-19 Radiography [81]: 8:2, Section 4.1."""
    train, test, found = {}, {}, image_files(root)
    for name in only or ["COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"]:
        if name not in found:
            raise UserError(f"--data-dir {root} has no folder {name} but {[*found]}, see README")
        files = found[name]
        files.sort(key=lambda f, c=name: hashlib.sha256(f"{c}/{f.name}".encode()).digest())
        cut = round(0.8 * len(files))
        train[name], test[name] = files[:cut], files[cut:]
    return train, test


def read_image(path: Path, size: int | None, mode: str) -> np.ndarray:
    """An image file as uint8 (C, H, W), C = 1 for mode "L", 3 for "RGB". Raises UserError."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # 16 or 32 bits, which Pillow would clip at 255
                raise ValueError(f"its pixels are of mode {image.mode}; 8-bit images are needed")
            if max(image.size) > 512 and not size:  # the most --size takes
                raise ValueError(f"it has {image.size} pixels; --size N makes all images N x N")
            image = ImageOps.exif_transpose(image).convert(mode)
            if size:
                image = image.resize((size, size), Image.Resampling.BILINEAR)  # antialiased
            return np.ascontiguousarray(np.moveaxis(np.atleast_3d(image), 2, 0))
    except Exception as error:  # Pillow raises OSError, SyntaxError, DecompressionBombError, ...
        raise UserError(f"cannot read the image {path}: {error}") from None


def read_dataset(name: str, train: dict, test: dict, size, only, mode: str = "RGB") -> Dataset:
    """From {class: files} of both parts; only: the classes to use, or all. Raises UserError."""
    classes, parts = sorted({*(only or [*train, *test])}), (train, test)
    lacking = [c for c in classes if not (train.get(c) and test.get(c))]
    if lacking or len(classes) < 2:
        found = f"no training or no test images of {lacking}" if lacking else "no two classes"
        raise UserError(f"{name} has {found}, but {[*train]} and {[*test]}; see README")
    files = [file for part in parts for c in classes for file in part[c]]
    labels = [k for part in parts for k, c in enumerate(classes) for _ in part[c]]
    reading = ThreadPoolExecutor().map(lambda file: read_image(file, size, mode), files)
    arrays = list(progress(reading, desc=f"reading {name}", total=len(files)))
    side = int(np.bincount([array.shape[1] for array in arrays]).argmax())  # the commonest
    for file, array in zip(files, arrays):
        if array.shape[1:] != (side, side):
            raise UserError(f"{file} has {array.shape[1:]} pixels, not {side, side}; see --size")
    images = torch.from_numpy(np.stack(arrays))
    lengths = [sum(len(part[c]) for c in classes) for part in parts]
    name = "-".join([name, *(classes if only else []), *([f"{size}px"] if size else [])])
    return Dataset(name, classes, *zip(images.split(lengths), torch.tensor(labels).split(lengths)))


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
    for pattern in SHAPES.values():
        x = grid[None, :] - draw(-0.3, 0.3)  # (train + test, 1, 1, 32)
        y = grid[:, None] - draw(-0.3, 0.3)  # (train + test, 1, 32, 1)
        tilt, scale = draw(-0.3, 0.3), draw(0.4, 0.8)
        u = (np.cos(tilt) * x - np.sin(tilt) * y) / scale
        v = (np.sin(tilt) * x + np.cos(tilt) * y) / scale
        inside = (pattern(u, v) * scale * 32 / 2 + 0.5).clip(0, 1)  # with soft edges
        image = draw(0, 0.5, 3) + inside * draw(0.2, 0.5, 3)
        image = image * (1 + draw(-0.3, 0.3) * x + draw(-0.3, 0.3) * y)
        image += rng.normal(0, 0.15, image.shape)
        images.append(torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)))
    parts = torch.stack(images).split([train, test], 1)  # (10, train or test, 3, H, W)
    labels = [torch.arange(len(SHAPES)).repeat_interleave(k) for k in (train, test)]
    return Dataset("shapes", list(SHAPES), *zip([part.flatten(0, 1) for part in parts], labels))


# ---- 7. Files (*.pt are written whole or not at all; read as data, not code), speed --------------

CHECKPOINT_SECONDS = 60  # at least, from one to the next
progress = functools.partial(tqdm, mininterval=0.2 if sys.stderr and sys.stderr.isatty() else 30)
# What files hold: names, types, lengths. A letter is one length throughout; no length: a number
TEACHER = "thetas float32 E P"
RESULT = "images float32 N C H H, labels int64 N, alpha float32, iteration int64"
CHANNELS = ", mean float32 C 1 1, scale float32 C 1 1"
ZCA = ", mean float32 C H H, scale float32 D D"  # D = C H H
HISTORY = "log float64 R 8, W float64 P, mismatch float32 P"
TO_RESUME = f"{RESULT}, {HISTORY}, m_images float32 N C H H, m_alpha float32"
SMALLEST = {"width": 1, "depth": 1, "alpha": 1e-12, "labels": 0, "thetas": -math.inf}


def fingerprint(tensors) -> int:
    return functools.reduce(lambda crc, x: zlib.crc32(x.contiguous().numpy(), crc), tensors, 0)


def save(content: dict, path: Path) -> None:
    """torch.save to another name, then renamed: `path` is the old file or the new, always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(content, path.with_suffix(".tmp"))
    except RuntimeError as error:  # the disk is full, for example
        raise OSError(f"cannot write {path.with_suffix('.tmp')}: {error}") from None
    os.replace(path.with_suffix(".tmp"), path)


def check(found: dict, fields: str, sizes: dict) -> None:
    """Raises if a field is missing, misfits or is not finite. sizes: of letters; grows."""
    for field in fields.split(", "):
        name, kind, *letters = field.split()
        x = found[name] if letters else torch.as_tensor(found[name])
        lengths = [sizes.setdefault(letter, n) for letter, n in zip(letters, x.shape, strict=True)]
        fine = x.dtype == getattr(torch, kind) and lengths == [*x.shape] and x.isfinite().all()
        if not fine or (name in SMALLEST and x.min() < SMALLEST[name]):  # min() of none raises
            raise ValueError(f"no {field!r} with {sizes}")


def load(path: Path, fields: str, wanted: dict, sizes: dict, remedy="make it anew") -> dict:
    """What `save` wrote, or UserError. Settings wanted as None are taken from the file."""
    try:
        code = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with zipfile.ZipFile(path) as records:  # as which torch saves, with a CRC for each record
            if code or records.testzip():
                raise ValueError(f"it would run {code}" if code else "wrong CRC")
        content = torch.load(path, map_location="cpu", mmap=fields == TEACHER, weights_only=True)
        given = content["settings"]
        given.setdefault("precision", "float32")  # a file older than --precision
        check(given, "zca bool, width int64, depth int64", {})
        wanted.update({k: given.get(k) for k, v in wanted.items() if v is None})
        wrong = [f"{k} {given.get(k)}, not {v}" for k, v in wanted.items() if given.get(k) != v]
        if fields.startswith(RESULT):
            fields += ZCA if given["zca"] else CHANNELS
            if content["labels"].max() >= len(content["classes"]):
                raise ValueError("a label of no class")
        if not wrong:  # else it has other sizes, too
            check(content, fields, {"1": 1, "8": 8, **sizes})
    except Exception as error:  # torch raises half a dozen types for a damaged file
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is missing, damaged or not iadd.py's: {remedy} ({why})") from None
    if wrong:
        raise UserError(f"{path} has {', '.join(wrong)}; {remedy}")
    return content


def claim(folder: Path, args: argparse.Namespace):
    """The lock of a folder, for `with`. --restart: what is there becomes folder.old-<time>."""
    held = filelock.FileLock(f"{folder.parent}/.{folder.name}.{args.rank}.lock").acquire(timeout=0)
    if args.restart and args.rank == 0 and folder.exists():
        folder.rename(f"{folder}.old-{datetime.datetime.now():%Y%m%d-%H%M%S.%f}")
    sum_over_ranks(torch.zeros(1))  # the others wait
    return held


def accelerated(make, examples, images: int, wanted: bool | None):
    """make(lambda f: f), or the same function made faster: make(torch.compile), on a GPU recorded
    as a CUDA graph (of fixed shapes; each call overwrites the last result). If that fails with the
    examples, but for lack of memory, or is off by half, it is left out. wanted: --compile,
    --no-compile (nor a graph), or None to compile if `images` in all steps repay the time."""
    examples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in examples)
    plain, cuda = make(lambda f: f), examples[0].is_cuda
    compiles = wanted or (wanted is None and images >= (3_000_000 if cuda else 120_000))
    if wanted is False or not (compiles or cuda):
        return plain
    try:
        if compiles:
            print("compiling first, up to a minute (--no-compile does without)", file=sys.stderr)
            torch.compiler.reset()  # a process may compile one function for eight networks only
        fast = make(functools.partial(torch.compile, dynamic=False)) if compiles else plain
        if cuda:
            gc.collect()  # an old graph that Python frees only while this is recorded spoils it
            fast = torch.cuda.make_graphed_callables(fast, examples)
        pairs = zip(trial(fast, examples), trial(plain, examples))
        if all((a - b).norm() <= 0.5 * b.norm() for a, b in pairs):  # in bf16 they differ by 0.15
            return fast
        why = "it gives other results"
    except Exception as error:  # no C++ compiler, no Triton, an unsupported Python, ...
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
            raise
        why = f"{type(error).__name__}: {error}".splitlines()[0][:99]
    print(f"without {'torch.compile' if compiles else 'CUDA graphs'}: {why}", file=sys.stderr)
    fast = None  # frees its graph
    return accelerated(make, examples, 0, None) if compiles else plain  # perhaps as a graph


def trial(function, inputs) -> list[Tensor]:
    """function(*inputs) less inputs[0] (by broadcasting), and the gradients of its square."""
    moved = function(*inputs) - inputs[0].detach()
    learned = [x for x in inputs if x.requires_grad]
    return [moved.detach(), *torch.autograd.grad(moved.square().sum(), learned)]


def choose_precision(args: argparse.Namespace, settings: dict) -> None:
    """As typed, or as in a file that `load` found, or bf16 if the device has arithmetic for it."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    native = torch.cuda.is_bf16_supported(False) if args.device.type == "cuda" else native
    args.precision = settings["precision"] = settings["precision"] or ("float32", "bf16")[native]
    if args.precision == "bf16" and not native:
        print("bf16 will be slow: this device has no arithmetic for it", file=sys.stderr)


def tune(device: torch.device) -> None:
    """cuDNN times its convolutions and chooses. glibc's malloc keeps large blocks that are freed:
    the system would clear every page before it gave it out again, up to half of a step's time."""
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs are recorded on the current one
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another system, another malloc
        for option, value in ((-4, 0), (-1, -1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, and
            ctypes.CDLL(None).mallopt(option, value)  # M_ARENA_MAX: what one frees is for all


def sum_over_ranks(x: Tensor) -> Tensor:
    """In place; everybody waits for it."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


# ---- 8. Commands ---------------------------------------------------------------------------------


def pick(args: argparse.Namespace, names: str) -> dict:
    return {name: getattr(args, name) for name in names.split()}


def prepare(args: argparse.Namespace) -> tuple[Dataset, dict, Path]:
    """Fills in what was not typed. Returns data, settings of teachers and results, their folder."""
    idle = {}  # {option: whether the others leave it without effect}
    if args.command == "distill":
        idle = {"lr_w": args.method not in (None, "iadd"), "epsilon": args.method != "ddpp"}
        idle |= dict.fromkeys(("nets", "eval_epochs", "lr"), not args.eval_every)
    elif args.command == "eval":
        idle = {"method": args.distilled or args.name, "distilled": "distilled" not in args.on}
    for key, is_idle in idle.items():
        if is_idle and getattr(args, key) is not None:
            raise UserError(f"--{key.replace('_', '-')} has no effect with the other options")
    args.ipc = args.ipc or 1
    for key, value in preset(args.dataset, args.ipc).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.command != "teachers":
        seed = args.seed if args.command == "distill" else 0  # eval's --seed is its networks'
        args.name = args.name or f"ipc{args.ipc}_{args.method}_seed{seed}"
        if args.name != Path(args.name).name or args.name.startswith(("teachers", "..")):
            raise UserError(f"--name {args.name} cannot be the name of a result's folder")
    data = load_dataset(args.dataset, args.data_dir, args.size, args.classes)
    args.depth = args.depth or max(1, round(math.log2(data.shape[1])) - 2)  # Sections 4.2, 4.5
    P = len(flat_parameters(build("convnet", data, args)))  # says at once if images are too small
    args.sizes = {"C": data.shape[0], "H": data.shape[1], "D": math.prod(data.shape), "P": P}
    sizes = f"{len(data.train[0])} training and {len(data.test[0])} test images of {data.shape}"
    print(f"{data.name}: {sizes} in {len(data.classes)} classes: {', '.join(data.classes)}")
    shared = {"dataset": data.name, "fingerprint": fingerprint(data.train)}
    name = f"{data.name}_{'zca' if args.zca else 'std'}_convnet-d{args.depth}-w{args.width}"
    return data, {**shared, **pick(args, "zca width depth")}, args.runs / name


def build(arch: str, data: Dataset, args: argparse.Namespace) -> nn.Module:
    """A new network, on the device; args.width and args.depth are a ConvNet's. Raises UserError."""
    halvings = {"convnet": args.depth, "alexnet": 3, "vgg11": 5, "resnet18": 4}[arch]
    if data.shape[1] >> halvings == 0:
        raise UserError(f"{data.shape[1]} pixels cannot be halved {halvings} times, as {arch} does")
    sizes = pick(args, "width depth") if arch == "convnet" else {}
    return ARCHITECTURES[arch](data.shape, len(data.classes), **sizes).to(args.device)


def fast_loss(net: nn.Module, x: Tensor, y: Tensor, normalise, args, passes: int, wanted):
    """`cross_entropy` of a network, made faster for mini-batches of x, y and so many passes."""
    loss, batch = cross_entropy(net, args.precision), min(args.batch_real, len(x))
    examples = (flat_parameters(net).requires_grad_(), normalise(x[:batch]), y[:batch])
    return accelerated(lambda faster: faster(loss), examples, passes * len(x), wanted)


def fast_student(net: nn.Module, theta: Tensor, d: Distillation, m: Matching, args):
    """`unroll` with a network's `student_step`, made faster; a step counts as 4 of a training."""
    J = m.J if args.device.type == "cuda" else 2  # a CUDA graph is of all steps
    examples = (theta.to(args.device), d.alpha, *student_batches(d.images, d.labels, m.batch, J))
    make = functools.partial(make_student, net, args.precision)
    return accelerated(make, examples, 4 * args.iterations * m.S * m.J * m.batch, args.compile)


def command_teachers(args: argparse.Namespace) -> None:
    """Train teachers on the real data and keep their parameters after every epoch (Section 3.1)."""
    shorten = args.epochs is None and args.ipc is not None
    data, settings, folder = prepare(args)
    if shorten:  # to those that distill reads with the preset of this IPC
        args.epochs = args.max_start_epoch - 1 + args.expert_epochs
    settings |= pick(args, "lr_teacher batch_real seed precision")
    paths = [folder / "teachers" / f"{k:03d}.pt" for k in range(args.teachers)]
    with claim(folder / "teachers", args):
        remedy = "--restart trains all anew, --runs DIR chooses another folder"
        found = {p: load(p, TEACHER, settings, args.sizes, remedy) for p in paths if p.exists()}
        choose_precision(args, settings)
        todo = [p for p in paths if p not in found or len(found[p]["thetas"]) <= args.epochs]
        print(f"{folder}/teachers: {len(paths) - len(todo)} of {len(paths)} are complete")
        sum_over_ranks(torch.zeros(1))  # before anyone writes, all have looked
        if todo:
            print(f"settings: {settings}, {args.epochs} epochs; {args.machine}")
            train_teachers(args, data, settings, todo[args.rank :: args.ranks], found)
        sum_over_ranks(torch.zeros(1))  # nobody leaves while others write


def train_teachers(args, data: Dataset, settings: dict, paths: list[Path], found: dict) -> None:
    """Trains the teachers at `paths` to the end, from what was found of them. Raises UserError."""
    normalise = Normalisation.fit(data.train[0], args.zca, args.device)
    (x, y), test = normalise.on_device(data.train), normalise.on_device(data.test)
    net = build("convnet", data, args)
    ell = fast_loss(net, x, y, normalise, args, args.teachers * args.epochs, args.compile)
    how = (args.lr_teacher, args.batch_real, normalise)
    for path in paths:
        seed = (args.seed, "teacher", int(path.stem))
        seed_all(*seed)
        theta = flat_parameters(build("convnet", data, args)).cpu()
        thetas = list(found[path]["thetas"]) if path in found else [theta]
        epochs = range(len(thetas) - 1, args.epochs)
        bar = progress(epochs, desc=f"teacher {path.stem}", unit="epoch", leave=False)
        saved = time.time()
        try:
            for theta in train_teacher(ell, thetas[-1], x, y, bar, seed, *how):
                if not theta.isfinite().all():
                    raise UserError(f"teacher {path.stem} diverged: lower --lr-teacher")
                thetas.append(theta)
                if time.time() > saved + CHECKPOINT_SECONDS:
                    save({"thetas": torch.stack(thetas), "settings": settings}, path)
                    saved = time.time()
        finally:  # also if interrupted
            if len(thetas) - 1 > epochs.start:
                save({"thetas": torch.stack(thetas), "settings": settings}, path)
        hits = confusion_matrix(net, theta.to(args.device), *test, normalise).trace()
        tqdm.write(f"teacher {path.stem}: {100 * hits / len(test[1]):.1f} % test accuracy")


def command_distill(args: argparse.Namespace) -> None:
    """Distil a dataset into a few images per class (Algorithm 1)."""
    most = args.teachers  # as typed, not the preset's
    data, settings, folder = prepare(args)
    args.batch = min(args.batch or math.inf, args.ipc * len(data.classes))
    if args.segments < args.ranks:
        raise UserError(f"{args.ranks} processes need --segments {args.ranks} or more to share out")
    paths = sorted((folder / "teachers").glob("[0-9]*.pt"))[:most]
    epochs = args.max_start_epoch - 1 + args.expert_epochs
    remedy = f"python iadd.py teachers --ipc {args.ipc} --epochs {epochs} --teachers "
    remedy += f"{most or len(paths) or args.teachers}, with the same options on data and network"
    files = [load(path, TEACHER, settings, args.sizes, remedy) for path in paths]
    teachers = [file["thetas"][: epochs + 1] for file in files]
    if len(teachers) < (most or 1) or min(map(len, teachers)) <= epochs:
        raise UserError(f"{len(paths)} teachers in {folder}, too few or short; run first: {remedy}")
    names = "ipc method steps expert_epochs max_start_epoch batch segments lr_img lr_alpha alpha "
    settings |= pick(args, names + "lr_w epsilon seed precision")
    settings |= {"teachers": len(teachers), "teachers_fingerprint": fingerprint(teachers)}
    run = Run(args, data, settings, teachers, folder / args.name)
    if run.d.t < args.iterations:
        print(f"settings: {settings}, {args.iterations} iterations; {args.machine}")
        with claim(run.out, args):
            run.to_the_end()
    print(f"{run.out}/distilled.pt is at iteration {run.d.t}, alpha {run.d.alpha:.5f}")


class Run:
    """A distillation under way. good: its last state that was found finite, for distilled.pt."""

    TENSORS = ("images", "W", "mismatch", "m_images", "m_alpha")  # that change
    COLUMNS = "iteration,time,loss,alpha,W_min,W_1pct,W_median,W_mean"  # of log.csv

    def __init__(self, args, data: Dataset, settings: dict, teachers: list[Tensor], out: Path):
        self.args, self.data, self.teachers, self.out = args, data, teachers, out
        path = out / "distilled.pt"
        if path.exists() and not args.restart:
            sizes = {**args.sizes, "N": args.ipc * len(data.classes)}
            remedy = "--restart begins anew, --name NAME keeps both"
            good = load(path, TO_RESUME, settings, sizes, remedy)
        else:
            seed_all(args.seed, "distill")
            norm = Normalisation.fit(data.train[0], args.zca, args.device)
            images, labels = real_images(data, norm, args.ipc)
            good = {"settings": settings, "classes": data.classes, "labels": labels, "iteration": 0}
            good |= {"images": images, "mean": norm.mean, "scale": norm.scale, "alpha": args.alpha}
        choose_precision(args, settings)
        images, labels = good["images"].to(args.device), good["labels"].to(args.device)
        self.normalise = Normalisation(good["mean"].to(args.device), good["scale"].to(args.device))
        rates = (args.lr_img, args.lr_alpha, args.lr_w)
        self.d = Distillation(images, labels, good["alpha"], teachers[0].shape[1], *rates)
        self.good, self.log, self.losses = good, [], []  # losses: since the last row of the log
        if good["iteration"] > 0:
            for name in self.TENSORS:
                getattr(self.d, name).data.copy_(good[name])
            self.d.t, self.log = good["iteration"], good["log"].tolist()

    def to_the_end(self) -> None:
        """Algorithm 1, from iteration d.t to T. Saves, also if interrupted."""
        args, d = self.args, self.d
        mine = range(args.rank, args.segments, args.ranks)
        d.optimizer.register_step_pre_hook(self.sum_gradients)
        names = "steps expert_epochs max_start_epoch batch segments method epsilon seed"
        m = Matching(*pick(args, names).values())  # in the order of its fields
        self.keep()
        self.save()
        if d.t == 0:
            self.draw()
        student = fast_student(build("convnet", self.data, args), self.teachers[0][0], d, m, args)
        try:
            with progress(total=args.iterations, initial=d.t, unit="it") as self.bar:
                distil(d, student, self.teachers, m, args.iterations, mine, self.after_iteration)
        finally:
            self.save()

    def sum_gradients(self, *_) -> None:
        """Adds them up over all processes, before a step of the optimizer."""
        for x in (self.d.alpha, self.d.W, self.d.images):
            if x.grad is not None:  # only IADD learns W
                sum_over_ranks(x.grad)

    def after_iteration(self, loss: Tensor) -> None:
        """Every tenth time, logs, draws, saves. (To look at a number is to wait for a GPU.)"""
        args, d, last = self.args, self.d, self.d.t == self.args.iterations
        self.losses.append(sum_over_ranks(loss))
        self.bar.update()
        test = args.eval_every and d.t % args.eval_every == 0
        if not (last or test or d.t % 10 == 0):
            return
        if not (d.alpha > 0 and all(x.isfinite().all() for x in (loss, d.alpha, d.images, d.W))):
            bad = f"diverged by {d.t} (loss {loss:.4g}, alpha {d.alpha:.4g}); kept: iteration"
            raise UserError(f"{bad} {self.good['iteration']}; --restart with lower learning rates")
        self.log_row()
        if test:
            now, lr = (d.images.detach(), d.labels), args.lr or d.alpha.item()
            what = ("distilled", "convnet", lambda: now, lr, self.out, d.t)
            evaluate(args, self.data, self.normalise, *what, compile=False)  # it would undo ours
        if last or d.t % (10 * math.ceil(args.iterations / 200)) == 0:  # 20 times
            self.draw()
        self.keep()
        if time.time() > self.saved + CHECKPOINT_SECONDS:
            self.save()

    def log_row(self) -> None:
        """A row of log.csv. Its loss is the mean since the row before."""
        d = self.d
        loss, alpha = float(sum(self.losses) / len(self.losses)), d.alpha.item()
        spread = d.W.detach().sort().values[[0, len(d.W) // 100, len(d.W) // 2]].tolist()
        self.log.append([d.t, time.time(), loss, alpha, *spread, d.W.mean().item()])
        self.losses = []
        self.bar.set_postfix_str(f"loss {loss:.4g} alpha {alpha:.4g}", refresh=False)
        if self.args.rank == 0:
            path = self.out / "log.csv"
            np.savetxt(path, self.log, "%.17g", ",", header=self.COLUMNS, comments="")

    def keep(self) -> None:
        """Makes a copy of all that changes."""
        state = {name: getattr(self.d, name).detach().clone() for name in self.TENSORS}
        state |= {"alpha": self.d.alpha.item(), "iteration": self.d.t, "machine": self.args.machine}
        log = torch.tensor(self.log, dtype=torch.float64).view(len(self.log), 8)
        self.good = {**self.good, **state, "log": log}

    def draw(self) -> None:
        """The images as a person sees them, `ipc` in a row (Fig. 4, 5, 8)."""
        if self.args.rank == 0:
            pixels = self.normalise.inverse(self.d.images.detach()).clamp(0, 1)
            pixels = F.interpolate(pixels, scale_factor=math.ceil(96 / self.data.shape[1]))
            path = self.out / f"images_{self.d.t:05d}.png"
            nrow = self.args.ipc if self.args.ipc > 1 else 10
            torchvision.utils.save_image(pixels, path, nrow=nrow, padding=4, pad_value=1)

    def save(self) -> None:
        if self.args.rank == 0:
            save(self.good, self.out / "distilled.pt")
        self.saved = time.time()


def command_eval(args: argparse.Namespace) -> None:
    """Train fresh networks on the distilled images and test them on real ones (Section 4.1)."""
    args.name = args.name or (args.distilled and args.distilled.stem)
    data, shared, folder = prepare(args)
    choose_precision(args, vars(args))
    out = folder / args.name
    path = args.distilled or out / "distilled.pt"
    if "distilled" in args.on:
        other = {"fingerprint": None} if args.distilled else {}  # decoders differ, so pixels do
        content = load(path, RESULT, shared | other, args.sizes, "options must fit")
        if content["classes"] != data.classes:
            raise UserError(f"{path} is of the classes {content['classes']}, {data.name} of others")
        args.ipc = len(content["labels"]) // len(data.classes)  # --name does not tell it
        normalise = Normalisation(*(content[key].to(args.device) for key in ("mean", "scale")))
    else:
        normalise = Normalisation.fit(data.train[0], args.zca, args.device)

    def training_set(on: str):
        if on == "distilled":
            return content["images"].to(args.device), content["labels"].to(args.device)
        if on == "full":
            return normalise.on_device(data.train)
        if on == "random":
            return real_images(data, normalise, args.ipc)
        theta = load(folder / "teachers/000.pt", TEACHER, shared, args.sizes)["thetas"][-1]
        choose = functools.partial(herding, build("convnet", data, args), theta, args.ipc)
        return real_images(data, normalise, args.ipc, choose)

    sets = {on: training_set(on) for on in args.on}
    of = path if "distilled" in args.on else data.name
    print(f"\n{of}, IPC {args.ipc}: test accuracy after the last epoch, mean ± std")
    print("trained on  network         accuracy  networks  epochs        lr  seconds")
    for on in args.on:
        sample = functools.partial(training_set if on == "random" else sets.get, on)  # random: anew
        lr = args.lr or (float(content["alpha"]) if on == "distilled" else args.lr_teacher)
        t = int(content["iteration"]) if on == "distilled" else None
        for arch in args.arch:
            evaluate(args, data, normalise, on, arch, sample, lr, out, t, args.compile)


@torch.no_grad()
def herding(net: nn.Sequential, theta: Tensor, ipc: int, x: Tensor) -> Tensor:
    """Herding [83]: indices (ipc,) into x (N, C, H, W). Features: the input of the last layer."""
    nn.utils.vector_to_parameters(theta.to(x.device), net.parameters())
    features = torch.cat([net[:-1](part) for part in x.split(500)])  # (N, features)
    chosen = []
    for n in range(1, ipc + 1):
        means = (features[chosen].sum(0) + features) / n  # of those chosen and one more
        distance = (features.mean(0) - means).norm(dim=1)
        distance[chosen] = math.inf
        chosen.append(distance.argmin().item())
    return torch.tensor(chosen)


def evaluate(args, data: Dataset, normalise, on, arch, sample, lr, out: Path, t, compile) -> None:
    """Trains new networks on what `sample()` returns, tests them, prints and writes a row."""
    start, test = time.time(), normalise.on_device(data.test)
    epochs = args.eval_epochs or (args.epochs if on == "full" else 1000)
    net, classes = build(arch, data, args), len(data.classes)
    ell = fast_loss(net, *sample(), normalise, args, args.nets * epochs, compile)
    matrices = torch.zeros(args.nets, classes, classes, dtype=torch.int64)
    mine = range(args.rank, args.nets, args.ranks)
    for k in progress(mine, desc=f"{arch} on {on}", unit="network", leave=False):
        seed_all(args.seed, "eval", on, arch, k)
        theta = flat_parameters(build(arch, data, args))
        theta = train_network(ell, theta, *sample(), epochs, lr, args.batch_real, normalise)
        matrices[k] = confusion_matrix(net, theta, *test, normalise)
    scores = [100 * m.trace().item() / m.sum().item() for m in sum_over_ranks(matrices)]
    mean, std = np.mean(scores), np.std(scores, ddof=1) if len(scores) > 1 else 0.0
    score, seconds = f"{mean:.1f} ± {std:.1f} %", time.time() - start
    tqdm.write(f"{on:<12}{arch:<10}{score:>14}{args.nets:>10}{epochs:>8}{lr:>10.5f}{seconds:>9.0f}")
    row = {"on": on, "arch": arch, "iteration": t, "mean": mean, "std": std, "accuracies": scores}
    row |= {"lr": lr, "epochs": epochs, "dataset": data.name, **pick(args, "ipc seed precision")}
    row |= {"seconds": seconds, "confusion": matrices.sum(0).tolist()}
    if args.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def command_plot(args: argparse.Namespace) -> None:
    """Draw the course of a distillation, its weights W beside what they weigh, and its images."""
    from matplotlib.figure import Figure

    out = args.folder
    content = load(out / "distilled.pt", HISTORY, {}, {})
    path, x = out / "results.jsonl", r"(\d+\.\d+(?:e-\d+)?)"  # skips a line that was cut
    row = rf'"arch": "(\w+)", "iteration": (\d+), "mean": {x}, "std": {x}'
    tests = re.findall(row, path.read_text(errors="replace") if path.exists() else "")
    columns = dict(zip(Run.COLUMNS.split(","), content["log"].T))
    figure = Figure((18, 8), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for ax, key in zip(axes[[0, 1, 2, 2, 2, 2]], list(columns)[2:]):  # loss, alpha, four of W
        ax.plot(columns["iteration"], columns[key], label=key)
    for arch in dict.fromkeys(test[0] for test in tests):
        mine = {int(t): (float(mean), float(std)) for a, t, mean, std in tests if a == arch}
        points = zip(*[(t, *mine[t]) for t in sorted(mine)])  # the last test of each iteration
        axes[3].errorbar(*points, marker="o", capsize=3, label=f"test accuracy of {arch}, %")
    axes[3].axhline(args.line, color="grey", linestyle="--")
    axes[4].plot(content["mismatch"].abs(), linewidth=0.3, label="|student - teacher|")  # Fig. 1
    axes[5].plot(content["W"], linewidth=0.3, label="W")  # Fig. 6, 7
    for ax, label in zip(axes, 4 * ["iteration"] + 2 * ["parameter, from the first layer on"]):
        ax.set_xlabel(label)
        ax.legend(*ax.get_legend_handles_labels())
    figure.savefig(out / "plot.png", dpi=130)
    pictures = [Image.open(path) for path in sorted(out.glob("images_*.png"))]
    if not pictures:
        raise UserError(f"{out} has no images_*.png to make evolution.gif of")
    first, *others = [x.reduce(math.ceil(max(x.size) / 1100)).quantize(128) for x in pictures]
    first.save(out / "evolution.gif", save_all=True, append_images=others, duration=250, loop=0)
    print(f"{out}/plot.png, {out}/evolution.gif")


# ---- 9. Command line -----------------------------------------------------------------------------


def between(low: float, high: float, kind: type = float):
    """An argparse type: a number from `low` to `high`."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)

    return number


def make_parser() -> argparse.ArgumentParser:
    form, switch = argparse.RawDescriptionHelpFormatter, argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {}
    for function in (command_teachers, command_distill, command_eval, command_plot):
        name, text = function.__name__.removeprefix("command_"), function.__doc__
        options = {"description": f"{text} (In brackets: defaults)", "formatter_class": form}
        commands[name] = subparsers.add_parser(name, help=text, epilog=PRESETS, **options)
        commands[name].set_defaults(function=function)

    def add(names, *flags, **options):
        for name in names.split():
            commands[name].add_argument(*flags, **options)

    whole, side = between(1, 10**6, int), between(1, 512, int)
    rate, above_zero = between(0, 1e30), between(1e-12, 1e30)
    teach, dist, both, data = "teachers", "distill", "distill eval", "teachers distill eval"
    add(data, "--dataset", default="cifar10", help="below; or a folder {train,test}/*/* (cifar10)")
    add(data, "--data-dir", type=Path, default="data", help="folder of data and downloads (data)")
    add(data, "--runs", type=Path, default="runs", help="folder of all that is written (runs)")
    add(data, "--classes", nargs="+", default=[], help="those to use, of image files (all)")
    add(data, "--size", type=side, help="pixels a side of image files (covid 112, else theirs)")
    add(data, "--ipc", type=whole, help="distilled images per class (1); for teachers: --epochs")
    add(data, "--zca", action=switch, help="whiten by ZCA, or normalise each channel (preset)")
    add(data, "--width", type=whole, help="channels of the ConvNet (preset, 128 in the paper)")
    add(data, "--depth", type=whole, help="its blocks (3 for 32 pixels a side, 4: 64, 5: 112)")
    add(data, "--seed", type=int, default=0, help="of everything random (0)")
    add(data, "--compile", action=switch, help="torch.compile (if the run is long)")
    add(data, "--precision", choices=["float32", "bf16"], help="(bf16 if the device has it)")
    add(data + " plot", "--device", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    add(teach, "--teachers", type=whole, help="how many (preset, 200 in the paper for CIFAR)")
    add(teach, "--epochs", type=whole, help="of each (preset; with --ipc those distill reads)")
    add(teach, "--lr-teacher", type=above_zero, help="learning rate, plain SGD (preset, .01)")
    add(teach, "--batch-real", type=whole, help="images a step (preset, 256)")
    add(dist, "--iterations", type=whole, help="T (preset, 5000 in the paper)")
    add(dist, "--teachers", type=whole, help="use the first so many in the folder (all)")
    add(dist, "--steps", type=whole, help="J, student steps an iteration (preset)")
    add(dist, "--expert-epochs", type=whole, help="K, teacher epochs to the target (preset)")
    add(dist, "--max-start-epoch", type=whole, help="I+, starts are below it (preset)")
    add(dist, "--segments", type=whole, default=1, help="S, starts an iteration averages (1)")
    add(dist, "--batch", type=whole, help="distilled images a step (preset, mostly all)")
    add(dist, "--lr-img", type=rate, help="learning rate of the images (preset)")
    add(dist, "--lr-alpha", type=rate, help="learning rate of alpha (preset)")
    add(dist, "--alpha", type=above_zero, help="alpha_0, its first value (preset)")
    add(dist, "--lr-w", type=rate, help="learning rate of W (1e-4, Section 4.1)")
    add(dist, "--epsilon", type=between(0, 1), help="ddpp: share that is dropped (0.1)")
    add(dist, "--eval-every", type=whole, help="iterations between evaluations (none)")
    add("teachers distill", "--restart", action="store_true", help="anew; renames what is there")
    add(both, "--method", choices=["iadd", "mtt", "ddpp"], help="(iadd)")
    add(both, "--name", help="of a result's folder (ipc<IPC>_<method>_seed<seed>; eval: seed0)")
    add(both, "--nets", type=whole, help="networks to train (5)")
    add(both, "--eval-epochs", type=whole, help="epochs of each (1000; on full the preset's 50)")
    add(both, "--lr", type=above_zero, help="their learning rate (alpha; on real the teachers')")
    sets = ["distilled", "random", "herding", "full"]
    add("eval", "--on", nargs="+", choices=sets, default=["distilled"], help="(distilled)")
    add("eval", "--arch", nargs="+", choices=ARCHITECTURES, default=["convnet"], help="(convnet)")
    add("eval", "--distilled", type=Path, metavar="FILE", help="from elsewhere (in --runs)")
    add("plot", "folder", type=Path, help="of a result, with distilled.pt")
    add("plot", "--line", type=between(0, 100), default=math.nan, help="an accuracy to mark (none)")
    return parser


def start_process(args: argparse.Namespace) -> None:
    """Chooses and tunes the device, and meets the other processes of torchrun. Raises UserError."""
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        launched = torch.distributed.is_torchelastic_launched()  # by torchrun
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched else 0)
        torch.zeros(1, device=device, dtype=torch.float64).item()  # W is float64
    except Exception as error:  # whatever a missing backend raises
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0][:99]}") from None
    tune(device)
    args.device, args.rank, args.ranks = device, 0, 1
    if launched:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=1))
        args.rank, args.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    args.machine = f"torch {torch.__version__}, {gpu}, {args.ranks} x {torch.get_num_threads()} CPU"


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, 2 for what the user can mend, 130 for Ctrl-C."""
    args = make_parser().parse_args(argv)
    stderr = sys.stderr
    try:
        start_process(args)
        if args.rank > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (till the process ends)
        args.function(args)
        return 0
    except KeyboardInterrupt:
        print("iadd.py: interrupted; teachers and distill, without --restart, go on", file=stderr)
        return 130
    except (UserError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and not re.search("allocate memory|overflow", str(error)):
            raise  # a bug
        print(f"iadd.py: error: {error or 'out of memory'}", file=stderr)
        return 2
    finally:
        sys.stderr = stderr  # for a traceback


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without ±
    sys.exit(main())
