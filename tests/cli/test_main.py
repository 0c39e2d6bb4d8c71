"""The command line as people use it: processes for what a process must show, `main` in this one for the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from volo.cli.main import COMMANDS, main
from volo.config import load_recipe
from volo.models.factory import create_model
from volo.models.hub import cached_path

TINY = """
[model]
name = "volo_nano"
[model.options]
depths = [1, 1]
embed_dims = [16, 32]
num_heads = [1, 2]
stem_dim = 8
patch_size = 4
[data]
kind = "digits"
img_size = 16
num_workers = 0
[augment]
crop = "pad"
hflip = 0.0
[optim]
lr = 5e-3
[schedule]
epochs = 3
warmup_epochs = 1
cooldown_epochs = 0
[train]
batch_size = 128
threads = 1
device = "cpu"
tensorboard = false
"""


def volo(*words: str | Path, **options) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "volo", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, **options)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.toml, three images of digits (and one that is broken) in pictures/, and runs/tiny, trained."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.toml").write_text(TINY)
    (folder / "pictures").mkdir()
    for i, digit in enumerate(load_digits().images[:3]):
        Image.fromarray((digit * 15.9).astype("uint8")).save(folder / "pictures" / f"{i}.png")
    (folder / "pictures" / "broken.png").write_bytes(b"GIF89a")
    here = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", "tiny.toml", "--quiet"]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(work)
    monkeypatch.setenv("COLUMNS", "200")
    return work


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys; from volo.cli.main import main; main(['--help']); assert 'torch' not in sys.modules, 'torch imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"volo {command}" in done.stdout


def test_help_lists_every_key_with_the_values_of_the_recipe(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "tiny.toml", "--help-all"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    recipe = load_recipe("tiny.toml").to_dict()
    for section, keys in recipe.items():
        for key in keys if isinstance(keys, dict) else ():
            assert f"--{section}.{key}" in text or key == "options", key
    assert "(default: 128)" in text
    assert "Peak learning rate" in text


def test_help_of_train_shows_first_what_matters(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.toml", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--train.batch_size 128" in text and "--optim.lr 0.005" in text and "--help-all" in text
    assert "--augment.erase_prob" not in text
    assert len(text.splitlines()) < 60
    assert main(["train", "--help"]) == 0
    assert "--train.batch_size 1024" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"bench", "train"}))
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"  volo {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian tiny.toml", "did you mean 'train'?"),
        ("train", "volo train needs a recipe"),
        ("train --resume", "the recipe comes first"),
        ("predict x y.png --json", "--format json"),
        ("predict x --data photos", "volo evaluate"),
        ("train digitz", "no recipe 'digitz'"),
        ("train tiny.toml", "already holds a run"),
        ("train tiny.toml --out x --model.options.dephts [1,1]", "did you mean 'depths'?"),
        ("train tiny.toml --out x --model.options.depths", "needs a value in TOML"),
        ("train tiny.toml --out x --optim.name adamx", "unknown optimizer 'adamx'"),
        ("train tiny.toml --out x --data nowhere --data.kind folder", "nowhere"),
        ("evaluate volo_d1.225", "did you mean 'volo_d1.224'?"),
        ("evaluate runs/tiny --crop timm", "crop presets belong to published weights"),
        ("evaluate runs/tiny --crop wide", "--crop is original, timm or a number"),
        ("evaluate runs/tiny --img-size 17", "The next legal size is 24 x 24"),
        ("evaluate tiny.toml", "tiny.toml"),
        ("predict runs/tiny", "name the images"),
        ("train tiny.toml --epochs 3", "volo train has no --epochs: --schedule.epochs"),
        ("train tiny.toml --batch_size=3", "--train.batch_size"),
        ("train tiny.toml --pretrained", "--model.weights pretrained"),
        ("predict --weights runs/tiny images", "name the model first"),
        ("evaluate --checkpoint runs/tiny", "name the model first"),
        ("predict runs/tiny gone.png", "no file or folder 'gone.png'"),
    ],
)
def test_errors_are_one_message(inside: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err and message not in captured.out
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train tiny.toml --optm.lr 3", "--optim.lr"),
        ("train tiny.toml --train.amp bf61", "bf16"),
        ("train tiny.toml --train.compile maybe", "compile"),
        ("info --modles", "--models"),
    ],
)
def test_misspelt_options_suggest_the_nearest(
    inside: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_traceback_can_be_had(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOLO_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["evaluate", "nothing"])


@pytest.mark.parametrize("given, meant", [("true", True), ("False", False), ("only", "only"), (None, True)])
def test_a_switch_that_has_a_third_way(given: str | None, meant: bool | str, inside: Path) -> None:
    out = f"runs/third_{given}"
    words = ["--token_label.ground_truth"] + ([] if given is None else [given])
    assert main(["train", "tiny.toml", "--out", out, *words, "--schedule.epochs", "1", "--quiet"]) == 0
    assert load_recipe(f"{out}/recipe.toml").token_label.ground_truth == meant


@pytest.mark.parametrize(
    "words", [["--data.img_size", "[16, 24]"], ["--data.img-size", "[16,", "24]"], ["--data.img_size=[16,24]"]]
)
def test_lists_may_be_spelt_as_in_toml(words: list[str], inside: Path) -> None:
    out = f"runs/list_{len(words)}{len(words[0])}"
    assert main(["train", "tiny.toml", "--out", out, *words, "--schedule.epochs", "1", "--quiet"]) == 0
    assert load_recipe(f"{out}/recipe.toml").data.img_size == (16, 24)


def test_overrides_reach_the_recipe(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "train tiny.toml --out runs/other --schedule.epochs 1 --schedule.warmup_epochs=0 --data.img-size 16 24 "
    words += "--train.deterministic false --optim.ema_warmup=false --train.grad_checkpointing --train.seed 3 "
    words += "--model.options.stem_dim 4 --model.options.outlooker_drop_path=true --json"
    assert main(words.split()) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["status"] == "completed"
    recipe = load_recipe("runs/other/recipe.toml")
    assert recipe.schedule.epochs == 1
    assert recipe.schedule.warmup_epochs == 0
    assert recipe.data.img_size == (16, 24)
    assert (recipe.train.deterministic, recipe.optim.ema_warmup, recipe.train.grad_checkpointing) == (
        False,
        False,
        True,
    )
    assert recipe.train.seed == 3
    assert recipe.model.options["stem_dim"] == 4
    assert recipe.model.options["outlooker_drop_path"] is True
    assert recipe.model.options["depths"] == [1, 1], "what the recipe says stays"
    assert recipe.optim.lr == 5e-3


@pytest.mark.parametrize(
    "words",
    [
        "photos_finetune",
        "photos_cpu --model.name volo_d1 --model.weights volo_d1.224",
        "photos_cpu --model.name=volo_d1 --model.options.qkv_bias false --model.weights volo_d1.224",
    ],
)
def test_fine_tuning_from_published_weights(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe for it, and another recipe whose [model.options] are not for that model."""
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path))
    save_file(create_model("volo_d1").state_dict(), cached_path("volo_d1.224"))
    for i in range(6):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (40 * i, 0, 0)).save(path)
    small = ["--data.img_size", "32", "--train.batch_size", "2", "--train.device", "cpu", "--data.num_workers", "0"]
    small += ["--optim.name", "adamw"]  # Muon takes twenty seconds for the matrices of D1
    assert main(["train", *words.split(), "--data", str(tmp_path / "photos"), "--plan", "--json", *small]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["model"], plan["num_classes"], plan["num_train"]) == ("volo_d1", 2, 4)
    assert plan["num_parameters"] == 26_632_040 - 2 * 998 * 385 - (14 * 14 - 2 * 2) * 384, "heads and grid have shrunk"


