"""The re-iterables: coverage, reproducibility, resumption."""

import json
from itertools import islice

import pytest
import torch

from tasks.data import batches, episodes
from tasks.data.batches import Blocks


def labelled(n=23):
    return torch.arange(n).float()[:, None] * 10, torch.arange(n)


def classes(counts=(4, 6, 5, 9)):
    """Images that tell class and number within the class."""
    pairs = [(c, i) for c, count in enumerate(counts) for i in range(count)]
    return torch.tensor(pairs, dtype=torch.float32), torch.tensor([c for c, _ in pairs])


MAKERS = {
    "batches": lambda seed=3: batches(*labelled(), size=5, seed=seed),
    "batches, last dropped": lambda seed=3: batches(*labelled(), size=5, seed=seed, drop_last=True),
    "episodes": lambda seed=3: episodes(
        *classes(), n_way=2, k_shot=1, queries=2, seed=seed, per_epoch=6
    ),
    "blocks": lambda seed=3: Blocks(torch.arange(100), length=6, size=4, seed=seed),
}
every_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def flat(batch):
    """All tensors of a batch as one list of numbers."""
    if isinstance(batch, torch.Tensor):
        return batch.double().flatten().tolist()
    return [number for part in batch for number in flat(part)]


def run(data, count):
    """The next ``count`` batches, over as many epochs as it takes."""
    out = []
    while len(out) < count:
        out += [flat(batch) for batch in islice(data, count - len(out))]
    return out


@every_kind
def test_epoch_depends_on_seed_and_number_only(make):
    first, second, other = make(), make(), make(seed=4)
    torch.manual_seed(0)
    a = [run(first, len(first)) for _ in range(3)]
    torch.manual_seed(1)
    assert a == [run(second, len(second)) for _ in range(3)]
    assert a[0] != a[1] != a[2]
    assert a[0] != run(other, len(other))


@every_kind
def test_resume_anywhere_equals_the_uninterrupted_run(make):
    total = 2 * len(make()) + 2
    expected = run(make(), total)
    for stop in range(total):
        data = make()
        got = run(data, stop)
        saved = json.loads(json.dumps(data.state_dict()))  # plain numbers, as in a file
        fresh = make()
        fresh.load_state_dict(saved)
        assert got + run(fresh, total - stop) == expected


@every_kind
def test_after_an_epoch_left_early_comes_the_next_one_whole(make):
    whole = make()
    epochs = [run(whole, len(whole)) for _ in range(2)]
    data = make()
    assert run(data, 2) == epochs[0][:2]
    assert [flat(batch) for batch in data] == epochs[1]


@every_kind
def test_two_iterators_at_once_each_get_a_whole_epoch(make):
    whole = make()
    epochs = [run(whole, len(whole)) for _ in range(2)]
    data = make()
    pairs = [(flat(a), flat(b)) for a, b in zip(data, data, strict=True)]
    assert [list(side) for side in zip(*pairs, strict=True)] == epochs


@every_kind
@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 9}, "saved with seed 9"),
        ({"samples": 7}, "saved with samples 7"),
        ({"position": 10**6}, "no batch 1000000"),
        ({"epoch": -1}, "epoch -1"),
        ({"extra": 1}, "no position"),
    ],
)
def test_foreign_positions_are_refused(make, change, message):
    data = make()
    with pytest.raises(ValueError, match=message):
        data.load_state_dict({**data.state_dict(), **change})


@pytest.mark.parametrize("size", [1, 5, 22, 23, 100])
def test_each_sample_once_per_epoch(size):
    data = batches(*labelled(), size=size, seed=0)
    for _ in range(2):
        drawn = list(data)
        assert len(drawn) == len(data)
        assert all(len(labels) == min(size, 23) for _, labels in drawn[:-1])
        assert all(torch.equal(images[:, 0], labels * 10.0) for images, labels in drawn)
        assert sorted(torch.cat([labels for _, labels in drawn]).tolist()) == list(range(23))


