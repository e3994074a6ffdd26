"""The digits and their augmentation."""

import re

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits

from helpers.lab.datasets import augment, digits
from helpers.lab.runtime import device, generator

FALSE_ALARM = 1e-6


def test_sizes_types_and_device():
    split = digits()
    assert split.x_train.shape == (1297, 64)
    assert split.y_train.shape == (1297,)
    assert split.x_test.shape == (500, 64)
    assert split.y_test.shape == (500,)
    assert split.x_train.dtype == split.x_test.dtype == torch.float64
    assert split.y_train.dtype == split.y_test.dtype == torch.int64
    assert {part.device.type for part in split} == {device().type}


def test_images_have_the_wanted_dtype():
    split = digits(torch.float32)
    assert split.x_train.dtype == split.x_test.dtype == torch.float32
    torch.testing.assert_close(split.x_test, digits().x_test.float(), rtol=0, atol=0)


def test_pixels_fill_the_unit_interval():
    for images in (digits().x_train, digits().x_test):
        assert images.min() == 0
        assert images.max() == 1


def test_split_is_disjoint_and_complete():
    # No two of the digits are the same image, so that sorted rows are the images themselves.
    images, labels = load_digits(return_X_y=True)
    assert len(np.unique(images, axis=0)) == len(images)
    split = digits()
    x, y = torch.cat([split.x_train, split.x_test]).cpu(), torch.cat([split.y_train, split.y_test]).cpu()
    ours = np.column_stack([x.numpy() * 16, y.numpy()])
    theirs = np.column_stack([images, labels])
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_both_parts_hold_every_stretch_of_the_collection():
    # Of every 18 images in their order the first five are for testing.
    images, _ = load_digits(return_X_y=True)
    rows = [row for row in range(len(images)) if row % 18 in (0, 1, 2, 3, 4)]
    np.testing.assert_array_equal(digits().x_test.cpu().numpy() * 16, images[rows])


def test_split_is_the_same_for_every_seed(monkeypatch):
    first = digits()
    monkeypatch.setenv("BOOK_SEED", "12345")
    assert all(torch.equal(one, other) for one, other in zip(first, digits(), strict=True))


def test_class_proportions_are_as_close_as_those_of_a_random_split():
    counts = [torch.bincount(labels, minlength=10).tolist() for labels in (digits().y_train, digits().y_test)]
    assert stats.chi2_contingency(counts).pvalue > 0.05


# augment


def random_images(n, stream, dtype=torch.float64):
    source = generator(f"test.datasets.{stream}")
    return torch.rand(n, 64, generator=source, dtype=dtype, device=source.device)


def random_shifts(n, stream, reach=8):
    source = generator(f"test.datasets.{stream}.shift")
    return torch.randint(-reach, reach + 1, (n, 2), generator=source, device=source.device)


def without_noise(images, shift):
    return augment(images, shift=shift, noise_level=images.new_zeros(len(images)), generator=generator("test.unused"))


def shifted_by_loops(image, down, right):
    """Move every pixel by itself; what leaves the frame is lost, what enters is background."""
    moved = [[0.0] * 8 for _ in range(8)]
    for row in range(8):
        for column in range(8):
            if 0 <= row + down <= 7 and 0 <= column + right <= 7:
                moved[row + down][column + right] = image[8 * row + column]
    return [pixel for row in moved for pixel in row]


def test_shifts_equal_a_loop_over_pixels():
    images, shift = random_images(60, "loops"), random_shifts(60, "loops")
    expected = [shifted_by_loops(image, *by) for image, by in zip(images.tolist(), shift.tolist(), strict=True)]
    assert without_noise(images, shift).tolist() == expected


@pytest.mark.parametrize("down", range(-8, 9))
def test_shifts_equal_a_crop_of_the_padded_image(down):
    image = random_images(1, "padded")
    padded = torch.nn.functional.pad(image.reshape(8, 8), (8, 8, 8, 8))
    for right in range(-8, 9):
        expected = padded[8 - down : 16 - down, 8 - right : 16 - right].reshape(1, 64)
        assert torch.equal(without_noise(image, torch.tensor([[down, right]], device=image.device)), expected)


