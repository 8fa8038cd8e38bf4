from pathlib import Path

import pytest

CONFTEST = (Path(__file__).parent / "conftest.py").read_text()


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile("def test_reads(real_data):\n    assert real_data.is_dir()\n")
    return pytester


def test_absent_real_data_skips_and_names_what_was_not_run(suite, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("CURATION_TEST_DATA", str(suite.path / "nowhere"))
    result = suite.runpytest_inprocess()
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*NOT RUN: the real data is absent*", "*::test_reads", "Set CURATION_TEST_DATA*"])


def test_absent_real_data_fails_under_ci(suite, monkeypatch):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("CURATION_TEST_DATA", str(suite.path / "nowhere"))
    result = suite.runpytest_inprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*no folder*nowhere*"])


def test_present_real_data_is_used(suite, monkeypatch):
    monkeypatch.setenv("CURATION_TEST_DATA", str(suite.mkdir("pools")))
    suite.runpytest_inprocess().assert_outcomes(passed=1)
