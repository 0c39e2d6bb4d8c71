"""Images and their labels from a table: CSV, TSV or Parquet, a row for every image.

For task "classify" a table is one more way to say which image is of which class (`open_table`). Several labels, numbers,
and several columns at once are `open_targets`.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from volo.config import DataConfig, nearest, read_text
from volo.data.classes import refuse_control_characters
from volo.data.decode import BadImage
from volo.data.folders import open_files
from volo.data.sources import LAYOUTS, DataSplits, FolderSource, Progress, Share, split_by_seed
from volo.data.splits import HELD_OUT, TRAIN, VAL, WAY_OUT, role
from volo.data.targets import Kind, Output, TableTargets
from volo.data.walk import spelled

ENDINGS = (".csv", ".tsv", ".parquet")
IMAGE_NAMES = "path image file filename image_path img_path file_path filepath file_name image_file picture img".split()
LABEL_NAMES = "label class category labels classes categories tags".split()
SPLIT_NAMES = "split subset fold set part".split()
"""Columns that are taken for what they are called, in any case, unless data.image_column and the like name others."""

SEPARATORS = (";", "|")
ZERO_ONE = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}


def is_table(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and path.is_file()


def open_table(config: DataConfig, on_progress: Progress | None = None, share: Share = Share()) -> DataSplits:
    """Training and held-out images of a table with one class column; see `volo.data.images.open_data`. Raises ValueError."""
    opened = _open(config, on_progress, share, single=True)
    (output,) = opened.targets.outputs
    if len(output.classes) < 2:
        raise ValueError(f"{config.path} has one class only, {output.classes[0]}; telling apart needs two")
    return DataSplits(
        opened.train, opened.val, output.classes, opened.skipped, opened.notes, parts=opened.parts
    )  # fmt: skip


def open_all_table(
    config: DataConfig, known: TableTargets | None = None, on_progress: Progress | None = None
) -> tuple[FolderSource, list[BadImage]]:
    """All images of a table in one source (evaluation), and what was left out: where a split column names held-out images
    those, otherwise everything.

    known: the outputs of a model, whose columns and classes are looked for; None: one class column. Raises ValueError.
    """
    read = _read(_table_path(config), config, single=known is None, known=known, everything=True)
    source, skipped, _ = _source(read, range(len(read.names)), config, on_progress, Share())
    if not len(source):
        raise ValueError(f"no image of {config.path} can be used")
    return source, skipped


@dataclass(frozen=True)
class TableSplits:
    """What `open_targets` found. Targets of the sources are float64 [N, targets.target_width]."""

    train: FolderSource
    val: FolderSource
    targets: TableTargets
    skipped: list[BadImage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the columns were taken for, and how many images there are of each label."""
    parts: str = ""


def open_targets(
    config: DataConfig,
    known: TableTargets | None = None,
    on_progress: Progress | None = None,
    share: Share = Share(),
) -> TableSplits:
    """Training and held-out images of a table with classes, several labels or numbers.

    known: the outputs of a model, whose columns and classes are looked for. Numbers are standardised by the training
    images. Raises ValueError as `volo.data.images.open_data` does, and for cells and columns that are not understood.
    """
    return _open(config, on_progress, share, single=False, known=known)


def _open(
    config: DataConfig,
    on_progress: Progress | None,
    share: Share,
    single: bool,
    known: TableTargets | None = None,
) -> TableSplits:
    path = _table_path(config)
    read = _read(path, config, single, known)
    train, val = ([i for i, its in enumerate(read.roles) if (its == TRAIN) == flag] for flag in (True, False))
    source, skipped, kept = _source(read, train + val, config, on_progress, share)
    for rows, part in ((train, "training"), (val, "held-out")):
        if rows and not set(rows) & set(kept):
            raise ValueError(f"no {part} image of {path} can be used")
    notes, parts = list(read.notes), ""
    if val:
        in_train = sum(read.roles[row] == TRAIN for row in kept)
        train_source, val_source = source.select(range(in_train)), source.select(range(in_train, len(source)))
        parts = f"by the column {read.split_column!r}"
    else:
        strata = None if single else _strata(read.targets, source.targets)
        train_source, val_source = split_by_seed(source, config, strata)  # type: ignore[assignment]
    targets = read.targets
    if not single:
        refuse_control_characters(name for output in targets.outputs for name in output.classes)
        targets = targets if known is not None else targets.standardised(train_source.targets)
        by_seed = f"{100 * config.val_fraction:g} % held out by data.split_seed {config.split_seed}"
        count = f"{len(train_source):,} training images and {len(val_source):,} held out: {parts or by_seed}"
        notes += [count, *_counts(targets, train_source.targets, val_source.targets)]
    return TableSplits(train_source, val_source, targets, skipped, notes, parts)


