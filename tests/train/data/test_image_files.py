"""Claim: a folder holds the same images for every command, in torchvision's order, and other files are counted."""

import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from repvgg_jax.errors import DataError
from repvgg_jax.image_files import describe_left_out, image_files
from repvgg_jax.preprocess import IMAGE_FORMATS, IMAGE_SUFFIXES, decode_image, open_image
from tests.helpers.photos import PHOTO, encode
from tests.helpers.torchvision_reference import torchvision
from train.data.sources import FolderSource

SMALL = PHOTO.resize((40, 30))


def place(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(SMALL, "JPEG"))


def in_torchvision(root: Path) -> list[tuple[str, int]]:
    """Return (path, label) of the images of torchvision's `ImageFolder`."""
    return torchvision.datasets.ImageFolder(os.fspath(root)).samples


def in_ours(root: Path) -> list[tuple[str, int]]:
    source = FolderSource(root)
    return [(source[index].name, source[index].label) for index in range(len(source))]


@pytest.mark.parametrize(
    "names",
    [
        ("dog/1.jpg", "dog/more/2.jpg", "cat/3.jpg", "cat/a/b/c/4.png", "cat/notes.txt"),
        # Tiny-ImageNet: class folders that contain only a folder of images and a list of boxes.
        ("n01443537/images/n01443537_1.JPEG", "n01443537/boxes.txt", "n01629819/images/n01629819_0.JPEG"),
        # Names that sort differently as strings and as path components.
        (
            "x/a/1.jpg",
            "x/a-b/1.jpg",
            "x/a/b/1.jpg",
            "x/a.jpg/inside.jpg",
            "x/A/1.jpg",
            "x/10.jpg",
            "x/9.jpg",
            "x/é.jpg",
        ),
    ],
)
def test_images_at_any_depth_are_in_torchvisions_order(tmp_path: Path, names: tuple[str, ...]) -> None:
    place(tmp_path, *names)
    assert in_ours(tmp_path) == in_torchvision(tmp_path)
    assert len(in_ours(tmp_path)) == sum(not name.endswith(".txt") for name in names)


def test_linked_folders_and_files_are_followed_as_in_torchvision(tmp_path: Path) -> None:
    place(tmp_path, "store/a/1.jpg", "store/2.jpg", "set/dog/3.jpg")
    (tmp_path / "set" / "dog" / "more").symlink_to(tmp_path / "store")
    (tmp_path / "set" / "dog" / "4.jpg").symlink_to(tmp_path / "store" / "2.jpg")
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "store")
    assert in_ours(tmp_path / "set") == in_torchvision(tmp_path / "set")
    assert len(in_ours(tmp_path / "set")) == 6


def test_a_link_to_a_parent_folder_is_not_followed_forever(tmp_path: Path) -> None:
    place(tmp_path, "dog/deep/1.jpg")
    (tmp_path / "dog" / "deep" / "again").symlink_to(tmp_path / "dog")
    (tmp_path / "dog" / "self").symlink_to(".")
    assert image_files(tmp_path / "dog").paths == [f"{tmp_path}/dog/deep/1.jpg"]


