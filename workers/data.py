"""Data sets: scikit-learn's bundled ones, LibSVM files, .npz files.

``load`` answers dense ``(features [N, f], labels [N] as 0..C-1)``; every defect of a file is
one sentence that names the file and the row.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.errors import ConfigError, nearest
from offbeat.runtime.registry import Reads

BUNDLED = {
    "breast_cancer": "569 tumours, 30 measurements, 2 classes",
    "digits": "1,797 images of 8x8 pixels, 10 classes",
    "iris": "150 flowers, 4 measurements, 3 classes",
    "wine": "178 wines, 13 measurements, 3 classes",
}
Data = Annotated[str, Reads(bundled=BUNDLED)]
LIBSVM_ENDINGS = (".svm", ".libsvm", ".txt", ".gz", ".bz2", "")
MAX_DENSE_BYTES = 4 * 2**30
_FEATURE_KEYS = ("X", "x", "Xtr", "X_train", "x_train", "data", "features")
_LABEL_KEYS = ("y", "Y", "ytr", "y_train", "target", "labels")


def load(source: str, dtype: str = "float32") -> tuple[NDArray, NDArray[np.int64]]:
    """Features ``[N, f]`` and labels ``[N]`` (0..C-1, in the order of the file's values).

    Args:
        source: a bundled name, or the path of a LibSVM file (plain, .gz, .bz2) or of an .npz
            file with arrays X and y (rows are flattened; bytes above 1 are pixels, over 255).
        dtype: ``float32`` or ``float64``.

    Raises:
        ConfigError: unknown name, missing file, ragged rows, non-finite values, one class only.
    """
    if source in BUNDLED:
        features, labels = _bundled(source)
    elif not (path := Path(source).expanduser()).exists():
        hint = nearest(source, BUNDLED) if path.name == source else ""
        raise ConfigError(
            f'no data set or file "{source}"{hint}; bundled: {", ".join(BUNDLED)}, '
            "else the path of a LibSVM (.svm, .gz, .bz2) or .npz file"
        )
    elif path.suffix == ".npz":
        features, labels = _npz(path)
    elif path.suffix in LIBSVM_ENDINGS:
        features, labels = _libsvm(path)
    else:
        raise ConfigError(f"{path}: cannot read a {path.suffix} file; LibSVM or .npz is expected")
    return _checked(source, features, labels, np.dtype(dtype))


def _bundled(name: str) -> tuple[NDArray, NDArray]:
    from sklearn import datasets

    features, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    if name == "digits":
        return features / 16.0, labels
    return (features - features.mean(0)) / features.std(0), labels


def _libsvm(path: Path) -> tuple[NDArray, NDArray]:
    from sklearn.datasets import load_svmlight_file

    try:
        sparse, labels = load_svmlight_file(str(path))
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: not a readable LibSVM file ({error})") from None
    if (size := sparse.shape[0] * sparse.shape[1] * 4) > MAX_DENSE_BYTES:
        raise ConfigError(
            f"{path}: {sparse.shape[0]} x {sparse.shape[1]} values are {size / 2**30:.1f} GiB as "
            f"dense rows; the limit is {MAX_DENSE_BYTES / 2**30:.0f} GiB"
        )
    return sparse.toarray(), labels


def _npz(path: Path) -> tuple[NDArray, NDArray]:
    try:
        with path.open("rb") as file:
            archive: Any = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array, not an archive")
            features, labels = (
                next((archive[key] for key in keys if key in archive.files), None)
                for keys in (_FEATURE_KEYS, _LABEL_KEYS)
            )
    except (ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        ragged = "Object arrays" in str(error)
        reason = "its rows have unequal lengths (an object array)" if ragged else str(error)
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
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
    source: str, features: NDArray, labels: NDArray, dtype: np.dtype
) -> tuple[NDArray, NDArray[np.int64]]:
    if not features.size:
        raise ConfigError(f"{source}: has no values")
    if labels.ndim != 1:
        raise ConfigError(f"{source}: labels must be one number a row, not of shape {labels.shape}")
    if len(features) != len(labels):
        raise ConfigError(f"{source}: {len(features)} rows of features but {len(labels)} labels")
    for name, array in (("features", features), ("labels", labels)):
        if array.dtype.kind not in "biuf":
            raise ConfigError(f"{source}: {name} are of type {array.dtype}; numbers are needed")
        with np.errstate(over="ignore"):
            array = array.astype(dtype)  # too large for it is infinite in it
        bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if bad.any():
            raise ConfigError(
                f"{source}: row {int(bad.argmax()) + 1} has a value that is not finite in its "
                f"{name} ({int(bad.sum())} such rows); remove or fill them"
            )
    if (labels != np.round(labels)).any():
        raise ConfigError(f"{source}: labels must be classes, whole numbers, not measurements")
    values, classes = np.unique(labels, return_inverse=True)
    if len(values) < 2:
        raise ConfigError(f"{source}: all {len(labels)} labels are equal; two classes are needed")
    return np.ascontiguousarray(features, dtype), classes.astype(np.int64)