def test_drop_last_gives_whole_batches_and_drops_others_each_epoch():
    data = batches(*labelled(), size=5, seed=0, drop_last=True)
    left_out = set()
    for _ in range(4):
        drawn = [labels for _, labels in data]
        assert [len(labels) for labels in drawn] == [5] * 4 == [5] * len(data)
        left_out.add(frozenset(range(23)) - set(torch.cat(drawn).tolist()))
    assert {len(samples) for samples in left_out} == {3} and len(left_out) == 4


def test_episodes_are_few_shot_problems():
    images, labels = classes()
    data = episodes(images, labels, n_way=3, k_shot=1, queries=2, seed=0, per_epoch=40)
    seen = set()
    for (support, support_labels), (query, query_labels) in data:
        assert support_labels.tolist() == [0, 1, 2]
        assert query_labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert support_labels.dtype == torch.int64
        ways = support[:, 0]
        assert len(ways.unique()) == 3
        assert torch.equal(query[:, 0], ways.repeat_interleave(2))
        both = torch.cat([support, query])
        assert len(both.unique(dim=0)) == len(both) == 9  # no image twice
        seen.update(map(tuple, both.tolist()))
    assert len(seen) == len(images)


def test_outer_first_swaps_query_and_support():
    options = dict(n_way=2, k_shot=1, queries=3, seed=5)
    plain = next(iter(episodes(*classes(), **options)))
    swapped = next(iter(episodes(*classes(), **options, outer_first=True)))
    assert flat(plain[0]) == flat(swapped[1]) and flat(plain[1]) == flat(swapped[0])
    assert len(swapped[0][1]) == 6


def test_blocks_do_not_overlap_and_targets_are_one_further():
    data = Blocks(torch.arange(1000), length=7, size=10, seed=0)
    first_tokens = set()
    for _ in range(3):
        drawn = list(data)
        assert len(drawn) == len(data) == 14  # 141 whole blocks wherever the cut begins
        assert all(tokens.shape == targets.shape == (10, 7) for tokens, targets in drawn)
        assert all(torch.equal(tokens + 1, targets) for tokens, targets in drawn)
        tokens = torch.cat([tokens.flatten() for tokens, _ in drawn])
        assert len(tokens.unique()) == len(tokens) == 980
        first_tokens.add(int(tokens[0]) % 7)
    assert len(first_tokens) > 1  # another offset


def test_blocks_reach_the_last_token_for_the_smallest_text():
    for seed in range(30):
        ((tokens, targets),) = Blocks(torch.arange(8), length=4, size=1, seed=seed)
        assert targets.max() <= 7 and torch.equal(tokens + 1, targets)
    with pytest.raises(ValueError, match="7 tokens are too few .* takes 8"):
        Blocks(torch.arange(7), length=4, size=1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: batches(torch.ones(3), torch.ones(4), 1), "3 images and 4 labels"),
        (lambda: batches(torch.ones(0), torch.ones(0), 1), "0 images"),
        (lambda: batches(torch.ones(3), torch.ones(3), 0), "size must be .* not 0"),
        (lambda: batches(torch.ones(3), torch.ones(3), 1.5), "size must be .* not 1.5"),
        (lambda: batches(torch.ones(3), torch.ones(3, device="meta"), 1), "cpu .* meta"),
        (lambda: episodes(*classes(), n_way=5), "n_way=5 classes: there are 4"),
        (lambda: episodes(*classes(), n_way=2, k_shot=2, queries=3), "class 0 has 4"),
        (lambda: episodes(*classes(), n_way=2, k_shot=0), "k_shot must be"),
        (lambda: episodes(torch.ones(3), torch.ones(4)), "3 images and 4 labels"),
        (lambda: Blocks(torch.arange(9), length=0, size=1), "length must be"),
    ],
)
def test_misuse_is_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()
