"""Proves that `sivae check` finds every flipped bit and every cut of a shard that pack wrote, and whatever else can be
wrong with a set, on a disk and on S3; that `sivae index` makes an index of shards of any writer, from their headers
alone and over few requests, and refuses those that cannot be read as they are.

    python -m pytest tests/unit/test_data_check.py

The S3 tests need moto's server (`pip install "moto[server]"`), which runs on loopback.
"""

import io
import os
import random
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from sivae.cli import main
from sivae.data import Index
from sivae.data.check import MAX_FINDINGS, Level, check, check_shard
from sivae.data.make_index import make_index
from sivae.data.pack import pack
from sivae.data.sources import open_source
from sivae.data.tar import Damaged, Members, RangeFile
from sivae.errors import UserError
from sivae.storage import Folder

FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, image_format="PNG", **settings):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, image_format, **settings)
    return buffer.getvalue()


def write_tar(path, members, format="gnu"):
    with tarfile.open(path, "w", format=FORMATS[format]) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def s3():
    """Storage options of a bucket `sets` on a real S3 server on loopback."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "test", "secret": "test", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    s3fs.S3FileSystem(**options).mkdir("sets")
    yield options
    server.stop()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A set of two shards with labels."""
    path = tmp_path_factory.mktemp("check")
    np.savez(path / "a.npz", images=noise(6, 5, 5, 3), labels=np.arange(6))
    pack(path / "a.npz", path / "set", resolution=5, samples_per_shard=3, splits="train=0:3,test=3:", progress=False)
    return str(path / "set")


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "set")


def findings(url, **settings):
    return check(url, progress=False, **settings).findings


def test_a_whole_set(whole, tmp_path, s3):
    report = check(whole, progress=False)
    index = Index.load(Folder(whole))
    assert report.findings.count == 0 and report.num_images == 6 and report.digest == index.digest
    assert report.num_bytes == sum(shard.size_bytes for shard in index.shards) and report.has_checksums
    assert check(whole, split="test", progress=False).num_images == 3
    assert main(["check", whole, "--workers", "2"]) == 0
    Folder("s3://sets/whole", s3).fs.put(whole + "/", "sets/whole/", recursive=True)
    assert check("s3://sets/whole", storage_options=s3, progress=False).findings.count == 0
    with pytest.raises(UserError, match="no packed image set"):
        check(tmp_path)


def test_every_flipped_bit_is_found(copy):
    path = copy / "train-000000.tar"
    data = bytearray(path.read_bytes())
    draw = random.Random(0)
    with tarfile.open(path) as tar:
        last = max(member.offset_data + member.size for member in tar)
    level = Level("", Folder(copy), Index.load(Folder(copy)))
    assert check_shard([level], (0, 0), lambda count: None)[1].count == 0
    # every byte that is in use with one bit of it, and some of the 8 KiB of zeros behind the end mark
    for at in [*range(0, last), *range(last, len(data), 97)]:
        bit = 1 << draw.randrange(8)
        data[at] ^= bit
        path.write_bytes(data)
        found = check_shard([level], (0, 0), lambda count: None)[1]
        assert found.count, f"bit {bit} of byte {at}"
        assert all(line.startswith("train-000000.tar: ") for line in found.lines), found.lines
        data[at] ^= bit


def test_every_cut_is_found(copy):
    path = copy / "train-000000.tar"
    data = path.read_bytes()
    for size in [0, 1, *range(511, len(data), 512), *range(512, len(data), 512), len(data) - 1]:
        path.write_bytes(data[:size])
        found = findings(copy, split="train")
        assert f"train-000000.tar: has {size:,} bytes where" in found.lines[0]
    path.write_bytes(data + bytes(512))
    assert findings(copy).count == 1
    os.unlink(path)
    assert findings(copy).lines == ["train-000000.tar: is missing"]


def test_damage_anywhere_raises_nothing(copy):
    path, draw = copy / "train-000000.tar", random.Random(0)
    whole = path.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 30)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.randint(0, len(data))] if draw.random() < 0.3 else data)
        findings(copy)


