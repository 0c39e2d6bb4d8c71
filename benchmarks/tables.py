"""Write the tables of README.md and docs/ that quote benchmarks/results, from these files: `python benchmarks/tables.py`.

A table stands between `<!-- NAME: python benchmarks/tables.py -->` and `<!-- end of NAME -->`; `--check` only says which
are out of date (exit code 1), as a test does.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [
    "README.md",
    "docs/cli.md",
    "docs/data_check.md",
    "docs/deployment.md",
    "docs/models/volo_nano.md",
    "docs/operator.md",
    "docs/token_labels.md",
    "docs/gpu.md",
]


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def row(name: str, candidate: str, **of: str) -> dict[str, Any]:
    """The row of a result that is of `candidate` and what else is asked."""
    wanted = {"candidate": candidate} | of
    (found,) = (r for r in result(name)["rows"] if all(r[key] == value for key, value in wanted.items()))
    return found


def where(name: str) -> str:
    content = result(name)
    return f"{content['device']}, {content['threads']} threads, {content['date']}"


def minutes(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def kernel(name: str, dtype: str, direction: str) -> float:
    return row(name, f"cpu {dtype}", **{"pass": direction})["times_reference"]


def trainings() -> str:
    def line(what: str, folder: str, share: float, figure: str, machine: str) -> list[str]:
        run = result(f"{folder}/summary")
        return [
            what,
            f"`{run['model']}`, {run['num_parameters'] / 1e6:.1f} M",
            f"{100 * share:.1f} % {figure}",
            f"{minutes(run['seconds'])} on {machine}",
            f"[{folder}](benchmarks/results/{folder})",
        ]

    top1 = {name: result(f"{name}/summary")["final"]["top1"] for name in ("digits", "photos", "cifar10")}
    held_out = {name: result(f"{name}/summary")["num_val"] for name in top1}
    camvid = result("camvid/test")
    return table(
        ["trained from scratch", "model", "score", "minutes", "files"],
        [
            line(f"handwritten digits, {held_out['digits']} held out", "digits", top1["digits"], "top-1", "two CPU cores"),
            line(f"ten classes of photos, {held_out['photos']} held out", "photos", top1["photos"], "top-1", "one CPU core"),
            line(f"CIFAR-10, {held_out['cifar10']:,} held out", "cifar10", top1["cifar10"], "top-1", "two CPU cores (AMX)"),
            line(f"CamVid, {camvid['count']} test images", "camvid", camvid["miou"], "mIoU", "two CPU cores"),
        ],
    )  # fmt: skip


def photos() -> str:
    def line(what: str, asked: str, name: str, cores: str = "") -> list[str]:
        run = result(name)
        folder = name.partition("/")[0]
        top1 = f"{100 * run['final']['top1']:.1f} %"
        time = minutes(run.get("command_seconds", run["seconds"])) + cores
        return [what, top1, asked, time, f"[{folder}](benchmarks/results/{folder})"]

    return table(
        ["ten classes of photos, 280 held out", "top-1", "aimed at", "minutes on two CPU cores", "files"],
        [
            line("`photos`: from the weights that come along", "98 %", "photos_pretrained/summary"),
            line("`photos_probe`: the linear probe alone", "97.5 %", "photos_pretrained/probe"),
            line("`photos_cpu`: from scratch", "", "photos/summary", " (one core)"),
        ],
    )


def waiting() -> str:
    rows = []
    for name, figures in result("busy_machine")["settings"].items():
        alone, beside = figures["alone"], figures["beside_one_busy_process"]
        shares = figures["alone_over_best"], figures["beside_over_alone"]
        rows.append([name, f"{alone:.0f} ({shares[0]:.2f} of the best)", f"{beside:.0f} ({shares[1]:.2f} of alone)"])
    return table(["images/s of training, 2 cores", "alone", "beside one busy process"], rows)


def copies() -> str:
    report = result("data_check")
    rows = [
        [name, f"{copy['lowest_similarity']:.3f}", f"{copy['lowest_correlation']:.3f}", f"{100 * copy['found']:.0f} %"]
        for name, copy in report["copies"].items()
    ]
    others = report["pairs_of_different_photos"]
    rows.append([f"pairs of different photos, of {others['of']:,}", "", "", f"{others['listed']} listed"])
    return table(["copy", "lowest similarity", "lowest correlation", "found"], rows)


def photo_labels() -> str:
    content = result("token_labels/photos")
    rows = []
    for name, arm in content["arms"].items():
        spread = f"{arm['stdev']:.1f}" if arm["stdev"] is not None else ""
        seeds = ", ".join(f"{top1:.1f}" for top1 in arm["top1"])
        rows.append([name, f"{arm['mean']:.1f} %", spread, seeds])
    head = [
        f"labels, {content['epochs']} epochs in all",
        "top-1 on 280 held-out photos, mean",
        "standard deviation",
        "each seed",
    ]
    return table(head, rows)


def transfer() -> str:
    def cell(of_set: dict[str, Any]) -> str:
        draws = of_set["draws"]
        small = f"{100 * draws['mean']:.1f} ± {100 * draws['stdev']:.1f}"
        return f"{100 * of_set['all']['top1']:.1f}; {small}" if "all" in of_set else small

    rows = [
        [name.replace(" lite0.pth", " ImageNet-1k"), f"{network['parameters'] / 1e6:.1f} M"]
        + [cell(network[kind]) if kind in network else "" for kind in ("photos", "cifar10", "camvid", "digits")]
        for name, network in result("transfer").items()
        if name != RECIPE
    ]
    head = [
        "linear probe, top-1 in %",
        "parameters",
        "photos: all; 20 a class",
        "CIFAR-10: 200 a class",
        "CamVid windows: all; 30 a class",
        "digits: all; 20 a class",
    ]
    return table(head, rows)


RECIPE, TO_BEAT = "recipe photos", "tf_efficientnet_lite0 lite0.pth 224 px"
SETS = {"cifar10": "CIFAR-10, 200 a class", "camvid": "CamVid windows", "digits": "digits"}


def transfer_tuned() -> str:
    """What `volo train photos` comes to on the same images, beside the probe of a network that knows ImageNet."""
    content = result("transfer")
    runs, other = content[RECIPE], content[TO_BEAT]
    rows = []
    for kind, name in SETS.items():
        its = runs[kind]
        probe = other[kind]["all"]["top1"] if "all" in other[kind] else other[kind]["draws"]["top1"][0]
        minutes, seconds = divmod(round(its["seconds"]), 60)
        figures = [f"{100 * its[what]:.1f}" for what in ("probe", "final", "best")]
        training, held = (f"{count:,}" for count in its["images"])
        size = f"{its['img_size']} px, {its['epochs']} epochs, {minutes}:{seconds:02}"
        rows.append([name, f"{training}, {held}", size, *figures, f"{100 * probe:.1f}"])
    head = "`volo train photos`, top-1 in %|images, held out|chosen|probe|last epoch|best|probe of EfficientNet-Lite0 at 224 px"
    return table(head.split("|"), rows)


def scores(network: dict[str, Any], what: str) -> tuple[float, str]:
    """Mean top-1 over the seeds in %, and how it is written: with the spread, if there are several; (-1, "") without any."""
    top1 = [100 * score["top1"] for score in network.get(what, {}).values()]
    if not top1:
        return -1.0, ""
    mean = statistics.mean(top1)
    return mean, f"{mean:.1f} ± {statistics.pstdev(top1):.1f}" if len(top1) > 1 else f"{mean:.1f}"


def best_in_bold(columns: Iterable[list[tuple[float, str]]]) -> list[list[str]]:
    """Rows of the texts; in each column of figures and texts the highest figure stands out, if no text is empty."""
    marked = []
    for column in columns:
        highest = max(figure for figure, _ in column) if all(text for _, text in column) else None
        marked.append([f"**{text}**" if figure == highest else text for figure, text in column])
    return [list(cells) for cells in zip(*marked)]


def peers() -> str:
    networks = {name: network for name, network in result("peers")["networks"].items() if "label maps" not in name}
    speed = result("peers_speed")

    def rate(name: str, what: str) -> tuple[float, str]:
        figure = speed["networks"][name][what]["images_per_second"]
        return figure, f"{figure:,.0f}"

    columns = [
        *([rate(name, what) for name in networks] for what in ("training", "inference")),
        *([scores(network, what) for network in networks.values()] for what in ("pretrained", "adamw")),
    ]
    rows = [
        [
            name,
            f"{network['size']['parameters'] / 1e6:.2f} M",
            f"{network['size']['multiply_adds'] / 1e6:.1f} M",
            *cells,
        ]
        for (name, network), cells in zip(networks.items(), best_in_bold(columns))
    ]
    head = "pretrained,parameters,multiply-adds,training images/s,inference images/s,top-1 in %,with AdamW".split(",")
    return (
        f"{table(head, rows)}\n\nImages per second of processor time on one core: 64 px, batches of {speed['batch_size']}, "
        f"{speed['device']}, {speed['date']}; {speed['load_before']:.0f} processes wanted the machine when it was measured."
    )


def peers_in_use() -> str:
    networks = {name: network for name, network in result("peers")["networks"].items() if "label maps" not in name}
    ways = [f"{how} {kind}" for kind in ("photos", "cifar10") for how in ("probe", "tuned", "scratch")]
    columns = ([scores(network, way) for network in networks.values()] for way in ways)
    rows = [[name, *cells] for name, cells in zip(networks, best_in_bold(columns))]
    names = [f"{kind}: {how}" for kind in ("photos", "CIFAR-10") for how in ("probe", "fine-tuned", "from scratch")]
    return table(["top-1 in %", *names], rows)


def peers_label_maps() -> str:
    networks = {name: network for name, network in result("peers")["networks"].items() if name.startswith("volo_nano")}
    columns = (
        [scores(network, what) for network in networks.values()]
        for what in ("pretrained", "probe photos", "probe cifar10")
    )
    rows = [[name, *cells] for name, cells in zip(networks, best_in_bold(columns))]
    return table(["top-1 in %", "held-out images", "photos: probe", "CIFAR-10: probe"], rows)


def speed() -> str:
    def link(name: str) -> str:
        return f"[{name}](benchmarks/results/{name}.json)"

    rows = []
    for batch in (1, 8):
        name = f"cpu_op_d1_batch{batch}"
        forward, both = (f"{kernel(name, 'float32', d):.1f}" for d in ("forward", "forward + backward"))
        what = f"CPU kernel against unfold/fold, D1 stage 1, batch {batch}, float32"
        rows.append([what, f"forward {forward}, with backward {both}", where(name), link(name)])
    for what, candidate, name in (
        ("inference of D1, batch 8, float32, against timm eager", "volo float32", "cpu_model_d1"),
        ("the same in bfloat16, against timm in float32", "volo bfloat16", "cpu_model_d1"),
        ("a training step of D1, batch 8, float32, against timm eager", "volo", "cpu_train_d1"),
    ):
        rows.append([what, f"{row(name, candidate)['times_timm_eager']:.2f}", where(name), link(name)])
    loop = f"{result('training_loop')['ratio']:.2f}"
    rows.append(["`volo train` against a bare loop", loop, where("training_loop"), link("training_loop")])
    eager = [f"{row('gpu_kernels_d1', f'fused {d}')['times_eager']:.0f}" for d in ("forward", "forward + backward")]
    what = "GPU kernels against unfold/fold eager, D1 stage 1, batch 128, bfloat16"
    machine = f"{result('gpu_kernels_d1')['device']}, {result('gpu_kernels_d1')['date']}"
    rows.append([what, f"forward {eager[0]}, with backward {eager[1]}", machine, link("gpu_kernels_d1")])
    return table(["what, against what", "times as fast", "where and when", "file"], rows)


def asked(head: str, goals: list[tuple[str, float, float]], form: str) -> str:
    def measured(bound: float, figure: float) -> str:
        text = format(figure, form)
        return text if figure >= bound else f"**{text}, missed**"

    return table(
        [head, "asked: at least", "measured"],
        [[what, f"{bound:g}", measured(bound, figure)] for what, bound, figure in goals],
    )


def operator() -> str:
    goals = (
        ("D1 at 224, batch 8", "cpu_op_d1_batch8", 12, 8),
        ("D1 at 224, batch 1", "cpu_op_d1_batch1", 6, 8),
        ("D4 at 448 (384 channels, 12 heads, 56 x 56 tokens), batch 1", "cpu_op_d4_448", 8, 8),
    )
    rows = [(f"forward, {what}", float(f), kernel(name, "float32", "forward")) for what, name, f, _ in goals]
    both = "forward + backward"
    rows += [(f"{both}, {what}", float(b), kernel(name, "float32", both)) for what, name, _, b in goals]
    return asked("times as fast as unfold, softmax, product, fold; float32", rows, ".1f")


def against_timm() -> str:
    goals = [
        ("inference, float32", 1.35, row("cpu_model_d1", "volo float32")["times_timm_eager"]),
        ("inference, bfloat16", 2.2, row("cpu_model_d1", "volo bfloat16")["times_timm_eager"]),
        ("training step, float32", 1.25, row("cpu_train_d1", "volo")["times_timm_eager"]),
    ]
    return asked("D1 at 224, batch 8: times as fast as timm eager in float32", goals, ".2f")


def gpu_goals() -> str:
    """What `volo bench gpu` has left in results/gpu; of the operator an earlier measurement where it has left nothing."""
    from volo.bench.gpu import GOALS, NOT_MEASURED, goal_rows, list_stages, read_results

    stages = [stage.name for stage in list_stages(pictures="pictures64")]
    measured = goal_rows({"kernels": result("gpu_kernels_d1")} | read_results(RESULTS / "gpu", stages))

    def figure(row: dict[str, Any]) -> str:
        if row["measured"] == NOT_MEASURED:
            return NOT_MEASURED
        text = f"{row['measured']:.2f}"
        return text if row["met"] == "yes" else f"**{text}, missed**"

    signs = {">=": "at least", "<=": "at most"}
    rows = [[row["goal"], f"{signs[sign]} {bound:g}", figure(row)] for row, (_, sign, bound) in zip(measured, GOALS)]
    return table(["H200, bfloat16, batch 128", "asked", "measured"], rows)


def gpu_compiled() -> str:
    rows = result("triton_compile")["rows"]
    by = {(r["kernel"], r["dtype"], r["target"]): r for r in rows}

    def line(name: str, dtype: str) -> list[str]:
        old, new = by[name, dtype, "sm_80"], by[name, dtype, "sm_90"]

        def both(key: str) -> str:
            return f"{old[key]} / {new[key]}"

        return [
            f"{name}, {dtype}",
            both("registers"),
            both("spill_bytes"),
            f"{new['shared_bytes'] / 1024:g} KB",
            both("warps_per_multiprocessor"),
            f"{new['instructions_per_cell_and_step']:.0f}",
            f"{new['loads_per_step']} + {new['stores_per_step']}",
            f"{new['megabytes_of_d1_at_batch_128']:.0f}",
            f"{new['predicted_microseconds']:.0f}",
        ]

    head = [
        "kernel", "registers, sm_80 / sm_90", "bytes spilled", "shared memory", "warps per multiprocessor",
        "instructions a cell and step", "loads + stores a step", "MB moved", "predicted µs",
    ]  # fmt: skip
    names = list(dict.fromkeys(r["kernel"] for r in rows))
    return table(head, [line(name, dtype) for dtype in ("bfloat16", "float32") for name in names])


def gpu_predicted() -> str:
    """Predicted, beside what was measured of it."""
    report = result("triton_compile")
    fewest = report["fewest_megabytes_of_d1_at_batch_128_in_bf16"]
    measured = {way: row("gpu_kernels_d1", f"fused {way}")["microseconds"] for way in ("forward", "backward")}
    today = report["predicted"]["variants"]["rows"]["layer_forward_microseconds"]
    lines = []
    for name, times in report["predicted"]["variants"].items():
        cells = [name]
        for way in ("forward", "backward"):
            time = times[f"operator_{way}_microseconds"]
            was = f"; measured {measured[way]:.0f}" if name == "rows" else ""
            cells.append(f"{time:.0f} µs, {fewest[way] / time / 4.3:.2f} of a copy's rate{was}")
        layer = times["layer_forward_microseconds"]
        lines.append([*cells, f"{layer:.0f} µs, {today / layer:.2f}"])
    return table(
        ["predicted, not measured", "operator forward", "operator backward", "layer forward, times rows"], lines
    )


DEPLOYED = {
    "deploy_d1": "with AVX-512, whole batches by all threads",
    "deploy_d1_avx2": "with AVX2, batches in pieces",
}
"""Files of `volo bench deploy`, and what sets them apart."""


def deployed() -> dict[str, dict[str, Any]]:
    return {name: result(name) for name in DEPLOYED if (RESULTS / f"{name}.json").exists()}


def deploy() -> str:
    """VOLO, timm's VOLO and the models people would pick instead, in the same runtimes."""
    contents = deployed()
    if not contents:
        return "Not measured yet."
    published = next(iter(contents.values()))["published"]
    papers = "; ".join(f"{name}: {its['paper']}" for name, its in published.items())
    return "\n\n".join(
        [
            *(
                f"{deploy_table(content)}\n\n![Accuracy against speed]({name}.png)"
                for name, content in contents.items()
            ),
            f"Medians in turns, random weights. Top-1 on ImageNet-1k at 224 as published ({papers}).",
        ]
    )


