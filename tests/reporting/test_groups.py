from dataclasses import replace
from pathlib import Path

import pytest

from etflight.reporting.groups import group
from etflight.reporting.results import Result, read_results

RESULTS = Path(__file__).parents[2] / "notebooks/results"


def result(arm="ce", seed=0, acc=0.5, **facts):
    facts = {"dataset": "CIFAR10", "ratio": 100.0, "num_classes": 10, **facts}
    return Result(source=f"{arm}_{seed}", arm=arm, seed=seed, metrics={"test/acc": acc}, **facts)


def test_a_number_has_mean_and_sample_deviation_over_the_runs_that_have_it():
    ((section,), _) = group([result(seed=0, acc=0.25), result(seed=1, acc=0.75, seconds=9.0), result("etf", seed=2)])
    ce, etf = section.groups
    assert ce.stat("test/acc") == (0.5, pytest.approx(0.125**0.5), 2)
    assert etf.stat("test/acc") == (0.5, None, 1)
    assert ce.seconds() == (9.0, None, 1)
    assert ce.stat("test/ece") is None


def test_runs_are_grouped_by_set_ratio_and_arm():
    runs = [
        result("ce", 0), result("etf", 0), result("ce", 1), result("ce", 0, ratio=50.0), result("ce", 0, dataset="CIFAR100"),
    ]  # fmt: skip
    sections, remarks = group(runs)
    assert remarks == []
    found = [(s.dataset, s.ratio, [(g.arm, [r.seed for r in g.results]) for g in s.groups]) for s in sections]
    assert found == [
        ("CIFAR10", 100.0, [("ce", [0, 1]), ("etf", [0])]),
        ("CIFAR10", 50.0, [("ce", [0])]),
        ("CIFAR100", 100.0, [("ce", [0])]),
    ]


def test_two_sets_of_one_name_never_share_a_section():
    """Equal classes, ratio and choice of images: runs on one are no seeds of the other, and none is taken for a repetition."""
    runs = [
        result(seed=0, dataset="pets", fingerprint="aaa-1"),
        result(seed=0, dataset="pets", fingerprint="bbb-1"),
        result(seed=1, dataset="pets", fingerprint="bbb-1"),
        result(seed=0, dataset="pets", ratio=50.0, fingerprint="aaa-2"),
        result(seed=7, dataset="pets", fingerprint=None),
    ]
    sections, remarks = group(runs)
    assert remarks == []
    assert [(s.title, [r.seed for g in s.groups for r in g.results]) for s in sections] == [
        ("pets aaa, imbalance ratio 100", [0]),
        ("pets bbb, imbalance ratio 100", [0, 1]),
        ("pets aaa, imbalance ratio 50", [0]),
        ("pets, imbalance ratio 100", [7]),
    ]


def test_runs_of_one_arm_on_two_sets_of_configurations_are_not_averaged_and_none_is_left_out():
    runs = [
        result(
            seed=seed, name=f"digits_{images}/ce/seed{seed}", config_sha256=images, acc=0.25 if images == "ten" else 0.5
        )
        for images in ("ten", "thirty")
        for seed in (0, 1)
    ]
    (section,), remarks = group(runs)
    assert remarks == []
    found = [(g.arm, [r.seed for r in g.results], g.stat("test/acc").mean) for g in section.groups]
    assert found == [("ce (digits_ten)", [0, 1], 0.25), ("ce (digits_thirty)", [0, 1], 0.5)]
    # one experiment under two names
    again, _ = group([replace(run, config_sha256="same") for run in runs[1:3]])
    assert [g.arm for section in again for g in section.groups] == ["ce"]


def test_runs_of_one_arm_with_other_options_have_rows_named_by_run_and_none_is_averaged_with_another_or_left_out():
    """The options came by flag: equal seeds are no repetition, and unequal ones no seeds of one experiment."""
    runs = [
        result(seed=0, acc=0.25, name="x/seed0", config_sha256="x", commit="a", command="etflight fit --smooth 0.1"),
        result(seed=0, acc=0.5, name="y", config_sha256="y", commit="a", command="etflight fit --smooth 0.2"),
        result(seed=1, acc=0.75, name="x/seed1", config_sha256="x", commit="b", command="etflight fit --smooth 0.1"),
        result(seed=2, acc=1.0, name="z", config_sha256="z", commit="b", command="etflight fit"),
        result(seed=3, acc=0.0, name="unknown"),
    ]
    ((section,), remarks) = group(runs)
    found = [(g.arm, [r.seed for r in g.results], g.stat("test/acc").mean) for g in section.groups]
    rows = [("ce (x)", [0, 1], 0.5), ("ce (y)", [0], 0.5), ("ce (z)", [2], 1.0), ("ce (unknown)", [3], 0.0)]
    assert (found, remarks) == (rows, [])
    records = [replace(run, name=None, source=f"results/{name}.json[3]") for name, run in zip("pq", runs, strict=False)]
    ((section,), _) = group(records)
    assert [g.arm for g in section.groups] == ["ce (p)", "ce (q)"]
    # of one name, as in two folders for runs: the paths differ
    ((section,), _) = group([replace(run, name="x", source=f"{i}/x") for i, run in enumerate(runs[:2])])
    assert [g.arm for g in section.groups] == ["ce (0/x)", "ce (1/x)"]


