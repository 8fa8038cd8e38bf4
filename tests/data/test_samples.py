"""What of a shard's place enters a uid."""

from __future__ import annotations

import pytest

from curation.data.samples import shard_name


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/a/part/00000.tar", "part/00000.tar"),
        ("/a/part/00000.tar", "part/00000.tar"),
        ("file:///a/part//./00000.tar", "part/00000.tar"),
        ("https://host/part/00000.tar?signature=a/b", "part/00000.tar"),
        ("simplecache::s3://bucket/00000.tar", "bucket/00000.tar"),
        ("memory://00000.tar", "00000.tar"),
        ("part/what?.tar", "part/what?.tar"),
    ],
)
def test_a_shards_name_is_its_last_folder_and_file_name_wherever_it_lies(url, name):
    assert shard_name(url) == name
