from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from meliad_edge.data.dataset import Dataset
from meliad_edge.data.readers import open_dataset
from meliad_edge.errors import DataError, MissingExtraError

needs_elpv = pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="elpv-dataset not installed")


def listing(dataset: Dataset, root: Path) -> list[tuple[str, str, str]]:
    return [(s.path.relative_to(root).as_posix(), s.defect, s.subset) for s in dataset.samples]


def masks(dataset: Dataset, root: Path) -> dict[str, str]:
    return {
        sample.path.relative_to(root).as_posix(): sample.mask_path.relative_to(root).as_posix()
        for sample in dataset.samples
        if sample.mask_path
    }


# ---- MVTec-style folders


def test_mvtec_folder(make_files: Any) -> None:
    root = make_files(
        "train/good/b.PNG",
        "train/good/a.jpg",
        "test/good/0.png",
        "test/crack/0.png",
        "test/hole/0.png",
        "test/hole/1.png",
        "train/crack/9.png",
        "ground_truth/crack/0_mask.png",
        "ground_truth/crack/9.png",
        "ground_truth/hole/0.PNG",
        "test/crack/.thumbs/0.png",
        "test/.cache/0.png",
    )
    (root / "readme.txt").write_text("about")
    dataset = open_dataset(str(root))
    assert dataset.name == root.name
    assert dataset.licence == "unknown"
    assert listing(dataset, root) == [
        ("test/crack/0.png", "crack", "test"),
        ("test/good/0.png", "good", "test"),
        ("test/hole/0.png", "hole", "test"),
        ("test/hole/1.png", "hole", "test"),
        ("train/crack/9.png", "crack", "train"),
        ("train/good/a.jpg", "good", "train"),
        ("train/good/b.PNG", "good", "train"),
    ]
    assert masks(dataset, root) == {
        "test/crack/0.png": "ground_truth/crack/0_mask.png",
        "test/hole/0.png": "ground_truth/hole/0.PNG",
        "train/crack/9.png": "ground_truth/crack/9.png",
    }


def test_a_mask_goes_to_the_test_image_when_a_training_image_has_the_same_name(make_files: Any) -> None:
    root = make_files("train/good/0.png", "train/crack/0.png", "test/crack/0.png", "ground_truth/crack/0_mask.png")
    assert masks(open_dataset(str(root)), root) == {"test/crack/0.png": "ground_truth/crack/0_mask.png"}


def test_masks_follow_subfolders_and_dots_in_names(make_files: Any) -> None:
    root = make_files(
        "train/good/0.png", "test/crack/day/0.1.png", "test/crack/0.png", "ground_truth/crack/day/0.1_mask.png"
    )
    assert masks(open_dataset(str(root)), root) == {"test/crack/day/0.1.png": "ground_truth/crack/day/0.1_mask.png"}


def test_masks_without_an_image_are_said(make_files: Any, caplog: pytest.LogCaptureFixture) -> None:
    root = make_files("train/good/0.png", "test/crack/0.png", "ground_truth/crack/label-0.png")
    assert masks(open_dataset(str(root)), root) == {}
    assert "none of the 1 masks" in caplog.text


def test_mvtec_normals_may_have_another_known_name(make_files: Any) -> None:
    root = make_files("train/Non-Defective/0.png", "test/OK/1.png", "test/crack/2.png")
    assert listing(open_dataset(str(root)), root) == [
        ("test/OK/1.png", "good", "test"),
        ("test/crack/2.png", "crack", "test"),
        ("train/Non-Defective/0.png", "good", "train"),
    ]


def test_unreadable_images_do_not_stop_the_reader(make_files: Any) -> None:
    root = make_files("train/good/0.png", "test/crack/0.png")
    (root / "train" / "good" / "1.png").touch()
    (root / "train" / "good" / "2.png").symlink_to(root / "gone.png")
    assert len(open_dataset(str(root)).samples) == 4


def test_mvtec_without_normals(make_files: Any, refuses: Any) -> None:
    root = make_files("train/crack/0.png", "test/good/0.png", "test/crack/0.png")
    with refuses(DataError, "no normal images to train on"):
        open_dataset(str(root))


