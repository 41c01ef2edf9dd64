"""A download ends with the signed bytes or a reason; what has come is not asked for again, nor what the board holds."""

import hashlib
import itertools
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.contract.errors import ArtifactError, UpdateRefusedError
from device.contract.parts import Part, Parts, parts_of
from device.download import Downloads, Fetched, Wanted, plan_of
from device.fetch import DirectoryFetch, FetchError, Pace
from device.web import WebFetch
from tests.support.tiny_bundle import write_zip
from tests.support.web import Site, serve

FILES = {
    name: random.Random(name).randbytes(size) for name, size in {"a": 30_000, "b": 9_000, "c": 100, "d": 50_000}.items()
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "repo" / "targets" / "bundle"
    path.parent.mkdir(parents=True)
    write_zip(path, FILES)
    return path


@pytest.fixture
def wanted(bundle: Path) -> Wanted:
    content = bundle.read_bytes()
    return Wanted(name="bundle", path="targets/bundle", bytes=len(content), sha256=sha256(content))


@pytest.fixture
def site(tmp_path: Path, bundle: Path) -> Iterator[Site]:
    with serve(tmp_path / "repo") as site:
        yield site


@pytest.fixture
def held(tmp_path: Path) -> dict[str, Path]:
    """The board has a and d."""
    for name in "ad":
        (tmp_path / name).write_bytes(FILES[name])
    return {sha256(FILES[name]): tmp_path / name for name in "ad"}


def get(
    tmp_path: Path,
    site: Site,
    wanted: Wanted,
    parts: Parts | None = None,
    held: dict[str, Path] | None = None,
    pace: Pace | None = None,
) -> Fetched:
    (tmp_path / "downloads").mkdir(exist_ok=True)
    with closing(WebFetch(site.url)) as fetch:
        return Downloads(tmp_path / "downloads", fetch, pace or Pace(), retry_pause_s=0).get(wanted, parts, held)


def require_right(fetched: Fetched, bundle: Path) -> None:
    assert fetched.path.read_bytes() == bundle.read_bytes()
    assert [path.name for path in fetched.path.parent.iterdir()] == ["bundle"]


def test_what_the_board_holds_is_not_transferred(
    tmp_path: Path, site: Site, bundle: Path, wanted: Wanted, held: dict[str, Path]
):
    fetched = get(tmp_path, site, wanted, parts_of(bundle), held)
    require_right(fetched, bundle)
    assert fetched.transferred_bytes == site.sent == wanted.bytes - len(FILES["a"]) - len(FILES["d"])
    assert len(site.requests) == 3  # the head, what lies between, the directory
    assert get(tmp_path, site, wanted).transferred_bytes == 0


def test_every_connection_that_breaks_is_gone_on_with(tmp_path: Path, site: Site, bundle: Path, wanted: Wanted):
    site.cut_after = 20_000
    fetched = get(tmp_path, site, wanted)
    require_right(fetched, bundle)
    assert fetched.transferred_bytes == site.sent == wanted.bytes
    assert len(site.requests) == -(-wanted.bytes // 20_000)


def test_a_download_goes_on_after_a_restart(
    tmp_path: Path, site: Site, bundle: Path, wanted: Wanted, held: dict[str, Path]
):
    calls = iter(range(100))
    stop = UpdateRefusedError("interrupted", "stop")
    pace = Pace(refusal=lambda: stop if next(calls) >= 1 else None)
    with pytest.raises(UpdateRefusedError):
        get(tmp_path, site, wanted, parts_of(bundle), held, pace)
    before = site.sent
    assert 0 < before < wanted.bytes
    fetched = get(tmp_path, site, wanted, parts_of(bundle), held)
    require_right(fetched, bundle)
    assert before + fetched.transferred_bytes == wanted.bytes - len(FILES["a"]) - len(FILES["d"])


def test_a_server_without_ranges_gives_all_of_it(
    tmp_path: Path, site: Site, bundle: Path, wanted: Wanted, held: dict[str, Path]
):
    site.has_ranges = False
    fetched = get(tmp_path, site, wanted, parts_of(bundle), held)
    require_right(fetched, bundle)
    assert fetched.transferred_bytes == wanted.bytes
    site.cut_after = 1000
    fetched.path.unlink()
    with pytest.raises(FetchError, match="the transfer broke") as failed:
        get(tmp_path, site, wanted)
    assert failed.value.reason == "unreachable"


@pytest.mark.parametrize("damage", ["held", "part", "long part", "index"])
def test_wrong_bytes_on_the_board_cost_a_transfer_and_nothing_else(
    tmp_path: Path, site: Site, bundle: Path, wanted: Wanted, held: dict[str, Path], damage: str
):
    parts = parts_of(bundle)
    (tmp_path / "downloads").mkdir()
    if damage == "held":
        (tmp_path / "a").write_bytes(FILES["a"][:-1])
    if damage == "part":
        (tmp_path / "downloads" / f"{wanted.sha256}.part").write_bytes(bytes(50))
    if damage == "long part":
        (tmp_path / "downloads" / f"{wanted.sha256}.part").write_bytes(bytes(wanted.bytes + 1))
    if damage == "index":
        parts = Parts(bundle_bytes=wanted.bytes, files=(Part(start=0, bytes=30_000, sha256=sha256(FILES["a"])),))
    require_right(get(tmp_path, site, wanted, parts, held), bundle)


def test_other_bytes_are_refused_and_not_kept(tmp_path: Path, site: Site, bundle: Path, wanted: Wanted):
    content = bundle.read_bytes()
    bundle.write_bytes(content[::-1])
    with pytest.raises(FetchError) as failed:
        get(tmp_path, site, wanted)
    assert failed.value.reason == "checksum"
    assert not list((tmp_path / "downloads").iterdir())


@pytest.mark.parametrize("is_endless", [False, True])
def test_a_file_that_goes_on_is_cut(tmp_path: Path, site: Site, bundle: Path, wanted: Wanted, is_endless: bool):
    bundle.write_bytes(bundle.read_bytes() + b"more")
    site.endless = is_endless
    with pytest.raises(FetchError, match="goes on beyond its") as failed:
        get(tmp_path, site, wanted)
    assert failed.value.reason == "endless"
    assert sum(path.stat().st_size for path in (tmp_path / "downloads").iterdir()) == 0


def test_a_server_that_gives_nothing_is_asked_a_few_times(tmp_path: Path, site: Site, wanted: Wanted):
    site.status = 503
    with pytest.raises(FetchError, match="HTTP 503") as failed:
        get(tmp_path, site, wanted)
    assert failed.value.reason == "unreachable"
    assert len(site.requests) == 6


def test_a_server_that_breaks_off_after_every_few_bytes_is_given_up(tmp_path: Path, site: Site, wanted: Wanted):
    site.cut_after = 10
    with pytest.raises(FetchError, match="was cut off after 10 bytes"):
        get(tmp_path, site, wanted)
    assert len(site.requests) == 6


def test_the_rate_is_kept(tmp_path: Path, bundle: Path, wanted: Wanted):
    now = [0.0]

    def pause(seconds: float) -> None:
        now[0] += seconds

    pace = Pace(10_000, pause=pause, clock=lambda: now[0])
    (tmp_path / "downloads").mkdir()
    Downloads(tmp_path / "downloads", DirectoryFetch(tmp_path / "repo"), pace).get(wanted)
    assert now[0] == pytest.approx(wanted.bytes / 10_000)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9000), st.booleans()), max_size=8),
    tail=st.integers(1, 99),
)
def test_a_plan_covers_every_byte_once(sizes: list[tuple[int, int, bool]], tail: int):
    files, held, end = [], {}, 0
    for number, (gap, size, has) in enumerate(sizes):
        files.append(Part(start=end + gap, bytes=size, sha256=str(number)))
        end += gap + size
        if has:
            held[str(number)] = Path(str(number))
    plan = plan_of(end + tail, Parts(bundle_bytes=end + tail, files=tuple(files)), held)
    assert [stretch.start for stretch in plan] == [0, *(stretch.end for stretch in plan[:-1])]
    assert plan[-1].end == end + tail
    assert all(stretch.held is None or stretch.end - stretch.start >= 4096 for stretch in plan)
    assert not any(a.held is None and b.held is None for a, b in itertools.pairwise(plan))


def test_an_index_comes_back_and_wrong_ones_are_refused(bundle: Path):
    parts = parts_of(bundle)
    assert Parts.from_json(parts.to_json()) == parts
    content = bundle.read_bytes()
    assert [content[part.start : part.start + part.bytes] for part in parts.files] == list(FILES.values())
    for wrong in (b"", b"[]", b"[" * 100_000, parts.to_json().replace(b'"schema":1', b'"schema":2')):
        with pytest.raises(ArtifactError):
            Parts.from_json(wrong)
    for files in ((Part(start=0, bytes=9, sha256=""),), (Part(start=-1, bytes=1, sha256=""),)):
        with pytest.raises(ArtifactError):
            Parts(bundle_bytes=8, files=files)
