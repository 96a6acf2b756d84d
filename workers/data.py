"""Data sets: scikit-learn's bundled ones, LibSVM files, CSV tables, .npz files.

``load`` answers ``(features [N, f], labels [N] as 0..C-1)``; every defect of a file is one
sentence that names the file and the row.
"""

import io
import warnings
import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from offbeat.runtime.base.errors import ConfigError, nearest
from offbeat.runtime.base.registry import Reads
from offbeat.runtime.base.tables import BROKEN, ending, read_text, unpacked

BUNDLED = {
    "breast_cancer": "569 tumours, 30 measurements, 2 classes",
    "digits": "1,797 images of 8x8 pixels, 10 classes",
    "iris": "150 flowers, 4 measurements, 3 classes",
    "wine": "178 wines, 13 measurements, 3 classes",
}
Data = Annotated[str, Reads(bundled=BUNDLED)]
TAKEN = (
    "the path of a LibSVM file (a9a.t, news20.binary.bz2), of a .csv with a header (give "
    'target = "COLUMN"), or of an .npz file; LibSVM and .csv also as .gz, .bz2 or .xz'
)
TABLES = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}  # ending -> what may separate
ELSEWHERE = {  # endings of other formats; LibSVM's own files have any, or none
    *(".npy", ".parquet", ".feather", ".arff", ".json", ".jsonl", ".mat", ".h5", ".hdf5", ".pkl"),
    *(".pickle", ".pt", ".pth", ".safetensors", ".zip", ".tar", ".tgz", ".7z", ".zst", ".xls"),
    *(".xlsx", ".toml", ".yaml", ".py", ".png", ".jpg"),
}
MAX_DENSE_BYTES = 4 * 2**30
SPARSE_BYTES = 2**26  # smaller data are faster as dense rows,
SPARSE_SHARE = 0.1  # and so are those of which more than this is not zero
_FEATURE_KEYS = ("X", "x", "Xtr", "X_train", "x_train", "data", "features")
_LABEL_KEYS = ("y", "Y", "ytr", "y_train", "target", "labels")


def load(
    source: str, dtype: str = "float32", *, target: str | None = None, sparse: bool = False
) -> tuple[NDArray | csr_array, NDArray[np.int64]]:
    """Features ``[N, f]`` and labels ``[N]`` (0..C-1, in the order of the file's values).

    Args:
        source: a bundled name, or the path of a LibSVM file (plain, .gz, .bz2, .xz), of a .csv or
            .tsv table with a header, or of an .npz file with arrays X and y (rows are flattened;
            bytes above 1 are pixels, over 255).
        dtype: ``float32`` or ``float64``.
        target: the column of a table that holds the labels; its other columns are the features.
        sparse: whether large features of which few are not zero may be answered as CSR.

    Raises:
        ConfigError: unknown name, missing file, ragged rows, missing or non-finite values, text
            where numbers are needed, one class only.
    """
    path = Path(source).expanduser()
    end = ending(path)
    if target is not None and (source in BUNDLED or end not in TABLES):
        raise ConfigError(f'{source}: target = "{target}" names a column of a .csv; leave it out')
    features: NDArray | csr_array
    if source in BUNDLED:
        features, labels = _bundled(source)
    elif not path.exists():
        hint = nearest(source, BUNDLED) if path.name == source else ""
        raise ConfigError(
            f'no data set or file "{source}"{hint}; bundled: {", ".join(BUNDLED)}, else {TAKEN}'
        )
    elif path.suffix.lower() == ".npz":
        features, labels = _npz(path)
    elif end in TABLES:
        features, labels = _table(path, TABLES[end], target)
    elif end in ELSEWHERE | {".npz"}:
        raise ConfigError(f"{path}: cannot read a {end} file; give {TAKEN}")
    else:
        features, labels = _libsvm(path, np.dtype(dtype), sparse)
    return _checked(source, features, labels, np.dtype(dtype))


def _bundled(name: str) -> tuple[NDArray, NDArray]:
    from sklearn import datasets

    features, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    if name == "digits":
        return features / 16.0, labels
    return (features - features.mean(0)) / features.std(0), labels


