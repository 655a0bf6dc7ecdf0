"""Random search by squares: no gradients, only the margins that the network gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.base import Attack, Best, Task

_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""The shares of the queries after which the squares' area is halved."""
_TILES = 5


class Window(NamedTuple):
    """A square of each row: its corner (n,) and its size."""

    top: Tensor
    left: Tensor
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Squares at random places are set to a side of the ball, and kept where the margin falls.

    L-inf starts from vertical stripes, L2 from tiles of random sign. In L2 a square takes over
    what another one and the unused rest of the radius hold, in the shape of two pyramids.

    Options: `num_queries`; `share`, of the image that the first squares cover; `seed`.

    Shapes: points (n, *feature), labels (n,). Inputs without rows and columns are taken as one
        row of elements in their order, and squares as windows of it.
    Units: those of the input.
    Randomness: places and signs, by `seed`; the same for any number of rows at a time.
    Cost: num_queries + 2 forwards a row, those that are broken drop out; no backward passes.
    Raises: as `Attack.run`; never for want of a gradient.
    Fails when: there are too few queries for the size of the input, or the answers are noise.
    Source: Andriushchenko et al. 2020, arXiv 1912.00049.
    """

    name: ClassVar[str] = "square"
    source: ClassVar[str] = "Andriushchenko et al. 2020, arXiv 1912.00049"
    norms: ClassVar[tuple[Norm, ...]] = (Norm.LINF, Norm.L2)
    needs_gradient: ClassVar[bool] = False

    num_queries: int = 1000
    share: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_queries < 1 or not 0 < self.share <= 1:
            raise OptionError("Square needs a query and a share from 0 to 1", got=f"{self}")

    def search(self, task: Task) -> Best:
        """See `Attack.search`."""
        generator = torch.Generator().manual_seed(self.seed)
        best = Best.of(task)
        canvas = Canvas.of(task)
        is_linf = task.ball.norm is Norm.LINF
        draw = _Linf(canvas, task) if is_linf else _L2(canvas, task)
        held, lowest = task.points.clone(), torch.full_like(best.margins, math.inf)
        for number in range(self.num_queries):
            share = self.share / 2 ** sum(number / self.num_queries > h for h in _HALVINGS)
            todo = best.todo
            if not len(todo):
                break
            if number == 0:
                tried = draw.first(generator)[todo]
            else:
                tried = draw.next(held, todo, share, generator)
            found = task.pick(todo).tried(tried)
            best.see(todo, tried, found)
            is_lower = found < lowest[todo]
            held[todo[is_lower]], lowest[todo[is_lower]] = tried[is_lower], found[is_lower]
        return best


@dataclass(frozen=True, eq=False)
class Canvas:
    """Inputs seen as (n, channel, row, column), whatever the order of their axes is."""

    order: tuple[int, ...]
    moved: tuple[int, ...]
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, task: Task) -> Canvas:
        """By the names of the axes at the classifier's site."""
        axes, sizes = task.classifier.axes, tuple(task.points.shape)
        if "row" not in axes or "column" not in axes:
            order = tuple(range(len(sizes)))
            return cls(order, sizes[1:], (1, 1, math.prod(sizes[1:])))
        space = (axes.index("row"), axes.index("column"))
        rest = tuple(i for i in range(len(sizes)) if i not in space)
        order = (*rest, *space)
        moved = tuple(sizes[i] for i in order[1:])
        height, width = moved[-2:]
        return cls(order, moved, (math.prod(moved[:-2]), height, width))

    def seen(self, x: Tensor) -> Tensor:
        """(n, *feature) as (n, channel, row, column)."""
        return x.permute(self.order).reshape(len(x), *self.shape)

    def back(self, x: Tensor) -> Tensor:
        """And back again."""
        inverse = [self.order.index(i) for i in range(len(self.order))]
        return x.reshape(len(x), *self.moved).permute(inverse).contiguous()

    def side(self, share: float) -> tuple[int, int]:
        """Rows and columns of a window that covers about this share."""
        _, height, width = self.shape
        each = share if height == 1 else math.sqrt(share)
        tall = 1 if height == 1 else round(each * height)
        return max(1, min(height, tall)), max(1, min(width, round(each * width)))

    def window(self, num: int, share: float, generator: torch.Generator) -> Window:
        """A random place for each of `num` rows."""
        tall, wide = self.side(share)
        _, height, width = self.shape
        top = torch.randint(height - tall + 1, (num,), generator=generator)
        left = torch.randint(width - wide + 1, (num,), generator=generator)
        return Window(top, left, tall, wide)

    def mask(self, window: Window, index: Tensor) -> Tensor:
        """(n, 1, row, column), of the rows `index`."""
        _, height, width = self.shape
        top, left = (at.to(index.device)[index][:, None] for at in window[:2])
        row = torch.arange(height, device=index.device)[None] - top
        column = torch.arange(width, device=index.device)[None] - left
        tall = (row >= 0) & (row < window.height)
        wide = (column >= 0) & (column < window.width)
        return (tall[:, :, None] & wide[:, None, :])[:, None]


def _signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return (torch.randint(2, shape, generator=generator) * 2 - 1).to(like)