def _table_path(config: DataConfig) -> Path:
    path = Path(config.path).expanduser()
    if config.kind not in ("auto", "table"):
        raise ValueError(f'data.kind is {config.kind!r}, which is no table; leave it at "auto" for labels from a table')
    if not config.path or not is_table(path):
        raise ValueError(
            f"data.path is {config.path or 'empty'}, but labels from a table need a file that ends in {', '.join(ENDINGS)}.\n{LAYOUTS}"
        )
    return path


def _source(
    read: _Read, rows: Sequence[int], config: DataConfig, on_progress: Progress | None, share: Share
) -> tuple[FolderSource, list[BadImage], list[int]]:
    """Images of these rows, what was left out, and the rows that were not."""
    names = [read.names[i] for i in rows]
    targets = read.values[list(rows)]
    classes: tuple[str, ...] = ()
    if read.single:
        targets, classes = targets[:, 0].long(), read.targets.outputs[0].classes
    source, skipped = open_files(read.root, names, targets, classes, config, on_progress, share, [read.path, read.root])
    left_out = {bad.name for bad in skipped}
    return source, skipped, [i for i in rows if read.names[i] not in left_out]


def _strata(targets: TableTargets, values: Tensor) -> list[int]:
    """What a split by seed takes the same share of: the classes, where exactly one output is a class."""
    columns = [v for output, v in zip(targets.outputs, targets.split_targets(values)) if output.kind == "class"]
    return columns[0][:, 0].long().tolist() if len(columns) == 1 else [0] * len(values)


def _counts(targets: TableTargets, train: Tensor, val: Tensor) -> list[str]:
    """For people: images of each label, and how numbers are spread."""
    notes = []
    for output, its, held in zip(targets.outputs, targets.split_targets(train), targets.split_targets(val)):
        if output.kind == "number":
            notes.append(
                f"{output.name}: a number, {its.min():g} to {its.max():g} in training (mean {output.mean:g}, standard deviation {output.std:g})"
            )
            continue
        if output.kind == "labels":
            counts = zip(its.sum(0).long().tolist(), held.sum(0).long().tolist())
        else:
            counts = zip(*(torch.bincount(v[:, 0].long(), minlength=len(output.classes)).tolist() for v in (its, held)))
        each = [f"{name} {a} + {b}" for name, (a, b) in zip(output.classes, counts)]
        more = f", ... ({len(each) - 20} more)" if len(each) > 20 else ""
        what = "labels, any number of them an image" if output.kind == "labels" else "classes"
        notes.append(f"{output.name}: {len(each)} {what} (training + held-out images): {', '.join(each[:20])}{more}")
        if output.kind == "labels" and (none := int((torch.cat([its, held]).sum(1) == 0).sum())):
            notes.append(f"{output.name}: {none:,} images have none of the labels")
    return notes


# Reading


@dataclass(frozen=True)
class _Table:
    path: Path
    columns: list[str]
    rows: list[list[str]]
    lines: list[int]
    """Where in the file each row ends, for messages."""

    def column(self, name: str) -> list[str]:
        at = self.columns.index(name)
        return [row[at] for row in self.rows]


