"""The matrix on an object store: the same files as in a folder, and leases in the place of locks."""

import json
import os
import socket
import subprocess
import sys
import time
import uuid

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from tiny_models import build, units_of

import fastforget as ff
from fastforget import cli
from fastforget.matrix import leases, plan
from fastforget.matrix.folders import LocalFolder, RemoteFolder, open_folder
from fastforget.matrix.shares import Share
from fastforget.matrix.store import Store

pytestmark = pytest.mark.usefixtures("small_shards")

MANIFEST = {"format": 1, "inputs": {"base": "a"}, "environment": {}}


class Bucket(LocalFileSystem):
    """An object store that processes share."""

    protocol = "bucket"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("bucket://"))


fsspec.register_implementation("bucket", Bucket)


@pytest.fixture
def url():
    """A place in this process's memory that no other test has."""
    return f"memory://{uuid.uuid4().hex}/matrix"


@pytest.fixture
def often(monkeypatch):
    """Leases are renewed every 20 ms."""
    monkeypatch.setattr(leases, "REFRESH", 0.02)


def objects(url):
    """Every object below a URL, bit for bit."""
    system, root = fsspec.url_to_fs(url)
    return {path.removeprefix(root + "/"): system.cat_file(path) for path in system.find(root)}


def foreign_lease(url, share=None, *, age=0.0, **changes):
    """The lease of a driver of another machine."""
    folder, suffix = open_folder(url), (share or Share()).suffix
    content = {"host": "elsewhere", "pid": 7, "time": time.time() - age} | changes
    folder.write(f"lease{suffix}-0123abcd.json", json.dumps(content).encode())


def test_a_url_is_a_path_or_an_object_store(tmp_path):
    assert open_folder(f"file://{tmp_path}/out").path == tmp_path / "out"
    assert isinstance(open_folder(tmp_path), LocalFolder)
    assert isinstance(open_folder("memory://a/b"), RemoteFolder)
    with pytest.raises(ValueError, match="out: expected a path or a URL that fsspec knows, got nope://a: "):
        open_folder("nope://a")
    with pytest.raises(ImportError, match=r"out: expected a package for s3://b/m, got none: Install s3fs"):
        open_folder("s3://b/m")


@pytest.mark.parametrize("store", ["memory", "bucket", "file"])
def test_the_matrix_is_that_of_a_folder(world, tmp_path, url, store):
    url = {"memory": url, "bucket": f"bucket://{tmp_path}/bucket", "file": f"file://{tmp_path}/bucket"}[store]
    whole = build(world, tmp_path / "out", ["full"])
    for shard in ("0/2", "1/2"):
        found = build(world, url, ["full"], shard=shard)
    assert found.complete
    np.testing.assert_array_equal(found.values, whole.values)
    assert found.noise == whole.noise
    again = ff.ForgettingMatrix.load(url)
    np.testing.assert_array_equal(again.values, whole.values)
    assert again.texts == whole.texts
    there = objects(url)
    units = {name.removeprefix("units/"): content for name, content in there.items() if name.startswith("units/")}
    assert units == units_of(tmp_path / "out")
    assert there["manifest.json"] == (tmp_path / "out" / "manifest.json").read_bytes()
    if store != "file":
        journals = {f"journal-{i}of2.jsonl/000000": b'{"event": "finished", "units": 2}\n' for i in range(2)}
        rest = {"manifest.json", "noise.json", "examples.parquet", "tasks.parquet", *journals}
        assert {name for name in there if not name.startswith("units/")} == rest  # and no lease
        assert journals.items() <= there.items()