def deploy_table(content: dict[str, Any]) -> str:
    rows = content["rows"]
    columns = list(dict.fromkeys(r["file"] for r in rows))
    by = {(r["model"], r["file"], r["batch_size"]): r["images_per_second"] for r in rows}
    lines = []
    for model in dict.fromkeys(r["model"] for r in rows):
        top1 = next((f"{r['top1']:g}" for r in rows if r["model"] == model and "top1" in r), "")
        cells = [
            " / ".join(f"{by[model, file, b]:.1f}" if (model, file, b) in by else "" for b in content["batch_sizes"])
            for file in columns
        ]
        lines.append([model, top1, *(cell if cell.strip(" /") else "" for cell in cells)])
    batches = " / ".join(f"batch {b}" for b in content["batch_sizes"])
    maker = (
        f"{content['device']} ({', '.join([content['processor']['vendor'], *content['processor']['instructions']])})"
    )
    return (
        table([f"images/s, {batches}", "top-1", *columns], lines)
        + f"\n\n{maker}, {content['threads']} threads, {content['date']}, {content['rounds']} rounds."
    )


def deploy_goals() -> str:
    goals = {name: deploy_goals_of(content) for name, content in deployed().items()}
    if not goals:
        return "Not measured yet."
    lines = []
    for rows in zip(*goals.values()):
        what, least, _ = rows[0]
        measured = [f"{value:.2f}" if value >= least else f"**{value:.2f}, missed**" for *_, value in rows]
        lines.append([what, f"{least:g}", *measured])
    return table(["VOLO-D1 at 224, times as fast as", "asked: at least", *(DEPLOYED[name] for name in goals)], lines)


