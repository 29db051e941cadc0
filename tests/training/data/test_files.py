import gzip
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest

from moe_router.errors import DataError
from moe_router.training.data import files

TEXT = "naïve café ☃\n".encode() * 50


def pack(folder: Path, kind: str, content: bytes) -> Path:
    path = folder / f"packed.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inside", content)
    else:
        path.write_bytes({"xz": lzma.compress, "gz": gzip.compress, "txt": bytes}[kind](content))
    return path


@pytest.mark.parametrize("kind", ["txt", "xz", "gz", "zip"])
def test_content_is_unpacked_whatever_the_name(tmp_path: Path, kind: str) -> None:
    path = pack(tmp_path, kind, TEXT).rename(tmp_path / "no_suffix")
    assert files.read_content(path).tobytes() == TEXT


@pytest.mark.parametrize("kind", ["xz", "gz", "zip"])
def test_a_damaged_archive_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    path = pack(tmp_path, kind, np.random.default_rng(0).bytes(5000))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match=rf"packed.{kind}: the archive is damaged .*want a whole"):
        files.read_content(path)


def test_a_zip_of_two_files_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a", "a")
        archive.writestr("b", "b")
    with pytest.raises(DataError, match=r"two.zip: .*2 members, want one"):
        files.read_content(tmp_path / "two.zip")


def test_a_large_plain_file_is_mapped(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    (tmp_path / "small").write_bytes(bytes(100))
    assert isinstance(files.read_content(tmp_path / "large"), np.memmap)
    assert not isinstance(files.read_content(tmp_path / "small"), np.memmap)


def test_a_limit_stops_a_packed_flood(tmp_path: Path) -> None:
    path = pack(tmp_path, "xz", bytes(5 << 20))
    assert 10 < len(files.read_content(path, limit=10)) < 2 << 20


def test_expand_finds_files_folders_and_globs_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.txt.gz", ".hidden/d.txt", "e.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = files.expand(str(tmp_path), (".txt", ".md"))
    assert [p.name for p in found] == ["a.md", "b.txt", "c.txt.gz"]
    assert [p.name for p in files.expand(str(tmp_path / "*.txt"), ())] == ["b.txt"]
    assert files.expand(str(tmp_path / "e.bin"), (".txt",)) == [tmp_path / "e.bin"]


def test_expand_names_a_near_match(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(DataError, match=r"corpu.txt: no such file.*did you mean 'corpus.txt'\?"):
        files.expand(str(tmp_path / "corpu.txt"), (".txt",))
    with pytest.raises(DataError, match=r"\*.json: no file matches, want at least one"):
        files.expand(str(tmp_path / "*.json"), ())
    with pytest.raises(DataError, match=r"no file ends in .jsonl in there"):
        files.expand(str(tmp_path), (".jsonl",))


def test_utf8_check_sees_across_its_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", 4)
    files.check_utf8(np.frombuffer(TEXT, np.uint8), "good")
    for at in (0, 3, 4, 9):
        bad = bytearray(b"abcdefghij")
        bad[at] = 0xFF
        with pytest.raises(
            DataError, match=f"bad.txt: byte 0xff at offset {at} is not UTF-8.*icon"
        ):
            files.check_utf8(np.frombuffer(bad, np.uint8), "bad.txt")
    for broken in (b"abc\xc3", b"abc\xc3xyz"):  # the second breaks in the window after
        with pytest.raises(DataError, match="byte 0xc3 at offset 3 is not UTF-8"):
            files.check_utf8(np.frombuffer(broken, np.uint8), "cut")


def test_replacing_keeps_the_old_file_when_the_write_fails(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"), files.replacing(path) as out:
        out.write(b"new")
        raise RuntimeError("half way")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    with files.replacing(path) as out:
        out.write(b"new")
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_a_data_error(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"f: cannot be written \(No space left.*free space"),
        files.replacing(tmp_path / "f"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
