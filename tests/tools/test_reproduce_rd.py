"""The tables and figures of rate-distortion pruning: what is measured, the cache, the page."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pot_sparsity.recipe import load_recipe
from tests.pipeline.nets import conv_net, images, labelled
from tests.tools.loading import tool

rd = tool("reproduce_rd")
network_tool = tool("rd_network")
page_tool = tool("rd_page")
figures = tool("rd_figures")
bench = tool("bench_curves")


def outcome(top1: float) -> dict[str, Any]:
    return {"top1": top1, "dense": 91.0, "interval": [top1 - 91.0, -2.0, 1.0]}


def outcomes() -> dict[str, dict[str, Any]]:
    """Something in every part of the page, but not everything."""
    found: dict[str, dict[str, Any]] = {"net/settings": {"samples": 64}}
    for aggregate, cleaning in page_tool.CURVES:
        for percent in page_tool.PRUNED[:2]:
            found[f"net/pruned/network/{aggregate}/{cleaning}/{percent}"] = outcome(90.0)
    found["net/pruned/layer/worst/outliers/30"] = outcome(85.5)
    found["net/pruned/lamp/30"] = outcome(84.0)
    found["net/pruned/noise/worst/outliers/30"] = outcome(86.0)
    for percent in page_tool.SPEED_PERCENTS:
        found[f"net/repaired/network/worst/outliers/{percent}"] = outcome(88.0)
        found[f"net/repaired/default/{percent}"] = outcome(88.25)
    left = [0.8**turn for turn in range(1, 11)]
    found["net/iterative/pruned/mean/none"] = {"rounds": [[1.0 - part, 70.0] for part in left]}
    found["net/additivity"] = {"20": {"alone": [1.0, 2.0, 4.0], "together": [1.1, 2.2, 4.4]}}
    points = {"percent": page_tool.STEPS, "sum": [1.0] * 11, "real": [2.0] * 11}
    found["net/approximation"] = {"allocated": points, "uniform": points}
    found["net/speed"] = {
        "published": {"wall": 300.0, "processor": 310.0},
        "ours": {"wall": 10.0, "processor": 18.0},
        "moments": 3.0,
        "solver": 0.25,
        "apart": 1e-6,
        "layers": 20,
        "every": 4,
    }
    return found


def test_the_page_has_what_is_known(tmp_path: Path) -> None:
    text = page_tool.page(["net", "absent_net"], outcomes(), tmp_path)
    assert "Dense: net 91.00." in text
    assert "| joint: the network's output | 90.00 (-1.00 [-2.00, +1.00]) | 90.00" in text
    assert "| single layer: the layer's own output | 85.50 (-5.50 [-2.00, +1.00]) | - |" in text
    assert "| LAMP | 84.00" in text
    assert "| no | no | 70.00 |" in text
    assert "refitted in each round" not in text  # nothing of that has run
    assert "| yes | no | 70.00" not in text
    assert "repaired, 70 %" not in text.partition("## Speed")[0]  # nothing of that column has run
    assert "| net | 20 % | 1.000 | 1.100 | 10 % |" in text
    assert "are 30.0 times as fast by the clock and take 17.2 times" in text
    assert "compiling, and of the runs, which all cost the same, one in 4 was made." in text
    assert "absent_net" not in text
    for name in (figures.ADDITIVITY, figures.APPROXIMATION):
        assert f"]({name})" in text
        assert (tmp_path / name).read_text(encoding="utf-8").startswith("<?xml")


def test_figures_are_the_same_every_time(tmp_path: Path) -> None:
    texts = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        page_tool.page(["net"], outcomes(), tmp_path / name)
        texts.append((tmp_path / name / figures.ADDITIVITY).read_bytes())
    assert texts[0] == texts[1]


def test_how_well_sums_fit() -> None:
    assert figures.fit_of([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == pytest.approx((1.0, 1.0, 0.0))
    correlation, slope, deviation = figures.fit_of([1.0, 2.0], [2.0, 1.0])
    assert correlation == pytest.approx(-1.0)
    assert slope == pytest.approx(4.0 / 5.0)
    assert deviation == pytest.approx(1.0)


@pytest.mark.parametrize("mode", list(page_tool.ITERATIVE))
def test_iterative_rows_are_recipes(mode: str) -> None:
    recipe = load_recipe("rd_iterative", page_tool.ITERATIVE[mode])
    assert recipe.allocation.rounds == "iterative"
    assert 1.0 - recipe.sparsity == pytest.approx(0.8**10, abs=1e-3)
    assert (recipe.reconstruction.input == "sparse") == (mode == "refitted")


def test_only_what_is_missing_is_measured(tmp_path: Path) -> None:
    calls = []

    def work() -> dict[str, Any]:
        calls.append(1)
        return {"top1": 1.0}

    rd.Cache(tmp_path).once("a", work)
    again = rd.Cache(tmp_path)
    again.once("a", work)
    again.once("b", work)
    assert len(calls) == 2
    assert again.known == {"a": {"top1": 1.0}, "b": {"top1": 1.0}}


def tiny_zoo(folder: Path) -> Path:
    """A zoo of one network of five layers."""
    net = conv_net()
    onnx.save(net, str(folder / "net.onnx"))
    np.savez(folder / "calibration.npz", x=images(24))
    labelled(folder / "validation.npz", net, 40)
    entry = {"model": "net.onnx", "calibration": "calibration.npz", "validation": "validation.npz"}
    (folder / "zoo.json").write_text(json.dumps({"net": entry}))
    return folder


def test_a_small_network_is_measured_as_published(tmp_path: Path) -> None:
    zoo = tiny_zoo(tmp_path)
    entry = json.loads((zoo / "zoo.json").read_text())["net"]
    with ExitStack() as stack:
        network = network_tool.Network("net", zoo, entry, tmp_path, stack, samples=8, threads=1)
        network.levels = 3
        fast = network.distances()
        assert (tmp_path / "net-network-8.npz").is_file()
        plain, seconds = network_tool.published_curves(network)
        assert seconds.wall > 0.0
        for name, distances in plain.items():
            assert distances.shape == (8, 3)
            np.testing.assert_allclose(fast[name], distances, rtol=2e-4, atol=1e-6 * distances.max())
        some, _ = network_tool.published_curves(network, 3)
        for name, distances in some.items():
            np.testing.assert_array_equal(distances, plain[name][:, 2::3])
        zeros = network.allocated(network.curves(), 0.5)
        assert sum(zeros.values()) == round(0.5 * sum(item.layer.size for item in network.layers))
        assert network.outcome(zeros)["dense"] == 100.0
        repaired = network.repaired(network.our_zeros(0.5))
        assert repaired["interval"][0] == pytest.approx(repaired["top1"] - 100.0)
        pruned = network.pruned(zeros)
        assert pruned is not network.pruned({})
        assert network.meter(network.pruned({})).max() == 0.0


def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--cache", str(tmp_path / "cache"), "--zoo"]
    with pytest.raises(SystemExit):
        rd.main([*given, str(tmp_path / "nothing")])
    assert "name the folder with --zoo" in capsys.readouterr().err
    (tmp_path / "zoo.json").write_text(json.dumps({"other": {}}))
    with pytest.raises(SystemExit):
        rd.main([*given, str(tmp_path)])
    assert "the zoo has no network 'resnet20_akamaster_cifar10'; it has other" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="it has other"):
        bench.main(["net", "--zoo", str(tmp_path)])


def test_seconds_of_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["net", "--zoo", str(tiny_zoo(tmp_path)), "--set", "allocation.levels=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == 5
    assert found["curves_and_allocation_seconds"] >= found["curves_seconds"] > 0.0
    assert bench.main(["--solver", "12"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 12
