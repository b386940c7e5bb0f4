from etflight.data import Digits, ImbalancedSampler
from etflight.data.sampler import ShardSampler


def samplers_of_this_rank(rank):
    data = Digits(imbalance_ratio=20, batch_size=100)
    return (
        list(ShardSampler(range(5))),
        list(ImbalancedSampler([0, 0, 0, 1, 1], "balanced", seed=4)),
        [label for _, labels in data.eval_dataloader("test") for label in labels.tolist()],
        [len(labels) for _, labels in data.train_dataloader()],
    )


def test_an_initialised_process_group_shards_without_being_told(two_processes):
    (even, first, shard, batches), (odd, second, other_shard, other_batches) = two_processes(
        samplers_of_this_rank, [(), ()]
    )
    assert (even, odd) == ([0, 2, 4], [1, 3])
    draw = list(ImbalancedSampler([0, 0, 0, 1, 1], "balanced", seed=4))
    assert (first, second) == (draw[::2], draw[1::2])
    labels = Digits().split("test").labels.tolist()
    assert (shard, other_shard) == (labels[::2], labels[1::2])
    assert (batches, other_batches) == ([100, 100, 16], [100, 100, 15])