def test_mvtec_images_directly_in_train(make_files: Any, refuses: Any) -> None:
    with refuses(
        DataError,
        "(0 images in all, of the kinds .bmp, .jpeg, .jpg, .png, .tif, .tiff, .webp); expected train/good + test/good",
    ):
        open_dataset(str(make_files("train/0.png")))


# ---- plain folders


def test_two_folders(make_files: Any) -> None:
    root = make_files("ok/2.png", "ok/1.png", "defective/1.png")
    assert listing(open_dataset(str(root)), root) == [
        ("defective/1.png", "defective", "any"),
        ("ok/1.png", "good", "any"),
        ("ok/2.png", "good", "any"),
    ]


def test_several_defect_folders_and_a_relative_path(make_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_files("Normal/1.png", "crack/1.png", "hole/a/1.png")
    monkeypatch.chdir(root)
    dataset = open_dataset(".")
    assert dataset.name == root.name
    assert [sample.defect for sample in dataset.samples] == ["good", "crack", "hole"]
    assert all(sample.path.is_absolute() for sample in dataset.samples)


def test_two_unknown_folders(make_files: Any, refuses: Any) -> None:
    root = make_files("a/1.png", "b/1.png")
    with refuses(DataError, "holds the normal images: it has a, b; rename it to good"):
        open_dataset(str(root))


def test_many_unknown_folders_are_not_all_listed(make_files: Any, refuses: Any) -> None:
    root = make_files(*(f"class{i}/1.png" for i in range(9)))
    with refuses(DataError, "class0, class1, class2, class3, class4 and 4 more"):
        open_dataset(str(root))


@pytest.mark.parametrize("extra", ["ground_truth/crack/1.png", "test/good/1.png", "masks/1.png"])
def test_a_folder_with_a_meaning_is_no_defect_class(make_files: Any, refuses: Any, extra: str) -> None:
    with refuses(DataError, "unknown layout of data set"):
        open_dataset(str(make_files("good/1.png", "crack/1.png", extra)))


def test_flat_folder(make_files: Any, refuses: Any) -> None:
    with refuses(DataError, "it holds no folders; expected train/good"):
        open_dataset(str(make_files("1.png", "2.png")))


def test_empty_normal_folder(make_files: Any, refuses: Any) -> None:
    root = make_files("crack/1.png")
    (root / "good").mkdir()
    with refuses(DataError, "no normal images to train on"):
        open_dataset(str(root))


def test_link_loops_end(make_files: Any) -> None:
    root = make_files("good/1.png", "crack/1.png")
    (root / "good" / "again").symlink_to(root / "good")
    (root / "crack" / "up").symlink_to(root / "crack")
    assert len(open_dataset(str(root)).samples) == 2


# ---- CSV


def write_csv(root: Path, text: str | bytes) -> Path:
    path = root / "parts.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_csv_without_split(make_files: Any) -> None:
    root = make_files("b.png", "a.png", "deep/c.png", "d.png")
    path = write_csv(root, "\ufeffpath,label\nb.png,good\na.png,1\ndeep/c.png, scratch \n\nd.png,0\n")
    dataset = open_dataset(str(path))
    assert dataset.name == "parts"
    assert listing(dataset, root) == [
        ("a.png", "defect", "any"),
        ("b.png", "good", "any"),
        ("d.png", "good", "any"),
        ("deep/c.png", "scratch", "any"),
    ]


def test_csv_with_split_and_masks(make_files: Any) -> None:
    root = make_files("a.png", "b.png", "c.png", "m.png")
    text = "split,path,mask,label\r\ntrain,a.png,,OK\r\nTest,b.png,m.png,hole\r\ntest,c.png,,normal\r\n"
    dataset = open_dataset(str(write_csv(root, text)))
    assert listing(dataset, root) == [("a.png", "good", "train"), ("b.png", "hole", "test"), ("c.png", "good", "test")]
    assert masks(dataset, root) == {"b.png": "m.png"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its header is ''"),
        ("image,label\na.png,good\n", "its header is 'image,label'"),
        ("path;label\na.png;good\n", "its header is 'path;label'"),
        ("path,label,masks\na.png,good,\n", "its header is 'path,label,masks'"),
        ("path,label,label\na.png,good,good\n", "its header is 'path,label,label'"),
        ("path,label\na.png\n", "line 2 has more or fewer fields"),
        ("path,label\na.png,good\nb.png,good,x\n", "line 3 has more or fewer fields"),
        ("path,label\na.png,\n", "line 2 has an empty path or label"),
        ("path,label\n ,good\n", "line 2 has an empty path or label"),
        ("path,label,split\na.png,good,val\n", "line 2 has split 'val'"),
        ("path,label,split\na.png,good,\n", "line 2 has split ''"),
        ("path,label\na.png,good\n./a.png,hole\n", "line 3 names './a.png' again, as line 2 did"),
        ("path,label\na.png,good\nx.png,good\ny.png,1\n", "2 of the 3 files named in"),
        ("path,label,mask\na.png,good,\nb.png,1,m.png\n", "1 of the 3 files named in"),
        ("path,label\na.png,hole\n", "no normal images to train on"),
        ("path,label\n", "no normal images to train on"),
        ('path,label\n"a.png,good\n', "save it as comma-separated UTF-8"),
        (b"path,label\n\xff\xfe.png,good\n", "save it as comma-separated UTF-8"),
        (f"path,label\n{'x' * 300}.png,good\n", "File name too long"),
    ],
)
def test_bad_csv(make_files: Any, refuses: Any, text: str | bytes, message: str) -> None:
    root = make_files("a.png", "b.png")
    with refuses(DataError, message):
        open_dataset(str(write_csv(root, text)))