def deploy_goals_of(content: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What was to be reached, by how much at least, and what was."""
    goals = []
    for batch in content["batch_sizes"]:
        own = [
            r
            for r in content["rows"]
            if r["batch_size"] == batch and r["model"] == "volo_d1" and r["file"].split()[0] in ("onnx", "openvino")
        ]

        def best(dtype: str, own: list[dict[str, Any]] = own) -> dict[str, Any]:
            return min((r for r in own if r["file"].split()[1] == dtype), key=lambda r: r["milliseconds"])

        goals += [
            (f"float32, batch {batch}: our fused float32", 1.0, best("fp32")["times_volo_fused"]),
            (f"bfloat16, batch {batch}: our fused float32", 1.6, best("bf16")["times_volo_fused"]),
            (f"int8, batch {batch}: our fused float32", 2.3, best("int8")["times_volo_fused"]),
            (f"int8, batch {batch}: timm eager float32", 3.6, best("int8")["times_timm_eager"]),
        ]
        goals += [
            (f"{r['file']}, batch {batch}: timm's volo_d1 in the same", 1.1, r["times_timm_same"])
            for r in own
            if "times_timm_same" in r
        ]
    return goals


def quantisation() -> str:
    content = result("quantisation")

    def line(r: dict[str, Any]) -> list[str]:
        way = r["way"] + (f", at most {r['max_changed']:g} % of the answers changed" if "max_changed" in r else "")
        what = [f"{r['model']} (`{r['architecture']}`)", r["machine"]["capability"], way]
        if "failed" in r:
            return [*what, "", "", "", "nothing suffices", ""]
        kept = r["left_in_floating_point"]
        first = r["tried"][0]
        unguarded = first.get("top1", first["agreement"])
        before, after = (f"{r[key]:.1f}" if key in r else "" for key in ("top1_before", "top1"))
        guarded = f"{after}" + (f" ({unguarded:.1f} before the search)" if kept else "")
        if "top1" not in r and kept:
            guarded = f"({100 - unguarded:.1f} % differed before the search)"
        return [
            *what,
            before,
            guarded,
            f"{100 - r['agreement']:.2f} %",
            f"{', '.join(f'`{name}`' for name in kept) or 'none'}, of {r['layers']}",
            f"{r['megabytes']:.1f} ({r['megabytes_fp32']:.1f})",
        ]

    judged = "; ".join(dict.fromkeys(f"{r['model']}: {r['judged_on']}" for r in content["rows"] if "judged_on" in r))
    machines = dict.fromkeys(
        f"{m['device']} with {m['capability']}, {m['threads']} threads, {m['date']}"
        for m in (r["machine"] for r in content["rows"])
    )
    head = ["model", "processor", "int8 by", "top-1 before", "after", "answers that differ", "layers in floating point"]
    rows = map(line, sorted(content["rows"], key=lambda r: (r["model"], r["machine"]["capability"] != "AVX512")))
    return table([*head, "MB (fp32)"], rows) + f"\n\nJudged on: {judged}. {'; '.join(machines)}."


def formats() -> str:
    """Error, size and speed of every format, model by model."""
    rows = result("formats")["rows"]
    names = {"nano": "`volo_nano`", "d1": "`volo_d1`", "timm": "timm's `volo_d1_224`", "segmenter": "`fpn_volo_nano`"}

    def speed(r: dict[str, Any], batch: str) -> str:
        if "images_per_second" not in r:
            return "does not run here" if r["format"] == "coreml" else "not measured"
        rates = r["images_per_second"][batch]
        return f"{rates['file']:.3g} ({rates['file'] / rates['model']:.2f})"

    def line(r: dict[str, Any]) -> list[str]:
        same = "all" if r["same_answers"] == r["pictures"] else f"{r['same_answers']:g}"
        error, size = f"{r['relative_error']:.1e}", f"{r['bytes'] / 1e6:.1f}"
        return [f"`{r['format']}`", names[r["model"]], error, same, size, speed(r, "1"), speed(r, "8")]

    head = ["format", "model", "error", "same answers", "MB", "images/s, batch 1", "batch 8"]
    order = ["onnx", "openvino", "torch", "aoti", "executorch", "coreml", "litert"]
    found = sorted(rows, key=lambda r: (list(names).index(r["model"]), order.index(r["format"])))
    machines = dict.fromkeys(
        f"{m['device']} with {m['capability']}, {m['date']}" for m in (r["machine"] for r in rows if "machine" in r)
    )
    return table(head, map(line, found)) + f"\n\nSpeed: one thread, by its processor time. {'; '.join(machines)}."


TABLES: dict[str, Callable[[], str]] = {
    "trainings": trainings,
    "photos": photos,
    "waiting": waiting,
    "copies": copies,
    "photo labels": photo_labels,
    "transfer": transfer,
    "transfer tuned": transfer_tuned,
    "peers": peers,
    "peers in use": peers_in_use,
    "peers label maps": peers_label_maps,
    "speed": speed,
    "operator": operator,
    "against timm": against_timm,
    "gpu goals": gpu_goals,
    "gpu compiled": gpu_compiled,
    "gpu predicted": gpu_predicted,
    "deploy": deploy,
    "deploy goals": deploy_goals,
    "quantisation": quantisation,
    "formats": formats,
}
PLACE = re.compile(r"(<!-- ([\w ]+): python benchmarks/tables\.py -->\n\n).*?(\n\n<!-- end of \2 -->)", re.DOTALL)


def written(text: str) -> str:
    """A document with its tables as the files have them now."""
    return PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], text)


def main(argv: list[str]) -> int:
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if written(text) != text:
            stale.append(name)
            if "--check" not in argv:
                path.write_text(written(text), encoding="utf-8")
    if stale:
        print(f"{'out of date' if '--check' in argv else 'written'}: {', '.join(stale)}")
    return int(bool(stale) and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