def test_no_shift_and_no_noise_change_nothing():
    images = random_images(20, "identity")
    assert torch.equal(without_noise(images, torch.zeros(20, 2, dtype=torch.int64, device=images.device)), images)


def test_images_themselves_are_left_alone():
    images = random_images(20, "untouched")
    copy = images.clone()
    augment(images, shift=random_shifts(20, "untouched"), noise_level=images[:, 0], generator=generator("test.noise"))
    assert torch.equal(images, copy)


def test_a_shift_may_be_shared_by_a_batch():
    images = random_images(5, "shared")
    shift = torch.tensor([[1, -2]], device=images.device).expand(5, 2)
    assert torch.equal(without_noise(images, shift), without_noise(images, shift.clone()))


def noise(n, stream, noise_level):
    images = random_images(n, stream)
    shift = random_shifts(n, stream)
    noisy = augment(images, shift=shift, noise_level=noise_level, generator=generator(f"test.datasets.{stream}.noise"))
    return noisy - without_noise(images, shift)


def test_noise_has_a_normal_law_with_the_level_of_its_image():
    source = generator("test.datasets.levels")
    level = torch.rand(500, generator=source, dtype=torch.float64, device=source.device) + 0.1
    standardized = noise(500, "normal", level) / level[:, None]
    assert stats.kstest(standardized.flatten().cpu().numpy(), stats.norm.cdf).pvalue > FALSE_ALARM


def test_noise_is_never_shared():
    # Correlation of neighboring images and of neighboring pixels, each the mean of n products of variance 1.
    z = noise(500, "unshared", torch.ones(500, dtype=torch.float64, device=device()))
    for products in (z[0::2] * z[1::2], z[:, 0::2] * z[:, 1::2]):
        assert abs(products.mean().item()) * products.numel() ** 0.5 < stats.norm.isf(FALSE_ALARM / 2)


def test_images_without_a_noise_level_stay_clean_beside_noisy_ones():
    level = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, device=device())
    added = noise(3, "beside", level)
    assert (added[[0, 2]] == 0).all()
    assert (added[1] != 0).all()


def test_augmentation_repeats_itself_for_equal_generators_only():
    images, shift = random_images(5, "repeat"), random_shifts(5, "repeat")
    first, again, other = (
        augment(images, shift=shift, noise_level=images[:, 0] + 1, generator=generator(f"test.datasets.{stream}"))
        for stream in "aab"
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_augmentation_keeps_the_dtype():
    images = random_images(5, "dtype", torch.float32)
    assert without_noise(images, random_shifts(5, "dtype")).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, "images must have shape (N, 64), got (3, 8, 8)"),
        ({"images": torch.zeros(3, 63)}, "images must have shape (N, 64), got (3, 63)"),
        ({"images": torch.zeros(64)}, "images must have shape (N, 64), got (64,)"),
        (
            {"shift": torch.zeros(1, 2, dtype=torch.int64)},
            "shift must have shape (3, 2) and noise_level (3,), got (1, 2) and (3,)",
        ),
        (
            {"shift": torch.zeros(3, dtype=torch.int64)},
            "shift must have shape (3, 2) and noise_level (3,), got (3,) and (3,)",
        ),
        ({"noise_level": torch.zeros(())}, "shift must have shape (3, 2) and noise_level (3,), got (3, 2) and ()"),
        (
            {"noise_level": torch.zeros(3, 1)},
            "shift must have shape (3, 2) and noise_level (3,), got (3, 2) and (3, 1)",
        ),
        (
            {"shift": torch.tensor([[0, 0], [0, 9], [0, 0]])},
            "a shift must lie between -8 and 8 pixels, got 9",
        ),
        ({"shift": torch.tensor([[0, 0], [-9, 0], [0, 0]])}, "a shift must lie between -8 and 8 pixels, got "),
        ({"noise_level": torch.tensor([0.0, -0.1, 0.2])}, "a noise level must not be negative, got -0.1"),
    ],
)
def test_impossible_augmentations_are_refused(changes, message):
    sound = {
        "images": torch.zeros(3, 64),
        "shift": torch.zeros(3, 2, dtype=torch.int64),
        "noise_level": torch.zeros(3),
        "generator": torch.Generator(),
    }
    arguments = sound | changes
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        augment(arguments.pop("images"), **arguments)
