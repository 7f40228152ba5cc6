"""A file is old or new."""

import pytest

from bn_lightning.reports.atomic import atomic_write


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    with atomic_write(path) as file:
        file.write(b"old")

    def interrupted():
        with atomic_write(path) as file:
            file.write(b"half")
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.jsonl"]
