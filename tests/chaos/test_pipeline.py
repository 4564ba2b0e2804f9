"""From a broker to a table under fire: exact, and not exact without any one of the checks."""

import pytest
from confluent_kafka import Producer

from chaos.pipeline import Options, PipelineResult, report, run
from chaos.proxy import KafkaProxy
from phonon_demo.brokers import KafkaBroker

MINUTE = 60


def struck(options: Options) -> PipelineResult:
    result = run(options)
    print(report(options, result))  # noqa: T201 - what `make chaos` shows
    assert result.kills == options.kills
    assert result.parked == 0
    return result


def test_no_client_of_kafka_goes_past_the_proxy() -> None:
    broker = KafkaBroker("views")
    with KafkaProxy(broker.address) as proxy:
        client = Producer({"bootstrap.servers": proxy.servers, "log_level": 2})
        found = client.list_topics(timeout=10).brokers.values()
        assert [f"{each.host}:{each.port}" for each in found] == [proxy.servers]
        assert proxy.servers != broker.address
    broker.close()


@pytest.mark.slow
@pytest.mark.timeout(3 * MINUTE)
@pytest.mark.parametrize(("source", "kills"), [("streams", 8), ("kafka", 3)])
def test_a_few_kills_from_end_to_end(source: str, kills: int) -> None:
    result = struck(Options(source, kills=kills))
    assert result.differing == 0
    assert result.surplus == 0


@pytest.mark.chaos
@pytest.mark.timeout(45 * MINUTE)
@pytest.mark.parametrize("source", ["streams", "kafka"])
def test_two_hundred_kills_from_end_to_end(source: str) -> None:
    result = struck(Options(source, kills=200))
    assert result.differing == 0
    assert result.handled > result.produced  # delivered again, and counted once
    assert min(result.cuts[source == "streams" :]) > 100
    assert result.pauses > 10


@pytest.mark.chaos
@pytest.mark.timeout(15 * MINUTE)
@pytest.mark.parametrize(
    ("source", "kills", "without"),
    [("kafka", 20, "offsets"), ("streams", 25, "ids"), ("streams", 25, "token")],
)
def test_without_a_check_the_table_is_wrong(source: str, kills: int, without: str) -> None:
    result = struck(Options(source, kills=kills, without=without))
    assert result.differing > 0
    assert result.surplus > 0
