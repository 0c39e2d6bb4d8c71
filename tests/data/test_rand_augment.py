from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from volo.data.rand_augment import OPERATIONS, RandAugment, move, parse_rand_augment

GEOMETRIC = [name for name, operation in OPERATIONS.items() if operation.apply is None]
FILL = (10, 20, 30)


def picture(height: int = 20, width: int = 30) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def forced(name: str, argument: object, inpt: torch.Tensor) -> torch.Tensor:
    return RandAugment(fill=FILL).transform(inpt, {"chosen": [(name, argument)]})


def test_there_are_timms_operations() -> None:
    timm = pytest.importorskip("timm.data.auto_augment")
    ours = {name.replace("_", "") for name in OPERATIONS}
    theirs = {name.lower().replace("increasing", "").replace("rel", "") for name in timm._RAND_INCREASING_TRANSFORMS}
    assert ours == theirs


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("increasing", [False, True])
def test_arguments_are_timms_at_every_level(name: str, increasing: bool) -> None:
    timm = pytest.importorskip("timm.data.auto_augment")
    argument = OPERATIONS[name].argument
    their_name = next(
        n
        for n in (timm._RAND_INCREASING_TRANSFORMS if increasing else timm._RAND_TRANSFORMS)
        if n.lower().replace("increasing", "").replace("rel", "") == name.replace("_", "")
    )
    level_function = timm.LEVEL_TO_ARG[their_name]
    if argument is None:
        assert level_function is None
        return
    for level in (0.0, 3.3, 9.0, 10.0):
        random.seed(0)
        theirs = {round(float(level_function(level, {})[0]), 9) for _ in range(40)}  # both signs
        if name == "posterize":
            theirs = {max(1.0, bits) for bits in theirs}
        ours = {round(float(argument(level / 10, increasing)), 9) for _ in range(40)}
        assert {abs(v) for v in ours} == {abs(v) for v in theirs}
        assert len(ours) == len(theirs)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_no_movement_is_the_identity(name: str) -> None:
    assert torch.equal(forced(name, 0.0, picture()), picture())
    # Nearly none: one affine resampling of the whole image moves nothing either.
    assert torch.equal(forced(name, 1e-7, picture()), picture())


@pytest.mark.parametrize(
    ("name", "argument"),
    {
        "color": 1.0,
        "contrast": 1.0,
        "brightness": 1.0,
        "sharpness": 1.0,
        "solarize": 256,
        "posterize": 8,
        "solarize_add": 0,
    }.items(),
)
def test_neutral_arguments_are_the_identity(name: str, argument: float) -> None:
    assert torch.equal(forced(name, argument, picture()), picture())


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_every_operation_keeps_type_and_shape_and_changes_pixels(name: str) -> None:
    argument = OPERATIONS[name].argument
    image = picture() // 2 + 60  # neither full range nor flat
    result = forced(name, None if argument is None else argument(0.9, True), image)
    assert result.dtype == torch.uint8
    assert result.shape == image.shape
    assert not torch.equal(result, image)
    assert image.min() >= 60  # the input is left alone


def test_the_simple_operations_are_pillows() -> None:
    timm = pytest.importorskip("timm.data.auto_augment")
    pil = Image.fromarray(picture().permute(1, 2, 0).numpy())
    for name, function, argument in (
        ("invert", timm.invert, None),
        ("equalize", timm.equalize, None),
        ("auto_contrast", timm.auto_contrast, None),
        ("posterize", timm.posterize, 3),
        ("posterize", timm.posterize, 1),
        ("solarize", timm.solarize, 77),
        ("solarize_add", timm.solarize_add, 128),
        ("brightness", timm.brightness, 1.7),
        ("color", timm.color, 0.2),
        ("contrast", timm.contrast, 1.8),
        ("sharpness", timm.sharpness, 1.9),
    ):
        theirs = np.asarray(function(pil) if argument is None else function(pil, argument)).astype(int)
        ours = forced(name, argument, picture()).permute(1, 2, 0).numpy().astype(int)
        # Fixed-point grey in Pillow, and its rounded mean, differ by a few levels after a strong blend.
        assert np.abs(ours - theirs).max() <= (0 if function in (timm.invert, timm.posterize, timm.solarize) else 3), (
            name
        )


def test_geometry_moves_where_it_says_and_fills() -> None:
    image = torch.full((3, 21, 21), 200, dtype=torch.uint8)
    right = forced("translate_x", 1 / 7, image)
    assert (right[:, :, 3:] == 200).all()
    assert (right[:, :, :3] == torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)).all()
    down = forced("translate_y", -1 / 7, image)
    assert (down[:, :-3] == 200).all()
    assert (down[:, -3:] == torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)).all()
    turned = forced("rotate", 90.0, picture(21, 21))
    assert torch.equal(turned, picture(21, 21).rot90(-1, (1, 2)))
    # A shear keeps its first row (or column) and moves the others in proportion.
    line = torch.zeros(3, 40, 40, dtype=torch.uint8)
    line[:, :, 20] = 255
    sheared = move(line, "shear_x", 0.25, (0, 0, 0))[0].float()
    centre = (sheared * torch.arange(40)).sum(1) / sheared.sum(1)
    slope = (centre[30] - centre[2]) / 28
    assert abs(abs(slope.item()) - 0.25) < 0.02
    assert abs(centre[0].item() - 20) < 0.5