def read_table(path: Path) -> _Table:
    """All cells as text, without blanks around them. Raises ValueError for what is no table, with the lines."""
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    text = read_text(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows, lines = [], []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append([cell.strip() for cell in row])
                lines.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(f"{path} is no table, line {reader.line_num}: {error}") from error
    if len(rows) < 2:
        raise ValueError(f"{path} has {len(rows)} lines; a table has a line of column names and one for every image")
    columns = rows[0]
    if wrong := [(line, len(row)) for row, line in zip(rows, lines) if len(row) != len(columns)]:
        line, cells = wrong[0]
        raise ValueError(
            f"{path} has {len(columns)} columns ({', '.join(columns)}), but {len(wrong)} lines have more or fewer cells, the first one line "
            f"{line} with {cells}. Put text that holds {delimiter!r} between double quotes"
        )
    return _checked(_Table(path, columns, rows[1:], lines[1:]))


def _read_parquet(path: Path) -> _Table:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ValueError(f"{path} is Parquet, which needs pyarrow: pip install pyarrow, or save it as CSV") from error
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    cells = [[_as_text(cell) for cell in column.to_pylist()] for column in table.columns]
    rows = [list(row) for row in zip(*cells)]
    return _checked(_Table(path, list(table.column_names), rows, list(range(1, len(rows) + 1))))


def _as_text(cell: object) -> str:
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, (list, tuple)):
        return SEPARATORS[0].join(map(_as_text, cell))
    return str(int(cell)) if isinstance(cell, bool) else str(cell).strip()


def _checked(table: _Table) -> _Table:
    if twice := [name for name, n in Counter(table.columns).items() if n > 1]:
        raise ValueError(f"{table.path} has several columns called {', '.join(map(repr, twice))}; rename them")
    if not table.rows:
        raise ValueError(f"{table.path} has no rows")
    return table


@dataclass(frozen=True)
class _Read:
    """A table as it was understood."""

    path: Path
    root: Path
    names: list[str]
    """Images relative to `root`, a row each."""
    targets: TableTargets
    values: Tensor
    """float64 [N, targets.target_width]"""
    roles: list[str]
    """Of each row: TRAIN, or the one that is held out."""
    split_column: str
    notes: list[str]
    single: bool


def _read(path: Path, config: DataConfig, single: bool, known: TableTargets | None, everything: bool = False) -> _Read:
    """The rows that are for training or held out; with `everything` those held out alone, or all where none is."""
    if config.root and not Path(config.root).expanduser().is_dir():
        raise ValueError(f"data.root is {config.root}, which is no folder; paths in {path} are relative to it")
    table = read_table(path)
    image = _find(table, config.image_column, "data.image_column", IMAGE_NAMES)
    if not image:
        raise ValueError(
            f"{path} has the columns {', '.join(table.columns)}, none of which is called {', '.join(IMAGE_NAMES[:4])}: name the one "
            "with the paths of the images (--data.image_column)"
        )
    split = ""
    if config.splits != "none":
        taken = {image, *config.label_columns}
        split = _find(table, config.split_column, "data.split_column", [n for n in SPLIT_NAMES if n not in taken])
    if known is not None:
        wanted = [column for output in known.outputs for column in output.columns]
        labels = [_find(table, column, "data.label_columns", ()) for column in wanted]
    else:
        labels = _label_columns(table, config, image, split, single)
    root = Path(config.root).expanduser() if config.root else path.parent
    roles = _roles(table, split, config.splits) if split else [TRAIN] * len(table.rows)
    if TRAIN not in roles and not everything:
        cells = _few(sorted(set(table.column(split))))
        raise ValueError(
            f"the column {split!r} of {path} has no training images: its cells are {cells}. Say which is which with --data.splits "
            '"TRAINING,HELD_OUT", or that there is no split: --data.splits none'
        )
    held = next((its for its in HELD_OUT if its in roles), "")
    used = [its == held if everything and held else its in (TRAIN, held) for its in roles]
    unused_parts = Counter(cell for cell, flag in zip(table.column(split) if split else (), used) if not flag)
    chosen = [i for i, flag in enumerate(used) if flag]
    table = _Table(path, table.columns, [table.rows[i] for i in chosen], [table.lines[i] for i in chosen])
    roles = [TRAIN if everything else its for its, flag in zip(roles, used) if flag]
    names = _image_names(table, image, root, skip=config.on_bad_image == "skip")
    outputs = known.outputs if known is not None else _outputs(table, labels, roles, config, single)
    parts = [_values(table, output, config.label_separator) for output in outputs]
    unused = [name for name in table.columns if name and name not in (image, split, *labels)]
    said = [f"{path}: images by the column {image!r}, labels by {', '.join(map(repr, labels))}"]
    said[0] += f", split by {split!r}" if split else ""
    if unused:
        said.append(f"columns that are not used: {', '.join(unused[:8])}{', ...' if len(unused) > 8 else ''}")
    if unused_parts:
        left = ", ".join(f"{n:,} {cell}" for cell, n in unused_parts.items())
        said.append(f"images left out by the column {split!r}: {left}")
    values = torch.cat([part.reshape(len(names), -1) for part in parts], dim=1)
    return _Read(path, root, names, TableTargets(tuple(outputs)), values, roles, split, said, single)


