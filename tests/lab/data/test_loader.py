"""A loader's batches are a function of seed and epoch, and the shares of all ranks are the whole batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur._internal.errors import SecateurError
from secateur.lab.data.loader import PAD, Loader, crop_flip


def numbered(n: int, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that all differ, and their numbers as labels."""
    return torch.arange(n * size * size, dtype=torch.float32).view(n, 1, size, size), torch.arange(n)


def epoch(loader: Loader, number: int, start: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.set_epoch(number)
    return list(loader.batches(start))


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True)
    )


@settings(deadline=None, max_examples=30)
@given(
    st.integers(4, 40),
    st.integers(4, 9),
    st.integers(1, 4),
    st.tuples(st.integers(0, 3), st.integers(0, 99), st.booleans()),
)
def test_shares_of_all_ranks_are_the_batch_of_one_process(n, batch, world, drawn):
    number, seed, augment = drawn
    images, labels = numbered(n)
    whole = Loader(images, labels, batch, shuffle=True, augment=augment, seed=seed)
    if n % batch and n % batch < world:
        with pytest.raises(SecateurError, match="drop_last"):
            whole.shard(0, world)
        return
    parts = [epoch(whole.shard(rank, world), number) for rank in range(world)]
    for step, (x, y) in enumerate(epoch(whole, number)):
        assert len(y) == whole.size(step)
        shares = [part[step] for part in parts]
        together = torch.cat([share[1] for share in shares])
        order, back = y.argsort(), together.argsort()
        assert torch.equal(y[order], together[back])
        assert torch.equal(x[order], torch.cat([share[0] for share in shares])[back])


def test_every_image_once_an_epoch_and_a_new_order_each_time():
    loader = Loader(*numbered(23), 5, shuffle=True, seed=3)
    orders = [torch.cat([y for _, y in epoch(loader, number)]) for number in range(3)]
    assert all(torch.equal(order.sort().values, torch.arange(23)) for order in orders)
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[2])


@pytest.mark.parametrize("augment", [False, True])
def test_order_depends_on_seed_and_epoch_alone(augment):
    images, labels = numbered(30)
    first = epoch(Loader(images, labels, 7, shuffle=True, augment=augment, seed=1), 4)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = Loader(images, labels, 7, shuffle=True, augment=augment, seed=1)
    epoch(again, 0)
    assert same(first, epoch(again, 4))
    assert torch.equal(state, torch.get_rng_state()), "the global random state was touched"
    assert not same(first, epoch(Loader(images, labels, 7, shuffle=True, augment=augment, seed=2), 4))
    for start in range(6):
        assert same(first[start:], epoch(again, 4, start))


def test_plain_batches_are_the_images_in_order():
    images, labels = numbered(10)
    batches = list(Loader(images, labels, 4))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), images)
    assert torch.equal(torch.cat([y for _, y in batches]), labels)
    dropping = Loader(images, labels, 4, drop_last=True)
    assert [len(y) for _, y in dropping] == [4, 4]
    assert len(dropping) == 2


def test_crop_in_the_middle_without_a_flip_is_the_image_itself():
    images = torch.randint(256, (6, 3, 8, 10), dtype=torch.uint8)
    middle, never = torch.full((6,), PAD), torch.zeros(6, dtype=torch.bool)
    assert torch.equal(crop_flip(images, middle, middle, never), images)
    assert torch.equal(crop_flip(images, middle, middle, ~never), images.flip(3))


def test_crops_are_windows_of_the_padded_image():
    images = torch.randint(1, 256, (50, 2, 6, 6), dtype=torch.uint8)
    rows, columns = torch.randint(2 * PAD + 1, (2, 50))
    flip = torch.randint(2, (50,)).bool()
    padded = torch.nn.functional.pad(images, (PAD,) * 4)
    for i, crop in enumerate(crop_flip(images, rows, columns, flip)):
        window = padded[i, :, rows[i] : rows[i] + 6, columns[i] : columns[i] + 6]
        assert torch.equal(crop, window.flip(2) if flip[i] else window)


def test_all_crops_and_both_mirrors_occur():
    images = torch.zeros(4000, 1, 9, 9)
    images[:, 0, 4, 3] = 1  # off the middle, so that a mirror image shows
    x = torch.cat([x for x, _ in Loader(images, torch.zeros(4000, dtype=torch.int64), 500, augment=True)])
    columns = x.sum(2).argmax(2).flatten()
    found = torch.stack([x.sum(3).argmax(2).flatten(), columns]).unique(dim=1)
    assert x.sum((1, 2, 3)).eq(1).float().mean() > 0.8  # at the far left of the crop the pixel may be cut off
    assert found[0].unique().tolist() == list(range(9))
    assert set(found[1].tolist()) == set(range(9))


def test_normalised_by_mean_and_std():
    images = torch.randint(256, (20, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    ((x, _),) = Loader(images, torch.zeros(20, dtype=torch.int64), 20, mean=mean, std=std)
    back = x.double() * torch.tensor(std).view(1, 3, 1, 1) + torch.tensor(mean).view(1, 3, 1, 1)
    assert x.dtype == torch.float32
    assert torch.allclose(back * 255, images.double(), atol=1e-4)


IMAGES, LABELS = numbered(10)
BAD = [
    ({"images": IMAGES[:, 0]}, "channels, height, width"),
    ({"images": IMAGES.long()}, "uint8 or floats"),
    ({"labels": LABELS[:5]}, "one integer for each of the 10 images"),
    ({"labels": LABELS.float()}, "one integer"),
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, "empty loader"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 2.5}, "batch_size=2.5"),
    ({"seed": -1}, "seed=-1"),
    ({"mean": (0.1, 0.2)}, "mean of 2 values"),
    ({"batch_size": 11, "drop_last": True}, "leaves no batch"),
    ({"rank": 2, "world": 2}, "rank=2, world=2"),
    ({"images": IMAGES.to("meta")}, "put both on one device"),
]


@pytest.mark.parametrize(("change", "told"), BAD)
def test_bad_input(change, told):
    with pytest.raises(SecateurError, match=told):
        Loader(**({"images": IMAGES, "labels": LABELS, "batch_size": 4} | change))