@pytest.mark.parametrize(("seeds", "commits"), [((0, 1), "aa"), ((0, 0), "ab")])
def test_a_configuration_edited_between_two_runs_of_one_command_is_another_one(seeds, commits):
    runs = [
        result(
            seed=seed, name=name, config_sha256=name, commit=commit, command=f"etflight fit -c my.yaml --name {name}"
        )
        for seed, name, commit in zip(seeds, "xy", commits, strict=True)
    ]
    ((section,), remarks) = group(runs)
    assert [g.arm for g in section.groups] == ["ce (x)", "ce (y)"]
    assert remarks == []


def test_results_of_two_checkpoints_of_a_run_have_rows_of_their_own():
    runs = [
        result(seed=seed, name=f"{name}/seed{seed}", checkpoint=name, config_sha256="c")
        for name in ("best", "last")
        for seed in (0, 1)
    ]
    ((section,), remarks) = group(runs)
    assert [(g.arm, len(g.results)) for g in section.groups] == [("ce (best)", 2), ("ce (last)", 2)]
    assert remarks == []


def test_seeds_whose_checkpoints_have_numbers_that_training_came_to_are_one_row():
    names = ["epoch=12-step=900", "epoch=9-step=675", "epoch=9-step=675-v1"]
    runs = [
        result(seed=seed, checkpoint=name, checkpoint_pattern="epoch=*-step=*", config_sha256="c")
        for seed, name in enumerate(names)
    ]
    ((section,), remarks) = group(runs)
    assert ([g.arm for g in section.groups], remarks) == (["ce"], [])


@pytest.mark.parametrize("names", [("epoch=9-step=675", "epoch=199-step=15000"), ("top1", "top5"), ("best", "best-v1")])
def test_checkpoints_whose_numbers_may_be_a_choice_are_never_averaged(names):
    runs = [result(seed=i, name=name, checkpoint=name, config_sha256="c") for i, name in enumerate(names)]
    ((section,), remarks) = group(runs)
    assert ([g.arm for g in section.groups], remarks) == ([f"ce ({name})" for name in names], [])


def decision(seed, of, name, **facts):
    """A test of a run whose identity is `of`, a hash or None."""
    command = f"etflight test -c ncm.yaml --ckpt_path runs/digits/{name}/seed{seed}/checkpoints/last.ckpt"
    based_on = {"config_sha256": of, "commit": "a", "options": ["etflight", "fit", "-c", "ce.yaml"]}
    facts = {"config_sha256": f"ncm of {of}", "based_on": of and based_on, "commit": "a", "command": command} | facts
    return result("ncm", seed, name=f"digits/ncm_{name}/seed{seed}", checkpoint="last", **facts)


def rows(runs):
    ((section,), remarks) = group(runs)
    return [(g.arm, [r.seed for r in g.results]) for g in section.groups], remarks


def test_decisions_for_differently_trained_models_are_never_averaged():
    apart = [("ncm (digits/ncm_x)", [0, 1]), ("ncm (digits/ncm_y)", [2])]
    assert rows([decision(0, "x", "x"), decision(1, "x", "x"), decision(2, "y", "y")]) == (apart, [])
    # as an earlier record has them: one hash for all, and the path of the checkpoint in the command
    earlier = {"config_sha256": "ncm"}
    assert rows([decision(i, None, name, **earlier) for i, name in enumerate("xxy")]) == (apart, [])
    later = [decision(0, None, "x", **earlier), decision(1, "x", "x", commit="b"), decision(2, "y", "y", commit="b")]
    assert rows(later)[0] == apart
    # a name is no identity
    assert rows([decision(i, "same", name) for i, name in enumerate("xyz")]) == ([("ncm", [0, 1, 2])], [])


def test_seeds_of_a_decision_stay_together_where_the_package_got_options_between_their_trainings():
    trained = {"config_sha256": "newer", "commit": "b", "options": ["etflight", "fit", "-c", "ce.yaml"]}
    newer = {"config_sha256": "ncm of newer", "commit": "a"}
    runs = [decision(0, "x", "x"), decision(1, None, "x", based_on=trained, **newer)]
    assert rows(runs)[0] == [("ncm", [0, 1])]
    other = trained | {"options": [*trained["options"], "--data.mixup", "1"]}
    assert len(rows([runs[0], decision(1, None, "x", based_on=other, **newer)])[0]) == 2
    second = trained | {"based_on": {"config_sha256": "first", "commit": "b", "options": ["etflight", "fit"]}}
    assert len(rows([runs[0], decision(1, None, "x", based_on=second, **newer)])[0]) == 2