@dataclass(frozen=True, eq=False)
class _Linf:
    """Draws are made for all rows of the task, so that they do not depend on which are left."""

    canvas: Canvas
    task: Task

    def _at_sides(self, signs: Tensor, index: Tensor) -> Tensor:
        ball = self.task.ball
        upper, lower = (self.canvas.seen(side[index]) for side in (ball.upper, ball.lower))
        return torch.where(signs > 0, upper, lower)

    def first(self, generator: torch.Generator) -> Tensor:
        channels, _, width = self.canvas.shape
        num = self.task.num
        signs = _signs((num, channels, 1, width), generator, self.task.points)
        return self.canvas.back(self._at_sides(signs, torch.arange(num)))

    def next(self, held: Tensor, todo: Tensor, share: float, generator: torch.Generator) -> Tensor:
        num = self.task.num
        window = self.canvas.window(num, share, generator)
        signs = _signs((num, self.canvas.shape[0], 1, 1), generator, held)[todo]
        inside = self.canvas.mask(window, todo)
        sides = self._at_sides(signs, todo)
        return self.canvas.back(torch.where(inside, sides, self.canvas.seen(held[todo])))


@dataclass(frozen=True, eq=False)
class _L2:
    """As `_Linf`."""

    canvas: Canvas
    task: Task

    def first(self, generator: torch.Generator) -> Tensor:
        channels, height, width = self.canvas.shape
        num = self.task.num
        tiles = _signs((num, channels, _TILES, _TILES), generator, self.task.points)
        row = torch.arange(height) * _TILES // height
        column = torch.arange(width) * _TILES // width
        pattern = tiles[:, :, row][:, :, :, column]
        whole = torch.ones(num, dtype=torch.float64)
        return self.task.ball.step(self.task.points, self.canvas.back(pattern), whole)

    def next(self, held: Tensor, todo: Tensor, share: float, generator: torch.Generator) -> Tensor:
        num, channels = self.task.num, self.canvas.shape[0]
        taken = self.canvas.window(num, share, generator)
        given = self.canvas.window(num, share, generator)
        signs = _signs((num, channels, 1, 1), generator, held)[todo].double()
        flipped = torch.randint(2, (num,), generator=generator)[todo].bool()
        ball = self.task.ball.pick(todo)
        moved = self.canvas.seen(held[todo]).double() - self.canvas.seen(ball.centre).double()
        inside, source = self.canvas.mask(taken, todo), self.canvas.mask(given, todo)
        unused = (ball.radius.square() - moved.square().flatten(1).sum(1)).clamp(min=0.0)
        both = torch.where(inside | source, moved, 0.0).square().sum((2, 3), keepdim=True)
        budget = (both + unused.reshape(-1, 1, 1, 1) / channels).sqrt()
        there = _unit(torch.where(inside, moved, 0.0))
        shape = self._placed(pyramids(taken.height, taken.width), taken, todo)
        if taken.height == taken.width:
            turned = self._placed(pyramids(taken.width, taken.height).T, taken, todo)
            shape = torch.where(flipped.reshape(-1, 1, 1, 1), turned, shape)
        fresh = _unit(signs * shape + there) * budget
        changed = torch.where(inside, fresh, torch.where(source, 0.0, moved))
        x = self.canvas.seen(ball.centre).double() + changed
        return ball.project(self.canvas.back(x.to(held.dtype)))

    def _placed(self, pattern: Tensor, window: Window, index: Tensor) -> Tensor:
        """A pattern of the window's size on the canvas of each row, (n, 1, row, column)."""
        _, height, width = self.canvas.shape
        made = torch.zeros(len(index), 1, height, width, dtype=torch.float64)
        row = window.top[index][:, None] + torch.arange(window.height)
        column = window.left[index][:, None] + torch.arange(window.width)
        at = torch.arange(len(index))[:, None, None]
        made[at, 0, row[:, :, None], column[:, None, :]] = pattern.to(made)
        return made


def pyramids(height: int, width: int) -> Tensor:
    """Two pyramids of opposite sign side by side, of norm 1: (height, width)."""
    half = width // 2
    if half == 0:
        made = _pyramid(height, width)
    else:
        made = torch.cat([_pyramid(height, half), -_pyramid(height, width - half)], 1)
    scaled: Tensor = made / made.norm()
    return scaled


def _pyramid(height: int, width: int) -> Tensor:
    """Growing steps towards the middle: ring by ring 1 / n^2 + ... + 1 is added up."""
    row = torch.minimum(torch.arange(height), torch.arange(height).flip(0))
    column = torch.minimum(torch.arange(width), torch.arange(width).flip(0))
    ring = torch.minimum(row[:, None], column[None])
    num = int(ring.max()) + 1
    added = torch.tensor([1.0 / (num - k) ** 2 for k in range(num)], dtype=torch.float64)
    return added.cumsum(0).index_select(0, ring.flatten()).reshape(ring.shape)


def _unit(x: Tensor) -> Tensor:
    """Each channel of each row at norm 1; zeros stay zeros."""
    norms = x.square().sum((2, 3), keepdim=True).sqrt()
    return x / torch.where(norms > 0, norms, 1.0)