def test_masks_move_along_and_keep_their_values() -> None:
    image = tv_tensors.Image(picture(32, 32))
    mask = tv_tensors.Mask(torch.ones(32, 32, dtype=torch.uint8))
    torch.manual_seed(0)
    moved = 0
    for _ in range(50):
        new_image, new_mask = RandAugment(9, prob=1.0, fill=(0, 0, 0))(image, mask)
        assert isinstance(new_image, tv_tensors.Image)
        assert isinstance(new_mask, tv_tensors.Mask)
        assert set(new_mask.unique().tolist()) <= {0, 1}
        moved += not torch.equal(new_mask, mask)
    assert moved > 10


def test_what_has_no_kernel_is_refused_and_not_left_behind() -> None:
    class Unknown(tv_tensors.TVTensor):
        pass

    with pytest.raises(TypeError):
        move(Unknown(torch.zeros(3, 4, 4)), "rotate", 10.0, FILL)


def test_probability_layers_and_noise() -> None:
    torch.manual_seed(0)
    plain = RandAugment(5, magnitude_std=0, num_layers=3, prob=0.5)
    counts = [len(plain.make_params([])["chosen"]) for _ in range(2000)]
    assert abs(np.mean(counts) - 1.5) < 0.08
    assert set(counts) == {0, 1, 2, 3}
    rotations = [abs(a) for _ in range(3000) for n, a in plain.make_params([])["chosen"] if n == "rotate"]
    assert all(abs(a - 15) < 1e-9 for a in rotations)
    noisy = RandAugment(9, magnitude_std=0.5, prob=1.0)
    levels = np.array([noisy._level() for _ in range(4000)])
    assert levels.max() == 10
    assert abs(np.median(levels) - 9) < 0.05
    assert abs((levels < 8.5).mean() - 0.159) < 0.03
    uniform = [RandAugment(9, magnitude_std=math.inf)._level() for _ in range(2000)]
    assert 0 <= min(uniform) < 0.1
    assert 8.9 < max(uniform) <= 9


def test_the_same_seed_gives_the_same_picture() -> None:
    augment = RandAugment()
    for seed in range(10):
        torch.manual_seed(seed)
        first = augment(picture())
        torch.manual_seed(seed)
        assert torch.equal(augment(picture()), first)


def test_words_of_timm() -> None:
    augment = parse_rand_augment("rand-m9-mstd0.5-inc1", fill=FILL)
    assert (augment.magnitude, augment.magnitude_std, augment.magnitude_max) == (9, 0.5, 10)
    assert (augment.num_layers, augment.prob, augment.increasing, augment.fill) == (2, 0.5, True, list(FILL))
    augment = parse_rand_augment("rand-n3-p0.7-mmax30-m15-mstd101")
    assert (augment.magnitude, augment.magnitude_std, augment.magnitude_max) == (15, math.inf, 30)
    assert (augment.num_layers, augment.prob, augment.increasing) == (3, 0.7, False)
    assert parse_rand_augment("rand-mstdinf").magnitude_std == math.inf


@pytest.mark.parametrize(
    "spec", ["augmix-m3", "rand-w0", "rand-m", "rand-m9-tweights", "rand-n1.5", "rand-p2", "rand-inc2"]
)
def test_unknown_words_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="rand_augment is"):
        parse_rand_augment(spec)


def test_affine_takes_what_functional_gives() -> None:
    # Size is read from the input itself, so that a map of another resolution moves by the same share.
    small = tv_tensors.Mask(torch.zeros(10, 10, dtype=torch.uint8))
    small[:, 5] = 1
    large = tv_tensors.Mask(F.resize(small, [40, 40]))
    assert move(small, "translate_x", 0.2, None)[:, 7].all()
    assert move(large, "translate_x", 0.2, None)[:, 28:32].all()


@pytest.mark.parametrize("name", ["rotate", "translate_x", "translate_y", "shear_x", "shear_y"])
@settings(max_examples=25, deadline=None)
@given(amount=st.floats(-0.9, 0.9), height=st.integers(2, 40), width=st.integers(2, 40))
def test_quick_moves_are_those_of_a_picture_on_a_canvas_of_the_fill(
    name: str, amount: float, height: int, width: int
) -> None:
    amount *= 60 if name == "rotate" else 1
    fill = (124, 116, 104)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moved = move(image, name, amount, fill)
    # torchvision's affine of a canvas so large that its own edge, which it treats otherwise, stays out of sight.
    margin = 3 * max(height, width)
    canvas = F.pad(image, [margin] * 4, fill=list(fill)).float()
    H, W = canvas.shape[1:]
    center, shear, translate, angle = [W / 2, H / 2], [0.0, 0.0], [0.0, 0.0], 0.0
    if name == "rotate":
        angle = amount
    elif name.startswith("translate"):
        translate = [amount * width, 0.0] if name.endswith("x") else [0.0, amount * height]
    else:
        center = [float(margin), float(margin)]
        degrees = math.degrees(math.atan(amount))
        shear = [degrees, 0.0] if name.endswith("x") else [0.0, degrees]
    expected = F.affine(
        canvas, angle=angle, translate=translate, scale=1.0, shear=shear, center=center,
        interpolation=v2.InterpolationMode.BILINEAR, fill=list(fill),
    )  # fmt: skip
    expected = expected[:, margin : margin + height, margin : margin + width]
    assert (moved.float() - expected).abs().max() < 0.51  # rounding to whole numbers