def test_decisions_that_do_not_say_for_which_model_are_named():
    runs = [decision(i, None, "x", config_sha256="ncm", command="etflight test --ckpt_path x.ckpt") for i in (0, 1)]
    found, (remark,) = rows(runs)
    assert found == [("ncm", [0, 1])]
    assert "may decide for differently trained models" in remark
    assert "ncm_0, ncm_1" in remark
    assert rows(runs[:1])[1] == []


@pytest.mark.parametrize("order", [1, -1])
def test_seeds_of_one_configuration_stay_together_beside_a_run_of_an_older_package(order):
    older = result(seed=0, name="old/seed0", config_sha256="a", commit="a", command="etflight fit --name 'old run'")
    newer = [
        result(
            seed=i, name=f"new/seed{i}", config_sha256="b", commit="b", command=f"etflight fit --seed_everything {i}"
        )
        for i in range(3)
    ]
    ((section,), remarks) = group([older, *newer][::order])
    assert {g.arm: sorted(r.seed for r in g.results) for g in section.groups} == {
        "ce (old)": [0],
        "ce (new)": [0, 1, 2],
    }
    assert remarks == []
    (section,), _ = group([replace(older, seed=3), *newer][::order])
    assert [len(g.results) for g in section.groups] == [4]


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_runs_of_one_seed_the_tested_one_is_kept_and_the_other_named(order):
    runs = [result(seed=0, config_sha256="c"), result(seed=1, config_sha256="c")]
    untested = replace(runs[0], source="untested", metrics={"val/acc": 0.9})
    ((section,), (remark,)) = group([*[runs[0], untested][::order], runs[1]])
    assert section.groups[0].results == [runs[0], runs[1]]
    assert "left out: untested is ce with seed 0, as ce_0 is" in remark


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_runs_of_an_arm_are_one_row_though_later_code_has_more_options(file):
    results, problems = read_results([file])
    sections, remarks = group(results)
    assert {g.arm for section in sections for g in section.groups} == {r.arm for r in results}
    assert sum(len(section.results) for section in sections) == len(results)
    assert not any("left out" in remark for remark in [*problems, *remarks])


def test_the_same_seed_and_other_classes_are_left_out_and_named():
    runs = [result(seed=0, acc=0.5), result(seed=0, acc=0.7), result(seed=1, acc=0.6, num_classes=None)]
    runs += [result(seed=None, acc=0.6), result(seed=None, acc=0.6), result(seed=2, num_classes=7)]
    (section,), remarks = group(runs)
    assert [r.metrics["test/acc"] for r in section.groups[0].results] == [0.5, 0.6, 0.6, 0.6]  # no seed: different runs
    assert len(remarks) == 2
    assert all(word in remarks[0] for word in ("ce_2", "7 classes", "10"))
    assert "same seed" in remarks[1]


def test_the_same_seed_on_other_images_is_another_run():
    runs = [result(seed=0, fingerprint=f"set-{choice}") for choice in ("a", "b", "b")]
    (section,), remarks = group(runs)
    assert len(section.groups[0].results) == 2
    assert all(word in remark for word, remark in zip(("same seed", "different images"), remarks, strict=True))


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("config_sha256", ("x", "y"), ["ce", "configurations"]),
        ("fingerprint", ("set-x", "set-y"), ["different images"]),
        ("epochs", (20, 30), ["different epochs", "20, 30"]),
    ],
)
def test_seeds_that_differ_in_more_than_the_seed_are_named(name, values, words):
    later = [
        {"commit": str(i), "command": f"etflight fit -c ce.yaml --seed_everything {i} --name s{i}"} for i in (0, 1)
    ]
    _, remarks = group([result(seed=i, **{name: value}, **later[i]) for i, value in enumerate(values)])
    assert len(remarks) == 1
    assert all(word in remarks[0] for word in words)
    assert group([result(seed=i, **{name: values[0]}) for i in range(2)])[1] == []


def test_published_numbers_stand_only_beside_their_set_and_ratio():
    runs = [result(ratio=100.0), result(ratio=20.0), result(dataset="CIFAR100", ratio=50.0), result(dataset="Digits")]
    sections, _ = group(runs)
    assert [len(s.published) > 0 for s in sections] == [True, False, True, False]
    assert {e["method"]: e["test/acc"] for e in sections[0].published}["LDAM-DRW"] == 0.7773
    assert all(e["read_in"] and 0 < e["test/acc"] < 1 for s in sections for e in s.published)