def test_interrupted_runs_say_how_to_go_on_and_end_like_others(inside: Path) -> None:
    """Ctrl-C in a run, resumed by the command it prints, gives the weights of the run that was never interrupted."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "volo", "train", "tiny.toml", "--out", "runs/cut"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    metrics, deadline = Path("runs/cut/metrics.jsonl"), time.monotonic() + 150
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=100)
    assert child.returncode == 130, out + err
    assert "continue with: volo train runs/cut --resume" in err
    assert "\x1b" not in out + err, "control characters, though this is not a terminal"

    assert main(["train", "runs/cut", "--resume", "--quiet"]) == 0
    cut, whole = (torch.load(Path("runs", run, "last.pt"), weights_only=True) for run in ("cut", "tiny"))
    assert cut["step"] == whole["step"]
    for name, weight in whole["model"].items():
        assert torch.equal(cut["model"][name], weight), name
    assert Path("runs/cut/curves.png").is_file()
    assert Path("runs/cut/confusion.png").is_file()


def test_evaluate(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "runs/tiny", "--out", "report", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    best = torch.load("runs/tiny/best.pt", weights_only=True)["metrics"]
    assert report["top1"] == pytest.approx(best["top1"])
    assert report["classes"] == [str(i) for i in range(10)]
    assert json.loads(Path("report/evaluation.json").read_text()) == report
    assert Path("report/confusion.png").stat().st_size > 10_000

    assert main(["evaluate", "runs/tiny", "--flip", "--json"]) == 0
    mirrored = json.loads(capsys.readouterr().out)
    assert (report["flip"], mirrored["flip"]) == (False, True)
    assert mirrored["loss"] != report["loss"]

    assert main(["evaluate", "runs/tiny/last.pt", "--batch-size", "7"]) == 0
    text = capsys.readouterr().out
    for word in ("top-1", "top-5", "mean of classes", "ECE", "accuracy by class"):
        assert word in text


def test_weight_files_of_others_are_models_too(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(create_model("volo_nano").state_dict(), "nano.safetensors")
    assert main(["predict", "nano.safetensors", "pictures/0.png", "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["predictions"]) == 3
    assert main(["evaluate", "nano.safetensors", "--json"]) == 2
    assert "these weights come without images" in capsys.readouterr().err


def test_predict_reads_paths_from_standard_input(inside: Path) -> None:
    paths = "pictures/0.png\npictures/gone.png\npictures/2.png\n"
    done = volo("predict", "runs/tiny", "-", "--format", "json", "--top", "2", input=paths, cwd=inside)
    assert done.returncode == 1, done.stderr
    answers = json.loads(done.stdout)
    assert [answer["picture"] for answer in answers] == paths.split()
    assert len(answers[0]["predictions"]) == 2
    assert "no such file" in answers[1]["error"]
    assert "1 of 3 images could not be read" in done.stderr


def test_predict_writes_files(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "runs/tiny", "pictures", "--out", "new/answers.csv", "--format", "csv", "--sheet", "sheet.png"]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "broken.png" in captured.err
    assert len(Path("new/answers.csv").read_text().splitlines()) == 1 + 3 * 3 + 1
    assert Path("sheet.png").stat().st_size > 10_000
    assert main([*words, "--on-bad-image", "skip"]) == 0


def test_predict_prints_a_table(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "runs/tiny", "pictures", "--top", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert sum(line.endswith(" %") for line in lines) == 3
    assert sum("not read" in line for line in lines) == 1


def test_what_one_would_not_expect_is_said_on_stderr(inside: Path) -> None:
    """By one process of a run. Under pytest logging is pytest's, so that takes a process."""
    code = (
        "import logging, sys; from volo.cli.main import main\n"
        "for line in sys.argv[1:]: assert main(line.split()) == 0; print('next')\n"
        "logging.getLogger('volo.x').info('said')"
    )
    adapted = "--model.weights runs/tiny/best.pt --data.img_size 24 --schedule.epochs 1 --schedule.warmup_epochs 0"
    lines = [
        f"train tiny.toml --out runs/wide {adapted} --json",
        # No backend but the reference computes in half precision on a CPU.
        "evaluate runs/tiny --device cpu --amp fp16 --json",
    ]
    done = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    trained, evaluated, _ = done.stdout.split("next\n")
    assert json.loads(trained)["status"] == "completed"
    assert json.loads(evaluated)["count"] > 0
    assert "adapted: pos_embed resampled from 2 x 2 to 3 x 3 tokens" in done.stderr
    assert done.stderr.count("outlook attention runs on the reference backend") == 1
    assert done.stderr.endswith("said\n")
    second = os.environ | {"RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True, env=second, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m volo info | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode in (0, 1)
    assert done.stderr == ""


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--models", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (
        facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"] == torch.__version__
    )
    assert facts["outlook_attention"]["cpu"]["reference"] is None
    assert facts["models"]["volo_d1"]["parameters"] == 26_632_040
    assert len(facts["pretrained"]) == 11
    assert "imagenet_volo_d1_224" in facts["recipes"]
    assert main(["info", "--models"]) == 0
    assert "volo_d5.512" in capsys.readouterr().out


def test_names_that_are_not_utf8_are_named(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a text file has to hold them; elsewhere they are just names."""
    folder = inside / os.fsdecode(b"Fotos_\xf6")
    for kind in ("ant", "bee"):
        (folder / kind).mkdir(parents=True)
        for i in range(100):
            Image.new("RGB", (16, 16), (i, 2 * i, 100)).save(folder / kind / f"{i}.png")
    assert main(["train", "tiny.toml", "--data", str(folder), "--data.kind", "auto", "--out", "runs/latin"]) == 2
    err = capsys.readouterr().err
    assert r"Fotos_\xf6 is not UTF-8" in err and "Rename it" in err
    (folder / "ant").rename(folder / os.fsdecode(b"caf\xe9"))
    assert main(["pack", str(folder), "--out", "shards"]) == 2
    assert r"caf\xe9" in capsys.readouterr().err
