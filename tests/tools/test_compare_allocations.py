"""The page that compares allocations: what is run, what is kept, and what the page says about who wins."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pot_sparsity.errors import PotSparsityError
from pot_sparsity.pipeline import sweep
from pot_sparsity.pipeline.intake import Sources
from pot_sparsity.pipeline.sweeping.sweep_points import ALL
from pot_sparsity.report.io import read_report
from pot_sparsity.report.sweep_io import read_sweep, write_sweep
from pot_sparsity.report.sweep_schema import DenseFigures, Sweep, SweepLayer, SweepPoint
from tests.pipeline.nets import images, labelled, plain_net
from tests.tools.loading import TOOLS, tool

pages = tool("allocation_page")
answers = tool("allocation_answers")
compare = tool("compare_allocations")

REPORT = read_report(TOOLS.parent / "tests" / "report" / "sample_report.json")
ENTRY = {
    "model": "net.onnx",
    "calibration": "calib",
    "validation": "val",
    "labels": "labels.csv",
    "metric": "top1",
    "preprocess": {"mean_values": [1, 2, 3], "layout": "NHWC", "center_crop": 8},
}
FAST: dict[str, Any] = {
    "pruning": {"method": "wanda_refit"},
    "allocation": {"levels": 3},
    "quantization": {"enabled": False},
}
SAMPLES = 400


def point(allocation: str, bound: float, top1: float, error: float = 0.2) -> SweepPoint:
    return SweepPoint(
        id=f"{allocation}@{bound:.2f}",
        allocation=allocation,
        budget="sparsity",
        bound=bound,
        sparsity=bound + (0.001 if allocation == "lamp" else 0.0),
        zeros=round(100 * bound),
        flops=None,
        bops=None,
        size=1.0 - bound,
        size_bytes=round(400 * (1.0 - bound)),
        metrics={"top1": top1, "agreement": top1 + 1.0, "sqnr": -10 * np.log10(error), "logit_kl": error / 2},
        drop=92.0 - top1,
        relative_error=error,
        layers=[round(100 * bound)],
        seconds=0.5,
    )


def made_up(*points: SweepPoint) -> Sweep:
    return Sweep(
        versions=REPORT.versions,
        machine=REPORT.machine,
        seed=0,
        engine="openvino",
        recipe={"pruning": {"method": "admm"}},
        model=REPORT.model,
        data=REPORT.data.model_copy(update={"metric": "top1", "validation": SAMPLES}),
        calibration="abc",
        keep_structure=False,
        correction="bias",
        grid=0.95,
        database="database",
        weights=100,
        layers=[SweepLayer(name="layer", weights=100)],
        dense=DenseFigures(metrics={"top1": 92.0}, flops=None, size_bytes=400),
        points=list(points),
        stages=[],
        warnings=[],
        seconds=3.0,
        peak_memory_mib=100.0,
    )


def answered(*parts: tuple[int, bool], sqnr: float = 3.0) -> Any:
    """Answers to SAMPLES pictures, so many of them right, so many wrong, and so on."""
    right = np.concatenate([np.full(count, right) for count, right in parts])
    return answers.Answers(right, {"top1": 100.0 * float(right.mean()), "sqnr": sqnr, "logit_kl": 0.3})


@pytest.fixture
def network() -> Any:
    """Output distortion leads at 70 %, is behind by little at 80 % and by much at 90 %, where it has no rival."""
    points = [
        point("output_distortion", 0.7, 90.0),
        point("output_distortion", 0.8, 80.0, error=0.3),
        point("output_distortion", 0.9, 50.0, error=0.5),
        point("lamp", 0.7, 89.0),
        point("lamp", 0.8, 81.0, error=0.25),
        point("lamp", 0.9, 60.0, error=0.6),
        point("erk", 0.7, 88.0),
        point("erk", 0.8, 80.0, error=0.4),
    ]
    known = {
        "output_distortion@0.80": answered((320, True), (80, False)),
        "lamp@0.80": answered((300, True), (20, False), (24, True), (56, False)),
        "output_distortion@0.90": answered((200, True), (200, False)),
        "lamp@0.90": answered((240, True), (160, False)),
        "refined@0.90": answered((260, True), (140, False), sqnr=10.0),
    }
    return pages.Network("net", made_up(*points), "pot-sparsity sweep $ZOO/net.onnx", known)


def test_where_it_does_not_win(network: Any) -> None:
    found = pages.contests(network.name, network.sweep, network.known)
    assert [(c.rival.id, c.difference.verdict) for c in found] == [
        ("lamp@0.80", "within the noise"),
        ("erk@0.80", "equal"),
        ("lamp@0.90", "behind"),
    ]
    # 24 pictures only lamp gets right, 20 only output distortion
    mean = 4 / SAMPLES
    half = 1.959964 * np.sqrt((44 - SAMPLES * mean**2) / (SAMPLES - 1) / SAMPLES)
    expected = 100 * np.array([mean, mean - half, mean + half])
    assert found[0].difference.interval == pytest.approx(expected, abs=1e-4)
    assert found[1].difference.interval is None
    assert [contest.refined is None for contest in found] == [True, True, False]
    # 20 pictures only the refined one gets right
    assert (found[2].refined.points, found[2].refined.verdict) == (pytest.approx(-5.0), "ahead")
    assert found[2].compared(pages.output_error) == pytest.approx((0.6, 0.5, 0.1))
    assert found[2].compared(pages.logit_kl) == pytest.approx((0.3, 0.25, 0.3))
    assert found[0].compared(pages.logit_kl)[2] is None
    unknown = pages.contests("net", network.sweep, {})[2]
    assert (unknown.difference.verdict, unknown.refined) == ("not compared picture by picture", None)


def test_the_page(network: Any) -> None:
    text = pages.page([network])
    assert "generated by `tools/compare_allocations.py`" in text
    assert "`admm` prunes the layers, and\nbiases are corrected in one step." in text
    assert "\nDense: 92.00 on 400 pictures; " in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "|  | 70 % | 80 % | 90 % |"
    assert rows[2:6] == [
        "| `output_distortion` | **90.00** (91.0) | 80.00 (81.0) | 50.00 (51.0) |",
        "| `lamp` | 89.00 (90.0) | **81.00** (82.0) | **60.00** (61.0) |",
        "| `erk` | 88.00 (89.0) | 80.00 (81.0) | - |",
        "| zeros, % | 70.00 to 70.10 | 80.00 to 80.10 | 90.00 to 90.10 |",
    ]
    assert "\n```sh\npot-sparsity sweep $ZOO/net.onnx\n```\n" in text
    closing = text.partition("## Where output distortion does not win\n")[2]
    assert "Compared are a network, a sparsity and another allocation: 5 times." in closing
    assert "top-1 in 2 of them." in closing
    row = (
        r"\| net \| 90 % \| `lamp` \| \+10\.00 \[\+7\.\d\d, \+12\.\d\d\], behind \| "
        r"-5\.00 \[.*\], ahead \| 0\.6 / 0\.5 / 0\.1 \| 0\.3 / 0\.25 / 0\.3 \|"
    )
    assert re.search(row, closing)
    assert "| net | 80 % | `erk` | +0.00, equal | - | 0.4 / 0.3 / - | 0.2 / 0.15 / - |" in closing
    assert closing.splitlines()[-4:] == [
        "Of these 3 differences 1 are none at all, 1 are within the noise of the pictures, and output distortion is "
        "behind in 1 (net at 90 %).",
        "In 2 of the 3 it nevertheless has the smaller output error, in 2 the smaller logit KL.",
        "Where the distance that it minimises is the smaller one, that distance does not rank these models as top-1 "
        "does; elsewhere what single layers do to the output does not add up to what they do together.",
        "Refined, it has the higher top-1 in 1 of 1, and is behind by more than the noise in 0.",
    ]


def test_what_is_not_compared_counts_as_neither(network: Any) -> None:
    closing = pages.closing([pages.Network("net", network.sweep, "", {})])
    start = closing.index(
        "Of these 3 differences 1 are none at all, 0 are within the noise of the pictures, and output distortion is "
        "behind in 0."
    )
    assert closing[start + 1] == "2 are not compared picture by picture yet and count as neither."


def test_where_it_always_wins() -> None:
    alone = made_up(point("output_distortion", 0.7, 90.0), point("lamp", 0.7, 89.0))
    closing = "\n".join(pages.closing([pages.Network("net", alone, "", {})]))
    assert closing.endswith(
        "another allocation: 1 times. Output distortion has the higher\ntop-1 in 1 of them."
    )


def test_commands() -> None:
    assert compare.command(ENTRY, [0.7, 0.9]) == (
        "pot-sparsity sweep $ZOO/net.onnx --calibration $ZOO/calib --validation $ZOO/val --validation-labels "
        "$ZOO/labels.csv --validation-split dev --mean-values 1,2,3 --center-crop 8 --points 0.7,0.9 --correct bias "
        "-o trade-off"
    )
    zoo = {"a1": ENTRY, "b1": ENTRY | {"metric": "coco_ap"}, "a2": ENTRY}
    assert compare.classifiers(zoo) == ["a1", "a2"]
    assert compare.classifiers(zoo, ["*2", "b*"]) == ["a2"]


@pytest.mark.parametrize(
    ("state", "option"), [("new", []), ("interrupted", ["--resume"]), ("other points", ["--force"])]
)
def test_an_interrupted_sweep_goes_on(
    state: str, option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "net"
    if state != "new":
        (home / "state").mkdir(parents=True)
        write_sweep(made_up(point("lamp", 0.7, 89.0)), home)
    if state == "interrupted":
        (home / "state" / "run.json").write_text("{}")
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda given, **_: commands.append(given))
    compare.run_sweep(ENTRY, tmp_path, home, [0.7, 0.8], 1)
    assert commands[0][1:5] == ["-m", "pot_sparsity", "sweep", f"{tmp_path}/net.onnx"]
    own = commands[0][commands[0].index("--threads") :]
    assert own == ["--threads", "1", "-o", str(home), "--quiet", *option]
    assert not any("$ZOO" in word for word in commands[0])


def test_finished_sweeps_are_kept_and_failures_do_not_stop_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, ran = tmp_path / "cache", []

    def fake(entry: Any, folder: Path, home: Path, points: list[float], threads: int) -> None:
        ran.append(home.name)
        if home.name == "bad":
            raise subprocess.CalledProcessError(2, "pot-sparsity")
        home.mkdir(exist_ok=True)
        write_sweep(made_up(*(point(name, p, 80.0 - len(name)) for name in ALL for p in points)), home)

    monkeypatch.setattr(compare, "run_sweep", fake)
    monkeypatch.setattr(compare, "answer", lambda *_: None)
    zoo = {"bad": ENTRY, "good": ENTRY}
    for points in ([0.7, 0.8], [0.8], [0.7, 0.9]):
        assert compare.fill_cache(cache, tmp_path, zoo, list(zoo), points, 1) == 1
    assert ran == ["bad", "good", "bad", "bad", "good"]
    assert "bad failed: " in capsys.readouterr().err
    (network,) = compare.read_networks(cache, zoo)
    assert network.name == "good"
    assert " --points 0.7,0.9 --correct bias " in network.command


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small classifier, and a cache with its sweep."""
    folder = tmp_path_factory.mktemp("zoo")
    onnx.save(plain_net(), folder / "net.onnx")
    np.savez(folder / "calibration.npz", x=images(48))
    labelled(folder / "validation.npz", plain_net(), 60)
    entry = {"model": "net.onnx", "calibration": "calibration.npz", "validation": "validation.npz"}
    (folder / "zoo.json").write_text(json.dumps({"tiny": {**entry, "metric": "top1"}}))
    sweep(
        folder / "net.onnx",
        folder / "calibration.npz",
        validation=folder / "validation.npz",
        recipe=FAST,
        points=[0.6, 0.8],
        output=folder / "cache" / "tiny",
        threads=1,
    )
    return folder


