"""The table of clients in the documentation, against the files that make it."""

from tests.clients import openai_parsed, openai_uses, run


def test_every_client_has_a_row_with_its_pins():
    rows = dict(run.read_rows())
    found = run.clients()
    assert list(rows) == [client.name for client in found]
    for client in found:
        assert all(f"`{pin}`" in rows[client.name] for pin in client.node_pins or client.pins)


def test_a_row_counts_passed_tests_and_shows_failures(tmp_path):
    report = tmp_path / "results.xml"
    report.write_text(
        '<testsuite><testcase name="test_chat"/><testcase name="test_chat_twice[1]"/>'
        '<testcase name="test_tools"><failure/></testcase>'
        '<testcase name="test_image"><skipped/></testcase></testsuite>'
    )
    results = run.read_results(report)
    assert results == {"chat": [True, True], "tools": [False]}
    row = run.row(run.Client("x", "X", ("x==1",), ()), results)
    assert row.startswith("| [X](../tests/clients/test_x.py) | `x==1` | 2 | – | – | – | **1 failed** |")
    assert row.count("|") == len(run.USES) + 3


def test_shared_tests_are_tests_of_each_client():
    """Of a star import only what the module gives away."""
    # Skips the test that imports it where another openai is installed.
    from tests.clients import test_openai_3

    shared = {
        name for module in (openai_parsed, openai_uses) for name in vars(module) if name.startswith("test_")
    }
    assert len(shared) > 15 and shared <= vars(test_openai_3).keys()
