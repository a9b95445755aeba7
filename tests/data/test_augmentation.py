import math

import pytest
import torch

from signal_reid.config import AugmentationConfig, DataConfig
from signal_reid.data.augmentation import Augmentation, augmentation_generator, draw_missing, draw_rectangles

H, W = 32, 16


def make(**augmentation) -> Augmentation:
    return Augmentation(DataConfig(augmentation=AugmentationConfig(**augmentation)))


def random_images(*batch: int) -> torch.Tensor:
    return torch.randint(0, 256, (*batch, 3, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def pixels(normalized: torch.Tensor) -> torch.Tensor:
    """Back from [-1, 1] to 0..255."""
    return ((normalized + 1) * 127.5).round().to(torch.uint8)


def position_images(count: int) -> torch.Tensor:
    """Images (count, 1, 3, H, W) whose pixels hold their own row and column, from 1."""
    row = torch.arange(1, H + 1).view(H, 1).expand(H, W)
    column = torch.arange(1, W + 1).expand(H, W)
    return torch.stack((row, column, row)).to(torch.uint8).expand(count, 1, 3, H, W)


def test_normalize_scales_to_the_mean_and_deviation():
    config = DataConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    images = random_images(2, 3)
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    torch.testing.assert_close(Augmentation(config).normalize(images), (images / 255 - mean) / std)


def test_without_augmentation_images_are_only_normalized():
    images, augmentation = random_images(2, 3), make(flip=0.0, pad=0, erase=0.0)
    result = augmentation.augment(images, augmentation_generator(0, 0, 0))
    assert torch.equal(result, augmentation.normalize(images))


def test_flip_mirrors_columns():
    images, augmentation = random_images(2, 3), make(flip=1.0, pad=0, erase=0.0)
    result = augmentation.augment(images, augmentation_generator(0, 0, 0))
    assert torch.equal(pixels(result), images.flip(-1))


def test_flip_happens_at_its_rate_for_each_image_on_its_own():
    images = position_images(1).expand(700, 3, 3, H, W)
    result = pixels(make(flip=0.3, pad=0, erase=0.0).augment(images, augmentation_generator(0, 0, 0)))
    flipped = result[:, :, 1, 0, 0] == W
    assert flipped.float().mean() == pytest.approx(0.3, abs=0.05)
    assert not torch.equal(flipped[:, 0], flipped[:, 1])


def test_crop_reaches_every_offset_alike():
    pad = 3
    result = pixels(make(flip=0.0, pad=pad, erase=0.0).augment(position_images(4000), augmentation_generator(0, 0, 0)))
    center = result[:, 0, :, H // 2, W // 2].long()
    offsets = torch.stack((center[:, 0] - H // 2 - 1 + pad, center[:, 1] - W // 2 - 1 + pad))
    for axis in offsets:
        counts = axis.bincount(minlength=2 * pad + 1)
        assert len(counts) == 2 * pad + 1
        assert counts.float().div(4000).sub(1 / 7).abs().max() < 0.03


def test_padding_is_black_before_normalization():
    white = torch.full((64, 1, 3, H, W), 255, dtype=torch.uint8)
    result = make(flip=0.0, pad=10, erase=0.0).augment(white, augmentation_generator(0, 0, 0))
    assert set(result.unique().tolist()) == {-1.0, 1.0}


def test_batch_agrees_with_augmenting_each_image_by_itself():
    pad, images = 4, random_images(8, 3)
    augmentation = make(flip=0.5, pad=pad, erase=0.7)
    result = augmentation.augment(images, augmentation_generator(3, 1, 4)).flatten(0, 1)
    generator = augmentation_generator(3, 1, 4)
    flip, top, left = augmentation._draw_crop(24, generator)
    rectangles = draw_rectangles(24, 0.7, H, W, generator).tolist()
    assert any(height for _, _, height, _ in rectangles)
    assert not all(height for _, _, height, _ in rectangles)
    for i, image in enumerate(images.flatten(0, 1)):
        canvas = torch.zeros(3, H + 2 * pad, W + 2 * pad, dtype=torch.uint8)
        canvas[:, pad : pad + H, pad : pad + W] = image.flip(-1) if flip[i] else image
        expected = augmentation.normalize(canvas[:, top[i] : top[i] + H, left[i] : left[i] + W])
        y, x, h, w = rectangles[i]
        kept = torch.ones(H, W, dtype=torch.bool)
        kept[y : y + h, x : x + w] = False
        assert torch.equal(result[i][:, kept], expected[:, kept])
        assert not (result[i] == expected)[:, ~kept].any()


def test_erased_pixels_are_standard_normal_and_independent():
    images = torch.zeros(400, 1, 3, H, W, dtype=torch.uint8)
    result = make(flip=0.0, pad=0, erase=1.0).augment(images, augmentation_generator(0, 0, 0))
    noise = result[result != -1.0]
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.unique().numel() > 0.9 * noise.numel()


def test_rectangles_are_drawn_at_the_rate_and_within_the_image():
    rectangles = draw_rectangles(4000, 0.5, 256, 128, augmentation_generator(0, 0, 0))
    top, left, height, width = rectangles.unbind(1)
    assert (height > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert ((height < 256) & (width < 128)).all()
    assert ((top >= 0) & (left >= 0) & (top + height <= 256) & (left + width <= 128)).all()
    assert torch.equal(height > 0, width > 0)


def test_rectangles_have_the_areas_and_aspects_of_random_erasing():
    side = 400
    _, _, height, width = draw_rectangles(4000, 1.0, side, side, augmentation_generator(0, 0, 0)).double().unbind(1)
    area, aspect = height * width / side**2, (height / width).log()
    assert area.min() > 0.019
    assert area.max() < 0.335
    assert area.mean().item() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert aspect.abs().max() < math.log(1 / 0.3) + 0.05
    assert aspect.mean().item() == pytest.approx(0, abs=0.05)


def test_rectangles_reach_both_edges():
    top, _, height, _ = draw_rectangles(4000, 1.0, H, W, augmentation_generator(0, 0, 0)).unbind(1)
    assert (top == 0).any()
    assert (top + height == H).any()


def test_a_try_that_does_not_fit_is_drawn_again():
    _, _, _, width = draw_rectangles(4000, 1.0, 256, 32, augmentation_generator(0, 0, 0)).unbind(1)
    assert (width > 0).float().mean() > 0.99
    assert (width < 32).all()


def test_shared_augments_the_images_of_a_triplet_alike():
    images = random_images(16, 1).expand(16, 3, 3, H, W)
    result = make(erase=0.0, shared=True).augment(images, augmentation_generator(0, 0, 0))
    assert torch.equal(result[:, 0], result[:, 1])
    assert torch.equal(result[:, 0], result[:, 2])
    assert not torch.equal(pixels(result), images)


def test_shared_erases_one_rectangle_of_a_triplet():
    images = torch.zeros(16, 3, 3, H, W, dtype=torch.uint8)
    result = make(flip=0.0, pad=0, erase=1.0, shared=True).augment(images, augmentation_generator(0, 0, 0))
    erased = result != -1.0
    assert torch.equal(erased[:, 0], erased[:, 1])
    assert not torch.equal(result[:, 0], result[:, 1])


def test_images_are_augmented_independently_by_default():
    images = random_images(16, 1).expand(16, 3, 3, H, W)
    result = make(erase=0.0).augment(images, augmentation_generator(0, 0, 0))
    assert not torch.equal(result[:, 0], result[:, 1])


def test_a_step_is_augmented_the_same_when_it_is_run_again():
    images, augmentation = random_images(4, 3), make()
    first = augmentation.augment(images, augmentation_generator(7, 2, 5))
    augmentation.augment(images, augmentation_generator(7, 2, 6))
    assert torch.equal(first, augmentation.augment(images, augmentation_generator(7, 2, 5)))


@pytest.mark.parametrize("other", [(8, 2, 5), (7, 3, 5), (7, 2, 6)])
def test_another_seed_epoch_or_step_augments_otherwise(other):
    images, augmentation = random_images(4, 3), make()
    first = augmentation.augment(images, augmentation_generator(7, 2, 5))
    assert not torch.equal(first, augmentation.augment(images, augmentation_generator(*other)))


def test_dropped_modalities_are_zero_and_the_others_what_they_were():
    images = random_images(40, 3)
    without, dropping = (make(drop_modality=p).augment(images, augmentation_generator(0, 1, 2)) for p in (0.0, 0.4))
    missing = (dropping == 0).flatten(2).all(dim=2)
    assert 0 < missing.sum() < missing.numel()
    assert torch.equal(dropping, without * ~missing[:, :, None, None, None])
    again = make(drop_modality=0.4).augment(images, augmentation_generator(0, 1, 2))
    assert torch.equal(again, dropping)


def test_each_image_is_missing_at_the_rate_but_one_of_a_sample_stays():
    p, generator = 0.6, torch.Generator().manual_seed(0)
    missing = draw_missing(20000, 3, p, generator)
    assert not missing.all(dim=1).any()
    for modality in range(3):  # of the samples that would lose all, a third keeps this one
        assert missing[:, modality].float().mean() == pytest.approx(p - p**3 / 3, abs=0.015)
    both = (missing[:, 0] & missing[:, 1]).float().mean()
    assert both == pytest.approx(p**2 - 2 * p**3 / 3, abs=0.015)


def test_the_input_is_left_as_it_was():
    images = random_images(4, 3)
    before = images.clone()
    make(flip=1.0, erase=1.0).augment(images, augmentation_generator(0, 0, 0))
    assert torch.equal(images, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parameters_are_the_same_on_a_gpu_and_nothing_waits_for_it():
    images, augmentation = random_images(8, 3), make(erase=0.0)
    expected = augmentation.augment(images, augmentation_generator(0, 0, 0))
    on_gpu = images.cuda()
    augmentation.augment(on_gpu, augmentation_generator(0, 0, 0))
    erasing = make()
    erasing.augment(on_gpu, augmentation_generator(0, 0, 0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = augmentation.augment(on_gpu, augmentation_generator(0, 0, 0))
        erasing.augment(on_gpu, augmentation_generator(0, 0, 0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), expected)
