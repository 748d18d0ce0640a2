"""Metrics of several engines on one page, read by Prometheus' own parser."""

from prometheus_client.parser import text_string_to_metric_families

from raylm.serving.exposition import merged

PAGE = """# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="%s"} %d
# HELP process_open_fds Number of open file descriptors.
# TYPE process_open_fds gauge
process_open_fds 42.0
# HELP http_requests_total Total number of requests.
# TYPE http_requests_total counter
http_requests_total{handler="/v1/models",model="kept \\\\ \\"so\\""} 3.0
"""


def test_each_family_is_described_once_and_samples_are_told_apart() -> None:
    pages = [({"model": "a"}, PAGE % ("a", 1)), ({"model": "b"}, PAGE % ("b", 2))]
    page = merged(pages)
    assert page.count("# TYPE process_open_fds") == 1
    families = {family.name: family.samples for family in text_string_to_metric_families(page)}
    assert len(families) == 3
    running = {(s.labels["model"], s.labels["model_name"]): s.value for s in families["vllm:num_requests_running"]}
    assert running == {("a", "a"): 1, ("b", "b"): 2}
    assert {sample.labels["model"] for sample in families["process_open_fds"]} == {"a", "b"}


def test_a_label_that_is_there_keeps_its_value() -> None:
    [family] = text_string_to_metric_families(merged([({"model": "b"}, 'f{model="1"} 2\n')]))
    assert family.samples[0].labels == {"model": "1"}


def test_a_value_is_escaped() -> None:
    [family] = text_string_to_metric_families(merged([({"model": 'x"y\\'}, "g 3\n")]))
    assert family.samples[0].labels == {"model": 'x"y\\'}


def test_no_pages_are_an_empty_page() -> None:
    assert merged([]) == ""


def test_figures_of_serve_are_there_once_and_not_of_a_model() -> None:
    """Each replica's page has those of its whole node."""
    serves = """# HELP ray_serve_num_ongoing Number of requests.
# TYPE ray_serve_num_ongoing gauge
ray_serve_num_ongoing{deployment="a",replica="r}1"} 1.0
ray_serve_num_ongoing{deployment="b",replica="r2"} %d
"""
    page = merged([({"model": "a"}, PAGE % ("a", 1) + serves % 2), ({"model": "b"}, PAGE % ("b", 2) + serves % 3)])
    families = {family.name: family.samples for family in text_string_to_metric_families(page)}
    assert [(s.labels, s.value) for s in families["ray_serve_num_ongoing"]] == [
        ({"deployment": "a", "replica": "r}1"}, 1.0),
        ({"deployment": "b", "replica": "r2"}, 2.0),
    ]
    assert len(families["vllm:num_requests_running"]) == 2