def rewrite_tar(path, change):
    """Write the tar again as TarWriter does, with its members (a list of name and bytes) changed."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    write_tar(path, change(members) or members, "ustar")


def test_what_is_not_as_the_index_says(copy):
    path = copy / "train-000000.tar"
    whole = path.read_bytes()

    def found(change):
        path.write_bytes(whole)
        rewrite_tar(path, change)
        return "\n".join(line for line in findings(copy).lines if "bytes where the index says" not in line)

    def set_bytes(number, data):
        def change(members):
            members[number] = members[number][0], data

        return change

    # members: 00000000.cls, 00000000.png, 00000001.cls, ...
    assert "says b'1' where the index has the label 0" in found(set_bytes(0, b"1"))
    assert "has no .cls" in found(lambda members: members[0:0] + [("x.txt", b"0"), *members[1:]])
    assert "'extra.png' is not in the index" in found(lambda members: [*members, ("extra.png", b"x")])
    assert "no JSON" in found(lambda members: [*members, ("00000002.json", b"{")])
    assert found(lambda members: [*members, ("00000002.json", b"{}"), ("notes.txt", b"x" * 3000)]) == ""
    swapped = found(lambda members: [members[0], members[3], members[2], members[1], *members[4:]])
    assert "'00000001.png'" in swapped and "sample 00000000 is damaged" in swapped
    assert "sample 00000002 is not at byte" in found(lambda members: members[:4])
    assert "not at byte" in found(lambda members: [("first.txt", b"x"), *members])


def test_what_lies_beside(copy):
    shutil.copy(copy / "train-000000.tar", copy / "train-000009.tar")
    assert findings(copy).lines == ["train-000009.tar: lies beside the index and is not in it"]


def test_findings_are_bounded_and_said(copy, tmp_path, capsys):
    np.save(tmp_path / "a.npy", noise(150, 4, 4))
    pack(tmp_path / "a.npy", tmp_path / "many", resolution=4, progress=False)
    path = tmp_path / "many" / "train-000000.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"IDAT", b"IDOT"))
    found = findings(tmp_path / "many")
    assert len(found.lines) == MAX_FINDINGS == 100 and found.count == 150
    assert main(["check", str(tmp_path / "many"), "--workers", "0"]) == 1
    output = capsys.readouterr().out
    assert "sample 00000000 is damaged, crc32" in output and "... and 50 more" in output and "150 findings" in output


def test_a_pyramid_is_checked_at_all_levels(tmp_path):
    np.savez(tmp_path / "a.npz", images=noise(9, 16, 16), labels=np.arange(9))
    settings = {"samples_per_shard": 3, "progress": False}
    pack(tmp_path / "a.npz", tmp_path / "set", resolution=16, pyramid=True, **settings)
    assert check(tmp_path / "set", progress=False).num_images == 3 * 9
    path = tmp_path / "set" / "8" / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[1600] ^= 1
    path.write_bytes(data)
    assert [line.split(":")[0] for line in findings(tmp_path / "set").lines] == ["8/train-000001.tar"]
    shutil.rmtree(tmp_path / "set" / "4")
    pack(tmp_path / "a.npz", tmp_path / "set" / "4", resolution=4, labels=False, **settings)
    assert any(line.startswith("4/index.json: other samples, labels") for line in findings(tmp_path / "set").lines)


def test_images_that_are_not_what_the_index_says(tmp_path):
    """Without checksums, only decoding tells."""
    images = [encoded(noise(6, 6, 3)), encoded(noise(6, 6)), encoded(noise(5, 5, 3)), encoded(noise(6, 6, 3))[:-40]]
    os.mkdir(tmp_path / "set")
    write_tar(tmp_path / "set" / "a.tar", [(f"{i}.png", data) for i, data in enumerate(images)])
    make_index(str(tmp_path / "set" / "a.tar"), progress=False)
    report = check(tmp_path / "set", progress=False)
    assert not report.has_checksums and [line.split(" (")[0] for line in report.findings.lines] == [
        "a.tar: sample 1 is a 8-bit grey image where the index says 8 bits and 3 channels",
        "a.tar: sample 2 is 5x5 pixels where the index says 6x6",
        "a.tar: sample 3 cannot be decoded",
    ]


# Indexes of shards of others


def others(folder, count=3, labels=True, format="gnu", image_format="jpg", key="pictures/{:05d}"):
    """`count` shards of four images as other programs write them; returns the images in order."""
    os.makedirs(folder, exist_ok=True)
    found = []
    for shard in range(count):
        members = []
        for i in range(4 * shard, 4 * shard + 4):
            data = encoded(noise(16, 16, 3, seed=i), {"jpg": "JPEG"}.get(image_format, image_format.upper()))
            found.append(data)
            members += [(f"{key.format(i)}.{image_format}", data), (f"{key.format(i)}.json", b"{}")]
            members += [(f"{key.format(i)}.cls", b"%d\n" % (i % 5))] if labels else []
        write_tar(os.path.join(folder, f"shards-{shard:06d}.tar"), members, format)
    return found


@pytest.mark.parametrize("crc", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_shards_of_others(tmp_path, format, crc):
    long = "a-name-of-more-than-a-hundred-letters/" * 4 if format != "ustar" else ""
    images = others(tmp_path / "set", format=format, key=long + "ä{:05d}" if long else "{:05d}")
    pattern = str(tmp_path / "set" / "shards-{000000..000002}.tar")
    made = make_index(pattern, crc=crc, split="validation", progress=False)
    loaded = Index.load(Folder(tmp_path / "set"))
    assert loaded.digest == made.digest and loaded.splits == {"validation": 12} and loaded.base is None
    assert (loaded.resolution, loaded.num_channels, loaded.image_format, loaded.num_classes) == (16, 3, "jpeg", 5)
    assert loaded.label.tolist() == [i % 5 for i in range(12)] and (loaded.crc32 is not None) == crc
    assert loaded.key[3] == (long + "ä00003" if long else "00003")
    for i, data in enumerate(images):
        shard = (tmp_path / "set" / loaded.shards[loaded.shard[i]].name).read_bytes()
        assert shard[loaded.offset[i] : loaded.offset[i] + loaded.size[i]] == data
    assert check(tmp_path / "set", progress=False).findings.count == 0
    source = open_source(pattern, resolution=16)  # the other reader of such tars finds the same
    assert [source[i].label for i in range(12)] == loaded.label.tolist()
    with pytest.raises(UserError, match="already holds an index"):
        make_index(pattern, progress=False)


def test_patterns_of_file_urls(tmp_path):
    others(tmp_path / "set")
    for i, pattern in enumerate(("*.tar", "shards-{000000..000002}.tar")):
        made = make_index(f"file://{tmp_path}/set/{pattern}", output=tmp_path / str(i), progress=False)
        assert made.count == 12 and made.base == str(tmp_path / "set")
    for before, after in (("shards-000000", "part-10"), ("shards-000001", "part-9")):
        os.rename(tmp_path / "set" / f"{before}.tar", tmp_path / "set" / f"{after}.tar")
    made = make_index(f"{tmp_path}/set/part-*.tar", progress=False)
    assert [shard.name for shard in made.shards] == ["part-9.tar", "part-10.tar"]


def test_an_index_elsewhere(tmp_path, s3, monkeypatch):
    others(tmp_path / "set", labels=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sivae.data.make_index.AHEAD_BYTES", 200)  # so that an image has many pieces
    made = make_index("set/*.tar", output=tmp_path / "index", crc=True, licence="theirs", progress=False)
    assert made.base == str(tmp_path / "set") and made.licence == "theirs" and made.label is None
    assert os.listdir(tmp_path / "index") == ["index.json"] and findings(tmp_path / "index").count == 0
    remote = Folder("s3://sets/others", s3)
    remote.fs.put(str(tmp_path / "set") + "/", "sets/others/", recursive=True)
    url = "s3://sets/others/shards-{000000..000002}.tar"
    from_s3 = make_index(
        url, output=tmp_path / "remote", crc=True, licence="theirs", storage_options=s3, progress=False
    )
    assert from_s3.digest == made.digest and from_s3.base == "s3://sets/others"
    assert findings(tmp_path / "remote", storage_options=s3).count == 0
    remote.fs.put(str(tmp_path / "index" / "index.json"), "sets/trap/index.json")
    with pytest.raises(UserError, match="this machine's disk"):
        check("s3://sets/trap", storage_options=s3, progress=False)
    assert main(["index", "set/shards-000000.tar", "set/shards-000001.tar", "--output", "two"]) == 0
    assert Index.load(Folder("two")).count == 8


@pytest.mark.parametrize("size, most", [(20_000, 0.2), (1_500_000, 1.2)])
def test_few_requests_and_few_bytes(tmp_path, s3, size, most, monkeypatch):
    """Small samples share a request, large ones are jumped over."""
    members = [
        (f"{i:04d}.{suffix}", data) for i in range(12) for suffix, data in (("cls", b"1"), ("jpg", os.urandom(size)))
    ]
    members[1] = ("0000.jpg", encoded(noise(600, 600, 3), "JPEG"))
    write_tar(tmp_path / "a.tar", members)
    Folder("s3://sets", s3).fs.put(str(tmp_path / "a.tar"), f"sets/few/{size}.tar")
    fetched = []
    real = RangeFile._fetch
    monkeypatch.setattr(RangeFile, "_fetch", lambda self, a, b: (fetched.append(b - a), real(self, a, b))[1])
    made = make_index(f"s3://sets/few/{size}.tar", output=tmp_path / "index", storage_options=s3, progress=False)
    assert made.count == 12
    assert len(fetched) <= most * 12 + 3 and sum(fetched) < 4_000_000


def test_shards_that_cannot_be_indexed(tmp_path):
    path = tmp_path / "a.tar"
    image, other = encoded(noise(6, 6, 3)), encoded(noise(6, 6, 3), "JPEG")
    for members, message in [
        ([("a.png", image), ("b.jpg", other)], "several formats"),
        ([("a.png", image), ("a.jpg", other)], "several formats"),
        ([("a.png", image), ("a.png", image)], "two images of the key 'a'"),
        ([("a.png", image), ("a.cls", b"1"), ("b.png", image)], "sample b .*no .cls"),
        ([("a.png", image), ("a.cls", b"cat")], "a.cls .*whole number"),
        ([("a.png", image), ("a.cls", b"2147483648")], "a.cls .*whole number"),
        ([("a.png", image), ("a.cls", b"1"), ("a.cls", b"2")], "two labels of the key 'a'"),
        ([("a.png", encoded(noise(5, 6)))], "6x5 pixels, which is no square.*sivae pack URLS DEST --resolution R"),
        ([("a.png", encoded(noise(6, 6, 4)))], "8-bit RGBA"),
        ([("a.png", b"x" * 99)], "is no png"),
        ([("a.png", image), ("b.png", bytes(2**21))], "sample b .*2,097,152 bytes"),
        ([("a\nb.png", image)], "no key"),
        ([("a.txt", b"x")], "no images"),
        ([], "no images"),
    ]:
        write_tar(path, members)
        with pytest.raises(UserError, match=message):
            make_index(str(path), progress=False)
    assert os.listdir(tmp_path) == ["a.tar"]
    write_tar(path, [("a.png", image), ("b.png", image)])
    write_tar(tmp_path / "b.tar", [("b.png", image)])
    write_tar(tmp_path / "jpeg.tar", [("c.jpg", other)])
    os.mkdir(tmp_path / "other")
    shutil.copy(path, tmp_path / "other" / "c.tar")
    for urls, message in [
        (["a.tar", "b.tar"], "two samples .* key 'b'"),
        (["a.tar", "jpeg.tar"], r"several formats \(png in a.tar, jpeg in jpeg.tar\)"),
        (["a.tar", "other/c.tar"], "one folder"),
        (["a.tar", "a.tar"], "twice"),
        (["missing.tar"], "missing.tar"),
        (["missing-*.tar"], "no files"),
    ]:
        with pytest.raises(UserError, match=message):
            make_index([str(tmp_path / url) for url in urls], progress=False)
    for url in ("s3://sets/*.tar", "http://[::1]/sets/[ab].tar?sig=secret"):
        with pytest.raises(UserError, match=r"patterns with \* work for local .* write shards-\{") as error:
            make_index(url, progress=False)
        assert "secret" not in str(error.value)
    data = path.read_bytes()
    for cut, message in [
        (data[:700], "cut short"),
        (data[:1024], "cut short"),
        (b"", "cut short"),
        (data[:2048], "cut short"),
    ]:
        path.write_bytes(cut)
        with pytest.raises(UserError, match=f"a.tar.*{message}"):
            make_index(str(path), progress=False)
    os.makedirs(tmp_path / "links")
    (tmp_path / "links" / "a.png").write_bytes(image)
    for kind, link in [("hard", os.link), ("symbolic", os.symlink)]:
        link(tmp_path / "links" / "a.png", tmp_path / "links" / f"{kind}.png")
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "links" / "a.png", "a.png")
            tar.add(tmp_path / "links" / f"{kind}.png", f"{kind}.png")
        for look in (make_index, lambda url, progress: open_source(url, resolution=6)):
            with pytest.raises(UserError, match=f"'{kind}.png' in .*a.tar is a link to another file"):
                look(str(path), progress=False)
    path.write_bytes(b"\x1f\x8b" + data)
    with pytest.raises(UserError, match="a.tar: it is no tar"):
        make_index(str(path), progress=False)
    broken = bytearray(data)
    broken[1024 + 5] ^= 1
    path.write_bytes(broken)
    with pytest.raises(UserError, match="header at byte 1024 is damaged"):
        make_index(str(path), progress=False)
    # A block that a crash has left as zeros where b's header was, and two tars put together
    for joined, end in [(data[:1024] + bytes(512) + data[1536:], 1024), (data + data, 2048)]:
        path.write_bytes(joined)
        with pytest.raises(UserError, match=f"a.tar.*more than zeros follows its end mark at byte {end}"):
            make_index(str(path), progress=False)
        with pytest.raises(UserError, match=f"a.tar.*more than zeros follows its end mark at byte {end}"):
            open_source(str(path), resolution=6)


def members_of(data):
    return list(Members(lambda start, size: data[start : start + size], len(data)))


def test_members_are_those_of_tarfile(tmp_path):
    for format in FORMATS:
        path = tmp_path / f"{format}.tar"
        with tarfile.open(path, "w", format=FORMATS[format]) as tar:
            long = "long/" * (18 if format == "ustar" else 80)
            for i, name in enumerate(["a.png", f"{long}b.png", "ü.cls", "c.x.json"]):
                info = tarfile.TarInfo(name)
                info.size = 700 * i
                if format == "pax":
                    info.pax_headers = {"comment": "x" * 3000, "mtime": "1.5"}
                tar.addfile(info, io.BytesIO(bytes(info.size)))
                for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE):
                    info = tarfile.TarInfo(f"{long}other{i}")
                    info.type, info.linkname = kind, long + "x"
                    tar.addfile(info)
        with tarfile.open(path) as tar:
            expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
        assert [tuple(member) for member in members_of(path.read_bytes())] == expected
    assert members_of(path.read_bytes())[3].key == "c" and members_of(path.read_bytes())[3].suffix == "x.json"


def test_hostile_headers(tmp_path):
    def header(**fields):
        info = tarfile.TarInfo("a.png")
        for name, value in fields.items():
            setattr(info, name, value)
        return info.tobuf(tarfile.GNU_FORMAT)

    end = bytes(1024)
    for data, message in [
        (header(size=-5) + end, "damaged"),
        (header(size=2**60) + end, "cut short"),
        (header(size=2**40, type=b"L") + end, "damaged"),
        (header(size=700, type=b"x") + b"9999999 path=x\n".ljust(1024, b"\0") + header() + end, "damaged"),
        (header(size=14, type=b"x") + b"14 size=-5000\n".ljust(512, b"\0") + header() + end, "damaged"),
        (header(type=b"S") + end, "holes"),
    ]:
        with pytest.raises(Damaged, match=message):
            members_of(data)
    whole = tmp_path / "a.tar"
    write_tar(whole, [("n" * 300 + ".png", b"x" * 100), ("b.png", b"y")], "pax")
    data, draw = whole.read_bytes(), random.Random(0)
    for _ in range(3000):
        broken = bytearray(data)
        for _ in range(draw.randint(1, 20)):
            broken[draw.randrange(4096)] = draw.randrange(256)
        try:
            members_of(bytes(broken))
        except Damaged:
            pass


def test_range_file_hands_out_what_is_there(tmp_path):
    data = os.urandom(5000)
    (tmp_path / "a").write_bytes(data)
    draw = random.Random(0)
    for ahead in (0, 7, 1000, 10_000):
        file = RangeFile(Folder(tmp_path), "a", len(data), ahead)
        for _ in range(300):
            start, size = draw.randrange(5100), draw.randrange(800)
            assert file.at(start, size) == data[start : start + size]


def test_a_pyramid_that_lacks_a_level(tmp_path):
    np.save(tmp_path / "a.npy", noise(3, 16, 16, 3))
    pack(tmp_path / "a.npy", tmp_path / "set", resolution=16, pyramid=True, progress=False)
    assert findings(tmp_path / "set").lines == []
    shutil.rmtree(tmp_path / "set" / "8")
    assert findings(tmp_path / "set").lines == ["8/index.json: is missing"]


@pytest.mark.parametrize("name", ["my shard.tar", "größe.tar"])
def test_no_index_is_written_that_nothing_reads(tmp_path, name):
    write_tar(tmp_path / name, [("a.png", encoded(noise(4, 4, 3)))])
    with pytest.raises(UserError, match="is no name for a shard"):
        make_index(str(tmp_path / name))
    write_tar(tmp_path / "fine.tar", [("a.png", encoded(noise(4, 4, 3)))])
    for split in ("all", "my split"):
        with pytest.raises(UserError, match="is no name for a split"):
            make_index(str(tmp_path / "fine.tar"), split=split)
    assert not (tmp_path / "index.json").exists()


def test_no_signature_is_in_what_is_said_of_a_name(tmp_path):
    with pytest.raises(UserError, match=r"/a b\.tar\?\.\.\. is no name") as told:
        make_index("https://localhost:1/a b.tar?X-Amz-Signature=secret")
    assert "secret" not in str(told.value)
    with pytest.raises(UserError, match="holds credentials, which an index elsewhere would keep") as told:
        make_index("https://somebody:secret@localhost:1/a.tar", output=tmp_path)
    assert "secret" not in str(told.value) and not os.listdir(tmp_path)