def test_files_that_are_not_images_are_skipped_and_counted(tmp_path: Path) -> None:
    place(tmp_path, "1.JPG", "a/2.heic", "a/3.HEIC", "a/notes.txt", "a/README", "._1.jpg", ".cache/4.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would block forever
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    paths, left_out = image_files(tmp_path)
    assert [Path(path).name for path in paths] == ["1.JPG", "gone.jpg"]
    assert left_out == {".heic": 2, ".txt": 1, "": 1, ".jpg": 1}
    assert describe_left_out(left_out).startswith("5 files that are not images (2 .heic, 1 ")


def test_a_broken_link_is_an_unreadable_image(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(DataError, match=r"gone\.jpg: cannot be read \(No such file"):
        FolderSource(tmp_path)[0]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot list the folder .*absent"):
        image_files(tmp_path / "absent")


# Formats: every file that is listed can be decoded, and no others


def test_suffixes_are_pils_for_the_formats_that_are_decoded() -> None:
    Image.init()
    of_pil = {suffix for suffix, kind in Image.registered_extensions().items() if kind in IMAGE_FORMATS}
    assert set(IMAGE_SUFFIXES) == of_pil - {".pfm"}
    assert set(torchvision.datasets.folder.IMG_EXTENSIONS) <= set(IMAGE_SUFFIXES)


@pytest.mark.parametrize(
    "name", ["a.jfif", "a.jpe", "a.avif", "a.gif", "a.jp2", "a.tga", "a.webp", "a.dib", "a.qoi", "a.pcx", "a.sgi"]
)
def test_every_suffix_is_listed_if_pil_decodes_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "class" / "sub" / name.upper()
    path.parent.mkdir(parents=True)
    SMALL.save(path, Image.registered_extensions()[Path(name).suffix])
    example = FolderSource(tmp_path)[0]
    assert isinstance(example.image, bytes)
    with Image.open(path) as reference:
        assert decode_image(example.image, name).tobytes() == reference.convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["EPS", "PDF", "FITS", "XPM"])
def test_a_file_of_another_format_with_an_image_suffix_starts_no_program(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr("os.system", started)
    head = {"EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "PDF": b"%PDF-1.7\n"}
    head |= {"FITS": b"SIMPLE  =                    T".ljust(2880), "XPM": b"/* XPM */\nstatic char * a[] = {\n"}
    with pytest.raises(DataError, match=r"^photo\.jpg: cannot be read as an image \(no known image format\)$"):
        decode_image(head[kind] + bytes(5000), "photo.jpg")


def bomb(kind: str, side: int) -> bytes:
    """Return a small file whose header says that the image is `side` pixels square."""
    data = bytearray(encode(SMALL, kind))
    if kind == "PNG":
        data[16:24] = side.to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    elif kind == "GIF":
        data[6:10] = side.to_bytes(2, "little") * 2
    elif kind == "BMP":
        data[18:26] = side.to_bytes(4, "little") * 2
    elif kind == "TIFF":
        entries = int.from_bytes(data[4:8], "little") + 2
        for start in range(entries, len(data) - 12, 12):
            if int.from_bytes(data[start : start + 2], "little") in (256, 257):  # width, height
                data[start + 2 : start + 12] = struct.pack("<HII", 4, 1, side)
    elif kind == "WEBP":
        data[12:] = b"VP8X" + struct.pack("<II", 10, 0) + (side - 1).to_bytes(3, "little") * 2 + data[12:]
        data[4:8] = (len(data) - 8).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(kind: str) -> None:
    side = 16_000 if kind == "WEBP" else 60_000
    with pytest.raises(DataError, match=r"^trip/1\.jpg: refused as a decompression bomb \(") as caught:
        decode_image(bomb(kind, side), "trip/1.jpg")
    assert f"{side}x{side}" in str(caught.value) or f"{side**2} pixels" in str(caught.value)


def test_the_warning_about_too_many_pixels_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(
        Image.DecompressionBombWarning, match=r"^trip/1\.png: 40x30 pixels, more than PIL's safety limit of 1000"
    ) as caught:
        decode_image(encode(SMALL, "PNG"), "trip/1.png")
    assert len(caught) == 1


# EXIF orientation: ignored by default


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_on_request_as_by_pil(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "phone.jpg"
    path.write_bytes(encode(SMALL, kind, exif=exif))
    with Image.open(path) as stored:
        assert open_image(path).tobytes() == stored.convert("RGB").tobytes()
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    ours = open_image(path, exif=True)
    assert (ours.size, ours.tobytes()) == (upright.size, upright.tobytes())
    assert ours.size == (SMALL.size if orientation < 5 else SMALL.size[::-1])


def exif_block(*entries: tuple[int, int, int, int]) -> bytes:
    """Return EXIF data with entries (tag, type, count, value or offset)."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(20)


def test_odd_tags_next_to_the_orientation_do_not_matter() -> None:
    data = encode(SMALL, "JPEG", exif=exif_block((0x0112, 3, 1, 6), (0x0132, 5, 1, 40)))  # a date stored as a fraction
    with Image.open(io.BytesIO(data)) as image, pytest.raises(AttributeError):
        ImageOps.exif_transpose(image)
    assert (
        decode_image(data, "x", exif=True).tobytes()
        == decode_image(data, "x").transpose(Image.Transpose.ROTATE_270).tobytes()
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF|Tag data larger")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0no TIFF header", b"Exif\0\0II", exif_block((0x0112, 2, 9000, 60)), exif_block((0x0112, 3, 1, 9))]
)
def test_damaged_exif_data_does_not_make_an_image_unreadable(exif: bytes) -> None:
    data = encode(SMALL, "JPEG", exif=exif)
    assert decode_image(data, "x", exif=True).tobytes() == decode_image(data, "x").tobytes()