def _find(table: _Table, wanted: str, key: str, usual: Sequence[str]) -> str:
    """The column called `wanted`, else the one with a usual name; "" where there is none. Raises ValueError."""
    if wanted:
        found = [c for c in table.columns if c == wanted] or [c for c in table.columns if c.lower() == wanted.lower()]
        if not found:
            raise ValueError(
                f"{table.path} has no column {wanted!r}{nearest(wanted, table.columns) or '.'} It has {', '.join(table.columns)} ({key})"
            )
        return found[0]
    found = [column for column in table.columns if column.lower() in usual]
    if len(found) > 1:
        raise ValueError(f"{table.path} has the columns {' and '.join(found)}: say which one is meant with --{key}")
    return found[0] if found else ""


def _label_columns(table: _Table, config: DataConfig, image: str, split: str, single: bool) -> list[str]:
    if config.label_columns:
        labels = [_find(table, column, "data.label_columns", ()) for column in config.label_columns]
        if twice := {name for name in labels if labels.count(name) > 1} | ({image, split} & set(labels)):
            raise ValueError(f"data.label_columns names {', '.join(sorted(twice))}, which is another column already")
    elif found := _find(table, "", "data.label_columns", LABEL_NAMES):
        labels = [found]
    else:
        labels = [name for name in table.columns if name and name not in (image, split)]
        if len(labels) != 1 and not (labels and all(map(_is_zero_one, map(table.column, labels)))):
            raise ValueError(
                f"{table.path} has no column called {', '.join(LABEL_NAMES[:3])}; it has {', '.join(table.columns)}. Name what is to be "
                "learned with --data.label_columns"
            )
    if config.label_kinds and len(config.label_kinds) != len(labels):
        raise ValueError(
            f"data.label_kinds names {len(config.label_kinds)} kinds for {len(labels)} label columns ({', '.join(labels)}); give one each"
        )
    if single and len(labels) > 1:
        raise ValueError(
            f"task 'classify' has one class an image, and {table.path} has {len(labels)} label columns: {', '.join(labels[:8])}. Name "
            "one with --data.label_columns, or learn them all with task 'table' (volo train table_cpu)"
        )
    return labels


def _image_names(table: _Table, column: str, root: Path, skip: bool) -> list[str]:
    """Raises ValueError for rows without a path, paths that come twice and files that are not there."""
    cells = table.column(column)
    if empty := [line for cell, line in zip(cells, table.lines) if not cell]:
        raise ValueError(f"{table.path} names no image in {_lines(empty)} (column {column!r}); complete or remove them")
    names = []
    for cell in cells:
        path = cell.replace("\\", "/") if "\\" in cell and not (root / cell).exists() else cell
        if Path(path).is_absolute():
            below = os.path.relpath(path, root)
            path = path if below.startswith("..") else below
        names.append(os.path.normpath(path).replace(os.sep, "/"))
    if twice := {name for name, n in Counter(names).items() if n > 1}:
        lines = [line for name, line in zip(names, table.lines) if name in twice]
        raise ValueError(
            f"{table.path} has {len(twice)} images more than once ({_few(sorted(twice))}; {_lines(lines)}): keep one row of each. "
            f"Several labels of an image go into one cell, separated by {' or '.join(SEPARATORS)}"
        )
    missing = [name for name in names if not (root / name).is_file()]
    if missing and (not skip or len(missing) == len(names)):
        raise ValueError(
            f"{len(missing):,} of {len(names):,} images of {table.path} are not there: {_few(missing)}. Paths are relative to {root}; "
            'name another folder with --data.root, or leave them out with data.on_bad_image "skip"'
        )
    return names


