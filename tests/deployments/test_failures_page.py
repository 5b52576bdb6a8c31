"""``docs/failures.md`` tells the truth."""

import ast
import re

from tests.serving import ROOT

TESTS = ROOT / "tests" / "deployments" / "ray_serve"
#: The test of each row of the table of ends.
ROWS = {
    "the client leaves while an image is fetched": "test_a_client_leaves_while_an_image_is_fetched",
    "another image of the request can't be used": "test_an_image_that_fails_ends_the_work_on_the_others",
    "the client leaves while tokens are made, one or several choices": (
        "test_a_client_leaves_while_tokens_are_made"
    ),
    "a stop string ends the answer": "test_a_stop_string_ends_the_work",
    "a stop string ends one of several choices": "test_a_choice_that_has_ended_ends_before_the_others",
    "the request's time is up while an image is fetched": "test_the_end_of_a_request_s_time_ends_the_work",
    "the request's time is up while tokens are made": "test_the_end_of_a_request_s_time_ends_the_work",
}


def functions_of(name: str) -> set[str]:
    tree = ast.parse((TESTS / name).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_end_in_the_table_is_tested():
    """The tests of ``test_ends.py`` run behind both proxies, or behind HAProxy if one of the same name in
    ``test_redeploy.py`` runs behind the other."""
    both = functions_of("test_ends.py")
    text = (ROOT / "docs" / "failures.md").read_text()
    table = re.search(r"\| end \|.*?\n\n", text, re.DOTALL)
    assert table is not None
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:] if line
    ]
    assert [row[0] for row in rows] == list(ROWS)
    for name, carrier, proxy, haproxy in rows:
        assert carrier in ("actor calls", "gRPC")
        assert proxy == "tested" and ROWS[name] in both | functions_of("test_redeploy.py"), name
        assert haproxy == ("tested" if ROWS[name] in both else ""), name


def test_links_lead_somewhere():
    text = (ROOT / "docs" / "failures.md").read_text()
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
    assert links and all((ROOT / "docs" / link).exists() for link in links)