def test_a_stopped_run_continues(world, tmp_path, url, monkeypatch):
    whole = build(world, tmp_path / "out", ["full"])
    real = Store.write_unit

    def stops(self, unit, *args):
        if unit.index == 2:
            raise KeyboardInterrupt
        real(self, unit, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_unit", stops)
        with pytest.raises(KeyboardInterrupt):
            build(world, url, ["full"])
    matrix = ff.ForgettingMatrix.load(url)
    assert not matrix.complete
    assert np.isfinite(matrix.base).all()
    written = []
    monkeypatch.setattr(
        Store, "write_unit", lambda self, unit, *args: written.append(unit.index) or real(self, unit, *args)
    )
    np.testing.assert_array_equal(build(world, url, ["full"]).values, whole.values)
    assert written == [2, 3]
    with pytest.raises(ValueError, match=r"out: memory://.* belongs to a run with other inputs"):
        build(world, url, ["other"])


def test_events_are_objects_in_order(url):
    store = Store(url)
    with store.opened(MANIFEST):
        for tokens in (512, 256):
            store.record("budget", from_unit=1, tokens_per_batch=tokens)
        store.record("finished", units=3)
    assert sorted(name for name in objects(url) if "journal" in name) == [f"journal.jsonl/00000{i}" for i in range(3)]
    assert [event["tokens_per_batch"] for event in Store(url).events("budget")] == [512, 256]
    assert [Store(url).budget(plan.Unit(i, 0, 0), 1024) for i in range(3)] == [1024, 256, 256]


def test_the_first_manifest_stays(url):
    with Store(url, Share(0, 2)).opened(MANIFEST | {"environment": {"of": 0}}, []):
        with Store(url, Share(1, 2)).opened(MANIFEST | {"environment": {"of": 1}}, []):
            pass
        with pytest.raises(ValueError, match="belongs to a run with other inputs"):
            Store(url, Share(1, 2)).opened(MANIFEST | {"inputs": {"base": "b"}}, []).__enter__()
    assert Store(url).manifest()["environment"] == {"of": 0}


def test_what_is_there_already_is_refused(url):
    fsspec.filesystem("memory").pipe_file(url + "/thesis.tex", b"years")
    with pytest.raises(ValueError, match=r"expected an empty folder or one of this run, got .* with thesis\.tex"):
        Store(url).check(MANIFEST)
    with pytest.raises(ValueError, match=r"expected the folder of a forgetting matrix, got memory://"):
        ff.ForgettingMatrix.load(url)


def test_a_store_that_cannot_be_reached_is_said(url, monkeypatch):
    store = Store(url)

    def refuses(*args, **kwargs):
        raise RuntimeError("no credentials")

    monkeypatch.setattr(type(store.folder.system), "ls", refuses)
    message = "out: expected a place that can be read and written, got memory://.*: RuntimeError: no credentials; check"
    with pytest.raises(ValueError, match=message):
        store.check(MANIFEST)


# Leases


def test_a_fresh_lease_of_another_driver_refuses_and_a_stale_one_is_taken_over(url):
    store = Store(url)
    for share in (None, Share(0, 2)):
        foreign_lease(url, share, age=leases.STALE - 5)
        message = r"in use by another run \((the whole run|shard 0/2), process 7 on elsewhere, 175 s ago\); wait for it"
        for attempt in (lambda: store.check(MANIFEST), lambda: store.opened(MANIFEST).__enter__()):
            with pytest.raises(ValueError, match=message):
                attempt()
        foreign_lease(url, share, age=leases.STALE + 5)
        store.check(MANIFEST)
        with store.opened(MANIFEST):
            assert [name for name in objects(url) if "0123abcd" in name] == []
    assert not [name for name in objects(url) if name.startswith("lease")]


def test_a_killed_driver_of_this_machine_is_known_to_be_dead(url):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    foreign_lease(url, pid=child.pid, host=leases._machine())
    Store(url).check(MANIFEST)
    foreign_lease(url, pid=os.getpid(), host=leases._machine())
    with pytest.raises(ValueError, match=rf"in use by another run .*process {os.getpid()} on {socket.gethostname()}"):
        Store(url).check(MANIFEST)


def test_a_lease_is_renewed_while_a_driver_works(url, often):
    with Store(url).opened(MANIFEST):
        (name,) = (name for name in objects(url) if name.startswith("lease"))
        foreign = json.loads(objects(url)[name]) | {"time": 0.0}
        open_folder(url).write(name, json.dumps(foreign).encode())
        deadline = time.monotonic() + 30
        while json.loads(objects(url)[name])["time"] == 0.0 and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(ValueError, match="in use by another run"):
            Store(url).check(MANIFEST)
    Store(url).check(MANIFEST)


def test_a_driver_whose_lease_was_taken_over_stops(url, often):
    store = Store(url)
    columns = {"nll_sum": np.array([0.5]), "tokens": np.array([3]), "exact": np.array([True])}
    with store.opened(MANIFEST):
        store.write_unit(plan.Unit(0, -1, 0), np.array([0]), columns)
        store.folder.delete(store._lease.name)  # as the driver does that takes over
        assert store._lease.lost.wait(10)
        with pytest.raises(
            ValueError, match=r"out: expected to be alone in memory://.*, got another driver that took over"
        ):
            store.write_unit(plan.Unit(1, -1, 1), np.array([1]), columns)
    assert store.finished() == {plan.Unit(0, -1, 0).file_name}


# The command


def test_the_command_takes_urls(world, url, monkeypatch, capsys, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(cli.sys, "argv", ["fastforget", *(str(part) for part in arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capsys.readouterr()

    command = ["matrix", "--base", world / "base", "--task", world / "full", "--upstream", world / "upstream.jsonl"]
    code, shown = run(*command, "--noise-examples", 0, "--no-progress", "--out", url)
    assert code == 0
    assert f"`fastforget plot {url} --to heatmap.png` draws it" in shown.out
    assert run("plot", url)[0] == 2
    assert run("plot", url, "--to", tmp_path / "heatmap.png")[0] == 0
    assert (tmp_path / "heatmap.png").exists()