def _roles(table: _Table, column: str, wanted: str) -> list[str]:
    cells = table.column(column)
    if wanted != "auto":
        train, comma, held = (part.strip() for part in wanted.partition(","))
        if not comma or not train or not held:
            raise ValueError(f'data.splits is {wanted!r}; it is "auto", "none", or two names: "TRAINING,HELD_OUT"')
        if absent := {train, held} - set(cells):
            raise ValueError(
                f"data.splits is {wanted!r}, but the column {column!r} of {table.path} has {_few(sorted(set(cells)))}, not "
                f"{' and '.join(sorted(absent))}"
            )
        return [TRAIN if cell == train else VAL if cell == held else "other" for cell in cells]
    known = {cell: role(cell) for cell in set(cells)}
    if unknown := sorted(cell for cell, its in known.items() if its is None):
        raise ValueError(
            f"the column {column!r} of {table.path} has cells that name no split: {_few([repr(cell) for cell in unknown])}. {WAY_OUT}; "
            "--data.splits none if it is something else"
        )
    return [known[cell] or "" for cell in cells]


def _outputs(
    table: _Table, labels: Sequence[str], roles: Sequence[str], config: DataConfig, single: bool
) -> list[Output]:
    """What each label column is, and its classes: those of the training rows."""
    if single:
        kinds: list[Kind] = [_only_class(table, labels[0], config)]
    elif config.label_kinds:
        kinds = list(config.label_kinds)
    else:
        kinds = [_kind(table, name, config.label_separator) for name in labels]
        zero_one = [_is_zero_one(table.column(name)) for name in labels]
        if sum(zero_one) > 1:
            kinds = ["labels" if flag else kind for kind, flag in zip(kinds, zero_one)]
    together = [name for name, kind in zip(labels, kinds) if kind == "labels" and _is_zero_one(table.column(name))]
    outputs: list[Output] = []
    for name, kind in zip(labels, kinds):
        if name in together:
            if name == together[0]:
                outputs.append(Output("labels", "labels", tuple(map(spelled, together)), tuple(together)))
        elif kind == "number":
            outputs.append(Output(name, kind, (), (name,)))
        else:
            outputs.append(Output(name, kind, _classes(table, name, kind, roles, config.label_separator), (name,)))
    return outputs


def _only_class(table: _Table, column: str, config: DataConfig) -> Kind:
    if config.label_kinds == ("class",) or config.label_separator == "none":
        return "class"
    kind = config.label_kinds[0] if config.label_kinds else _kind(table, column, config.label_separator)
    if kind == "labels":
        raise ValueError(
            f"the column {column!r} of {table.path} has several labels in a cell: learn them with task 'table' (volo train table_cpu), or say "
            "that a cell is one class, whatever is in it: --data.label_separator none"
        )
    if kind == "number" and not all(cell.lstrip("-").isdecimal() for cell in table.column(column) if cell):
        raise ValueError(
            f"the column {column!r} of {table.path} has numbers: learn them with task 'table' (volo train table_cpu), or say that they are "
            "classes: --data.label_kinds class"
        )
    return "class"


def _kind(table: _Table, column: str, separator: str) -> Kind:
    cells = [cell for cell in table.column(column) if cell]
    if any(_separator(cell, separator) for cell in cells):
        return "labels"
    if cells and not _is_zero_one(cells) and all(_number(cell) is not None for cell in cells):
        return "number"
    return "class"


