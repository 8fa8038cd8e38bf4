import json
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.columns import FORMAT_VERSION
from curation.data import manifest, storage
from curation.data.manifest import OtherRun

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MADE_BY = {"model": "nano", "batch": 64, "precision": "float32"}


@pytest.fixture(params=["local", "memory", "s3"])
def output(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3_bucket") + "/out"
    return str(tmp_path / "out") if request.param == "local" else f"memory:///{uuid.uuid4().hex}"


@given(st.dictionaries(st.text(), JSON, max_size=6), st.randoms())
def test_the_key_does_not_depend_on_the_order_of_fields(fields, random):
    names = list(fields)
    random.shuffle(names)
    assert manifest.digest({name: fields[name] for name in names}) == manifest.digest(fields)


@pytest.mark.parametrize(
    ("a", "b"), [({"a": 1}, {"a": 2}), ({"a": None}, {}), ({"a": 1}, {"a": "1"}), ({"a": ["b"]}, {"a": "b"}), ({}, [])]
)
def test_values_that_differ_have_other_keys(a, b):
    assert manifest.digest(a) != manifest.digest(b)
    assert len(manifest.digest(a)) == 64


def test_nothing_is_committed_in_a_fresh_output(output):
    assert manifest.committed(output, "embed") == {}


@given(record=st.dictionaries(st.sampled_from(["read", "url", "dropped"]), JSON), number=st.integers(0, 2**43))
@settings(deadline=None)
def test_a_record_comes_back_as_it_was_committed(record, number):
    output = f"memory:///{uuid.uuid4().hex}"
    manifest.commit(output, "embed", number, record, made_by=MADE_BY)
    kept = {"format_version": FORMAT_VERSION, "key": manifest.digest(MADE_BY), "made_by": MADE_BY}
    assert manifest.committed(output, "embed") == {number: {**kept, **record}}


def test_stages_do_not_see_each_others_pieces(output):
    manifest.commit(output, "embed", 3, {"read": 1}, made_by=MADE_BY)
    manifest.commit(output, "write", 4, {"read": 2}, made_by=MADE_BY)
    assert manifest.committed(output, "embed").keys() == {3}
    assert manifest.committed(output, "write").keys() == {4}


@pytest.mark.parametrize(
    "name", [".00000001.json.77.ab12.tmp", "00000001.json.tmp", "._00000001.json", "notes.json", "x"]
)
def test_a_file_that_is_no_manifest_is_not_looked_at(output, name):
    manifest.commit(output, "embed", 0, {}, made_by=MADE_BY)
    storage.write_bytes(storage.join(output, "manifest", "embed", name), b"{half of a rec")
    assert manifest.committed(output, "embed").keys() == {0}


@pytest.mark.parametrize("text", ["", "{half", "[]", "null", '"text"', '{"format_version": "1"}', "\x80"])
def test_a_damaged_manifest_is_named(output, text):
    url = manifest.url_of(output, "embed", 5)
    storage.write_bytes(url, text.encode("latin-1"))
    with pytest.raises(ValueError, match="manifest/embed/00000005.json is damaged"):
        manifest.committed(output, "embed")


def test_a_newer_format_is_refused(output):
    newer = {"format_version": FORMAT_VERSION + 1}
    storage.write_bytes(manifest.url_of(output, "embed", 0), json.dumps(newer).encode())
    with pytest.raises(
        ValueError, match=f"00000000.json has format_version {FORMAT_VERSION + 1}, this code reads up to"
    ):
        manifest.committed(output, "embed")


def test_pieces_of_the_same_recipe_are_no_other_run(output):
    manifest.commit(output, "embed", 0, {}, made_by=MADE_BY)
    manifest.check_same_run(manifest.committed(output, "embed"), dict(reversed(MADE_BY.items())))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (MADE_BY | {"batch": 32}, r"shard 7 made with another recipe \(batch was 64, now 32\)\."),
        (MADE_BY | {"batch": 64.0}, r"\(batch was 64, now 64\.0\)"),
        (MADE_BY | {"seed": None}, r"\(seed was absent, now null\)"),
        ({"model": "nano", "batch": 64}, r'\(precision was "float32", now absent\)'),
        ({"model": "b32", "batch": 1, "precision": "float32"}, r'\(batch was 64, now 1; model was "nano", now "b32"\)'),
    ],
)
def test_another_run_is_told_by_the_fields_that_differ(output, now, message):
    manifest.commit(output, "embed", 7, {}, made_by=MADE_BY)
    with pytest.raises(OtherRun, match=message):
        manifest.check_same_run(manifest.committed(output, "embed"), now)


def test_a_manifest_without_a_key_is_of_another_run():
    with pytest.raises(OtherRun, match="shard 0 .*model was absent"):
        manifest.check_same_run({0: {}}, MADE_BY)