def _libsvm(path: Path, dtype: np.dtype, sparse: bool) -> tuple[NDArray | csr_array, NDArray]:
    from sklearn.datasets import load_svmlight_file

    try:
        with unpacked(path) as file, np.errstate(over="ignore"):
            # Too large a value is infinite in float32, and told below.
            found, labels = load_svmlight_file(file, dtype=dtype)
    except (*BROKEN, OverflowError) as error:
        why = _first_wrong(path) or error
        raise ConfigError(f"{path}: not a readable LibSVM file ({why})") from None
    rows, columns = found.shape
    size = rows * columns * dtype.itemsize
    if sparse and size > SPARSE_BYTES and found.nnz < SPARSE_SHARE * rows * columns:
        return csr_array(found), labels
    if size > MAX_DENSE_BYTES:
        kept = "" if sparse else "; logistic keeps sparse data as they are"
        raise ConfigError(
            f"{path}: {rows:,} x {columns:,} values are {size / 2**30:.1f} GiB as dense rows, and "
            f"twice that while they are divided; the limit is {MAX_DENSE_BYTES / 2**30:.0f} GiB"
            f"{kept}"
        )
    return found.toarray(), labels


def _first_wrong(path: Path) -> str:
    """What is wrong in the first line of a LibSVM file that cannot be right; "" if none is."""
    try:
        with io.TextIOWrapper(unpacked(path), encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                label, *pairs = line.partition("#")[0].split() or ["0"]
                if why := _wrong(label, pairs):
                    return f"line {number}: {why}"
    except BROKEN as error:
        return str(error)
    return ""


def _wrong(label: str, pairs: list[str]) -> str:
    if not _number(label):
        several = ": it has one label a row" if "," in label else ""
        return f'the label "{label}" is no number{several}'
    before = -1
    for pair in pairs:
        index, colon, value = pair.partition(":")
        if index == "qid":
            continue
        if not (colon and index.isdecimal() and _number(value)):
            return f'"{pair}" is not index:value'
        if int(index) <= before:
            return f"index {index} comes after {before}; a row's indices must grow"
        before = int(index)
    return ""


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _table(path: Path, separators: tuple[str, ...], target: str | None) -> tuple[NDArray, NDArray]:
    """The columns of a table with a header: ``target``, and all others, which must be numbers."""
    import pandas

    text = read_text(path)

    def read(separator: str, **how: Any) -> Any:
        return pandas.read_csv(io.StringIO(text), sep=separator, skipinitialspace=True, **how)

    try:
        heads = {sep: read(sep, header=None, nrows=1, dtype=str).iloc[0] for sep in separators}
        if len(several := [sep for sep in separators if len(heads[sep]) > 1]) > 1:
            said = " and ".join(several).replace("\t", "tab")
            raise ConfigError(f"{path}: its header has both {said}; keep one")
        separator = several[0] if several else separators[0]
        with warnings.catch_warnings(action="error", category=pandas.errors.ParserWarning):
            frame = read(separator, index_col=False, low_memory=False)
    except ConfigError:
        raise
    except pandas.errors.ParserWarning:
        raise ConfigError(f"{path}: its rows have more values than its header has names") from None
    except ValueError as error:  # pandas' own are
        raise ConfigError(f"{path}: cannot be read: {str(error).strip()}") from None
    head = [name if isinstance(name, str) else "" for name in heads[separator]]
    named = _names(path, head, target)
    if frame.empty:
        raise ConfigError(f"{path}: has no rows below its header")
    frame.columns = pandas.Index(head)
    missing = frame.isna().to_numpy()
    if missing.any():
        row, at = np.argwhere(missing)[0]
        raise ConfigError(
            f'{path}: row {row + 1}, column "{head[at]}": there is no value '
            f"({int(missing.any(axis=1).sum())} such rows); remove or fill them"
        )
    labels = frame.pop(named)
    for name, values in frame.items():
        if values.dtype.kind not in "biuf":
            text = pandas.to_numeric(values, errors="coerce").isna().to_numpy()
            row = int(text.argmax())
            raise ConfigError(
                f'{path}: column "{name}" is text ("{values.iloc[row]}" in row {row + 1}), and '
                "features must be numbers; make a column of 0 and 1 for each of its values, or "
                "leave it out"
            )
    if labels.dtype.kind not in "biuf":
        labels = labels.astype(str)
    return frame.to_numpy(float), np.array(labels.tolist())


def _names(path: Path, head: list[str], target: str | None) -> str:
    """The target's name, which is in the header ``head``; all names are told apart."""
    if all(map(_number, head)):
        raise ConfigError(f"{path}: its first line has numbers; a header with names is needed")
    if "" in head:
        raise ConfigError(
            f"{path}: column {head.index('') + 1} has no name; remove it where it only counts the "
            "rows (pandas writes none with index=False)"
        )
    if twice := [name for name in head if head.count(name) > 1]:
        raise ConfigError(f'{path}: two columns are called "{twice[0]}"')
    if target is None:
        raise ConfigError(
            f'{path}: which column is the label? Give target = "{head[-1]}", or '
            f"another one of {', '.join(head)}"
        )
    if target not in head:
        raise ConfigError(f'{path}: no column is called "{target}"{nearest(target, head)}')
    if len(head) == 1:
        raise ConfigError(f'{path}: has no column besides "{target}"')
    return target


def _npz(path: Path) -> tuple[NDArray, NDArray]:
    key = ""
    try:
        with path.open("rb") as file:
            archive: Any = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array, not an archive")
            found = {}
            for key in (*_FEATURE_KEYS, *_LABEL_KEYS):
                if key in archive.files:
                    found[key] = archive[key]
    except (*BROKEN, zipfile.BadZipFile) as error:
        reason = str(error)
        if "Object arrays" in reason:
            what, kind = ("labels", "str") if key in _LABEL_KEYS else ("numbers", "float")
            reason = (
                f"{key} is an array of Python objects (text, or rows of unequal lengths); save "
                f"{what} as {key}.astype({kind})"
            )
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    features, labels = (
        next((found[key] for key in keys if key in found), None)
        for keys in (_FEATURE_KEYS, _LABEL_KEYS)
    )
    if features is None or labels is None:
        raise ConfigError(
            f"{path}: needs an array named X and one named y; it has {', '.join(archive.files)}"
        )
    if not features.size or not features.ndim:
        raise ConfigError(f"{path}: X has no rows of values, but the shape {features.shape}")
    if features.dtype == np.uint8 and features.max() > 1:  # pixels
        features = features / 255.0
    return features.reshape(len(features), -1), labels


def _checked(
    source: str, features: NDArray | csr_array, labels: NDArray, dtype: np.dtype
) -> tuple[NDArray | csr_array, NDArray[np.int64]]:
    count = features.shape[0]
    if not count * features.shape[1]:
        raise ConfigError(f"{source}: has no values")
    if labels.ndim != 1:
        raise ConfigError(f"{source}: labels must be one number a row, not of shape {labels.shape}")
    if count != len(labels):
        raise ConfigError(f"{source}: {count} rows of features but {len(labels)} labels")
    if features.dtype.kind not in "biuf":
        raise ConfigError(f"{source}: features are of type {features.dtype}; numbers are needed")
    with np.errstate(over="ignore"):  # too large for it is infinite in it
        features = features.astype(dtype, copy=False)
    text = labels.dtype.kind == "U"
    if not text and labels.dtype.kind not in "biuf":
        raise ConfigError(
            f"{source}: labels are of type {labels.dtype}; numbers or text are needed"
        )
    _all_finite(source, "features", features)
    if not text:
        _all_finite(source, "labels", labels)
        if (labels != np.round(labels)).any():
            raise ConfigError(f"{source}: labels must be classes, whole numbers, not measurements")
    values, classes = np.unique(labels, return_inverse=True)
    if len(values) < 2:
        raise ConfigError(f"{source}: all {len(labels)} labels are equal; two classes are needed")
    if isinstance(features, np.ndarray):
        features = np.ascontiguousarray(features)
    return features, classes.astype(np.int64)


def _all_finite(source: str, name: str, array: Any) -> None:
    dense = isinstance(array, np.ndarray)
    flat = array if dense else array.data
    bad = ~np.isfinite(flat)
    if not bad.any():
        return
    if dense:
        rows = np.flatnonzero(bad.reshape(len(array), -1).any(axis=1))
    else:
        rows = np.unique(array.indptr.searchsorted(np.flatnonzero(bad), side="right") - 1)
    raise ConfigError(
        f"{source}: row {rows[0] + 1} has a value that is not finite in its {name} "
        f"({len(rows)} such rows); remove or fill them"
    )