def _classes(table: _Table, column: str, kind: Kind, roles: Sequence[str], separator: str) -> tuple[str, ...]:
    """Raises ValueError for columns that hold no classes, and for held-out ones that training does not know."""
    cells = table.column(column)
    if kind == "class" and (empty := [line for cell, line in zip(cells, table.lines) if not cell]):
        raise ValueError(
            f"the column {column!r} of {table.path} is empty in {_lines(empty)}: give these images a label, or remove them"
        )
    found: dict[str, Counter[str]] = {TRAIN: Counter(), VAL: Counter()}
    for cell, its in zip(cells, roles):
        found[TRAIN if its == TRAIN else VAL].update(_labels(cell, separator) if kind == "labels" else [spelled(cell)])
    classes = tuple(sorted(found[TRAIN]))
    if unknown := sorted(set(found[VAL]) - set(classes)):
        raise ValueError(
            f"the column {column!r} of {table.path} has {len(unknown)} labels that no training image has: {_few(unknown)}. Correct them, or "
            "give the training images of these, too"
        )
    if not classes:
        raise ValueError(f"the column {column!r} of {table.path} has no labels at all")
    if kind == "class" and len(cells) >= 20 and sum(n == 1 for n in found[TRAIN].values()) > len(cells) / 2:
        raise ValueError(
            f"the column {column!r} of {table.path} has {len(classes):,} different cells for {len(cells):,} images ({_few(classes, 3)}), which "
            "are no classes. Name the column that is meant with --data.label_columns (numbers have a decimal point, no comma)"
        )
    return classes


def _values(table: _Table, output: Output, separator: str) -> Tensor:
    """Targets of one output, float64 [N, target_width]. Raises ValueError for cells that it does not know."""
    columns = [_find(table, column, "data.label_columns", ()) for column in output.columns]
    cells, at = table.column(columns[0]), {name: i for i, name in enumerate(output.classes)}
    wrong: list[tuple[str, int]] = []
    rows: list[list[float]] = []
    if output.kind == "labels" and (len(columns) > 1 or output.classes == tuple(map(spelled, output.columns))):
        for texts, line in zip(zip(*map(table.column, columns)), table.lines):
            rows.append([ZERO_ONE.get(text.lower(), math.nan) for text in texts])
            wrong += [(text, line) for text in texts if text.lower() not in ZERO_ONE][:1]
        allowed = "0 or 1"
    elif output.kind == "number":
        numbers = [_number(cell) for cell in cells]
        rows = [[math.nan if number is None else number] for number in numbers]
        wrong = [(cell, line) for cell, number, line in zip(cells, numbers, table.lines) if number is None]
        allowed = "a number such as 31.5"
    else:
        for cell, line in zip(cells, table.lines):
            its = _labels(cell, separator) if output.kind == "labels" else [spelled(cell)]
            known = [at[name] for name in its if name in at]
            if output.kind == "labels":
                rows.append([float(i in known) for i in range(len(at))])
            else:
                rows.append([float(known[0]) if known else math.nan])
            wrong += [(cell, line)] if len(known) < len(its) else []
        allowed = f"one of {_few(output.classes)}" if output.kind == "class" else f"made of {_few(output.classes)}"
    if wrong:
        first = f"{wrong[0][0]!r}" if wrong[0][0] else "empty"
        raise ValueError(
            f"the column {output.name!r} of {table.path} has {len(wrong)} cells that are not {allowed}: {_lines([line for _, line in wrong])}, the "
            f"first one {first}. Correct or remove these rows, or say what the column holds with --data.label_kinds"
        )
    return torch.tensor(rows, dtype=torch.float64)


def _separator(cell: str, separator: str) -> str:
    """The one that separates labels in a cell; "" where there is none."""
    given = SEPARATORS if separator == "auto" else () if separator == "none" else (separator,)
    return next((mark for mark in given if mark and mark in cell), "")


def _labels(cell: str, separator: str) -> list[str]:
    mark = _separator(cell, separator)
    parts: Iterable[str] = cell.split(mark) if mark else [cell]
    return [spelled(part.strip()) for part in parts if part.strip()]


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_zero_one(cells: Iterable[str]) -> bool:
    return all(cell.lower() in ZERO_ONE for cell in cells)


def _lines(lines: Sequence[int]) -> str:
    return ("line " if len(lines) == 1 else "lines ") + _few(list(map(str, lines)))


def _few(items: Sequence[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f", ... ({len(items) - most} more)" if len(items) > most else "")
