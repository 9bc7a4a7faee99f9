"""Put a changed face back into its photo, which keeps its size and detail.

Pictures are tensors (C, S, S) in [0, 1] of the size that the model draws. What moves from one to the other, such as the
corners of a smiling mouth, is moved in the photo, and only the rest is added to it.
"""

import math

import torch
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image


@torch.no_grad()
def paste_face(image, crop, before, after):
    """Change a PIL image (L or RGB), in place, as `before` (C, S, S) changes to `after` in the square of a Crop.

    Pixels outside an ellipse around the head, which lies within the square, stay exactly as they are.
    """
    left, top, maps = to_photo(find_changes(before.cpu(), after.cpu()), crop, image.size)
    side, size = len(maps[0]), crop.square[2]
    right, bottom = min(left + size, image.width), min(top + size, image.height)
    enlarge = F.interpolate(torch.eye(side)[None, None], (size, side), mode="bicubic", antialias=True)[0, 0]
    wide = maps @ enlarge[max(left, 0) - left : right - left].T
    reach = math.ceil(wide[-2:].abs().max() * size) + 2
    pixels = pil_to_tensor(image)[:, :, max(left, 0) : right]
    for y in range(max(top, 0), bottom, 128):  # enlarged maps of the whole square would take a gigabyte
        weights = enlarge[y - top : min(y + 128, bottom) - top]
        used = weights.any(0)
        above = min(y, reach)
        around = pixels[:, y - above : y + 128 + reach] / 255
        rows = redraw(around, weights[:, used] @ wide[:, used], above, size)
        image.paste(to_pil_image(rows), (max(left, 0), y))


def redraw(around, maps, first, size):
    """Return rows of the photo, uint8 (C, H, W), redrawn by enlarged maps: `around` (C, H', W) from its row `first`."""
    added, moved, redrawn, texture, flow = maps.split([len(around), len(around), 1, 1, 2])
    pixels = warp(around, flow * size, first)
    detail = pixels - moved  # of the photo, which the model's picture lacks
    lines = detail - detail.clamp(-texture, texture)  # what remains is the texture of skin and hair
    return ((pixels + added - redrawn * lines).clamp(0, 1) * 255).round().byte()


def to_photo(maps, crop, photo_size):
    """Turn maps as their Crop is turned in the photo; return left and top of their square there, and the maps."""
    size, sides = crop.square[2], torch.tensor(photo_size)
    angle = torch.tensor(math.radians(crop.angle))
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).view(2, 2)  # y points down
    turned = math.ceil(math.hypot(*photo_size)) if crop.angle % 90 else (turn.abs() @ sides.float()).round()
    center = sides / 2 + turn.T @ (torch.tensor(crop.square[:2]) + (size - turned) / 2)
    corner = (center - size / 2).round().int()
    shift = turn @ (corner + size / 2 - center) * 2 / size
    grid = F.affine_grid(torch.cat([turn, shift[:, None]], dim=1)[None], (1, 1, *maps.shape[1:]), align_corners=False)
    maps = F.grid_sample(maps[None], grid, "bicubic", "border", align_corners=False)[0]
    return *corner.tolist(), torch.cat([maps[:-2], torch.einsum("ji,jhw->ihw", turn, maps[-2:])])


# Maps of changes
def find_changes(before, after):
    """Return maps (2C + 4, S, S): what to add, the moved picture, where to redraw, limit of texture, flow in sides."""
    size = len(before[0])
    mask = head_mask(size)
    flow = mask * optical_flow(before, after)
    moved = warp(before, flow * size)
    similarity = torch.exp(-(blur((after - moved).abs().mean(0, keepdim=True), 0.02) / 0.2).square())
    redrawn = mask * (1 - similarity * kept_structure(moved, after))
    return torch.cat([mask * (after - moved), moved, redrawn, 0.04 * similarity, flow])


def head_mask(size):
    """Return (size, size): 1 around the middle of the square, and 0 beyond an ellipse around head and neck."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    inwards = ((1 - torch.hypot(x / 0.84, (y + 0.02) / 0.94)) / 0.4).clamp(0, 1)
    return inwards.square() * (3 - 2 * inwards)


def optical_flow(before, after):
    """Return the flow (2, S, S), x and y in sides, so that `before` at x + flow(x) resembles `after` at x.

    By iterated least squares (Lucas & Kanade 1981), from coarse to fine. Both pictures lack coarse brightness, since
    hair that turns grey does not move, and flat areas do not move either.
    """
    size = len(before[0])
    flow = torch.zeros(2, size, size)
    for sigma in 3 * [0.027] + 3 * [0.013] + 3 * [0.0067]:
        now, wanted = (blur(image, sigma) - blur(image, 0.067) for image in (warp(before, flow * size), after))
        slopes = size * torch.stack(torch.gradient(now, dim=(2, 1)))
        products = blur(torch.einsum("ichw,jchw->ijhw", slopes, slopes), 0.027).permute(2, 3, 0, 1)
        targets = blur(torch.einsum("ichw,chw->ihw", slopes, wanted - now), 0.027).permute(1, 2, 0)
        step = torch.linalg.solve(products + 22 / 3 * len(before) * torch.eye(2), targets).permute(2, 0, 1)
        flow = blur(flow + step, 0.027)
    return flow


def kept_structure(moved, after):
    """Return (1, S, S): how much of the structure around a pixel is the same in two pictures, from 0 to 1.

    It is the slope of a local regression, as in the guided filter (He et al. 2013), which tends to 1 in flat areas.
    """
    covariance = blur(moved * after, 0.02) - blur(moved, 0.02) * blur(after, 0.02)
    variance = blur(moved.square(), 0.02) - blur(moved, 0.02).square()
    return ((covariance.mean(0, keepdim=True) + 3.3e-5) / (variance.mean(0, keepdim=True) + 3.3e-5)).clamp(0, 1)


# Images
def warp(image, flow, first=0):
    """Return an image (C, H', W) sampled where a flow (2, H, W) in pixels points to from its rows `first` and below."""
    _, rows, columns = flow.shape
    y, x = torch.meshgrid(torch.arange(rows) + first + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    points = torch.stack([x + flow[0], y + flow[1]], dim=-1) * 2 / torch.tensor([image.shape[2], image.shape[1]]) - 1
    return F.grid_sample(image[None], points[None], "bicubic", "border", align_corners=False)[0]


def blur(images, sigma):
    """Blur square images (..., S, S) by a Gaussian whose sigma is given as a fraction of their side."""
    position = torch.arange(images.shape[-1]) / images.shape[-1]
    weights = torch.softmax(-0.5 * ((position[:, None] - position) / sigma).square(), dim=1)
    return weights @ images @ weights.T