def test_csv_names_the_first_missing_file(make_files: Any, refuses: Any) -> None:
    root = make_files("a.png")
    with refuses(DataError, f"first {root / 'x.png'}"):
        open_dataset(str(write_csv(root, "path,label\na.png,good\nx.png,good\ny.png,1\n")))


def test_csv_sees_through_links(make_files: Any, refuses: Any) -> None:
    root = make_files("a.png")
    (root / "b.png").symlink_to(root / "a.png")
    with refuses(DataError, "line 3 names 'b.png' again"):
        open_dataset(str(write_csv(root, "path,label\na.png,good\nb.png,hole\n")))


# ---- anything else


def test_nothing_there(tmp_path: Path, refuses: Any) -> None:
    with refuses(DataError, "nowhere does not exist; give a folder, a CSV file or the name elpv"):
        open_dataset(str(tmp_path / "nowhere"))


def test_neither_folder_nor_csv(make_files: Any, refuses: Any) -> None:
    with refuses(DataError, "it is no folder and no .csv file"):
        open_dataset(str(make_files("a.png") / "a.png"))


@needs_elpv
def test_elpv_counts() -> None:
    dataset = open_dataset("elpv")
    assert Counter(sample.is_anomaly for sample in dataset.samples) == {False: 1508, True: 715}
    assert {sample.defect for sample in dataset.samples} == {"good", "mono", "poly"}
    assert {sample.subset for sample in dataset.samples} == {"any"}
    assert all(sample.path.is_file() for sample in dataset.samples)
    assert dataset.licence == "CC BY-NC-SA 4.0"


def test_elpv_not_installed(monkeypatch: pytest.MonkeyPatch, refuses: Any) -> None:
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    with refuses(MissingExtraError, "elpv-dataset is not installed; run: pip install 'meliad-edge[demo]'"):
        open_dataset("elpv")


def test_the_room_needs_neither_torch_nor_pillow() -> None:
    program = (
        "import sys; from meliad_edge.data import images, readers, split; "
        "from meliad_edge.errors import MeliadError\n"
        "try: readers.open_dataset('elpv')\n"
        "except MeliadError: pass\n"
        "sys.exit(', '.join({'torch', 'PIL', 'elpv_dataset'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
