from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.settings import to_dict
from pipeline.config.training import PretrainConfig
from pipeline.redaction import redact

letters = st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)
anything = st.text(
    [chr(code) for code in range(33, 127)] + list("żł😀"), min_size=1, max_size=12
)  # all but white space: @ / ? # : included
schemes = st.sampled_from(["http", "HTTPS", "s3", "Postgresql+psycopg2", "mysql", "ftp", "x-y.z"])
hosts = st.sampled_from(["host", "example.org", "10.0.0.1:5000", "[::1]:80", "localhost"])


@given(schemes, letters, anything, hosts, letters)
def test_no_password_is_left(scheme: str, user: str, password: str, host: str, path: str) -> None:
    """Whatever characters it has; SECRET marks where the password begins and ends."""
    address = f"{scheme}://{user}:SECRET{password}SECRET@{host}/{path}"
    assert redact(f"cannot reach {address} now") == f"cannot reach {scheme}://{host}/{path} now"


@given(schemes, anything, hosts, letters)
def test_no_value_of_a_secret_key_is_left(scheme: str, value: str, host: str, path: str) -> None:
    safe = "".join(letter for letter in value if letter not in "&@")
    address = f"{scheme}://{host}/{path}?part=2&KEY=SECRET{safe}&last=1"
    for key in ("token", "ACCESS_TOKEN", "X-Amz-Signature", "sig", "pass%77ord", "X-Goog-Credential", "api_key"):
        assert redact(address.replace("KEY", key)) == f"{scheme}://{host}/{path}?part=2&{key}=***&last=1"


@given(schemes, hosts, st.lists(letters, max_size=4), letters)
def test_an_address_without_secrets_is_left_alone(scheme: str, host: str, folders: list[str], name: str) -> None:
    address = "/".join([f"{scheme}://{host}", *folders, name])
    assert redact(f"{address} and {address}?page=2") == f"{address} and {address}?page=2"


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/owner/name@0123456789abcdef/file.parquet",
        "http://127.0.0.1:5000/mlflow/file@v2.txt",
        "sqlite:////folder/a@b/mlflow.db",
        "file:///folder/a:b@c",
        "s3://bucket/a:b@c/part?versionId=1",
        "no address: user:password@host",
        "",
    ],
)
def test_what_only_looks_like_a_user_stays(text: str) -> None:
    assert redact(text) == text


def test_an_address_that_was_taken_for_a_path() -> None:
    assert (
        redact("there is no preset https:/me:SECRET@host/x; give one") == "there is no preset https:/host/x; give one"
    )


def test_several_addresses_in_one_text() -> None:
    text = "http://a:SECRET@one/x, then\nhttps://b:SECRET/@two?sig=SECRET"
    assert redact(text) == "http://one/x, then\nhttps://two?sig=***"


def test_all_settings_are_shown_without_secrets() -> None:
    config = PretrainConfig(data="https://me:SECRET@host/data", tracking_uri="postgresql://me:SEC/RET@host/db")
    values = to_dict(config)
    assert values["data"] == "https://host/data" and values["tracking_uri"] == "postgresql://host/db"