def test_models_are_put_together_again(zoo: Path, tmp_path: Path) -> None:
    home = zoo / "cache" / "tiny"
    done = read_sweep(home)
    sources = Sources(
        zoo / "net.onnx", zoo / "calibration.npz", zoo / "validation.npz", None, None, None, "openvino"
    )
    found = dict(answers.measure(sources, home, [p.id for p in done.points], [0.8], 1))
    assert list(found) == [*(p.id for p in done.points), "refined@0.80"]
    for each in done.points:
        assert found[each.id].right.size == 60
        assert found[each.id].right.sum() == pytest.approx(0.6 * each.metrics["top1"])
        assert found[each.id].metrics == each.metrics
    cache = tmp_path / "answers"
    for name, known in found.items():
        answers.append(cache, "tiny", home, name, known)
    read = answers.read(cache, "tiny", home)
    assert {name: (known.right.tolist(), known.metrics) for name, known in read.items()} == {
        name: (known.right.tolist(), known.metrics) for name, known in found.items()
    }
    assert answers.read(cache, "another", home) == {}
    assert dict(answers.measure(sources, home, [], [], 1)) == {}

    done.points[0].metrics["top1"] += 5.0
    done.database = str(home / "database")
    write_sweep(done, tmp_path)
    assert answers.read(cache, "tiny", tmp_path) == {}
    with pytest.raises(PotSparsityError, match="delete that folder"):
        list(answers.measure(sources, tmp_path, [done.points[0].id], [], 1))
    done.correction = "full"
    write_sweep(done, tmp_path)
    with pytest.raises(PotSparsityError, match="more than stitched layers"):
        list(answers.measure(sources, tmp_path, [done.points[1].id], [], 1))


def test_the_whole_tool(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.md"
    given = ["--zoo", str(zoo), "--cache", str(zoo / "cache"), "--output", str(output), "--points", "0.6,0.8"]
    assert compare.main([*given, "--threads", "1"]) == 0
    text = output.read_text()
    assert "## tiny" in text
    assert str(zoo) not in text
    assert "not compared" not in text
    lost = compare.contests("tiny", read_sweep(zoo / "cache" / "tiny"), {})
    assert lost
    assert text.count("| tiny | ") == len(lost)
    # Everything is known now: the second call measures nothing and says the same.
    monkeypatch.setattr(answers, "load_job", lambda *_: pytest.fail("measured twice"))
    assert compare.main(given) == compare.main([*given, "--render-only"]) == 0
    assert output.read_text() == text
    with pytest.raises(SystemExit):
        compare.main([*given, "--only", "nobody"])
    assert "there are tiny" in capsys.readouterr().err
    assert compare.main(["--zoo", str(zoo), "--cache", str(tmp_path), "--render-only"]) == 1
